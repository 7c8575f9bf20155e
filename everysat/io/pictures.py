"""Pictures - JPEG and PNG of 8 bits - as arrays. GDAL takes what is missing at their end for grey or black; here it is an error."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning

from everysat.io import arrays
from everysat.io.plane import unreadable

SUFFIXES = (".jpg", ".jpeg", ".png")
_END_OF_JPEG = b"\xff\xd9"


def picture(path: str | Path, bands: int = 3) -> np.ndarray:
    """uint8 [band, y, x]; of a picture with more channels, such as a transparent one, the first ``bands``.

    Raises:
        FileNotFoundError: there is no such file. OSError: it is truncated or no picture. ValueError: fewer bands, or not 8 bits.
    """
    path = arrays.present(path)
    if path.suffix.lower() in SUFFIXES[:2] and _END_OF_JPEG not in path.read_bytes()[-64:]:
        raise unreadable(str(path), OSError("it ends before its last block"))
    values, _ = arrays.tiff(path)
    if values.dtype != np.uint8 or len(values) < bands:
        raise ValueError(f"{path} holds {values.dtype} of {values.shape}, expected 8 bits in {bands} bands or more")
    return values[:bands]


def write_jpeg(path: Path, values: np.ndarray, quality: int = 95) -> None:
    """A JPEG image of uint8 [band, y, x]; makes the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    size = {"count": count, "height": height, "width": width, "dtype": "uint8"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="JPEG", quality=quality, **size) as file:
            file.write(values)

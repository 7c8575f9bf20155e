"""What the bands of a raster file are called in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rasterio
from rasterio.errors import RasterioIOError

from everysat.io.arrays import present
from everysat.io.plane import unreadable


def band_names(path: str | Path) -> tuple[str, ...]:
    """The description of each band, empty where it has none.

    Raises:
        FileNotFoundError: there is no such file. OSError: it cannot be read.
    """
    try:
        with rasterio.open(present(path)) as file:
            return tuple(name or "" for name in file.descriptions)
    except RasterioIOError as error:
        raise unreadable(str(path), error) from error


def name_bands(path: str | Path, names: Sequence[str]) -> None:
    """Gives the bands of a file these descriptions."""
    with rasterio.open(path, "r+") as file:
        file.descriptions = tuple(names)

"""Arrays as the files of datasets hold them - NumPy, HDF5, TIFF, JSON -, with errors that name the file.

Nothing is unpickled. Scenes are read by :mod:`everysat.io.read`; here one file is one array.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from everysat.io import grid
from everysat.io.plane import HANDLES, open_raster, unreadable


def present(path: str | Path) -> Path:
    """``path``, or a :class:`FileNotFoundError` that names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is missing: the dataset is incomplete, or lies elsewhere. Fetch this file again"
        )
    return Path(path)


def npy(path: str | Path, *, mapped: bool = False) -> np.ndarray:
    """The array of a ``.npy`` file; ``mapped`` reads from disk only what is then indexed.

    Raises:
        FileNotFoundError: there is no such file. OSError: it is truncated, or holds pickled objects.
    """
    try:
        return np.load(present(path), mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise unreadable(str(path), error) from error


def hdf5(path: str | Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named datasets of an HDF5 file.

    Raises:
        FileNotFoundError: there is no such file. OSError: it is truncated. KeyError: it lacks one of ``names``.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {path} needs h5py: pip install 'everysat[data]'") from error
    try:
        with h5py.File(present(path), "r") as file:
            for name in names:
                if name not in file:
                    raise KeyError(f"{path} has no dataset {name!r}; it has {', '.join(file)}")
            return {name: file[name][()] for name in names}
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        raise unreadable(str(path), error) from error


def tiff(path: str | Path) -> tuple[np.ndarray, GeoBox | None]:
    """All bands [band, y, x] of an image file as stored, and its grid when it is georeferenced.

    Raises:
        FileNotFoundError: there is no such file. OSError: it cannot be read.
    """
    dataset, lock = HANDLES.get(str(present(path)), open_raster)
    try:
        if dataset.driver == "PNG" and not _is_whole_png(Path(path)):
            raise RasterioError("it ends before its last block")
        with lock:
            values = dataset.read()
    except RasterioError as error:
        raise unreadable(str(path), error) from error
    # A local CRS, as the label files of FLAIR have, does not say where on Earth a pixel is.
    placed = dataset.crs is not None and (dataset.crs.is_projected or dataset.crs.is_geographic)
    placed = placed and not dataset.transform.is_identity
    return values, GeoBox(dataset.shape, dataset.transform, grid.plain_crs(dataset.crs)) if placed else None


def _is_whole_png(path: Path) -> bool:
    """Whether the file ends as PNG files do: GDAL takes what is missing for zeros."""
    with path.open("rb") as file:
        file.seek(-min(12, path.stat().st_size), 2)
        return b"IEND" in file.read()


def parsed(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file. OSError: it is truncated or no JSON.
    """
    try:
        return json.loads(present(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise unreadable(str(path), error) from error


def lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty, without white space around them."""
    return [line.strip() for line in present(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def write_npy(path: Path, values: np.ndarray) -> None:
    """A ``.npy`` file; like the other writers here it makes the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values, allow_pickle=False)


def write_hdf5(path: Path, content: Mapping[str, Any]) -> None:
    """An HDF5 file of the named arrays; lists of strings become variable-length strings."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in content.items():
            file[name] = values


def write_tiff(
    path: Path,
    values: np.ndarray,
    *,
    crs: str | None = None,
    corner: tuple[float, float] = (0.0, 0.0),
    gsd_m: float = 1.0,
) -> None:
    """A GeoTIFF of [band, y, x]; with ``crs`` georeferenced, its north-west ``corner`` at these metres."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": values.dtype.name,
    }
    if crs:
        profile |= {"crs": crs, "transform": Affine(gsd_m, 0.0, corner[0], 0.0, -gsd_m, corner[1])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) as file:
            file.write(values)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content))

"""Archives and tables as the files of datasets hold them - NPZ, CSV, PyTorch, rows of HDF5 -, with errors that name the file.

Nothing is unpickled but tensors, numbers, strings and dates.
"""

from __future__ import annotations

import datetime
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import rasterio
import torch
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning

from everysat.io.arrays import present
from everysat.io.plane import unreadable

# Dates are made by calling their class on bytes, which can do nothing else.
torch.serialization.add_safe_globals([datetime.date, datetime.datetime])


def npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file by name.

    Raises:
        FileNotFoundError: there is no such file. OSError: it is truncated, or holds pickled objects.
    """
    try:
        # Opened here, so that a truncated file does not stay open.
        with present(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one array, no archive of arrays")
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise unreadable(str(path), error) from error


def only(arrays: Mapping[str, np.ndarray], name: str, path: str | Path) -> np.ndarray:
    """The array of that name, or an error that lists what the file ``path`` holds."""
    if name not in arrays:
        raise KeyError(f"{path} has no array {name!r}; it has {', '.join(arrays) or 'none'}")
    return arrays[name]


def table(path: str | Path, columns: Iterable[str] = (), **options: Any) -> pd.DataFrame:
    """A CSV table that has at least the named columns.

    Raises:
        FileNotFoundError: there is no such file. OSError: it is no table. ValueError: it lacks a column.
    """
    try:
        frame = pd.read_csv(present(path), **options)
    except (ValueError, UnicodeDecodeError) as error:
        raise unreadable(str(path), error) from error
    lacking = [column for column in columns if column not in frame.columns]
    if lacking:
        raise ValueError(
            f"{path} lacks the columns {', '.join(lacking)}; it has {', '.join(map(str, frame.columns)) or 'none'}"
        )
    return frame


def tensors(path: str | Path, names: Iterable[str]) -> dict[str, Any]:
    """The named entries of a dictionary saved by PyTorch: tensors, numbers, strings, dates and lists of them.

    Raises:
        FileNotFoundError: there is no such file. OSError: it is truncated, or would run code of its own. KeyError: it lacks a name.
    """
    try:
        content = torch.load(present(path), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise unreadable(str(path), error) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary with {', '.join(names)}")
    for name in names:
        if name not in content:
            raise KeyError(f"{path} has no entry {name!r}; it has {', '.join(map(str, content))}")
    return content


def hdf5_row(path: str | Path, names: Iterable[str], index: int) -> dict[str, np.ndarray]:
    """Entry ``index`` of the first axis of the named datasets of an HDF5 file; the rest of the file is not read.

    Raises:
        FileNotFoundError: there is no such file. OSError: it is truncated, or too short. KeyError: it lacks one of ``names``.
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
            return {name: file[name][index] for name in names}
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise unreadable(str(path), error) from error


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """A ``.npz`` file; makes the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def write_png(path: Path, values: np.ndarray) -> None:
    """A PNG image of uint8 [band, y, x]; makes the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="PNG", count=count, height=height, width=width, dtype="uint8") as file:
            file.write(values)


def write_grid(path: Path, values: np.ndarray, crs: str, transform: Affine) -> None:
    """A GeoTIFF of [band, y, x] on any grid, degrees too; makes the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    size = {"count": count, "height": height, "width": width, "dtype": values.dtype.name}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=transform, compress="deflate", **size) as file:
        file.write(values)

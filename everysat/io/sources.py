"""Whatever holds pixels, opened as planes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from everysat.io.cube import cube_planes
from everysat.io.plane import Plane, file_planes


def open_planes(source: Any, crs: Any = None) -> list[Plane]:
    """The planes of a file, a Zarr store, or an xarray object; ``crs`` is assumed where it tells none.

    Raises:
        OSError: the file is not there or cannot be read; the message names it.
        ValueError: it has no CRS or no grid.
    """
    if hasattr(source, "dims") and hasattr(source, "coords"):
        return cube_planes(source, crs)
    path = os.fspath(source)
    if path.rstrip("/").lower().endswith((".zarr", ".nc", ".nc4", ".cdf")):
        return cube_planes(path, crs)
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give the files in it that are to be read")
    return file_planes(path, crs)

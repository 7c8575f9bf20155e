"""One plane of pixels: a band of a file, or a variable of a NetCDF, Zarr or xarray object at one time.

Opening reads the metadata alone. Planes can be pickled and used after a fork and from several threads: files are
opened again where needed and kept open while they are in use.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from everysat.io import dates, grid, labels, remote
from everysat.io.dates import Span
from everysat.sensors import Sensor

OPEN_FILES = 64
"""Files kept open per process; the system's limit is often 1024, and a long series has more."""


# GDAL decodes JP2 in threads of its own, whose errors are lost: a truncated file would read as zeros.
_GDAL = {"GDAL_NUM_THREADS": "1"}


class Handles:
    """Files opened once per process, the least recently used closed first. Each comes with the lock to read it under."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, tuple[int, int]], tuple[Any, threading.Lock]] = OrderedDict()

    def get(self, path: str, opener: Callable[[str], Any]) -> tuple[Any, threading.Lock]:
        key = path, _stamp(path)
        with self._lock:
            if key not in self._open and not remote.is_remote(path):
                self._open[key] = (opener(path), threading.Lock())
            found = self._open.get(key)
        if found is None:  # many servers answer at the same time, so nobody waits for another's
            found = opener(path), threading.Lock()
        with self._lock:
            found = self._open.setdefault(key, found)
            self._open.move_to_end(key)
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
            return found

    def forget(self) -> None:
        """Start anew: what a forked process inherits shares file positions and locks with its parent."""
        self.__init__()  # type: ignore[misc]


def _stamp(path: str) -> tuple[int, int]:
    """What changes when the file at ``path`` is replaced."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return status.st_ino, status.st_mtime_ns


HANDLES = Handles()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=HANDLES.forget)


def unreadable(path: str, error: Exception) -> OSError:
    """The error for a file that is there and cannot be read."""
    return OSError(
        f"{remote.parts(path)[0]} cannot be read: it is truncated, corrupt or of an unknown format ({error}). Fetch it again"
    )


def open_raster(path: str) -> Any:
    """A rasterio dataset; an error that names the file when it cannot be opened."""
    if remote.is_remote(path):
        return remote.RemoteDataset(path)
    if "://" not in path and not path.startswith("/vsi") and not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with warnings.catch_warnings(), rasterio.Env(**_GDAL):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(path)
    except RasterioError as error:
        raise unreadable(path, error) from error


@dataclass(frozen=True)
class FilePixels:
    """Band ``index`` (from 1) of a file that GDAL reads."""

    path: str
    index: int
    masked: bool

    def read(
        self, rows: slice, cols: slice, shape: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Digital numbers, and where they are valid if the file has a mask; decimated to ``shape`` when given."""
        dataset, lock = HANDLES.get(self.path, open_raster)
        window = rasterio.windows.Window.from_slices(rows, cols)
        options = {"window": window, "out_shape": shape, "resampling": Resampling.nearest}
        try:
            with lock, rasterio.Env(**_GDAL):
                values = dataset.read(self.index, **options)
                mask = dataset.read_masks(self.index, **options) > 0 if self.masked else None
        except RasterioError as error:
            raise unreadable(self.path, error) from error
        return values, mask


@dataclass(frozen=True)
class Plane:
    """Metadata of a plane, and its pixels on demand.

    ``geobox`` is north-up (``flip`` says which axes of the stored array run the other way). ``nodata``, ``scale``,
    ``offset`` and ``unit`` are what the file itself says, None or empty when it does not. ``alpha`` marks a band that says
    where the others are valid, or that some writer took for such a one because it was the fourth. Of planes of one band and
    time on one grid, those of higher ``rank`` lie over the others; with one rank for both, one of them is too many.
    """

    source: str
    pixels: Any
    label: str
    geobox: GeoBox
    dtype: str
    siblings: int
    nodata: float | None = None
    scale: float | None = None
    offset: float | None = None
    unit: str = ""
    time: Span | None = None
    flip: tuple[bool, bool] = (False, False)
    tags: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sensor: Sensor | None = None
    alpha: bool = False
    rank: int = 0

    @property
    def name(self) -> str:
        """File and band, for messages."""
        return f"{self.source}{f' ({self.label})' if self.label else ''}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.geobox.shape[0], self.geobox.shape[1]

    @property
    def is_float(self) -> bool:
        return np.dtype(self.dtype).kind == "f"

    def read(
        self, rows: slice | None = None, cols: slice | None = None, shape: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Digital numbers [y, x] of a window and where they are data; decimated to ``shape`` when that is given."""
        span = [slice(0, n) if s is None else s for s, n in zip((rows, cols), self.shape, strict=True)]
        stored = [
            slice(n - s.stop, n - s.start) if turned else s
            for s, turned, n in zip(span, self.flip, self.shape, strict=True)
        ]
        values, mask = self.pixels.read(*stored, shape)
        turn = tuple(slice(None, None, -1 if turned else 1) for turned in self.flip)
        values = values[turn]
        valid = np.ones(values.shape, bool) if mask is None else mask[turn]
        if self.is_float:
            valid = valid & np.isfinite(values)
        if self.nodata is not None and not math.isnan(self.nodata):
            valid = valid & (values != np.asarray(self.nodata).astype(values.dtype))
        return values, valid


def file_planes(path: str, crs: Any = None) -> list[Plane]:
    """The bands of a file that GDAL reads; ``crs`` is assumed where it tells none.

    Raises:
        OSError: the file is not there or cannot be read; the message names it.
        ValueError: it has no CRS or no georeference.
    """
    dataset, lock = HANDLES.get(path, open_raster)
    with lock:
        if dataset.crs is None and crs is None:
            points = (
                " It has ground control points only: warp it to a grid first, with gdalwarp." if dataset.gcps[0] else ""
            )
            raise ValueError(
                f"{path} has no CRS, so where it lies is unknown.{points} Give crs='EPSG:...' if you know it, or store it in "
                "the file with gdal_edit.py -a_srs"
            )
        if dataset.transform.is_identity:
            raise ValueError(f"{path} has no georeference: it has a CRS but no transform from pixels to coordinates")
        geobox = GeoBox(dataset.shape, dataset.transform, grid.plain_crs(dataset.crs or crs))
        geobox, flip_y, flip_x = grid.north_up(geobox)
        tags = dataset.tags()
        sensor = labels.from_json(tags.get(labels.SENSOR_TAG, ""))
        when = dates.in_tags(tags) or dates.in_name(Path(path).name) or dates.in_name(_product(path))
        shared = Plane(
            path, None, "", geobox, "", dataset.count, flip=(flip_y, flip_x), tags=tags, sensor=sensor, time=when
        )
        return [_band_plane(dataset, index, shared) for index in dataset.indexes]


def _band_plane(dataset: Any, index: int, shared: Plane) -> Plane:
    flags = dataset.mask_flag_enums[index - 1]
    masked = MaskFlags.per_dataset in flags or MaskFlags.alpha in flags
    scale, offset = dataset.scales[index - 1], dataset.offsets[index - 1]
    scaled = (scale, offset) != (1.0, 0.0)
    tags = dataset.tags(index)
    return replace(
        shared,
        pixels=FilePixels(shared.source, index, masked),
        label=dataset.descriptions[index - 1] or "",
        dtype=dataset.dtypes[index - 1],
        nodata=dataset.nodatavals[index - 1],
        scale=scale if scaled else None,
        offset=offset if scaled else None,
        unit=dataset.units[index - 1] or "",
        time=dates.in_tags(tags) or shared.time,
        tags={**shared.tags, **tags},
        alpha=dataset.colorinterp[index - 1].name == "alpha",
    )


def _product(path: str) -> str:
    """Name of the product folder that a file lies in (``....SAFE`` or one folder a scene)."""
    parts = Path(path).parts
    return next(
        (part for part in reversed(parts[:-1]) if part.upper().endswith(".SAFE")), parts[-2] if len(parts) > 1 else ""
    )

"""The read side of every store: vectors by window, by place and one after another, in memory that does not grow."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from shapely.geometry.base import BaseGeometry

from everysat.io import grid
from everysat.store.quantise import Quantiser

Period = tuple[str, str]
"""Start and end, ISO 8601; the end is excluded."""
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Points:
    """Vectors with their places.

    Attributes:
        vectors: float32 [n, dim].
        x, y: float64 [n], centres in the CRS of the store.
        index: int64 [n], number of the pixel counted along rows, or of the row of a table.
    """

    vectors: np.ndarray
    x: np.ndarray
    y: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @staticmethod
    def cat(parts: list[Points], dim: int) -> Points:
        """Parts one after another; of none, no points of length ``dim``."""
        none = Points(np.zeros((0, dim), np.float32), np.zeros(0), np.zeros(0), np.zeros(0, np.int64))
        names = ("vectors", "x", "y", "index")
        return Points(*(np.concatenate([getattr(p, n) for p in parts or [none]]) for n in names))


@dataclass(frozen=True, eq=False)
class Store(ABC):
    """Embeddings of an area on disk, made by one model for one period.

    Attributes:
        path: where it lies.
        kind: ``pixel`` (a vector a pixel of a grid) or ``chip`` (a vector a footprint of a table).
        dim: length of the decoded vectors.
        crs: text that pyproj takes.
        geobox: the grid, rows from the north, of a pixel store.
        shape: (y, x) of a pixel store, (n,) of a chip store.
        period: what the vectors are about, where it is told.
        quantiser: the rule of the codes.
        model: ``name``, ``weights`` (hash) and what else is told of it.
        attrs: everything that the file says of itself, among it ``geoemb:...`` and the measured cost of the codes.
    """

    path: Path
    kind: str
    crs: str
    geobox: GeoBox | None
    shape: tuple[int, ...]
    period: Period | None
    quantiser: Quantiser
    model: dict[str, Any]
    attrs: dict[str, Any] = field(repr=False)

    @property
    def dim(self) -> int:
        return self.quantiser.out_dim

    @property
    def quality(self) -> dict[str, Any]:
        """Round-trip error and recall that were measured when it was written; empty if nobody did."""
        return dict(self.attrs.get("everysat", {}).get("quality", {}))

    @abstractmethod
    def points(self) -> Iterator[Points]:
        """All vectors that are data, a part at a time."""

    @abstractmethod
    def within(self, geometry: BaseGeometry) -> Points:
        """Vectors of what lies in a geometry given in the CRS of the store."""

    @abstractmethod
    def at(self, lonlat: tuple[float, float]) -> np.ndarray:
        """The vector float32 [dim] at a longitude and latitude, degrees.

        Raises:
            LookupError: the place is outside, or there is no data.
        """

    def _to_crs(self, lonlat: tuple[float, float]) -> tuple[float, float]:
        lon, lat = (float(value) for value in lonlat)
        if not (-180 <= lon <= 180 and -90 <= lat <= 90):
            raise ValueError(f"lonlat={(lon, lat)}: expected longitude -180 to 180 and latitude -90 to 90, degrees")
        x, y = Transformer.from_crs("EPSG:4326", self.crs, always_xy=True).transform(lon, lat)
        return float(x), float(y)


@dataclass(frozen=True, eq=False)
class PixelStore(Store):
    """A vector for each pixel of a grid. ``chunk``: rows and columns that are stored together."""

    chunk: tuple[int, int] = (256, 256)

    @property
    def grid(self) -> GeoBox:
        assert self.geobox is not None
        return self.geobox

    def windows(self) -> Iterator[Window]:
        """Rows and columns of one chunk after another, row by row; those at the edge are smaller."""
        height, width = self.shape
        for top in range(0, height, self.chunk[0]):
            for left in range(0, width, self.chunk[1]):
                yield (
                    slice(top, min(top + self.chunk[0], height)),
                    slice(left, min(left + self.chunk[1], width)),
                )

    @abstractmethod
    def _codes(self, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes [y, x, width] and factors [y, x] or None."""

    def codes(self, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """What is stored of a window: codes [y, x, width], factors float32 [y, x] or None, and bool [y, x], where data is.

        Raises:
            ValueError: the window is empty or reaches beyond the grid.
        """
        for name, span, size in zip(("rows", "cols"), (rows, cols), self.shape, strict=True):
            if (
                span.step not in (None, 1)
                or not 0 <= (span.start or 0) < (size if span.stop is None else span.stop) <= size
            ):
                raise ValueError(f"{name}={span} is no window of {size} {name}; expected slice(start, stop) inside it")
        codes, scale = self._codes(slice(*rows.indices(self.shape[0])[:2]), slice(*cols.indices(self.shape[1])[:2]))
        return codes, scale, self.quantiser.valid(codes, scale)

    def read(self, rows: slice, cols: slice) -> np.ndarray:
        """Vectors float32 [y, x, dim] of a window, NaN where there is no data."""
        codes, scale, _ = self.codes(rows, cols)
        flat = self.quantiser.decode(codes.reshape(-1, codes.shape[-1]), None if scale is None else scale.ravel())
        return flat.reshape(*codes.shape[:2], self.dim)

    def points(self) -> Iterator[Points]:
        for rows, cols in self.windows():
            found = self._points(rows, cols)
            if len(found):
                yield found

    def within(self, geometry: BaseGeometry) -> Points:
        """Vectors of the pixels whose centres lie in ``geometry``; where it holds none, of those that it touches."""
        window = self._around(geometry)
        if window is None:
            return Points.cat([], self.dim)
        shapely.prepare(geometry)
        for touched in (geometry.area == 0, True):
            parts = [self._inside(geometry, rows, cols, touched) for rows, cols in self._parts(*window)]
            if any(len(part) for part in parts):
                break
        return Points.cat(parts, self.dim)

    def at(self, lonlat: tuple[float, float]) -> np.ndarray:
        x, y = self._to_crs(lonlat)
        col, row = (math.floor(float(v)) for v in grid.positions(~self.grid.affine, x, y))
        if not (0 <= row < self.shape[0] and 0 <= col < self.shape[1]):
            raise LookupError(f"{tuple(lonlat)} lies outside {self.path}: {grid.describe(self.grid)}")
        vector = self.read(slice(row, row + 1), slice(col, col + 1))[0, 0]
        if np.isnan(vector).any():
            raise LookupError(f"{self.path} has no data at {tuple(lonlat)}, row {row}, column {col}")
        return vector

    def _points(self, rows: slice, cols: slice, mask: np.ndarray | None = None) -> Points:
        codes, scale, valid = self.codes(rows, cols)
        y, x = np.nonzero(valid if mask is None else valid & mask)
        vectors = self.quantiser.decode(codes[y, x], None if scale is None else scale[y, x])
        y, x = y + rows.start, x + cols.start
        east, north = grid.positions(self.grid.affine, x + 0.5, y + 0.5)
        return Points(vectors, east, north, y.astype(np.int64) * self.shape[1] + x)

    def _around(self, geometry: BaseGeometry) -> Window | None:
        """The window that the bounds of a geometry touch."""
        if geometry.is_empty:
            raise ValueError("the geometry is empty")
        west, south, east, north = geometry.bounds
        col, row = grid.positions(~self.grid.affine, [west, east, west, east], [south, south, north, north])
        spans = []
        for along, size in zip((row, col), self.shape, strict=True):
            low, high = max(0, math.floor(along.min())), min(size, math.floor(along.max()) + 1)
            if low >= high:
                return None
            spans.append(slice(low, high))
        return spans[0], spans[1]

    def _parts(self, rows: slice, cols: slice) -> Iterator[Window]:
        """The chunks of a window, cut at its edges."""
        for r, c in self.windows():
            top, left = max(r.start, rows.start), max(c.start, cols.start)
            bottom, right = min(r.stop, rows.stop), min(c.stop, cols.stop)
            if top < bottom and left < right:
                yield slice(top, bottom), slice(left, right)

    def _inside(self, geometry: BaseGeometry, rows: slice, cols: slice, touched: bool) -> Points:
        top, left = np.arange(rows.start, rows.stop)[:, None], np.arange(cols.start, cols.stop)[None]
        if touched:
            west, north = grid.positions(self.grid.affine, left, top)
            east, south = grid.positions(self.grid.affine, left + 1, top + 1)
            mask = shapely.intersects(geometry, shapely.box(west, south, east, north))
        else:
            mask = shapely.contains_xy(geometry, *grid.positions(self.grid.affine, left + 0.5, top + 0.5))
        if not mask.any():
            return Points.cat([], self.dim)
        return self._points(rows, cols, mask)

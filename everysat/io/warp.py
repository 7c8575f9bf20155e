"""Planes on other grids. A grid that fits is never resampled; every other way from grid to grid is taken once.

The result for a pixel depends on its position alone, not on the window it is asked for with: reading a window equals
reading all and cropping. That is why this does not use GDAL's warper, which approximates transforms within a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from odc.geo.geobox import GeoBox
from pyproj import Transformer

from everysat.io import grid
from everysat.io.plane import Plane

METHODS = ("auto", "nearest", "bilinear", "average", "mode")
Convert = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Digital numbers and where they are valid -> float32 with NaN where they are not."""
_POINTS = 1 << 20
"""Positions that are worked on at a time."""


def method_for(source_gsd_m: float, target_gsd_m: float, is_class: bool, wanted: str) -> str:
    """What ``auto`` stands for: nearest for classes, average when coarsening, bilinear when refining or shifting."""
    if wanted not in METHODS:
        raise ValueError(f"resampling={wanted!r} is not one of {', '.join(METHODS)}")
    if wanted != "auto":
        return wanted
    if is_class:
        return "nearest"
    return "average" if target_gsd_m > 1.05 * source_gsd_m else "bilinear"


def on_grid(plane: Plane, target: GeoBox, method: str, convert: Convert) -> np.ndarray:
    """Values of ``plane`` on ``target`` [y, x], float32; NaN where it has none or does not reach."""
    spot = grid.offset(plane.geobox, target)
    if spot is not None:
        row, col, down, across = spot
        height, width = target.shape
        same = abs(down - 1) * height < grid.FIT and abs(across - 1) * width < grid.FIT
        if same and _whole(row) and _whole(col):
            return _window(plane, round(row), round(col), height, width, convert)
        factor = round(down)
        blocks = factor > 1 and max(abs(down - factor) * height, abs(across - factor) * width) < grid.FIT
        if method == "average" and blocks and _whole(row) and _whole(col):
            values = _window(plane, round(row), round(col), height * factor, width * factor, convert)
            return _block_mean(values, factor)
    return _warp(plane, target, method, convert)


def _whole(value: float) -> bool:
    return abs(value - round(value)) < grid.FIT


def _window(plane: Plane, row: int, col: int, height: int, width: int, convert: Convert) -> np.ndarray:
    """Pixels of the plane's own grid, which may reach beyond its edges."""
    out = np.full((height, width), np.nan, np.float32)
    rows = slice(max(row, 0), min(row + height, plane.shape[0]))
    cols = slice(max(col, 0), min(col + width, plane.shape[1]))
    if rows.start < rows.stop and cols.start < cols.stop:
        out[rows.start - row : rows.stop - row, cols.start - col : cols.stop - col] = convert(*plane.read(rows, cols))
    return out


def _block_mean(values: np.ndarray, factor: int) -> np.ndarray:
    """Mean of the valid pixels of each block; NaN where a block has none."""
    height, width = values.shape
    blocks = values.reshape(height // factor, factor, width // factor, factor)
    seen = np.isfinite(blocks)
    count = seen.sum((1, 3))
    total = np.where(seen, blocks, 0.0).sum((1, 3), dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _warp(plane: Plane, target: GeoBox, method: str, convert: Convert) -> np.ndarray:
    """Any grid to any grid, strip by strip."""
    ratio = max(1.0, grid.gsd_m(target) / grid.gsd_m(plane.geobox))
    # Averages are means of samples, of source pixels that were averaged first where a target pixel holds very many.
    factor = max(1, int(ratio / 2)) if method == "average" else 1
    finer = min(8, math.ceil(2 * ratio / factor)) if method in ("average", "mode") else 1
    height, width = target.shape
    rows = max(1, _POINTS // (width * finer * finer))
    out = np.empty((height, width), np.float32)
    for top in range(0, height, rows):
        strip = grid.crop(target, slice(top, min(top + rows, height)), slice(0, width))
        out[top : top + rows] = _strip(plane, strip, method, factor, finer, convert)
    return out


def _strip(plane: Plane, target: GeoBox, method: str, factor: int, finer: int, convert: Convert) -> np.ndarray:
    at = positions(plane.geobox, target, finer)
    inside = (at[0] >= 0) & (at[0] < plane.shape[0]) & (at[1] >= 0) & (at[1] < plane.shape[1])
    if not inside.any():
        return np.full(tuple(target.shape), np.nan, np.float32)
    window = []
    for along, size in zip(at, plane.shape, strict=True):
        first = max(0, math.floor(along[inside].min()) - 1) // factor * factor
        last = math.ceil((math.floor(along[inside].max()) + 2) / factor) * factor
        window.append((first, last, min(last, size)))
    (top, bottom, low), (left, right, east) = window
    values = convert(*plane.read(slice(top, low), slice(left, east)))
    if factor > 1:
        whole = ((0, bottom - low), (0, right - east))
        values = _block_mean(np.pad(values, whole, constant_values=np.nan), factor)
    row, col = (at[0] - top) / factor, (at[1] - left) / factor
    sampled = _bilinear(values, row, col) if method == "bilinear" else _nearest(values, row, col)
    sampled[~inside] = np.nan
    if finer == 1:
        return sampled
    return _block_mode(sampled, finer) if method == "mode" else _block_mean(sampled, finer)


@lru_cache(maxsize=16)
def positions(source: GeoBox, target: GeoBox, finer: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column on ``source`` of the centres of ``finer`` x ``finer`` parts of each pixel of ``target``; -1 where there
    is no such place. Bands of one scene share them."""
    y, x = ((np.arange(n * finer) + 0.5) / finer for n in target.shape)
    cols, rows = np.meshgrid(x, y)
    east, north = grid.positions(target.affine, cols, rows)
    if source.crs != target.crs:
        to = Transformer.from_crs(grid.crs_of(target).proj, grid.crs_of(source).proj, always_xy=True)
        east, north = to.transform(east, north)
    col, row = grid.positions(~source.affine, east, north)
    known = np.isfinite(row) & np.isfinite(col)
    # The small shift decides centres that fall on an edge the same way everywhere.
    return np.where(known, row + 1e-6, -1.0), np.where(known, col + 1e-6, -1.0)


def _nearest(values: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    i, j = (np.clip(np.floor(v), 0, n - 1).astype(np.intp) for v, n in zip((row, col), values.shape, strict=True))
    return values[i, j]


def _bilinear(values: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Between the centres of the four nearest pixels, as far as they are valid; valid where the nearest one is."""
    i, j = np.floor(row - 0.5), np.floor(col - 0.5)
    down, across = row - 0.5 - i, col - 0.5 - j
    total, weight = np.zeros(row.shape), np.zeros(row.shape)
    for di, wi in ((0, 1 - down), (1, down)):
        for dj, wj in ((0, 1 - across), (1, across)):
            corner = _nearest(values, i + di, j + dj)
            seen = np.isfinite(corner)
            total += np.where(seen, corner, 0.0) * (wi * wj)
            weight += seen * (wi * wj)
    known = np.isfinite(_nearest(values, row, col))
    return np.where(known, total / np.where(known, weight, 1.0), np.nan).astype(np.float32)


def _block_mode(values: np.ndarray, factor: int) -> np.ndarray:
    """The most frequent valid value of each block, the smallest of equals."""
    height, width = values.shape
    blocks = values.reshape(height // factor, factor, width // factor, factor)
    best = np.full((height // factor, width // factor), np.nan, np.float32)
    most = np.zeros(best.shape, np.int64)
    for value in np.unique(values[np.isfinite(values)]):
        count = (blocks == value).sum((1, 3))
        best = np.where(count > most, value, best)
        most = np.maximum(most, count)
    return best

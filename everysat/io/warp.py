"""Planes on other grids. A grid that fits is never resampled; every other way from grid to grid is taken once.

The result for a pixel depends on its position alone, not on the window it is asked for with: reading a window equals
reading all and cropping.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.warp import reproject

from everysat.io import grid
from everysat.io.plane import HANDLES, Plane

METHODS = ("auto", "nearest", "bilinear", "cubic", "average", "mode")
Convert = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Digital numbers and where they are valid -> float32 with NaN where they are not."""


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
        if method == "nearest":
            return _nearest(plane, spot, target, convert)
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


def _nearest(plane: Plane, spot: tuple[float, float, float, float], target: GeoBox, convert: Convert) -> np.ndarray:
    picks, inside, spans = [], [], list[slice]()
    for start, step, count, size in zip(spot[:2], spot[2:], target.shape, plane.shape, strict=True):
        # The small shift decides centres that fall on an edge the same way in every window.
        index = np.floor(start + (np.arange(count) + 0.5) * step + 1e-6).astype(int)
        seen = (index >= 0) & (index < size)
        if not seen.any():
            return np.full(target.shape, np.nan, np.float32)
        spans.append(slice(int(index[seen].min()), int(index[seen].max()) + 1))
        picks.append(index[seen] - spans[-1].start)
        inside.append(seen)
    out = np.full(target.shape, np.nan, np.float32)
    out[np.ix_(*inside)] = convert(*plane.read(spans[0], spans[1]))[np.ix_(*picks)]
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
    ratio = max(1.0, grid.gsd_m(target) / grid.gsd_m(plane.geobox))
    window = grid.window_on(plane.geobox, target, margin=3 * ratio + 2)
    out = np.full(target.shape, np.nan, np.float32)
    if window is None:
        return out
    source = grid.crop(plane.geobox, *window)
    values = convert(*plane.read(*window))
    with HANDLES.warnings:
        reproject(
            values,
            out,
            src_transform=source.affine,
            src_crs=grid.crs_of(source).to_wkt(),
            src_nodata=np.nan,
            dst_transform=target.affine,
            dst_crs=grid.crs_of(target).to_wkt(),
            dst_nodata=np.nan,
            resampling=Resampling[method],
            tolerance=0.0,  # approximated transforms depend on the window
            XSCALE=1 / ratio,  # so does the width of the kernel, which GDAL guesses from the sizes of the windows
            YSCALE=1 / ratio,
        )
    return out

"""A store on another grid: vectors are averaged or interpolated as vectors and brought back to length; codes never are."""

from __future__ import annotations

import numpy as np
import rasterio.warp
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling

from everysat.io import grid
from everysat.store.read import PixelStore

_ROWS = 256
_SHARP = {"XSCALE": 1, "YSCALE": 1}
"""The kernel has the same width in every part of the image; GDAL would guess it from the part at hand."""


def warp(store: PixelStore, geobox: GeoBox) -> np.ndarray:
    """Vectors float32 [dim, y, x] of ``store`` on another grid, NaN where there is no data.

    On a coarser grid a pixel is the mean of the vectors below it, on a finer one they are interpolated bilinearly; either is
    then given the mean (or interpolated) length of the vectors that it was made from. The image is held in memory; of the
    store, what lies below 256 rows of it.
    """
    height, width = geobox.shape
    out = np.full((store.dim, height, width), np.nan, np.float32)
    coarser = grid.gsd_m(geobox) > grid.gsd_m(store.grid) * (1 + grid.FIT)
    how = Resampling.average if coarser else Resampling.bilinear
    for top in range(0, height, _ROWS):
        rows = slice(top, min(top + _ROWS, height))
        part = grid.crop(geobox, rows, slice(0, width))
        window = grid.window_on(store.grid, part, margin=2)
        if window is not None:
            out[:, rows] = _warped(store, window, part, how)
    return out


def _warped(store: PixelStore, window: tuple[slice, slice], part: GeoBox, how: Resampling) -> np.ndarray:
    below = grid.crop(store.grid, *window)
    vectors = store.read(*window).transpose(2, 0, 1)
    # The length goes along as one more channel.
    source = np.concatenate([vectors, np.linalg.norm(vectors, axis=0, keepdims=True)])
    moved = np.full((len(source), *part.shape), np.nan, np.float32)
    rasterio.warp.reproject(
        source, moved, src_transform=below.affine, src_crs=grid.crs_of(below).to_wkt(), src_nodata=np.nan,
        dst_transform=part.affine, dst_crs=grid.crs_of(part).to_wkt(), dst_nodata=np.nan, resampling=how, tolerance=0,
        **({} if how is Resampling.average else _SHARP),
    )  # fmt: skip
    mean, length = moved[:-1], moved[-1]
    norm = np.linalg.norm(mean, axis=0)
    # Vectors that cancel have no direction.
    scale = np.where(norm > 1e-6 * length, length / np.where(norm > 0, norm, 1), np.where(length == 0, 0, np.nan))
    return mean * scale

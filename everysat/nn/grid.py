"""A raster layer on another pixel grid of the same places, dates averaged: [row, band, y, x]. Validity travels along."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from everysat.types import Place, Raster


def grid_shape(places: tuple[Place, ...], gsd_m: float) -> tuple[int, int]:
    """Height and width in pixels of ``gsd_m`` that hold the largest of the places."""
    height, width = (max(getattr(p, side) for p in places) for side in ("height_m", "width_m"))
    return math.ceil(height / gsd_m - 1e-4), math.ceil(width / gsd_m - 1e-4)


def mean_over_dates(raster: Raster, rows: int) -> tuple[Tensor, Tensor]:
    """Mean of what was observed, [row, band, y, x], and whether anything was."""
    seen = raster.valid.to(raster.values.dtype)
    shape = (rows, *raster.values.shape[1:])
    total = seen.new_zeros(shape).index_add_(0, raster.row, torch.where(raster.valid, raster.values, 0.0))
    count = seen.new_zeros(shape).index_add_(0, raster.row, seen)
    return total / count.clamp(min=1), count > 0


def on_grid(raster: Raster, rows: int, gsd_m: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Values and validity [row, band, height, width] at ``gsd_m``, both grids starting at the north-west corner.

    Finer: the pixel that holds the centre (a value is repeated, none is invented). Coarser: the mean of the valid pixels
    whose centres lie inside. What lies beyond the raster is invalid. Values are 0 where invalid.
    """
    values, valid = mean_over_dates(raster, rows)
    ratio = gsd_m / raster.gsd_m
    if ratio > 1 + 1e-3:
        values, valid = _coarser(values, valid, ratio)
        ratio = 1.0
    return _nearest(values, valid, ratio, height, width)


def _nearest(values: Tensor, valid: Tensor, ratio: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    y, x = (((torch.arange(n, device=values.device) + 0.5) * ratio).floor().long() for n in (height, width))
    inside = (y < values.shape[2])[:, None] & (x < values.shape[3])
    y, x = y.clamp(max=values.shape[2] - 1), x.clamp(max=values.shape[3] - 1)
    seen = valid[:, :, y][..., x] & inside
    return torch.where(seen, values[:, :, y][..., x], 0.0), seen


def _coarser(values: Tensor, valid: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    k = round(ratio)
    if abs(ratio - k) > 1e-3 * k:
        return _binned(values, valid, ratio)
    pad = (0, -values.shape[3] % k, 0, -values.shape[2] % k)
    seen = F.pad(valid.to(values.dtype), pad)
    total, count = (F.avg_pool2d(part, k, divisor_override=1) for part in (F.pad(values, pad) * seen, seen))
    return total / count.clamp(min=1), count > 0


def _binned(values: Tensor, valid: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Ratios that are not whole: each fine pixel goes to the coarse one that holds its centre."""
    y, x = (((torch.arange(n, device=values.device) + 0.5) / ratio).floor().long() for n in values.shape[2:])
    shape = (*values.shape[:2], int(y.max()) + 1, int(x.max()) + 1)
    cell = (y[:, None] * shape[3] + x).flatten()
    seen = valid.to(values.dtype)
    flat = (*shape[:2], shape[2] * shape[3])
    total = values.new_zeros(flat).index_add_(2, cell, (values * seen).flatten(2))
    count = values.new_zeros(flat).index_add_(2, cell, seen.flatten(2))
    return (total / count.clamp(min=1)).view(shape), (count > 0).view(shape)

"""Images onto another grid of the same ground, by one small matrix per axis, and only of the pixels that count."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=256)
def axis_weights(before: int, after: int, ratio: float, antialias: bool = False, stretched: bool = False) -> Tensor:
    """Weights [after, before] that make ``after`` cells of ``before`` pixels, where a pixel is ``ratio`` cells long and both begin
    at the same edge.

    Linear between the two nearest pixel centres, whatever lies between cells; with ``antialias``, a triangle as wide as
    two cells, so that every pixel counts. Beyond the last pixel its value holds. ``stretched``: as PyTorch and the published
    RAMEN do it, by that ratio to a whole number of cells, and these stretched to ``after``, which moves what does not fit; as many
    cells as pixels are a copy.
    """
    if stretched:
        cells = math.floor(before * ratio + 1e-9)
        first = torch.eye(before) if cells == before else _linear(before, cells, 1.0 / ratio)
        return first if cells == after else _linear(cells, after, cells / after) @ first
    if not antialias or ratio >= 1.0:
        return _linear(before, after, 1.0 / ratio)
    centre = (torch.arange(after, dtype=torch.float64) + 0.5) / ratio
    pixel = torch.arange(before, dtype=torch.float64) + 0.5
    weight = (1.0 - (pixel - centre[:, None]).abs() * ratio).clamp(min=0.0)
    lost = weight.sum(1) == 0  # cells beyond the last pixel
    weight[lost, -1] = 1.0
    return (weight / weight.sum(1, keepdim=True)).float()


def _linear(before: int, after: int, step: float) -> Tensor:
    at = ((torch.arange(after, dtype=torch.float64) + 0.5) * step - 0.5).clamp(0, before - 1)
    low = at.floor().long().clamp(max=max(before - 2, 0))
    part = at - low
    weight = torch.zeros(after, before, dtype=torch.float64)
    weight.scatter_add_(1, low[:, None], (1 - part)[:, None])
    weight.scatter_add_(1, (low + 1).clamp(max=before - 1)[:, None], part[:, None])
    return weight.float()


def resample(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``image`` [..., y, x] by the weights of both axes: [..., after y, after x], in the precision of the image, also under autocast."""
    with torch.autocast(image.device.type, enabled=False):
        for axis, weight in ((-2, rows), (-1, columns)):
            weight = weight.to(image.device, image.dtype)
            used = torch.nonzero(weight.any(0)).flatten()
            if len(used) < weight.shape[1]:
                image, weight = image.index_select(axis, used), weight[:, used]
            image = torch.matmul(weight, image) if axis == -2 else F.linear(image, weight)
    return image


def resample_valid(values: Tensor, valid: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of the valid ``values`` [..., y, x] alone, and where there is any; 0 where there is none."""
    if bool(valid.all()):
        out = resample(values, rows, columns)
        return out, torch.ones_like(out, dtype=torch.bool)
    weight = resample(valid.to(values.dtype), rows, columns)
    seen = weight > 1e-6
    total = resample(torch.where(valid, values, 0.0), rows, columns)
    return torch.where(seen, total / weight.clamp(min=1e-6), 0.0), seen

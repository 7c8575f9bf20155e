"""Rows of several sequences stacked on one axis, and the same side by side."""

from __future__ import annotations

import torch
from torch import Tensor


def ordinal(row: Tensor, rows: int) -> Tensor:
    """Number of each entry among those of its row, in their order: int64 [n] of ``row`` int64 [n] below ``rows``."""
    count = torch.bincount(row, minlength=rows)
    order = torch.argsort(row, stable=True)
    number = torch.empty_like(row)
    number[order] = torch.arange(len(row), device=row.device) - (torch.cumsum(count, 0) - count)[row[order]]
    return number


def side_by_side(x: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors ``x`` [n, dim] of each row beside each other, [row, most, dim], zeros behind; which are there, bool [row, most]; and
    the place of each in the flattened result, int64 [n]."""
    count = torch.bincount(row, minlength=rows)
    most = int(count.max()) if rows else 0
    slot = row * most + ordinal(row, rows)
    out = x.new_zeros(rows * most, x.shape[1]).index_copy(0, slot, x).view(rows, most, x.shape[1])
    return out, torch.arange(most, device=x.device) < count[:, None], slot

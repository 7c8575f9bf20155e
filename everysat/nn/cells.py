"""Cells of grids as features: where they lie, and those of several parts of a batch together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from everysat.nn.inputs import InputConfig
from everysat.types import ALWAYS, ContractError, Coords, Features, Tokens


def refuse_without_statistics(name: str, modality: InputConfig) -> None:
    """ContractError for a layer whose values could not be normalised."""
    if modality.mean is None or modality.std is None:
        raise ContractError(
            f"the model has no mean and std for layer {name!r}, and its input must be normalised. Compute them (everysat stats ... "
            "-o stats.json) and load the model with statistics='stats.json'; in a recipe, set model.statistics to data; for values "
            "that are normalised already, give mean 0 and std 1"
        )


def cells_at(row: Tensor, y: Tensor, x: Tensor, size_m: float, group: int) -> Coords:
    """Coordinates of the cells ``y``, ``x`` of grids of ``size_m`` metres."""
    at_m = (torch.stack([y, x], -1) + 0.5) * size_m
    always = torch.tensor(ALWAYS, dtype=torch.float64, device=row.device).expand(len(row), 2)
    return Coords(row, at_m, torch.full((len(row),), size_m, device=row.device), always, torch.full_like(row, group))


def joined(found: Sequence[tuple[Tensor, Coords]], tokens: Tokens, dim: int) -> Features:
    """Features of all parts, place by place, and their mean per place as summary."""
    if not found:
        nowhere = torch.zeros(0, dtype=torch.long, device=tokens.x.device)
        found = [(tokens.x.new_zeros(0, dim), cells_at(nowhere, nowhere, nowhere, 1.0, 0))]
    mean, coords = torch.cat([m for m, _ in found]), Coords.cat([c for _, c in found])
    order = torch.argsort(coords.row, stable=True)
    mean, coords, rows = mean[order], coords[order], len(tokens.places)
    total = mean.new_zeros(rows, dim).index_add(0, coords.row, mean)
    count = torch.bincount(coords.row, minlength=rows).clamp(min=1)[:, None]
    return Features(mean, coords, total / count.to(mean.dtype), tokens.places)

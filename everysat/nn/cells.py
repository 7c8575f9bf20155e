"""Cells of grids as features: where they lie, and those of several parts of a batch together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from everysat.nn.gather import world
from everysat.nn.inputs import InputConfig
from everysat.types import ALWAYS, Batch, ContractError, Coords, Features, Place, Tokens


def refuse_without_statistics(name: str, modality: InputConfig) -> None:
    """ContractError for a layer whose values could not be normalised."""
    if modality.mean is None or modality.std is None:
        raise ContractError(
            f"the model has no mean and std for layer {name!r}, and its input must be normalised. Compute them (everysat stats ... "
            "-o stats.json) and load the model with statistics='stats.json'; in a recipe, set model.statistics to data; for values "
            "that are normalised already, give mean 0 and std 1"
        )


def refuse_uneven(batch: Batch, names: Iterable[str], *, training: bool) -> None:
    """ContractError where batch normalisation over processes could wait for ever: networks that run once per layer and size of place
    must run as often in every process."""
    if not training or world()[1] == 1:
        return
    sizes = {(p.height_m, p.width_m) for p in batch.places}
    empty = [name for name in names if not batch.raster(name).valid.any()]
    if len(sizes) > 1 or empty:
        what = f"layer {empty[0]!r} is empty in this one" if empty else f"there are places of {len(sizes)} sizes"
        raise ContractError(
            f"training in several processes needs the same layers and one size of places in each: {what}. Train with devices: 1"
        )


def cells_at(row: Tensor, y: Tensor, x: Tensor, size_m: float, group: int) -> Coords:
    """Coordinates of the cells ``y``, ``x`` of grids of ``size_m`` metres."""
    at_m = (torch.stack([y, x], -1) + 0.5) * size_m
    always = torch.tensor(ALWAYS, dtype=torch.float64, device=row.device).expand(len(row), 2)
    return Coords(row, at_m, torch.full((len(row),), size_m, device=row.device), always, torch.full_like(row, group))


def joined(found: Sequence[tuple[Tensor, Coords]], tokens: Tokens, dim: int, cell_m: float | None = None) -> Features:
    """Features of all parts, place by place, and their mean per place as summary; with ``cell_m``, in place of the features, their means
    over the cells of that side that their centres lie in."""
    if not found:
        nowhere = torch.zeros(0, dtype=torch.long, device=tokens.x.device)
        found = [(tokens.x.new_zeros(0, dim), cells_at(nowhere, nowhere, nowhere, 1.0, 0))]
    mean, coords = torch.cat([m for m, _ in found]), Coords.cat([c for _, c in found])
    order = torch.argsort(coords.row, stable=True)
    mean, coords = mean[order], coords[order]
    summary = _mean_by(mean, coords.row, len(tokens.places))
    if cell_m is not None:
        keys = torch.cat([coords.row[:, None], torch.floor(coords.at_m / cell_m + 1e-4).long()], 1)
        keys, where = torch.unique(keys, dim=0, return_inverse=True)
        mean, coords = _mean_by(mean, where, len(keys)), cells_at(keys[:, 0], keys[:, 1], keys[:, 2], cell_m, 0)
    return Features(mean, coords, summary, tokens.places)


def side_by_layer(
    x: Tensor, coords: Coords, pooled: Tensor, row: Tensor, group: Tensor, places: tuple[Place, ...], layers: int
) -> Features:
    """Features of images that were encoded one by one: means over the images of a layer, layers beside each other.

    Args:
        x: [token, dim] at ``coords``, whose ``group`` is the number of the layer, below ``layers``.
        pooled: [image, dim], of images of place ``row`` and layer ``group``, int64 [image].

    Returns:
        One feature [dim x layers] per cell that any layer observed; zeros stand for a layer that has nothing there.
    """
    dim, rows = x.shape[1], len(places)
    cells = coords.cells()
    keys, where = torch.unique(torch.cat([coords.row[:, None], cells], 1), dim=0, return_inverse=True)
    mean = _mean_by(x, where * layers + coords.group, len(keys) * layers).view(len(keys), layers * dim)
    summary = _mean_by(pooled, row * layers + group, rows * layers).view(rows, layers * dim)
    size_m = float(coords.size_m[0]) if len(coords) else 1.0
    return Features(mean, cells_at(keys[:, 0], keys[:, 1], keys[:, 2], size_m, 0), summary, places)


def _mean_by(x: Tensor, index: Tensor, count: int) -> Tensor:
    total = x.new_zeros(count, x.shape[1]).index_add(0, index, x)
    return total / torch.bincount(index, minlength=count).clamp(min=1)[:, None].to(x.dtype)

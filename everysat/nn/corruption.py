"""Inputs that are corrupted on purpose, so that a model learns what an unreliable one looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from everysat.nn.draws import uniform
from everysat.nn.gather import row_offset
from everysat.nn.ragged import ordinal
from everysat.types import Batch, Input, Raster


def corrupted(batch: Batch, inputs: Mapping[str, Input], share: float, generator: torch.Generator) -> Batch:
    """The batch with white noise added to all observations that a ``share`` of places has of each layer; layers are drawn independently. Its deviation
    is 0.5 to 3 times that of the band: of the contract, or of the batch where the contract lists no such layer."""
    layers, offset = dict(batch.layers), row_offset(len(batch))
    for name in sorted(batch.layers):
        layer = batch.layers[name]
        drawn = uniform(generator, torch.arange(len(batch)) + offset, torch.tensor(0))
        strength = 0.5 + 2.5 * uniform(generator, torch.arange(len(batch)) + offset, torch.tensor(1))
        if not isinstance(layer, Raster) or layer.sensor.kind == "classes" or not share:
            continue
        chosen = (drawn < share).to(layer.row.device)[layer.row]
        noise = standard_normal(
            generator, layer.row.cpu(), layer.values[0].numel() if len(layer.row) else 0, offset, len(batch)
        )
        noise = (
            noise.to(layer.values).view(layer.values.shape) * strength.to(layer.values)[layer.row][:, None, None, None]
        )
        scale = _deviation(layer, inputs.get(name))[:, None, None]
        layers[name] = replace(
            layer, values=torch.where(chosen[:, None, None, None], layer.values + scale * noise, layer.values)
        )
    return replace(batch, layers=layers)


def _deviation(layer: Raster, wanted: Input | None) -> Tensor:
    """Of each band of a layer, [band]."""
    known = {} if wanted is None else dict(zip(wanted.sensor.names, wanted.std, strict=True))
    there = [layer.values[:, i][layer.valid[:, i]] for i in range(layer.values.shape[1])]
    own = [float(v.std()) if len(v) > 1 else 1.0 for v in there]
    return layer.values.new_tensor([known.get(name, own[i]) for i, name in enumerate(layer.sensor.names)])


def standard_normal(generator: torch.Generator, row: Tensor, width: int, offset: int, rows: int) -> Tensor:
    """Standard normal numbers [n, width] that depend on the place, and on the position among what the place has, alone."""
    index = ordinal(row, rows)[:, None] * width + torch.arange(width)
    u = uniform(generator, (row + offset)[:, None], index).double()
    return (math.sqrt(2) * torch.erfinv((2 * u - 1 + 2.0**-24).clamp(-1 + 1e-7, 1 - 1e-7))).float()

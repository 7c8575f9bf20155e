"""Heads: from features to what a task asks for, per place or per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.grid import on_grid
from everysat.sensors import Sensor
from everysat.types import ALWAYS, Batch, Encoder, Features, Raster

HEADS = ("linear", "norm", "mlp")
LEVELS = ("place", "pixel")


def build_head(
    level: str,
    kind: str,
    encoder: Encoder,
    out: int,
    *,
    gsd_m: float | None,
    token_size_m: float | None,
    local: Sequence[str] = (),
) -> PlaceHead | PixelHead:
    """A head for one value set per ``place`` or per ``pixel``; the latter needs ``gsd_m`` and ``token_size_m``."""
    if level == "pixel":
        if gsd_m is None or token_size_m is None:
            raise ValueError(
                "level 'pixel' needs gsd_m (pixel of the target) and token_size_m (side of the tokens), metres"
            )
        return PixelHead(kind, encoder, out, token_size_m=token_size_m, gsd_m=gsd_m, local=local)
    if level != "place":
        raise LookupError(f"no level is called {level!r}. {suggest(level, LEVELS)}")
    if local:
        raise ValueError(f"local={list(local)} is read by level 'pixel' only")
    return PlaceHead(kind, encoder.dim, out)


def aligned(values: Tensor, seen: Tensor, target: Raster) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What was predicted for each observation of ``target``, on the pixels that both have.

    Returns:
        values [obs, channel, y, x], seen [obs, y, x], and the target's values and validity [obs, band, y, x].
    """
    height, width = (min(values.shape[axis], target.values.shape[axis]) for axis in (2, 3))
    inside = (..., slice(height), slice(width))
    return values[target.row][inside], seen[target.row][inside], target.values[inside], target.valid[inside]


def head(kind: str, dim: int, out: int) -> nn.Module:
    """``linear``; ``norm``: LayerNorm, then linear; ``mlp``: LayerNorm, linear to ``dim``, GELU, linear."""
    if kind == "linear":
        return nn.Linear(dim, out)
    if kind == "norm":
        return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, out))
    if kind == "mlp":
        return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out))
    raise LookupError(f"no head is called {kind!r}. {suggest(kind, HEADS)}")


class PlaceHead(nn.Module):
    """From the summary of each place to [row, out, 1, 1]."""

    def __init__(self, kind: str, dim: int, out: int) -> None:
        super().__init__()
        self.head = head(kind, dim, out)

    def forward(self, features: Features, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """Values [row, out, 1, 1], and which of them come from a place that was observed at all [row, y, x]."""
        seen = torch.zeros(len(features.places), dtype=torch.bool, device=features.summary.device)
        seen[features.coords.row] = True
        return self.head(features.summary)[:, :, None, None], seen[:, None, None]

    def raster(self, sensor: Sensor, values: Tensor, seen: Tensor, features: Features) -> Raster:
        """The head's output as a layer of one pixel per place."""
        size_m = max(max(p.height_m, p.width_m) for p in features.places)
        return _undated(sensor, values, seen, size_m)


class PixelHead(nn.Module):
    """From each token to the ``out`` channels of the k x k pixels of ``gsd_m`` that it covers, k = token size / gsd.

    ``local`` names layers whose normalised pixels are added to the decision by a linear map of their own, which equals one
    linear layer on the concatenation of token and pixel.
    """

    def __init__(
        self,
        kind: str,
        encoder: Encoder,
        out: int,
        *,
        token_size_m: float,
        gsd_m: float,
        local: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.side = round(token_size_m / gsd_m)
        if self.side < 1 or abs(self.side * gsd_m - token_size_m) > 1e-3 * gsd_m:
            raise ValueError(f"token_size_m={token_size_m:g} is not a multiple of the target's gsd_m={gsd_m:g}")
        self.token_size_m, self.gsd_m, self.out = token_size_m, gsd_m, out
        self.head = head(kind, encoder.dim, out * self.side**2)
        for name in local:
            if name not in encoder.inputs:
                raise LookupError(f"local={name!r} is no input of the encoder. {suggest(name, encoder.inputs)}")
        self.inputs = {name: encoder.inputs[name] for name in local}
        bands = sum(len(i.sensor.bands) for i in self.inputs.values())
        self.local = nn.Linear(bands, out, bias=False) if bands else None

    def forward(self, features: Features, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """Values [row, out, y, x] at ``gsd_m``, and which pixels lie in a token [row, y, x]."""
        size_m = features.coords.size_m
        if len(size_m) and not torch.allclose(size_m, size_m.new_tensor(self.token_size_m), rtol=1e-3):
            raise ValueError(
                f"tokens are {float(size_m.min()):g}-{float(size_m.max()):g} m wide, the head was built with "
                f"token_size_m={self.token_size_m:g}"
            )
        grid = features.grid()
        seen = torch.isfinite(grid).all(1)
        k = self.side
        flat = self.head(torch.nan_to_num(grid).permute(0, 2, 3, 1))
        rows, height, width, _ = flat.shape
        values = flat.view(rows, height, width, self.out, k, k).permute(0, 3, 1, 4, 2, 5)
        values = values.reshape(rows, self.out, height * k, width * k)
        seen = seen.repeat_interleave(k, 1).repeat_interleave(k, 2)
        if self.local is not None:
            values = values + self._local(batch, values.shape[2], values.shape[3])
        return values, seen

    def raster(self, sensor: Sensor, values: Tensor, seen: Tensor, features: Features) -> Raster:
        """The head's output as a layer."""
        return _undated(sensor, values, seen, self.gsd_m)

    def _local(self, batch: Batch | None, height: int, width: int) -> Tensor:
        if batch is None:
            raise ValueError(f"the head reads pixels of {', '.join(self.inputs)}: give predict() the batch too")
        assert self.local is not None
        parts = []
        for name, wanted in self.inputs.items():
            raster = wanted.fit(batch.raster(name), name)
            normal = replace(raster, values=wanted.normalise(raster), var=None)
            parts.append(on_grid(normal, len(batch), self.gsd_m, height, width)[0])
        return self.local(torch.cat(parts, 1).movedim(1, -1)).movedim(-1, 1)


def _undated(sensor: Sensor, values: Tensor, seen: Tensor, gsd_m: float) -> Raster:
    rows = torch.arange(len(values), device=values.device)
    times = torch.tensor([ALWAYS] * len(values), dtype=torch.float64, device=values.device)
    return Raster(sensor, values, seen[:, None].expand_as(values), times, rows, gsd_m)

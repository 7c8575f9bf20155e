"""Heads: from features to what a task asks for, per place or per pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.grid import on_grid
from everysat.sensors import Sensor
from everysat.types import ALWAYS, Batch, Encoder, Features, Raster

HEADS = ("linear", "norm", "mlp", "upernet")
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
    dim: int | None = None,
) -> PlaceHead | PixelHead:
    """A head for one value set per ``place`` or per ``pixel``; the latter needs ``gsd_m``, and ``token_size_m`` where the encoder does not say it. ``dim`` is the width of
    the features where it is not the encoder's."""
    dim = encoder.dim if dim is None else dim
    if level == "pixel":
        if token_size_m is None:
            token_size_m = getattr(getattr(encoder, "settings", None), "token_m", None)
        if gsd_m is None or token_size_m is None:
            raise ValueError(
                "level 'pixel' needs gsd_m (pixel of the target) and token_size_m (side of the tokens), metres"
            )
        return PixelHead(kind, encoder, out, token_size_m=token_size_m, gsd_m=gsd_m, local=local, dim=dim)
    if level != "place":
        raise LookupError(f"no level is called {level!r}. {suggest(level, LEVELS)}")
    if local:
        raise ValueError(f"local={list(local)} is read by level 'pixel' only")
    return PlaceHead(kind, dim, out)


def aligned(values: Tensor, seen: Tensor, target: Raster) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What was predicted for each observation of ``target``, on the pixels that both have.

    Returns:
        values [obs, channel, y, x], seen [obs, y, x], and the target's values and validity [obs, band, y, x].
    """
    height, width = (min(values.shape[axis], target.values.shape[axis]) for axis in (2, 3))
    inside = (..., slice(height), slice(width))
    return values[target.row][inside], seen[target.row][inside], target.values[inside], target.valid[inside]


def head(kind: str, dim: int, out: int) -> nn.Module:
    """Of one vector: ``linear``; ``norm``: LayerNorm, then linear; ``mlp``: LayerNorm, linear to ``dim``, GELU, linear."""
    if kind == "linear":
        return nn.Linear(dim, out)
    if kind == "norm":
        return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, out))
    if kind == "mlp":
        return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out))
    if kind == "upernet":
        raise ValueError("head='upernet' makes images of token grids: take the level 'pixel', or another head")
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
    """From each token to the ``out`` channels of the k x k pixels of ``gsd_m`` that it covers, k = token size / gsd; with the kind
    ``upernet``, from the whole grid of tokens (:class:`UperNet`).

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
        dim: int | None = None,
    ) -> None:
        super().__init__()
        self.side = round(token_size_m / gsd_m)
        if self.side < 1 or abs(self.side * gsd_m - token_size_m) > 1e-3 * gsd_m:
            raise ValueError(f"token_size_m={token_size_m:g} is not a multiple of the target's gsd_m={gsd_m:g}")
        self.token_size_m, self.gsd_m, self.out = token_size_m, gsd_m, out
        dim = encoder.dim if dim is None else dim
        self.head = UperNet(dim, out, self.side) if kind == "upernet" else head(kind, dim, out * self.side**2)
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
        if isinstance(self.head, UperNet):
            values = self.head(torch.nan_to_num(grid), seen, self._extents(features))
        else:
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

    def _extents(self, features: Features) -> list[tuple[int, int]]:
        """Height and width of each place, in tokens."""
        sizes = [(place.height_m, place.width_m) for place in features.places]
        return [tuple(math.ceil(m / self.token_size_m - 1e-4) for m in size) for size in sizes]  # type: ignore[misc]

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


class UperNet(nn.Module):
    """From one grid of tokens to ``out`` channels at ``side`` times its resolution: pyramid pooling, and levels fused from coarse to
    fine (UPerNet, Xiao et al. 2018, section 3.1).

    The levels are four, each half as fine as the one before, and all made from the one grid that an encoder gives, by transposed
    convolutions and by pooling (the simple feature pyramid of ViTDet, Li et al. 2022, section 3); the finest is up to 4 times as fine as
    the tokens. From there to the pixels of the target, values are interpolated.

    Norms are those of each cell's channels, means count the cells that are there, and places of other extents run apart, so that neither
    other places nor what was not observed have an effect. ``hidden``: channels inside, by default half of ``dim``, from 32 to 256.
    """

    BINS = (1, 2, 3, 6)

    def __init__(self, dim: int, out: int, side: int, hidden: int | None = None) -> None:
        super().__init__()
        self.out, self.side, self.rise = out, side, min(2, side.bit_length() - 1)
        hidden = min(256, max(32, dim // 2)) if hidden is None else hidden
        self.first = nn.Sequential(nn.Conv2d(dim, hidden, 1), ChannelNorm(hidden))
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(hidden, hidden, 2, 2), ChannelNorm(hidden), nn.GELU())
            for _ in range(self.rise)
        )
        self.pooled = nn.ModuleList(_convolved(hidden, hidden, 1) for _ in self.BINS)
        self.context = _convolved((1 + len(self.BINS)) * hidden, hidden, 3)
        self.lateral = nn.ModuleList(_convolved(hidden, hidden, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_convolved(hidden, hidden, 3) for _ in range(3))
        self.fuse = _convolved(4 * hidden, hidden, 3)
        self.last = nn.Conv2d(hidden, out, 1)

    def forward(self, grid: Tensor, seen: Tensor, extents: Sequence[tuple[int, int]]) -> Tensor:
        """[row, out, y, x] from ``grid`` [row, dim, y, x], 0 where it is not ``seen`` [row, y, x]; ``extents`` of each place in cells."""
        rows, _, height, width = grid.shape
        values = grid.new_zeros(rows, self.out, height * self.side, width * self.side)
        for high, wide in dict.fromkeys(extents):
            index = torch.tensor([i for i, own in enumerate(extents) if own == (high, wide)], device=grid.device)
            there = seen[index, :high, :wide]
            found = self._run(grid[index, :, :high, :wide], there[:, None].to(grid.dtype))
            pad = (0, values.shape[3] - found.shape[3], 0, values.shape[2] - found.shape[2])
            values = values.index_copy(0, index, F.pad(found, pad).to(values.dtype))
        return values

    def _run(self, grid: Tensor, seen: Tensor) -> Tensor:
        token = self.first(grid) * seen
        levels = [token]
        for up in self.up:
            levels.insert(0, up(levels[0]))
        for _ in range(3 - self.rise):
            levels.append(_half(levels[-1], seen))
            seen = _half(seen, seen)
        found = self._with_context(levels[-1], seen)
        fused = [found]
        for level, lateral, smooth in zip(levels[-2::-1], self.lateral, self.smooth, strict=True):
            found = lateral(level) + _resized(found, level.shape[2:])
            fused.append(smooth(found))
        finest = fused[-1].shape[2:]
        fine = self.last(self.fuse(torch.cat([_resized(each, finest) for each in fused], 1)))
        return _resized(fine, [n * self.side for n in grid.shape[2:]])

    def _with_context(self, level: Tensor, seen: Tensor) -> Tensor:
        """A level beside its means over 1, 4, 9 and 36 parts of the place (the pyramid pooling of Zhao et al. 2017)."""
        parts = [level]
        for bins, convolved in zip(self.BINS, self.pooled, strict=True):
            total, count = (F.adaptive_avg_pool2d(part, bins) for part in (level * seen, seen))
            parts.append(_resized(convolved(total / count.clamp(min=1e-6)), level.shape[2:]))
        return self.context(torch.cat(parts, 1))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of the channels of each cell, [row, channel, y, x]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _convolved(before: int, after: int, side: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, side, padding=side // 2, bias=False), ChannelNorm(after), nn.GELU())


def _half(level: Tensor, seen: Tensor) -> Tensor:
    """Mean of what is seen in each 2 x 2 cells; 0 where nothing is. Of ``seen`` itself: where anything is."""
    total, count = (F.avg_pool2d(part, 2, ceil_mode=True) for part in (level * seen, seen))
    return total / count.clamp(min=1e-6)


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    return (
        image
        if image.shape[2:] == tuple(size)
        else F.interpolate(image, tuple(size), mode="bilinear", align_corners=False)
    )


def _undated(sensor: Sensor, values: Tensor, seen: Tensor, gsd_m: float) -> Raster:
    rows = torch.arange(len(values), device=values.device)
    times = torch.tensor([ALWAYS] * len(values), dtype=torch.float64, device=values.device)
    return Raster(sensor, values, seen[:, None].expand_as(values), times, rows, gsd_m)

"""Features finer than the tokens: the encoder sees the same ground several times, its token grid shifted by parts of a token.

A token says something about the square that it covers, best attributed to its centre. With k x k shifts the centres form a
lattice k times finer than the tokens. Large places are cut into overlapping chips of the extent that the encoder was trained
on; where chips overlap, tokens near the middle of their chip count more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from everysat.nn.grid import grid_shape
from everysat.types import Batch, Encoder, Features, Place, Raster

HOW = ("bilinear", "mean")


Embed = Callable[[Batch], Features]


def dense_features(
    encoder: Encoder | Embed,
    batch: Batch,
    gsd_m: float,
    *,
    token_m: float,
    shifts: int = 1,
    how: str = "bilinear",
    chip_m: float | None = None,
    stride_m: float | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Features of every pixel of ``gsd_m``, float [row, dim, y, x]; NaN where nothing was observed.

    Args:
        encoder: an encoder, or a function from a batch to features on one token grid, such as one that gives the tokens of a
            single modality.
        token_m: side of the encoder's tokens, metres.
        shifts: grids per axis, each ``token_m / shifts`` further; 1 is the token grid alone. A layer whose pixels are larger
            than a shift is averaged by area onto the shifted grid.
        how: ``bilinear`` between the centres of tokens, or the ``mean`` of all tokens that cover the pixel.
        chip_m: side of the square that the encoder sees at once, a multiple of ``token_m``; the whole place by default.
        stride_m: between chips, a multiple of ``token_m``; half a chip by default.
        batch_size: chips that are encoded together; it does not change the result beyond rounding.

    Raises:
        ValueError: sizes that are not multiples of each other, or ``how`` unknown.
    """
    if how not in HOW:
        raise ValueError(f"how={how!r} is none of {', '.join(HOW)}")
    plan = _plan(token_m, shifts, chip_m, stride_m)
    height, width = grid_shape(batch.places, gsd_m)
    if isinstance(encoder, Encoder):
        batch = encoder.known(batch)
    embed: Embed = encoder.embed if isinstance(encoder, Encoder) else encoder
    lattices = (_lattice(embed, batch[index], plan, batch_size) for index in range(len(batch)))
    return torch.stack([_sample(lattice, plan, gsd_m, height, width, how) for lattice in lattices])


def dense_at(
    encoder: Encoder | Embed,
    batch: Batch,
    gsd_m: float,
    y: Tensor,
    x: Tensor,
    *,
    token_m: float,
    shifts: int = 1,
    chip_m: float | None = None,
    stride_m: float | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Bilinear features of single pixels of ``gsd_m``, float [n, dim], of a batch of one place: those that
    :func:`dense_features` gives at rows ``y`` and columns ``x`` [n], without holding all others."""
    plan = _plan(token_m, shifts, chip_m, stride_m)
    embed: Embed = encoder.embed if isinstance(encoder, Encoder) else encoder
    known = encoder.known(batch) if isinstance(encoder, Encoder) else batch
    lattice = _lattice(embed, known[0], plan, batch_size)
    total = lattice.new_zeros(len(y), lattice.shape[0])
    share = lattice.new_zeros(len(y), 1)
    nodes = [_nodes(at, plan, gsd_m, lattice.shape[axis]) for axis, at in ((1, y), (2, x))]
    for row, row_part in ((nodes[0][0], 1 - nodes[0][2]), (nodes[0][1], nodes[0][2])):
        for col, col_part in ((nodes[1][0], 1 - nodes[1][2]), (nodes[1][1], nodes[1][2])):
            found = lattice[:, row, col].T
            weight = (row_part * col_part)[:, None] * torch.isfinite(found[:, :1])
            total += torch.nan_to_num(found) * weight
            share += weight
    return torch.where(share > 1e-6, total / share.clamp(min=1e-6), math.nan)


def _nodes(pixel: Tensor, plan: _Plan, gsd_m: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two nodes of a lattice axis of ``count`` nodes around the centres of pixels, and the share of the second. The last
    of the unshifted nodes holds for what lies beyond it."""
    last = count - plan.shifts
    at = ((pixel + 0.5) * gsd_m - plan.token_m / 2) / plan.step_m
    at = (at + 1e-6).clamp(0, last)
    low = at.floor().long()
    part = at - low
    return low, (low + 1).clamp(max=last), torch.where(part < 1e-4, 0.0, part)


@dataclass(frozen=True)
class _Plan:
    """Sides in metres; ``side`` and ``stride`` of a chip in tokens, ``side`` 0 for whole places."""

    token_m: float
    shifts: int
    side: int
    stride: int

    @property
    def step_m(self) -> float:
        return self.token_m / self.shifts


def _plan(token_m: float, shifts: int, chip_m: float | None, stride_m: float | None) -> _Plan:
    if shifts < 1:
        raise ValueError(f"shifts={shifts} must be at least 1")
    if chip_m is None:
        return _Plan(token_m, shifts, 0, 0)
    side = _whole("chip_m", chip_m, token_m)
    stride = max(1, side // 2) if stride_m is None else _whole("stride_m", stride_m, token_m)
    if stride > side:
        raise ValueError(f"stride_m={stride_m:g} is larger than chip_m={chip_m:g}: ground would be left out")
    return _Plan(token_m, shifts, side, stride)


def _whole(name: str, size_m: float, token_m: float) -> int:
    count = round(size_m / token_m)
    if count < 1 or not math.isclose(count * token_m, size_m, rel_tol=1e-6):
        raise ValueError(f"{name}={size_m:g} is not a multiple of token_m={token_m:g}")
    return count


def _lattice(embed: Embed, place: Batch, plan: _Plan, batch_size: int) -> Tensor:
    """Features at the centres of all tokens of all shifts, [dim, y, x]; node n lies at token_m / 2 + n step_m."""
    k = plan.shifts
    tokens = [math.ceil(size / plan.token_m - 1e-4) for size in (place.places[0].height_m, place.places[0].width_m)]
    lattice: Tensor | None = None
    for a in range(k):
        for b in range(k):
            count = tokens[0] - (a > 0), tokens[1] - (b > 0)
            if min(count) < 1:
                continue
            view = shifted(place, a * plan.step_m, b * plan.step_m, count, plan.token_m)
            found = _chipped(embed, view, count, plan, batch_size)
            if lattice is None:
                lattice = torch.full((len(found), *(k * n for n in tokens)), math.nan)
            lattice[:, a : a + k * count[0] : k, b : b + k * count[1] : k] = found
    assert lattice is not None
    return lattice


def shifted(batch: Batch, south_m: float, east_m: float, tokens: tuple[int, int], token_m: float) -> Batch:
    """The ``tokens`` (rows, columns) that begin ``south_m`` and ``east_m`` from the corner of each place; beyond the place
    nothing is valid. Between pixels, values are means by the area that each covers."""
    size = tokens[0] * token_m, tokens[1] * token_m
    layers = {}
    for name, raster in batch.layers.items():
        assert isinstance(raster, Raster)
        for axis, offset_m in ((2, south_m), (3, east_m)):
            raster = _moved(raster, axis, offset_m / raster.gsd_m, round(size[axis - 2] / raster.gsd_m))
        layers[name] = raster
    return Batch(tuple(Place(*size, lonlat=place.lonlat) for place in batch.places), layers)


def _moved(raster: Raster, axis: int, offset: float, count: int) -> Raster:
    """``count`` pixels from ``offset`` (in pixels) on; between pixels, the mean of two by the area that each covers."""
    whole, part = math.floor(offset + 1e-6), offset - math.floor(offset + 1e-6)
    values, valid = (_window(t, axis, whole, count) for t in (raster.values, raster.valid))
    if part > 1e-6:
        next_values, next_valid = (_window(t, axis, whole + 1, count) for t in (raster.values, raster.valid))
        values, valid = torch.lerp(values, next_values, part), valid & next_valid
    return replace(raster, values=values, valid=valid, var=None)


def _window(image: Tensor, axis: int, start: int, count: int) -> Tensor:
    part = image.narrow(axis, start, max(0, min(count, image.shape[axis] - start)))
    missing = count - part.shape[axis]
    return F.pad(part, (0, missing) if axis == 3 else (0, 0, 0, missing)) if missing else part


def _chipped(embed: Embed, view: Batch, tokens: tuple[int, int], plan: _Plan, batch_size: int) -> Tensor:
    """Features of one token grid, [dim, y, x], from chips that overlap."""
    height, width = (min(plan.side or n, n) for n in tokens)
    corners = [(y, x) for y in _starts(tokens[0], height, plan.stride) for x in _starts(tokens[1], width, plan.stride)]
    weight = _centred(height, width)
    total, count = torch.zeros(1), torch.zeros(tokens)
    for i in range(0, len(corners), batch_size):
        some = corners[i : i + batch_size]
        grids = _encode(embed, cut(view, some, height, width, plan.token_m), height, width)
        if total.ndim == 1:
            total = torch.zeros(grids.shape[1], *tokens)
        seen = torch.isfinite(grids[:, 0])
        grids = torch.nan_to_num(grids)
        for (y, x), grid, there in zip(some, grids, seen, strict=True):
            inside = (slice(y, y + height), slice(x, x + width))
            total[:, *inside] += grid * weight * there
            count[inside] += weight * there
    return torch.where(count > 0, total / count.clamp(min=1e-12), math.nan)


def _starts(tokens: int, side: int, stride: int) -> Sequence[int]:
    """Where chips begin: every stride, and one that ends at the end."""
    if side == tokens:
        return [0]
    return sorted({*range(0, tokens - side + 1, stride), tokens - side})


def _centred(height: int, width: int) -> Tensor:
    """Weight of a token by its place in the chip: 1 / (1 + distance from the middle)^2, in tokens along the farther axis."""
    y, x = ((torch.arange(n) - (n - 1) / 2).abs() for n in (height, width))
    return (1 + torch.maximum(y[:, None], x[None])) ** -2


def cut(view: Batch, corners: Sequence[tuple[int, int]], height: int, width: int, token_m: float) -> Batch:
    """The chips at these corners (in tokens) as the places of one batch."""
    n = len(corners)
    layers = {}
    for name, raster in view.layers.items():
        assert isinstance(raster, Raster)
        k = token_m / raster.gsd_m
        y, x = (torch.tensor([round(c[axis] * k) for c in corners])[:, None] for axis in (0, 1))
        y, x = (y + torch.arange(round(height * k)))[:, :, None], (x + torch.arange(round(width * k)))[:, None, :]
        values, valid = (t[:, :, y, x].permute(2, 0, 1, 3, 4).flatten(0, 1) for t in (raster.values, raster.valid))
        obs = len(raster.row)
        layers[name] = replace(
            raster,
            values=values,
            valid=valid,
            time_s=raster.time_s.repeat(n, 1),
            row=torch.arange(n).repeat_interleave(obs),
        )
    place = Place(height * token_m, width * token_m, lonlat=view.places[0].lonlat)
    return Batch((place,) * n, layers)


def _encode(embed: Embed, chips: Batch, height: int, width: int) -> Tensor:
    features = embed(chips)
    if len(features.coords) == 0:
        return torch.full((len(chips), features.mean.shape[1], height, width), math.nan)
    grid = features.grid().float().cpu()
    if grid.shape[2:] != (height, width):
        raise ValueError(
            f"the encoder made {grid.shape[2]} x {grid.shape[3]} tokens of a chip, token_m says {height} x {width}; its tokens "
            f"are {float(features.coords.size_m[0]):g} m wide"
        )
    return grid


def _sample(lattice: Tensor, plan: _Plan, gsd_m: float, height: int, width: int, how: str) -> Tensor:
    if plan.shifts == 1 and math.isclose(gsd_m, plan.token_m):
        return lattice[:, :height, :width]  # a pixel is a token
    if how == "mean":
        return _mean_of_covering(lattice, plan, gsd_m, height, width)
    seen = torch.isfinite(lattice[0]).float()
    total = torch.nan_to_num(lattice)
    for axis, count in ((1, height), (2, width)):
        low, high, part = _nodes(torch.arange(count), plan, gsd_m, lattice.shape[axis])
        part = part[:, None] if axis == 1 else part
        total, seen = (_between(t, low, high, part, t.ndim - 3 + axis) for t in (total, seen))
    return torch.where(seen > 1e-6, total / seen.clamp(min=1e-6), math.nan)


def _between(image: Tensor, low: Tensor, high: Tensor, part: Tensor, axis: int) -> Tensor:
    return image.index_select(axis, low) * (1 - part) + image.index_select(axis, high) * part


def _mean_of_covering(lattice: Tensor, plan: _Plan, gsd_m: float, height: int, width: int) -> Tensor:
    """Node n covers n to n + shifts in steps: a step of ground is covered by the nodes that end on it."""
    k = plan.shifts
    seen = torch.isfinite(lattice[:1]).float()
    parts = [F.pad(t, (k - 1, 0, k - 1, 0)) for t in (torch.nan_to_num(lattice) * seen, seen)]
    total, count = (F.avg_pool2d(t[None], k, 1, divisor_override=1)[0] for t in parts)
    steps = torch.where(count > 0, total / count.clamp(min=1), math.nan)
    y, x = (((torch.arange(n) + 0.5) * gsd_m / plan.step_m).floor().long() for n in (height, width))
    return steps[:, y.clamp(max=steps.shape[1] - 1)][:, :, x.clamp(max=steps.shape[2] - 1)]

"""Codes of single measured values, and linear maps of them that never write the codes down.

The vector of a value is several codes behind each other: of its band, of the value itself, of its row, of its column, of its date. All but
that of the value take few different values over an image. A layer norm and a linear map of such a vector are sums over the codes,
so each different code is mapped once, and a value costs one small product and a few sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from everysat.nn import draws
from everysat.nn.position import day_number
from everysat.nn.ragged import ordinal

CHUNK_ELEMENTS = 1_000_000
"""Numbers of the code of values that are held at once, 4 MB in single precision: it fits the caches of a processor."""
YEAR_S, MIDDLE_S = 365.2425 * 86400.0, 1577836800.0
"""Length of a year, and what year codes count from: 2020-01-01."""
SEASONS = 4
"""Harmonics of the year in the code of a date."""


@dataclass(frozen=True)
class Fourier:
    """Sine and cosine of ``count`` frequencies from ``phase`` to ``phase * highest / 2``, evenly spaced, and the number itself."""

    highest: float
    count: int
    phase: float = math.pi

    @property
    def dim(self) -> int:
        return 2 * self.count + 1

    def __call__(self, x: Tensor) -> Tensor:
        """Code [..., 2 count + 1] of numbers [...]: sines, cosines, number."""
        scale = torch.linspace(1.0, self.highest / 2, self.count, device=x.device, dtype=x.dtype) * self.phase
        angle = x[..., None] * scale
        return torch.cat([angle.sin(), angle.cos(), x[..., None]], -1)


def spectral_code(centre_nm: Tensor, width_nm: Tensor, anchors: Tensor, points: int = 0) -> Tensor:
    """Code [..., anchor] of bands [...]: how far the band reaches into each of the Gaussians ``anchors`` [anchor, 2] (middle and deviation,
    nanometres), that is its largest value within the band. With ``points``, at that many evenly spaced wavelengths alone. A width
    that is not known (NaN) counts as 0."""
    middle, deviation = anchors.to(centre_nm).unbind(-1)
    width = width_nm.nan_to_num(0.0)[..., None]
    low = centre_nm[..., None] - width / 2
    nearest = torch.minimum(torch.maximum(middle, low), low + width)
    if points:
        step = (width / (points - 1)).clamp(min=1e-6)
        nearest = low + ((nearest - low) / step).round().clamp(max=points - 1) * step
    return torch.exp(-0.5 * ((nearest - middle) / deviation).square())


def date_code(middle_s: Tensor, years: Fourier) -> Tensor:
    """Code [obs, 1 + 2 SEASONS + years.dim] of times [obs], seconds since 1970: whether there is a date, day of the year, year. Zeros
    where the time is not finite."""
    dated = torch.isfinite(middle_s)
    some = torch.where(dated, middle_s, MIDDLE_S).double()
    day = day_number(some[:, None].expand(-1, 2), None) - 1
    angle = 2 * math.pi * day[:, None] / 365.25 * torch.arange(1, SEASONS + 1, device=day.device)
    decades = (some - MIDDLE_S) / (10 * YEAR_S)
    code = torch.cat([torch.ones_like(angle[:, :1]), angle.sin(), angle.cos(), years(decades)], -1)
    return (code * dated[:, None]).float()


@dataclass(frozen=True)
class Part:
    """One of the codes: ``table`` [different, dim], and which of its rows each value has, int64 [value]."""

    table: Tensor
    index: Tensor

    def __getitem__(self, keep: Tensor | slice) -> Part:
        return Part(self.table, self.index[keep])


@dataclass(frozen=True)
class Atoms:
    """Values [value] with their codes, in the order band, value, then ``parts``. Without ``code``, the value itself is left out."""

    band: Part
    value: Tensor
    code: Fourier | None
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, keep: Tensor | slice) -> Atoms:
        parts = tuple(part[keep] for part in self.parts)
        return replace(self, band=self.band[keep], value=self.value[keep], parts=parts)

    @property
    def dim(self) -> int:
        return sum(part.table.shape[1] for part in (self.band, *self.parts)) + (self.code.dim if self.code else 0)

    def written(self) -> Tensor:
        """The vectors themselves [value, dim]: the plain formulation."""
        values = [] if self.code is None else [self.code(self.value)]
        return torch.cat([self.band.table[self.band.index], *values, *(p.table[p.index] for p in self.parts)], -1)

    def projected(self, maps: Sequence[tuple[nn.LayerNorm, Tensor]]) -> list[Tensor]:
        """For each (norm, weight [out, dim]), ``norm(vectors) @ weight.T`` [value, out]."""
        mapped = _Mapped.of(self, maps)
        step = max(1, CHUNK_ELEMENTS // max(1, self.code.dim if self.code else 0))
        starts = range(0, len(self), step)
        if not torch.is_grad_enabled():
            out = mapped.shift.new_empty(len(self), len(mapped.shift))
            for start in starts:
                out[start : start + step] = mapped.chunk(self, start, step)
        elif not starts:
            out = mapped.shift.new_zeros(0, len(mapped.shift))
        else:
            # Recorded chunks are computed again in the backward pass, instead of kept.
            several = len(starts) > 1
            done = [
                checkpoint(mapped.chunk, self, s, step, use_reentrant=False) if several else mapped.chunk(self, s, step)
                for s in starts
            ]
            out = torch.cat(done)
        return list(out.split([len(w) for _, w in maps], 1))


@dataclass(frozen=True)
class _Mapped:
    """A layer norm and linear map taken apart: the ``weight`` of the value's code; of each table what it is mapped to, its sum and
    the sum of its squares; and what the mean of a vector and the bias of the norm contribute."""

    weight: Tensor
    tables: tuple[tuple[Tensor, Tensor, Tensor], ...]
    total: Tensor
    shift: Tensor
    eps: float

    @classmethod
    def of(cls, atoms: Atoms, maps: Sequence[tuple[nn.LayerNorm, Tensor]]) -> _Mapped:
        parts = (atoms.band, *atoms.parts)
        value = atoms.code.dim if atoms.code else 0
        weight = torch.cat([w * norm.weight for norm, w in maps])
        first, own, *rest = weight.split([parts[0].table.shape[1], value, *(p.table.shape[1] for p in parts[1:])], 1)
        tables = tuple(
            (F.linear(part.table, piece), part.table.sum(-1), part.table.square().sum(-1))
            for part, piece in zip(parts, (first, *rest), strict=True)
        )
        shift = torch.cat([w @ norm.bias for norm, w in maps])
        return cls(own, tables, weight.sum(1), shift, maps[0][0].eps)

    def chunk(self, atoms: Atoms, start: int, step: int) -> Tensor:
        some = slice(start, start + step)
        index = [part.index[some] for part in (atoms.band, *atoms.parts)]
        mapped, total, square = (t[index[0]] for t in self.tables[0])
        if atoms.code is not None:
            code = atoms.code(atoms.value[some])
            mapped = mapped + F.linear(code, self.weight)
            # Of each frequency, the squares of sine and cosine make 1.
            total, square = total + code.sum(-1), square + atoms.code.count + atoms.value[some].square()
        for (table, s, q), at in zip(self.tables[1:], index[1:], strict=True):
            # In place where nothing is recorded: these sums are bound by memory.
            mapped = mapped + table[at] if mapped.requires_grad else mapped.add_(table[at])
            total, square = total + s[at], square + q[at]
        mean = total / atoms.dim
        scale = torch.rsqrt(square / atoms.dim - mean.square() + self.eps)[:, None]
        if mapped.requires_grad:
            return torch.addcmul(self.shift, mapped - mean[:, None] * self.total, scale)
        return mapped.addcmul_(mean[:, None], self.total, value=-1).mul_(scale).add_(self.shift)


def kept_at_random(row: Tensor, count: Tensor, generator: torch.Generator, first: int = 0) -> Tensor:
    """Which entries stay when ``count`` [row] of each row stay at random: bool [n] of ``row`` [n]. ``first`` is the number of the first row in
    the global batch."""
    where, rows = row.cpu(), len(count)
    luck = draws.uniform(generator, where + first, ordinal(where, rows))
    order = torch.argsort(luck, stable=True)
    order = order[torch.argsort(where[order], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = ordinal(where[order], rows)
    return (rank < count.cpu()[where]).to(row.device)


def spread_evenly(row: Tensor, at: Tensor, kind: Tensor, rows: int, budget: int) -> Tensor:
    """At most ``budget`` entries of each row [n], spread over its ground: bool [n].

    Entries are ordered along a Z-order curve over ``at`` [n, 2] (shares of the extent, 0 to 1), those of one spot in an order that looks
    random and depends on ``kind`` [n] (integers) and the spot alone, and every (count / budget)-th is taken. The order of the entries
    is irrelevant.
    """
    spot = (at.double() * 65535).round().long().clamp(0, 65535)
    curve = _spaced(spot[:, 0]) * 2 + _spaced(spot[:, 1])
    luck = draws.uniform(draws.generator("budget"), curve.cpu(), kind.cpu()).to(row.device)
    order = torch.argsort(luck, stable=True)
    for key in (curve, row):
        order = order[torch.argsort(key[order], stable=True)]
    count = torch.bincount(row, minlength=rows)[row[order]]
    rank = ordinal(row[order], rows)
    taken = ((rank + 1) * budget // count.clamp(min=budget)) > (rank * budget // count.clamp(min=budget))
    keep = torch.empty_like(taken)
    keep[order] = taken
    return keep


def _spaced(x: Tensor) -> Tensor:
    """The 16 bits of each number with a zero before each."""
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        x = (x | (x << shift)) & mask
    return x

"""Position codes: sinusoids of dates, and contextual relative positions on a grid (iRPE)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 3
"""Rounded distance, in cells, up to which buckets differ; all cells farther away share one bucket."""
FAR_BUCKET, PREFIX_BUCKET, BUCKETS = 6, 7, 8


def sinusoid(position: Tensor, dim: int, period: float) -> Tensor:
    """Sine and cosine code [..., dim] of numbers [...]: entry j is sin (j even) or cos (j odd) of
    position / period^(2 floor(j/2) / dim). Computed in float64, so that large day numbers lose nothing."""
    j = torch.arange(dim, device=position.device)
    frequency = period ** (-2.0 * (j // 2).double() / dim)
    angle = position.double()[..., None] * frequency
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def sine_cosine(position: Tensor, dim: int, precision: torch.dtype = torch.float64) -> Tensor:
    """Code [..., dim] of numbers [...], in any unit: sines, then cosines, of wavelengths from 2 pi up to 2 pi 10000. ``precision`` of the
    angles matters to published weights whose numbers are large."""
    frequency = 1.0 / 10000.0 ** (torch.arange(dim // 2, device=position.device, dtype=precision) / (dim / 2))
    angle = position.to(precision)[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1).float()


def grid_sinusoid(at: Tensor, dim: int) -> Tensor:
    """Sine and cosine code [..., dim] of places ``at`` [..., 2] (row, column), in any unit: :func:`sine_cosine` of the column in one
    half of the numbers, of the row in the other (as in MAE and, in metres, AnySat)."""
    if dim % 4:
        raise ValueError(f"dim={dim} must be a multiple of 4 to hold sines and cosines of two coordinates")
    return sine_cosine(at.flip(-1), dim // 2).flatten(-2)


def day_number(time_s: Tensor, origin: float | None) -> Tensor:
    """Day of the middle of each period ``time_s`` [obs, 2]: days since ``origin`` (seconds since 1970), or, with
    ``origin=None``, the day of its year, 1 to 366. float64 [obs]."""
    middle = time_s.mean(dim=1)
    if origin is not None:
        return (middle - origin) / 86400.0
    # The calendar in whole numbers, which float64 holds exactly. Years that begin on 1 March end with their leap day; an era is the
    # 400 of them after which the calendar repeats.
    days = (middle / 86400.0).floor() + 719468.0  # since 1 March of the year 0
    era = (days / 146097.0).floor()
    of_era = days - 146097.0 * era
    year = (
        (of_era - (of_era / 1460.0).floor() + (of_era / 36524.0).floor() - (of_era / 146096.0).floor()) / 365.0
    ).floor()
    of_year = of_era - (365.0 * year + (year / 4.0).floor() - (year / 100.0).floor())
    whole = 400.0 * era + year
    leap = (whole % 4.0 == 0) & ((whole % 100.0 != 0) | (whole % 400.0 == 0))
    return torch.where(of_year >= 306.0, of_year - 305.0, of_year + 60.0 + leap)


def bucket_of(squared_distance: Tensor) -> Tensor:
    """iRPE bucket of squared cell distances (Wu et al. 2021, with alpha 1.9, beta 3.8, gamma 15.2): 3 for the cell itself, 4
    for its neighbours, 5 for distances that round to 2 or 3, 6 beyond. Buckets 0-2 exist in the table but are never used."""
    rounded = squared_distance.double().sqrt().round()
    table = torch.tensor([3, 4, 5, 5, FAR_BUCKET], device=squared_distance.device)
    return table[rounded.clamp(max=NEAR + 1).long()]


@dataclass(frozen=True)
class Grid:
    """How a token sequence lies on the ground: ``prefix`` tokens without position, then ``copies`` times the
    ``height`` x ``width`` cells of one grid, row by row."""

    prefix: int
    copies: int
    height: int
    width: int

    def __len__(self) -> int:
        return self.prefix + self.copies * self.height * self.width

    @classmethod
    def guessed(cls, length: int) -> Grid:
        """The grid that the released OmniSat code assumes for a sequence of that length, whatever its tokens are: the largest
        square that fits, behind a prefix of the rest. Right for one modality alone. A perfect square leaves no prefix, for
        which the released code fails."""
        side = math.isqrt(length)
        return cls(length - side * side, 1, side, side)

    def buckets(self, queries: Grid | None = None) -> Tensor:
        """Bucket of every (query, key) pair, int64 [len(queries), len(self)]; queries default to the keys themselves."""
        queries = queries or self
        rows, cols = (grid.cells() for grid in (queries, self))
        near = bucket_of((rows[:, None] - cols[None]).square().sum(-1))
        table = torch.full((len(queries), len(self)), PREFIX_BUCKET)
        table[queries.prefix :, self.prefix :] = near
        return table

    def cells(self) -> Tensor:
        """Row and column of the tokens behind the prefix, int64 [copies x height x width, 2]."""
        y, x = torch.meshgrid(torch.arange(self.height), torch.arange(self.width), indexing="ij")
        return torch.stack([y, x], -1).reshape(-1, 2).repeat(self.copies, 1)

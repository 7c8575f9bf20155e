"""Codes of where a place lies on Earth, the networks that read them, and the base of encoders that read nothing else.

Positions are ``lonlat`` [n, 2]: longitude and latitude in degrees (WGS 84), in double precision, since the finest codes tell metres apart.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from everysat.types import ALWAYS, Batch, ContractError, Coords, Encoder, Features, Place, Tokens

EQUAL_EARTH = (1.340264, -0.081106, 0.000893, 0.003796)
"""Coefficients A1 to A4 of the Equal Earth projection (Savric, Patterson and Jenny 2018, equation 7)."""


def positions(places: Sequence[Place], needed_by: str) -> Tensor:
    """``lonlat`` float64 [place, 2] of places.

    Raises:
        ContractError: a place does not say where it lies, or where there is no such position on Earth.
    """
    for number, place in enumerate(places):
        if place.lonlat is None:
            raise ContractError(
                f"place {number} of {len(places)} has no lonlat, all that {needed_by} reads. Give Place(..., lonlat=(lon, lat)) in "
                "degrees, or read the place from files with a CRS"
            )
    lonlat = torch.tensor([place.lonlat for place in places], dtype=torch.float64).reshape(-1, 2)
    check(lonlat)
    return lonlat


def check(lonlat: Tensor) -> Tensor:
    """``lonlat`` [n, 2], if all are positions on Earth; ContractError otherwise."""
    if lonlat.ndim != 2 or lonlat.shape[1] != 2:
        raise ContractError(
            f"lonlat has shape {tuple(lonlat.shape)}, expected [n, 2]: longitude and latitude in degrees"
        )
    right = (lonlat[:, 0].abs() <= 360) & (lonlat[:, 1].abs() <= 90)
    if not right.all():
        wrong = lonlat[~right][0].tolist()
        raise ContractError(
            f"lonlat={tuple(wrong)} is no longitude (-180 to 180) and latitude (-90 to 90) in degrees, in this order"
        )
    return lonlat


def cartesian(lonlat: Tensor) -> Tensor:
    """Points [n, 3] of the unit sphere: x towards longitude 0 on the equator, z towards the north pole."""
    lon, lat = torch.deg2rad(lonlat).unbind(-1)
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], -1)


def equal_earth(lonlat: Tensor) -> Tensor:
    """Equal Earth projection [n, 2] (east, north) of the unit sphere: areas keep their proportions."""
    lon, lat = torch.deg2rad(lonlat).unbind(-1)
    a1, a2, a3, a4 = EQUAL_EARTH
    t = torch.asin(math.sqrt(3) / 2 * lat.sin())
    slope = 9 * a4 * t**8 + 7 * a3 * t**6 + 3 * a2 * t**2 + a1
    east = 2 * math.sqrt(3) * lon * t.cos() / (3 * slope)
    return torch.stack([east, a4 * t**9 + a3 * t**7 + a2 * t**3 + a1 * t], -1)


def spherical_harmonics(lonlat: Tensor, degrees: int) -> Tensor:
    """Real, orthonormal spherical harmonics [n, degrees^2] of degrees 0 to ``degrees`` - 1, by degree and in it by order -l to l.

    Orders m > 0 have cos(m longitude), m < 0 sin(|m| longitude), without the Condon-Shortley sign. Legendre functions come from their
    recurrence in normalised form (Holmes and Featherstone 2002, equations 11-13), which stays exact where explicit polynomials lose
    all digits. Computed in double precision.
    """
    lon, lat = torch.deg2rad(lonlat.double()).unbind(-1)
    z, radius = lat.sin(), lat.cos()
    found: dict[tuple[int, int], Tensor] = {}
    sectoral = torch.full_like(z, math.sqrt(1 / (4 * math.pi)))
    for m in range(degrees):
        if m:
            sectoral = sectoral * radius * math.sqrt((2 * m + 1) / (2 * m))
        before, now = torch.zeros_like(z), sectoral
        turns = [(m, (m * lon).cos() * math.sqrt(2)), (-m, (m * lon).sin() * math.sqrt(2))] if m else [(0, 1.0)]
        for degree in range(m, degrees):
            if degree > m:
                a = math.sqrt((4 * degree**2 - 1) / (degree**2 - m**2))
                b = math.sqrt(((degree - 1) ** 2 - m**2) / (4 * (degree - 1) ** 2 - 1)) if degree > m + 1 else 0.0
                before, now = now, a * (z * now - b * before)
            for order, turn in turns:
                found[degree, order] = now * turn
    return torch.stack([found[degree, order] for degree in range(degrees) for order in range(-degree, degree + 1)], -1)


class Fourier(nn.Module):
    """Random Fourier features (Tancik et al. 2020): cosines, then sines, of 2 pi times ``count`` random combinations of the inputs, drawn
    from a normal distribution of deviation ``sigma``, cycles per unit, and then fixed. [n, inputs] to [n, 2 count]."""

    matrix: Tensor

    def __init__(self, inputs: int, count: int, sigma: float) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(count, inputs) * sigma)

    def forward(self, x: Tensor) -> Tensor:
        angle = (
            2 * math.pi * x.double() @ self.matrix.T.double()
        )  # in single precision, the finest would be off by 1e-3
        return torch.cat([angle.cos(), angle.sin()], -1).to(self.matrix.dtype)


class Siren(nn.Module):
    """Layers with sines between them (Sitzmann et al. 2020): sin(w x) with w = ``first`` behind the first layer and 1 behind others, and no
    sine behind the last. ``dropout`` acts before the sines, as in SatCLIP. [n, inputs] to [n, outputs]."""

    def __init__(
        self, inputs: int, width: int, outputs: int, hidden: int, *, first: float = 30.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [inputs, *[width] * hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.first, self.dropout = first, nn.Dropout(dropout)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            limit = 1 / inputs if number == 0 else math.sqrt(6 / layer.in_features)
            nn.init.uniform_(layer.weight, -limit, limit)
            nn.init.uniform_(layer.bias, -limit, limit)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for number, layer in enumerate(hidden):
            x = torch.sin((self.first if number == 0 else 1.0) * self.dropout(layer(x)))
        out: Tensor = last(x)
        return out


class LocationEncoder(Encoder):
    """An encoder that reads where a place lies and none of its layers, so that ``inputs`` is empty. A place is one token as large as
    it; a place without ``lonlat`` is an error. Derived classes give the ``code`` of positions and the ``network`` that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = {}

    @abstractmethod
    def code(self, lonlat: Tensor) -> Tensor:
        """Of ``lonlat`` float64 [n, 2], what the network reads, [n, ...]."""

    @abstractmethod
    def network(self, code: Tensor) -> Tensor:
        """Of :meth:`code`, the features, float [n, dim]."""

    def of(self, lonlat: Tensor) -> Tensor:
        """Features [n, dim] of positions ``lonlat`` [n, 2], longitude and latitude in degrees: a table of points needs no places."""
        return self.network(self.code(check(lonlat.double())))

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per place, its code."""
        device = next(self.parameters()).device
        x = self.code(positions(batch.places, self.family).to(device))
        size = torch.tensor([[place.height_m, place.width_m] for place in batch.places], device=device).view(-1, 2)
        row = torch.arange(len(batch), device=device)
        always = torch.tensor(ALWAYS, dtype=torch.float64, device=device).expand(len(batch), 2)
        coords = Coords(row, size / 2, size.amax(1), always, torch.zeros_like(row))
        return Tokens(x, coords, ("location",), batch.places)

    def forward(self, tokens: Tokens) -> Features:
        """The feature of each place, also as its summary; zeros for places whose token was taken away."""
        mean = self.network(tokens.x)
        summary = mean.new_zeros(len(tokens.places), mean.shape[1]).index_copy(0, tokens.coords.row, mean)
        return Features(mean, tokens.coords, summary, tokens.places)

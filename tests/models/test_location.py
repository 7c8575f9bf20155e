"""Codes of positions: what geometry says of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from everysat.nn.location import Fourier, Siren, cartesian, equal_earth, spherical_harmonics


def quadrature(degrees: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and weights that integrate products of harmonics below ``degrees`` over the sphere exactly."""
    z, weight = np.polynomial.legendre.leggauss(degrees)
    lon = np.arange(2 * degrees) * 180.0 / degrees
    lonlat = np.stack(np.meshgrid(lon, np.degrees(np.arcsin(z))), -1).reshape(-1, 2)
    return torch.tensor(lonlat), torch.tensor(np.repeat(weight, 2 * degrees) * math.pi / degrees)


@pytest.mark.parametrize("degrees", [1, 10, 40])
def test_harmonics_are_orthonormal(degrees) -> None:
    lonlat, weight = quadrature(degrees)
    found = spherical_harmonics(lonlat, degrees)
    product = found.T @ (weight[:, None] * found)
    torch.testing.assert_close(product, torch.eye(degrees**2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_harmonics_of_a_degree_sum_to_a_constant() -> None:
    """The addition theorem: squares over the orders of degree l add up to (2 l + 1) / 4 pi, also at the poles."""
    lonlat = torch.tensor([[0.0, 90.0], [77.0, -90.0], [-179.0, 89.999], [12.0, 0.0]], dtype=torch.float64)
    found = spherical_harmonics(lonlat, 30)
    for degree in range(30):
        total = found[:, degree**2 : (degree + 1) ** 2].square().sum(1)
        torch.testing.assert_close(total, torch.full_like(total, (2 * degree + 1) / (4 * math.pi)))


def test_harmonics_turn_with_the_globe() -> None:
    """Turned by a longitude, each order mixes with its opposite alone."""
    lonlat = torch.tensor([[20.0, 35.0]], dtype=torch.float64)
    a, b = spherical_harmonics(lonlat, 4)[0], spherical_harmonics(lonlat + torch.tensor([[30.0, 0.0]]), 4)[0]
    plus, minus, turn = 9 + 3 + 2, 9 + 3 - 2, math.radians(60)
    torch.testing.assert_close(b[plus], a[plus] * math.cos(turn) - a[minus] * math.sin(turn))
    torch.testing.assert_close(b[minus], a[minus] * math.cos(turn) + a[plus] * math.sin(turn))


def test_cartesian_axes() -> None:
    found = cartesian(torch.tensor([[0.0, 0.0], [90.0, 0.0], [45.0, 90.0]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_equal_earth_keeps_areas() -> None:
    """The Jacobian of the projection is cos(latitude) everywhere."""
    at = torch.tensor([[10.0, 5.0], [-120.0, 60.0], [170.0, -80.0]], dtype=torch.float64)
    for point in at:
        jacobian = torch.autograd.functional.jacobian(
            lambda p: equal_earth(torch.rad2deg(p)[None])[0], torch.deg2rad(point)
        )
        torch.testing.assert_close(jacobian.det(), torch.deg2rad(point)[1].cos(), rtol=1e-5, atol=0)


def test_equal_earth_of_known_points() -> None:
    """The pole is a line, 1.317 radii above the equator; half of the equator is 2.707 radii long."""
    found = equal_earth(torch.tensor([[180.0, 0.0], [0.0, 90.0]], dtype=torch.float64))
    torch.testing.assert_close(
        found, torch.tensor([[2.70663, 0.0], [0.0, 1.31736]], dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_fourier_features_have_unit_length_per_frequency() -> None:
    torch.manual_seed(0)
    found = Fourier(2, 16, 8.0)(torch.rand(5, 2, dtype=torch.float64))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, :16].square() + found[:, 16:].square(), torch.ones(5, 16))


def test_siren_starts_where_sines_bend() -> None:
    """The initialisation of the paper: a hidden layer's sum has a standard deviation of about 1, whatever the width."""
    torch.manual_seed(0)
    siren = Siren(3, 256, 8, 2)
    sums: list[torch.Tensor] = []
    siren.layers[1].register_forward_hook(lambda _, __, out: sums.append(out))
    siren(torch.rand(500, 3) * 2 - 1)
    assert 0.8 < float(sums[0].detach().std()) < 1.2

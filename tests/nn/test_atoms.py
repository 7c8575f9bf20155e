"""Codes of values, and the choice of some of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from everysat.nn.atoms import Atoms, Fourier, Part, date_code, spectral_code, spread_evenly

YEARS = Fourier(8, 4)


def test_a_fourier_code() -> None:
    code = Fourier(6, 3)(torch.tensor([0.25]))[0]
    scale = math.pi * torch.tensor([1.0, 2.0, 3.0]) * 0.25
    torch.testing.assert_close(code, torch.cat([scale.sin(), scale.cos(), torch.tensor([0.25])]))


def test_the_reach_of_a_band_is_the_largest_within_it() -> None:
    anchors = torch.tensor([[500.0, 15.0], [560.0, 15.0], [900.0, 20.0]])
    centre, width = torch.tensor([540.0, 540.0]), torch.tensor([100.0, math.nan])
    wide, thin = spectral_code(centre, width, anchors)
    points = torch.linspace(490.0, 590.0, 20001)
    dense = torch.exp(-0.5 * ((points[:, None] - anchors[:, 0]) / anchors[:, 1]).square()).amax(0)
    torch.testing.assert_close(wide, dense, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(thin, torch.exp(-0.5 * ((540.0 - anchors[:, 0]) / anchors[:, 1]).square()))
    sampled = spectral_code(centre, width, anchors, points=50)[0]
    points = torch.linspace(490.0, 590.0, 50)
    expected = torch.exp(-0.5 * ((points[:, None] - anchors[:, 0]) / anchors[:, 1]).square()).amax(0)
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-6)


def test_dates_tell_season_and_year() -> None:
    day = 86400.0
    times = torch.tensor([18000.0, 18000.0 + 365.2425 * 4, 18090.0, math.inf, -math.inf], dtype=torch.float64) * day
    code = date_code(times, YEARS)
    season = slice(1, 9)
    torch.testing.assert_close(code[0, season], code[1, season], rtol=0, atol=0.1)
    assert (code[0, 9:] - code[1, 9:]).abs().max() > 0.3
    assert (code[0, season] - code[2, season]).abs().max() > 0.5
    assert not code[3:].any()
    assert (code[:3, 0] == 1).all()


@pytest.mark.parametrize("valued", [True, False])
def test_maps_of_written_and_factored_vectors_agree(generator, valued) -> None:
    n = 300
    tables = [torch.randn(size, dim, generator=generator) for size, dim in ((5, 4), (7, 3), (2, 6))]
    parts = [Part(t, torch.randint(len(t), (n,), generator=generator)) for t in tables]
    value = 3 * torch.randn(n, generator=generator)
    atoms = Atoms(parts[0], value, Fourier(8, 5) if valued else None, tuple(parts[1:]))
    norm, weight = nn.LayerNorm(atoms.dim), torch.randn(9, atoms.dim, generator=generator)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    nn.init.normal_(norm.bias)
    (found,) = atoms.projected([(norm, weight)])
    torch.testing.assert_close(found, norm(atoms.written()) @ weight.T, rtol=1e-4, atol=1e-4)
    keep = torch.randperm(n, generator=generator)[:50]
    torch.testing.assert_close(atoms[keep].projected([(norm, weight)])[0], found[keep], rtol=1e-4, atol=1e-4)
    assert atoms.written().shape == (n, atoms.dim)


def test_a_budget_is_spread_over_ground_and_kinds(generator) -> None:
    side, kinds = 32, 6
    y, x, kind = torch.meshgrid(torch.arange(side), torch.arange(side), torch.arange(kinds), indexing="ij")
    at = (torch.stack([y.flatten(), x.flatten()], 1) + 0.5) / side
    row = torch.cat([torch.zeros(len(at), dtype=torch.long), torch.ones(100, dtype=torch.long)])
    at, kind = torch.cat([at, at[:100]]), torch.cat([kind.flatten(), kind.flatten()[:100]])
    keep = spread_evenly(row, at, kind, 2, 512)
    assert torch.bincount(row[keep]).tolist() == [512, 100]  # the second place has fewer than the budget
    first = keep & (row == 0)
    blocks = (at[first] * 8).long()
    share = torch.bincount(blocks[:, 0] * 8 + blocks[:, 1], minlength=64)
    assert share.min() == share.max() == 8
    assert (torch.bincount(kind[first], minlength=kinds) - 512 / kinds).abs().max() < 30
    order = torch.randperm(len(row), generator=generator)
    assert torch.equal(spread_evenly(row[order], at[order], kind[order], 2, 512), keep[order])

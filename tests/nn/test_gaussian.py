"""Laws of fusions, and the measures of Gaussians against integrals and samples."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from everysat.nn.gaussian import (
    FUSIONS,
    Gaussian,
    GaussianHead,
    containment,
    divergence,
    expected_match,
    fuse,
    information,
)

PRECISION = ("precision_average", "product")


@pytest.fixture
def said(generator):
    """Means, log variances [7, 4, 5] and which witnesses are there [7, 4]; some sets are empty, one is full."""
    there = torch.rand(7, 4, generator=generator) > 0.4
    there[0], there[1], there[2] = False, True, torch.tensor([True, False, False, False])
    return torch.randn(7, 4, 5, generator=generator), torch.randn(7, 4, 5, generator=generator) - 1, there


def close(a: Gaussian, b: Gaussian, **tolerance: float) -> None:
    torch.testing.assert_close(a.mean, b.mean, **tolerance)
    torch.testing.assert_close(a.log_var, b.log_var, **tolerance)
    assert torch.equal(a.observed, b.observed)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_order_of_witnesses_is_irrelevant(fusion, said, generator) -> None:
    mean, log_var, there = said
    ties = torch.rand(log_var.shape, generator=generator) < 0.5  # of which a first one could win
    log_var = torch.where(ties, -9.0, log_var)
    order = torch.tensor([2, 0, 3, 1])
    weight = torch.rand(4, generator=generator) + 0.1
    there_too, weight_too = there[:, order], weight[order]
    close(
        fuse(fusion, mean, log_var, there, weight),
        fuse(fusion, mean[:, order], log_var[:, order], there_too, weight_too),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_who_is_not_there_has_no_effect(fusion, said) -> None:
    mean, log_var, there = said
    wild = [
        torch.where(there[..., None], x, torch.tensor(value)) for x, value in ((mean, math.nan), (log_var, math.inf))
    ]
    close(fuse(fusion, mean, log_var, there), fuse(fusion, *wild, there))
    for row in range(1, 7):
        keep = there[row]
        if keep.any():
            alone = fuse(fusion, mean[row, keep], log_var[row, keep], keep[keep])
            both = fuse(fusion, mean, log_var, there)
            torch.testing.assert_close(both.mean[row], alone.mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(both.log_var[row], alone.log_var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nobody_gives_the_prior_and_says_so(fusion, said) -> None:
    mean, log_var, there = said
    found = fuse(fusion, mean, log_var, there)
    assert not found.observed[0]
    assert (found.mean[0] == 0).all()
    assert (found.var[0] == 1).all()
    assert found.information()[0] == 0
    assert found.observed.tolist() == there.any(1).tolist()
    assert (found.mean[found.observed] != 0).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_are_finite_and_reach_who_is_there(fusion, said) -> None:
    mean, log_var, there = said
    log_var = log_var.clone()
    log_var[1, 0] = math.inf
    log_var[1, 1] = -math.inf
    mean.requires_grad_()
    log_var.requires_grad_()
    found = fuse(fusion, mean, log_var, there)
    assert torch.isfinite(found.mean).all()
    assert torch.isfinite(found.log_var).all()
    (found.mean.sum() + found.log_var[2:].sum()).backward()
    for grad in (mean.grad, log_var.grad):
        assert torch.isfinite(grad).all()
        assert (grad[~there] == 0).all()
        assert grad[2, 0].any()


@pytest.mark.parametrize("fusion", PRECISION)
def test_another_witness_never_lowers_precision(fusion, said) -> None:
    mean, log_var, _ = said
    before = fuse(fusion, mean, log_var, torch.tensor([True, True, False, False]).expand(7, 4))
    after = fuse(fusion, mean, log_var, torch.tensor([True, True, True, False]).expand(7, 4))
    assert (after.log_var < before.log_var).all()


@pytest.mark.parametrize("fusion", PRECISION)
def test_a_duplicate_with_half_weight_is_one_copy(fusion, said) -> None:
    mean, log_var, _ = said
    twice = torch.tensor([0, 0, 1, 2])
    everyone = torch.ones(7, 4, dtype=torch.bool)
    doubled = fuse(fusion, mean[:, twice], log_var[:, twice], everyone, torch.tensor([0.5, 0.5, 1.0, 1.0]))
    close(doubled, fuse(fusion, mean[:, :3], log_var[:, :3], everyone[:, :3]), rtol=1e-4, atol=1e-5)
    naive = fuse(fusion, mean[:, twice], log_var[:, twice], everyone)
    assert (naive.log_var < doubled.log_var).all()


def test_copies_count_once_in_a_tempered_product(said) -> None:
    mean, log_var, _ = said
    copies = torch.zeros(4, dtype=torch.long)
    everyone = torch.ones(7, 4, dtype=torch.bool)
    once = fuse("product", mean[:, :1], log_var[:, :1], everyone[:, :1])
    close(fuse("tempered_product", mean[:, copies], log_var[:, copies], everyone), once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["max_conf", "soft_max_conf", *PRECISION])
@pytest.mark.parametrize("nothing", [40.0, math.inf])
def test_a_witness_that_knows_nothing_is_a_no_op(fusion, nothing, said) -> None:
    mean, log_var, _ = said
    log_var = log_var.clone()
    log_var[:, 3], everyone = nothing, torch.ones(7, 4, dtype=torch.bool)
    without = fuse(fusion, mean[:, :3], log_var[:, :3], everyone[:, :3])
    close(fuse(fusion, mean, log_var, everyone), without, rtol=1e-5, atol=1e-6)


def test_values_by_hand() -> None:
    mean, var = torch.tensor([[1.0], [4.0]]), torch.tensor([[1.0], [0.5]])
    both = torch.tensor([True, True])
    expected = {
        "max_conf": (4.0, 0.5),
        "precision_average": (3.0, 1 / 3),
        "product": (9 / 4, 1 / 4),
        "tempered_product": (4.5 / 2.5, 1 / 2.5),
        "soft_max_conf": (17 / 5, 1 / 25 + 0.5 * 16 / 25),
        "mixture": (2.5, 0.75 + 2.25),
        "mean": (2.5, 0.375),
    }
    parts = [(0.5, 0.5), (8 / 3, 1 / 3), (9 / 4, 1 / 4)]
    middle = sum(m for m, _ in parts) / 3
    expected["subset_mixture"] = (middle, sum(v + m**2 for m, v in parts) / 3 - middle**2)
    assert set(expected) == set(FUSIONS)
    for fusion, (m, v) in expected.items():
        found = fuse(fusion, mean, var.log(), both)
        assert found.mean.item() == pytest.approx(m, rel=1e-5), fusion
        assert found.var.item() == pytest.approx(v, rel=1e-5), fusion


def test_a_product_is_the_posterior_and_is_calibrated_whatever_is_there(generator) -> None:
    """z ~ N(0, 1), seen with errors of known size: (z - mean)^2 / var is 1 on average for every number of witnesses, and for no other fusion."""
    z = torch.randn(4000, 6, generator=generator)
    sizes = torch.tensor([0.3, 0.6, 1.0, 2.0])
    seen = z[:, None] + sizes[:, None] * torch.randn(4000, 4, 6, generator=generator)
    log_var = (2 * sizes.log())[:, None].expand(seen.shape)
    ratio = {}
    for fusion in FUSIONS:
        for count in (0, 1, 2, 3, 4):
            order = torch.rand(4000, 4, generator=generator).argsort(1).argsort(1)
            found = fuse(fusion, seen, log_var, order < count)
            ratio[fusion, count] = float(((z - found.mean).square() / found.var).mean())
    for count in range(5):
        assert ratio["product", count] == pytest.approx(1, abs=0.03)
    assert ratio["tempered_product", 4] < 0.7
    assert ratio["precision_average", 1] == pytest.approx(1, abs=0.05)


def test_half_precision_is_computed_in_full(said) -> None:
    mean, log_var, there = said
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fuse("product", mean.bfloat16(), log_var.bfloat16(), there)
    assert found.mean.dtype == torch.float32
    close(found, fuse("product", mean.bfloat16().float(), log_var.bfloat16().float(), there))


def test_what_does_not_fit_is_refused(said) -> None:
    mean, log_var, there = said
    with pytest.raises(LookupError, match="Did you mean max_conf"):
        fuse("maxconf", mean, log_var, there)
    with pytest.raises(ValueError, match=r"have shapes.*\[7, 3\]"):
        fuse("product", mean, log_var, there[:, :3])
    with pytest.raises(ValueError, match="at most 8"):
        fuse("subset_mixture", torch.zeros(1, 9, 2), torch.zeros(1, 9, 2), torch.ones(1, 9, dtype=torch.bool))


def test_divergence_and_information_are_those_of_the_textbook(generator) -> None:
    g = Gaussian(torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator), torch.ones(3).bool())
    normal = Normal(g.mean, (g.log_var / 2).exp())
    torch.testing.assert_close(
        divergence(g), kl_divergence(normal, Normal(torch.tensor(0.0), torch.tensor(1.0))).sum(-1)
    )
    torch.testing.assert_close(information(g.var), (Normal(0.0, 1.0).entropy() - normal.entropy()).mean(-1))
    assert (divergence(Gaussian(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2).bool())) == 0).all()


def test_expected_match_is_what_samples_give(generator) -> None:
    """E|z_a - z_b|^2 of independent samples, for means of length sqrt(dim), is 2 dim (1 - match)."""
    mean = torch.nn.functional.normalize(torch.randn(2, 8, generator=generator), dim=-1) * math.sqrt(8)
    a, b = (Gaussian(m[None], torch.randn(1, 8, generator=generator) - 1, torch.ones(1).bool()) for m in mean)
    draws = [g.sample(torch.randn(200_000, 8, generator=generator)) for g in (a, b)]
    distance = (draws[0] - draws[1]).square().sum(-1).mean()
    assert float(distance / 16) == pytest.approx(1 - expected_match(a, b).item(), rel=0.01)


def test_containment_is_the_difference_of_two_integrals() -> None:
    a = Gaussian(torch.tensor([[0.3]]), torch.tensor([[0.4]]).log(), torch.ones(1).bool())
    b = Gaussian(torch.tensor([[-0.5]]), torch.tensor([[2.0]]).log(), torch.ones(1).bool())
    p, q = stats.norm(0.3, math.sqrt(0.4)).pdf, stats.norm(-0.5, math.sqrt(2.0)).pdf
    expected = math.log(integrate.quad(lambda x: p(x) ** 2 * q(x), -20, 20)[0])
    expected -= math.log(integrate.quad(lambda x: p(x) * q(x) ** 2, -20, 20)[0])
    assert containment(a, b).item() == pytest.approx(expected, rel=1e-5)
    assert containment(a, b).item() > 0 > containment(b, a).item()


def test_samples_have_the_moments(generator) -> None:
    g = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0]).log(), torch.tensor(True))
    drawn = g.sample(torch.randn(100_000, 2, generator=generator))
    reference = MultivariateNormal(g.mean, torch.diag(g.var))
    torch.testing.assert_close(drawn.mean(0), reference.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.var(0), reference.variance, atol=0.03, rtol=0)


def test_a_head_keeps_length_and_bounds(generator) -> None:
    head = GaussianHead(12, 8)
    mean, log_var = head(torch.randn(5, 12, generator=generator))
    torch.testing.assert_close(mean.square().mean(-1), torch.ones(5))
    torch.testing.assert_close(log_var, torch.full((5, 8), -3.0), atol=0.3, rtol=0)
    with torch.no_grad():
        head.spread.weight.mul_(1e6)
    log_var = head(torch.randn(50, 12, generator=generator))[1].detach()
    assert -9.0 <= float(log_var.min()) < -8.9
    assert 2.9 < float(log_var.max()) <= 3.0

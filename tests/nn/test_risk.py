"""Risk and coverage, ranks and calibration against definitions."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from everysat.nn.gaussian import Gaussian, fuse
from everysat.nn.risk import auroc, calibration_by_count, error_ratio, fitted_scale, risk_coverage
from everysat.report import risk_figure


def test_the_curve_by_hand() -> None:
    curve = risk_coverage(torch.tensor([0.9, 0.1, 0.5, 0.7]), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert curve.aurc == pytest.approx(1 / 3)
    assert curve.best == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert curve.excess == pytest.approx(curve.aurc - curve.best)
    assert curve.chance == 0.5
    assert curve.at(0.5) == 0.5
    assert curve.at(0.6) == curve.at(0.75) == pytest.approx(1 / 3)
    assert curve.coverage_at(0.4) == 0.75
    assert curve.coverage_at(-1.0) == 0.0


def test_equal_confidence_is_chance_in_any_order(generator) -> None:
    loss = torch.rand(50, generator=generator)
    curve = risk_coverage(torch.ones(50), loss)
    torch.testing.assert_close(curve.risk, loss.double().mean().expand(50))
    confidence = torch.randint(4, (50,), generator=generator).float()
    order = torch.randperm(50, generator=generator)
    torch.testing.assert_close(risk_coverage(confidence, loss).risk, risk_coverage(confidence[order], loss[order]).risk)


def test_a_perfect_order_has_no_excess_and_a_wrong_one_much(generator) -> None:
    loss = torch.rand(200, generator=generator) ** 2
    assert risk_coverage(-loss, loss).excess == 0
    assert risk_coverage(loss, loss).aurc > risk_coverage(torch.zeros(200), loss).aurc > risk_coverage(-loss, loss).aurc


def test_confidence_that_is_no_number_comes_last() -> None:
    curve = risk_coverage(torch.tensor([math.nan, 0.2, 0.1]), torch.tensor([1.0, 0.0, 0.0]))
    assert curve.risk.tolist() == pytest.approx([0, 0, 1 / 3])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        risk_coverage(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="n > 0"):
        risk_coverage(torch.ones(0), torch.ones(0))
    with pytest.raises(ValueError, match="coverage=0"):
        risk_coverage(torch.ones(3), torch.ones(3)).at(0)


def test_auroc_is_that_of_scikit_learn_with_ties(generator) -> None:
    score = torch.randint(6, (80,), generator=generator).float()
    truth = torch.rand(80, generator=generator) < 0.3 + 0.05 * score
    assert auroc(score, truth) == pytest.approx(roc_auc_score(truth.numpy(), score.numpy()))
    assert math.isnan(auroc(score, torch.ones(80, dtype=torch.bool)))


def test_calibration_by_count_finds_what_is_wrong(generator) -> None:
    z = torch.randn(6000, 4, generator=generator)
    seen = z[:, None] + 0.5 * torch.randn(6000, 3, 4, generator=generator)
    there = torch.rand(6000, 3, generator=generator) > 0.4
    honest = fuse("product", seen, torch.full(seen.shape, 2 * math.log(0.5)), there)
    found = calibration_by_count(honest, z, there)
    assert set(found) == {0, 1, 2, 3}
    assert list(found.values()) == pytest.approx([1, 1, 1, 1], abs=0.06)
    vain = fuse("product", seen, torch.full(seen.shape, 2 * math.log(0.25)), there)
    boasted = calibration_by_count(vain, z, there)
    assert boasted[0] == pytest.approx(1, abs=0.06)
    assert min(boasted[k] for k in (1, 2, 3)) > 2.5


def test_fitted_scale_makes_truth_most_likely(generator) -> None:
    said = Gaussian(torch.zeros(5000, 2), torch.zeros(5000, 2), torch.ones(5000, dtype=torch.bool))
    truth = 1.7 * torch.randn(5000, 2, generator=generator)
    scale = fitted_scale(said, truth)
    assert scale == pytest.approx(1.7**2, rel=0.05)

    def cost(factor):
        return 0.5 * (error_ratio(said, truth).mean() / factor + math.log(factor))

    assert cost(scale) < min(cost(0.9 * scale), cost(1.1 * scale))


def test_the_figure_names_each_curve_with_its_area(generator) -> None:
    loss = torch.rand(1000, generator=generator)
    curve = risk_coverage(-loss, loss)
    figure = risk_figure({"fused": curve, "chance": risk_coverage(torch.zeros(1000), loss)}, risk="squared error")
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_legend().get_texts()] == [
        f"fused (AURC {curve.aurc:.3g})",
        f"chance (AURC {float(loss.mean()):.3g})",
    ]
    x, y = axis.lines[0].get_data()
    assert x[-1] == 1.0
    assert y[-1] == pytest.approx(float(loss.mean()))
    assert len(x) <= 201

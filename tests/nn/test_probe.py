"""Probes: the optimum of their objective, choices made on left-out groups, weights that mean what they say."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SkRidge

from everysat.nn.probe import (
    WEIGHTINGS,
    Linear,
    Scale,
    fit_linear,
    fit_neighbours,
    fit_ridge,
    sample_weights,
    subsample,
)

CLASSES = ("a", "b", "c")


def blobs(generator, groups=30, per_group=20, noise=1.0, dim=5):
    """Groups with a shift of their own around their class."""
    centres = 2 * torch.randn(3, dim, generator=generator)
    of_group = torch.arange(groups) % 3
    middle = centres[of_group] + noise * torch.randn(groups, dim, generator=generator)
    group = torch.arange(groups).repeat_interleave(per_group)
    return middle[group] + 0.3 * torch.randn(len(group), dim, generator=generator), of_group[group], group


def test_equals_scikit_learn_for_the_same_objective(generator):
    x, label, group = blobs(generator)
    strength = 0.01
    mine = fit_linear(
        x, label, group, classes=CLASSES, strengths=[strength], weighting="none", per_group=1000, calibrate=False
    )
    scaled = Scale.of(x)(x)
    theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=2000).fit(scaled, label)
    expected = torch.tensor(theirs.predict_proba(scaled), dtype=torch.float32)
    torch.testing.assert_close(mine.probabilities(x), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("weighting", [*WEIGHTINGS])
def test_weights_mean_what_they_say(weighting):
    label = torch.tensor([0] * 6 + [1] * 2)
    group = torch.tensor([0, 0, 0, 0, 0, 1, 2, 3])
    w = sample_weights(label, group, weighting)
    per_class = torch.bincount(label, w)
    per_group = torch.bincount(group, w)
    assert w.sum() == pytest.approx(1)
    share = {"none": 6 / 8, "class": 0.5, "sqrt": 3**0.5 / (3**0.5 + 1), "group": 0.5, "class+group": 0.5}[weighting]
    assert float(per_class[0]) == pytest.approx(share, rel=1e-5)
    if "group" in weighting:
        assert per_group[0] == pytest.approx(float(per_group[1]))
    else:
        assert per_group[0] == pytest.approx(5 * float(per_group[1]))


def test_subsample_takes_at_most_so_many_of_each_group(generator):
    group = torch.tensor([5] * 100 + [2] * 3 + [9] * 50)[torch.randperm(153, generator=generator)]
    keep = subsample(group, 10, generator)
    assert torch.bincount(group[keep]).tolist() == [0, 0, 3, 0, 0, 10, 0, 0, 0, 10]
    assert len(keep.unique()) == len(keep)


def test_strength_is_chosen_on_groups_that_were_left_out(generator):
    """Features that only name the group: pixels of one group predict each other, other groups are not predicted at all."""
    of_group = torch.arange(24) % 3
    group = torch.arange(24).repeat_interleave(20)
    tag = torch.nn.functional.one_hot(group, 24).float()
    signal = torch.nn.functional.one_hot(of_group[group], 3) + 1.5 * torch.randn(480, 3, generator=generator)
    x = torch.cat([10 * tag, signal], 1)
    chosen = fit_linear(
        x, of_group[group], group, classes=CLASSES, strengths=[1e-6, 1e-2], scale=Scale(0 * x[0], 0 * x[0] + 1)
    )
    by_pixel = fit_linear(x, of_group[group], torch.arange(480), classes=CLASSES, strengths=[1e-6, 1e-2], folds=2)
    assert chosen.temperature > 1.5 * by_pixel.temperature, (
        "left-out groups show the overconfidence that left-out pixels hide"
    )


def test_calibrated_probabilities_have_less_log_loss_on_other_groups(generator):
    x, label, group = blobs(generator, groups=60, noise=2.5)
    train = group < 30
    args = x[train], label[train], group[train]
    raw, calibrated = (fit_linear(*args, classes=CLASSES, strengths=[1e-4], calibrate=c) for c in (False, True))
    losses = [torch.nn.functional.nll_loss(m.probabilities(x[~train]).log(), label[~train]) for m in (raw, calibrated)]
    assert losses[1] < losses[0]
    assert calibrated.temperature > 1
    assert torch.equal(raw.logits(x).argmax(1), calibrated.logits(x).argmax(1))


def test_one_group_per_class_takes_the_middle_strength(generator):
    x, label, group = blobs(generator, groups=3)
    fitted = fit_linear(x, label, group, classes=CLASSES, strengths=[1.0, 1e-2, 1e-4])
    assert (fitted.strength, fitted.temperature) == (1e-2, 1.0)


@pytest.mark.parametrize("fit", [fit_linear, fit_neighbours])
def test_a_class_without_labels_is_never_predicted_and_nan_rows_do_nothing(generator, fit):
    x, label, group = blobs(generator)
    known = label < 2
    clean = fit(x[known], label[known], group[known], classes=CLASSES)
    p = clean.probabilities(x)
    assert (p[:, 2] < 1e-6).all()
    broken = torch.cat([x[known], torch.full((4, 5), torch.nan)])
    more = fit(
        broken,
        torch.cat([label[known], torch.ones(4).long()]),
        torch.cat([group[known], torch.zeros(4).long()]),
        classes=CLASSES,
    )
    assert torch.isfinite(more.probabilities(x)).all()
    assert torch.isnan(clean.probabilities(broken)[-1]).all()


def test_neighbours_of_themselves(generator):
    x, label, group = blobs(generator, noise=0.5)
    knn = fit_neighbours(x, label, group, classes=CLASSES, k=1)
    assert torch.equal(knn.probabilities(x).argmax(1), label)
    small = Scale.of(x)
    again = fit_neighbours(x, label, group, classes=CLASSES, k=5, scale=small)
    whole = again.probabilities(x)
    object.__setattr__(again, "rows", 7)
    torch.testing.assert_close(again.probabilities(x), whole)


def test_ridge_equals_scikit_learn_and_chooses_by_group(generator):
    x, _, group = blobs(generator)
    y = x @ torch.tensor([1.0, -2, 0, 0.5, 3]) + 7 + 0.1 * torch.randn(len(x), generator=generator)
    mine = fit_ridge(x, y, group, strengths=[0.1], per_group=1000)
    theirs = SkRidge(alpha=0.1 * len(x)).fit(Scale.of(x)(x), y)
    torch.testing.assert_close(
        mine(x)[:, 0], torch.tensor(theirs.predict(Scale.of(x)(x))).float(), atol=1e-3, rtol=1e-4
    )
    assert fit_ridge(x, y, group, strengths=[100.0, 1e-4]).strength == 1e-4


def test_saved_and_loaded_is_the_same(generator, tmp_path):
    x, label, group = blobs(generator)
    fitted = fit_linear(x, label, group, classes=CLASSES)
    fitted.save(tmp_path / "probe.safetensors")
    again = Linear.load(tmp_path / "probe.safetensors")
    assert torch.equal(again.probabilities(x), fitted.probabilities(x))
    assert (again.classes, again.strength) == (fitted.classes, fitted.strength)
    assert [p.name for p in tmp_path.iterdir()] == ["probe.safetensors"]


def test_same_seed_same_probe(generator):
    args = blobs(generator, per_group=100)
    one, two, other = (fit_linear(*args, classes=CLASSES, per_group=10, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": torch.tensor([0, 9])}, "labels are 0-9, there are 3 classes"),
        ({"x": torch.full((2, 4), torch.nan)}, "none of the 2 samples"),
        ({"group": torch.tensor([0])}, "2, 2 and 1 rows"),
        ({"weighting": "clas"}, "Did you mean class"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"x": torch.eye(2, 4), "label": torch.tensor([0, 1]), "group": torch.tensor([0, 1]), "classes": CLASSES}
    with pytest.raises((ValueError, LookupError), match=message):
        fit_linear(**{**given, **change})

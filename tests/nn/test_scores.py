"""Scores equal their definitions (scikit-learn as the second road), and calibration does what it says."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics as sk

from everysat.nn.scores import (
    LABEL_SCORES,
    SCORES,
    VALUE_SCORES,
    calibration_error,
    confusion_matrix,
    fit_temperature,
    iou_per_class,
    label_counts,
    moments,
    reliability,
)


@pytest.fixture
def case(generator):
    label = torch.randint(4, (200,), generator=generator)
    predicted = torch.where(
        torch.rand(200, generator=generator) < 0.5, label, torch.randint(5, (200,), generator=generator)
    )
    return label, predicted, torch.randint(7, (200,), generator=generator)


def test_scores_equal_scikit_learn_over_the_labelled_classes(case):
    label, predicted, group = case  # the fifth class is predicted and never a label
    confusion = confusion_matrix(label, predicted, 5, group, 7).sum(0)
    present = [0, 1, 2, 3]
    expected = {
        "accuracy": sk.accuracy_score(label, predicted),
        "macro_f1": sk.f1_score(label, predicted, labels=present, average="macro"),
        "weighted_f1": sk.f1_score(label, predicted, labels=present, average="weighted"),
        "miou": sk.jaccard_score(label, predicted, labels=present, average="macro"),
        "balanced_accuracy": sk.recall_score(label, predicted, labels=present, average="macro"),
        "kappa": sk.cohen_kappa_score(label, predicted),
    }
    assert set(expected) == set(SCORES)
    for name, value in expected.items():
        assert float(SCORES[name][1](confusion)) == pytest.approx(value), name


def test_matrices_of_groups_add_up_and_are_scored_side_by_side(case):
    label, predicted, group = case
    confusion = confusion_matrix(label, predicted, 5, group, 7)
    assert confusion.sum() == 200
    for name, (_, function) in SCORES.items():
        together = function(confusion)
        one_by_one = torch.stack([function(c) for c in confusion])
        torch.testing.assert_close(together, one_by_one, equal_nan=True, msg=name)


def test_a_class_that_occurs_nowhere_is_nan_and_one_never_predicted_is_zero():
    confusion = torch.tensor([[3.0, 0, 0], [2, 0, 0], [0, 0, 0]])
    assert iou_per_class(confusion).nan_to_num(-1).tolist() == pytest.approx([0.6, 0, -1])
    assert float(SCORES["miou"][1](confusion)) == pytest.approx(0.3)


@pytest.mark.parametrize("true_t", [0.5, 1.0, 4.0])
def test_temperature_recovers_how_overconfident_logits_are(generator, true_t):
    logits = 2 * torch.randn(20000, 4, generator=generator)
    label = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(true_t * logits, label) == pytest.approx(true_t, rel=0.05)
    p = logits.softmax(1)
    assert calibration_error(p.max(1).values, p.argmax(1) == label) < 0.02
    assert calibration_error((5 * logits).softmax(1).max(1).values, p.argmax(1) == label) > 0.1


def test_temperature_without_samples_is_one():
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 1


def test_reliability_by_hand():
    said, true, share = reliability(torch.tensor([0.1, 0.9, 0.8, 1.0]), torch.tensor([0, 1, 1, 0]), bins=2)
    assert said.tolist() == pytest.approx([0.1, 0.9])
    assert true.tolist() == pytest.approx([0, 2 / 3])
    assert share.tolist() == [0.25, 0.75]


def test_scores_of_several_labels_equal_scikit_learn(generator):
    label, guess = (torch.rand(300, 4, generator=generator) < 0.4 for _ in range(2))
    label[:, 3] = False  # never a label, and out of the mean
    group = torch.randint(9, (300,), generator=generator)
    counts = label_counts(label, guess, group, 9).sum(0)
    expected = {
        "micro_f1": sk.f1_score(label, guess, average="micro"),
        "macro_f1": sk.f1_score(label[:, :3], guess[:, :3], average="macro"),
        "weighted_f1": sk.f1_score(label, guess, average="weighted", zero_division=0),
    }
    assert set(expected) == set(LABEL_SCORES)
    for name, value in expected.items():
        assert float(LABEL_SCORES[name][1](counts)) == pytest.approx(value), name


def test_scores_of_values_equal_scikit_learn_and_add_up_over_groups(generator):
    truth = torch.randn(200, generator=generator) * 30 + 100
    guess = truth + torch.randn(200, generator=generator) * 10
    sums = moments(truth, guess, torch.randint(5, (200,), generator=generator), 5)
    expected = {
        "r2": sk.r2_score(truth, guess),
        "rmse": sk.root_mean_squared_error(truth, guess),
        "mae": sk.mean_absolute_error(truth, guess),
    }
    assert set(expected) == set(VALUE_SCORES)
    for name, value in expected.items():
        assert float(VALUE_SCORES[name][1](sums.sum(0))) == pytest.approx(value, rel=1e-5), name

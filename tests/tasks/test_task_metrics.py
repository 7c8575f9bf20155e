"""Metrics of tasks against scikit-learn: what is masked does not count, classes may occur nowhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_predictions import CODES, made, tasks
from sklearn import metrics as sk

from everysat.nn.scores import SCORES, confusion_matrix
from everysat.types import Batch, Raster

QUIET = pytest.mark.filterwarnings(
    "ignore:No positive samples", "ignore:.*y_pred contains classes", "ignore:.*single label"
)


def labelled(name: str, prediction: Raster, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """What counts, found pixel by pixel: predictions [n, channel] and labels [n, band]."""
    label, found = batch.raster("label"), []
    for row, y, x in np.ndindex(label.values.shape[0], *label.values.shape[2:]):
        true, there = (
            label.values[row, :, y, x],
            bool(label.valid[row, :, y, x].all() and prediction.valid[row, :, y, x].all()),
        )
        if there and not (name == "classify" and int(true[0]) not in CODES):
            found.append((prediction.values[row, :, y, x].numpy(), true.numpy()))
    return np.array([f[0] for f in found]), np.array([f[1] for f in found])


def computed(task, prediction: Raster, batch: Batch) -> dict[str, float]:
    found = {}
    for name, metric in task.metrics().items():
        metric.update(*task.pairs(prediction, batch))
        found[name] = float(metric.compute())
    return found


def expected(name: str, p: np.ndarray, true: np.ndarray) -> dict[str, float]:
    zero = {"zero_division": 0}
    if name == "classify":
        label, guess = np.searchsorted(CODES, true[:, 0]), p.argmax(1)
        return {
            "accuracy": sk.accuracy_score(label, guess),
            "macro_f1": sk.f1_score(label, guess, average="macro", **zero),
            "weighted_f1": sk.f1_score(label, guess, average="weighted", **zero),
            "miou": sk.jaccard_score(label, guess, average="macro", **zero),
        }
    if name == "several":
        guess, label = p > 0.5, true > 0.5
        precision = [sk.average_precision_score(label[:, c], p[:, c]) for c in range(4) if label[:, c].any()]
        scores = {f"{a}_f1": sk.f1_score(label, guess, average=a, **zero) for a in ("micro", "macro", "weighted")}
        return {**scores, "map": float(np.mean(precision)) if precision else math.nan}
    if name == "regress":
        return {
            "rmse": sk.root_mean_squared_error(true.ravel(), p.ravel()),
            "mae": sk.mean_absolute_error(true.ravel(), p.ravel()),
            "r2": sk.r2_score(true.ravel(), p.ravel()),
        }
    label, guess = true[:, 0].astype(int), p.argmax(1)
    moved, told = label != 0, guess != 0
    one = len(set(label) | set(guess)) == 1
    return {
        "f1_changed": sk.f1_score(moved, told, **zero),
        "iou_changed": sk.jaccard_score(moved, told, **zero),
        "precision_changed": sk.precision_score(moved, told, **zero),
        "recall_changed": sk.recall_score(moved, told, **zero),
        "kappa": math.nan if one else sk.cohen_kappa_score(label, guess),
        "accuracy": sk.accuracy_score(label, guess),
        "miou": sk.jaccard_score(label, guess, average="macro", **zero),
    }


@QUIET
@pytest.mark.parametrize("name", ["classify", "several", "regress", "change"])
@given(seed=st.integers(0, 9999), rows=st.integers(1, 3), side=st.integers(3, 5), kinds=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_metrics_are_those_of_scikit_learn(name, seed, rows, side, kinds):
    task = tasks()[name]
    prediction, batch = made(name, task, seed, rows, side, kinds)
    p, true = labelled(name, prediction, batch)
    if len(p) < 2:
        return
    found, wanted = computed(task, prediction, batch), expected(name, p, true)
    assert found.keys() == wanted.keys()
    for metric, value in wanted.items():
        assert found[metric] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), metric


@given(seed=st.integers(0, 9999), n=st.integers(1, 40), kinds=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_scores_of_confusion_matrices_are_those_of_scikit_learn(seed, n, kinds):
    """Over the classes that occur among the labels; others may be predicted, or not occur at all."""
    g = torch.Generator().manual_seed(seed)
    label, guess = torch.randint(kinds, (n,), generator=g), torch.randint(5, (n,), generator=g)
    confusion = confusion_matrix(label, guess, 5, torch.zeros_like(label), 1)[0]
    options = {"labels": label.unique().tolist(), "zero_division": 0}
    wanted = {
        "accuracy": sk.accuracy_score(label, guess),
        "macro_f1": sk.f1_score(label, guess, average="macro", **options),
        "weighted_f1": sk.f1_score(label, guess, average="weighted", **options),
        "miou": sk.jaccard_score(label, guess, average="macro", **options),
        "balanced_accuracy": sk.recall_score(label, guess, average="macro", **options),
    }
    for name, value in wanted.items():
        assert float(SCORES[name][1](confusion)) == pytest.approx(value, abs=1e-9), name

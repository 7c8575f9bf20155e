"""Scores, each with its full definition, from counts that can be added up over groups; and how far confidence can be trusted.

Three kinds of targets, each with its counts, float64: ``classes`` (one of several) has confusion matrices [..., class, class], rows are labels,
columns predictions; ``labels`` (several at once) has [..., class, 3], hits, labels and predictions of each class; ``values`` has the sums
[..., 5] of :func:`moments`. The leading axes are whatever is scored side by side (draws, bootstrap replicates).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
SCORES: dict[str, tuple[str, Function]] = {}
"""Definition and function by name, of one class of several."""
LABEL_SCORES: dict[str, tuple[str, Function]] = {}
"""The same where several classes may be there at once."""
VALUE_SCORES: dict[str, tuple[str, Function]] = {}
"""The same of numbers."""
KINDS = {"classes": SCORES, "labels": LABEL_SCORES, "values": VALUE_SCORES}


def _score(definition: str, scores: dict[str, tuple[str, Function]] = SCORES) -> Callable[[Function], Function]:
    def keep(function: Function) -> Function:
        scores[function.__name__.removeprefix("label_")] = (definition, function)
        return function

    return keep


def confusion_matrix(label: Tensor, predicted: Tensor, classes: int, group: Tensor, groups: int) -> Tensor:
    """Counts float64 [groups, class, class] per group of samples; ``label``, ``predicted``, ``group`` int64 [n]."""
    cell = (group * classes + label) * classes + predicted
    return torch.bincount(cell, minlength=groups * classes**2).view(groups, classes, classes).double()


def _parts(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1), confusion.sum(-2)


def f1_per_class(confusion: Tensor) -> Tensor:
    """2 TP / (labels + predictions) of each class; 0 where a labelled class is never predicted, NaN where it occurs in neither."""
    hits, labels, predictions = _parts(confusion)
    return 2 * hits / (labels + predictions)


def iou_per_class(confusion: Tensor) -> Tensor:
    """TP / (labels + predictions - TP) of each class; NaN where it occurs in neither."""
    hits, labels, predictions = _parts(confusion)
    return hits / (labels + predictions - hits)


def _mean_of_labelled(values: Tensor, confusion: Tensor) -> Tensor:
    labelled = confusion.sum(-1) > 0
    return torch.where(labelled, values, 0.0).sum(-1) / labelled.sum(-1)


@_score("share of the test samples that are classified right (overall accuracy; equals micro F1 and micro recall)")
def accuracy(confusion: Tensor) -> Tensor:
    return _parts(confusion)[0].sum(-1) / confusion.sum((-2, -1))


@_score(
    "F1 per class over all test samples of a draw, unweighted mean over the classes that occur among the test labels"
)
def macro_f1(confusion: Tensor) -> Tensor:
    return _mean_of_labelled(f1_per_class(confusion), confusion)


@_score("F1 per class over all test samples of a draw, mean weighted by the number of test labels of the class")
def weighted_f1(confusion: Tensor) -> Tensor:
    labels = confusion.sum(-1)
    return (torch.nan_to_num(f1_per_class(confusion)) * labels).sum(-1) / labels.sum(-1)


@_score("intersection over union per class, unweighted mean over the classes that occur among the test labels")
def miou(confusion: Tensor) -> Tensor:
    return _mean_of_labelled(iou_per_class(confusion), confusion)


@_score("recall per class, unweighted mean over the classes that occur among the test labels")
def balanced_accuracy(confusion: Tensor) -> Tensor:
    hits, labels, _ = _parts(confusion)
    return _mean_of_labelled(hits / labels, confusion)


@_score("Cohen's kappa: (accuracy - chance agreement) / (1 - chance agreement), chance from the margins")
def kappa(confusion: Tensor) -> Tensor:
    hits, labels, predictions = _parts(confusion)
    n = confusion.sum((-2, -1))
    chance = (labels * predictions).sum(-1) / n**2
    return (hits.sum(-1) / n - chance) / (1 - chance)


def label_counts(label: Tensor, predicted: Tensor, group: Tensor, groups: int) -> Tensor:
    """Hits, labels and predictions [groups, class, 3] of ``label`` and ``predicted``, bool [n, class]."""
    each = torch.stack([label & predicted, label, predicted], -1).double()
    return each.new_zeros(groups, *each.shape[1:]).index_add(0, group, each)


def _f1(counts: Tensor) -> Tensor:
    hits, labels, predictions = counts.unbind(-1)
    return torch.where(labels + predictions > 0, 2 * hits / (labels + predictions).clamp(min=1), 0.0)


@_score(
    "F1 over all (place, class) decisions of a draw together, predicted where the probability is above 0.5",
    LABEL_SCORES,
)
def label_micro_f1(counts: Tensor) -> Tensor:
    return _f1(counts.sum(-2))


@_score(
    "F1 per class over all test places of a draw at probability above 0.5, unweighted mean over the classes that occur among the test labels",
    LABEL_SCORES,
)
def label_macro_f1(counts: Tensor) -> Tensor:
    there = counts[..., 1] > 0
    return torch.where(there, _f1(counts), 0.0).sum(-1) / there.sum(-1)


@_score("F1 per class at probability above 0.5, mean weighted by the number of test labels of the class", LABEL_SCORES)
def label_weighted_f1(counts: Tensor) -> Tensor:
    labels = counts[..., 1]
    return (_f1(counts) * labels).sum(-1) / labels.sum(-1)


def moments(truth: Tensor, predicted: Tensor, group: Tensor, groups: int) -> Tensor:
    """Per group the number of samples, the sums of ``truth`` and of its square, of the squared and of the absolute error: [groups, 5]."""
    truth, error = truth.double(), predicted.double() - truth.double()
    each = torch.stack([torch.ones_like(truth), truth, truth**2, error**2, error.abs()], -1)
    return each.new_zeros(groups, 5).index_add(0, group, each)


@_score(
    "1 - sum of squared errors / sum of squared deviations of the test labels from their mean, over all test samples of a draw",
    VALUE_SCORES,
)
def r2(counts: Tensor) -> Tensor:
    n, total, squares, errors, _ = counts.unbind(-1)
    return 1 - errors / (squares - total**2 / n)


@_score(
    "square root of the mean squared error over all test samples of a draw, in the unit of the label; less is better",
    VALUE_SCORES,
)
def rmse(counts: Tensor) -> Tensor:
    return (counts[..., 3] / counts[..., 0]).sqrt()


@_score("mean absolute error over all test samples of a draw, in the unit of the label; less is better", VALUE_SCORES)
def mae(counts: Tensor) -> Tensor:
    return counts[..., 4] / counts[..., 0]


LESS_IS_BETTER = {"rmse", "mae"}


def fit_temperature(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> float:
    """The T > 0 that minimises the (weighted) mean of ``-log softmax(logits / T)[label]`` (Guo et al. 2017).

    ``logits`` [n, class] must come from samples that the classifier was not fitted on. 1 when there are none.
    """
    if len(label) == 0:
        return 1.0
    each = torch.ones(len(label)) if weight is None else weight
    logits = logits.double()

    def cost(log_t: Tensor) -> Tensor:
        log_p = (logits / log_t.exp()).log_softmax(-1).gather(1, label[:, None])[:, 0]
        return -(log_p * each).sum() / each.sum()

    low, high = torch.tensor(-3.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    golden = (5**0.5 - 1) / 2
    for _ in range(40):  # convex in 1/T, hence unimodal in log T: golden section
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    return float(((low + high) / 2).exp())


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, accuracy and share of samples in ``bins`` equal slices of confidence 0-1; NaN in empty slices."""
    which = (confidence * bins).long().clamp(0, bins - 1)
    count = torch.bincount(which, minlength=bins).double()
    means = [torch.bincount(which, values.double(), minlength=bins) / count for values in (confidence, correct)]
    return means[0], means[1], count / max(1, len(confidence))


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean of |accuracy - confidence| over equal slices of confidence, weighted by their samples."""
    said, true, share = reliability(confidence, correct, bins)
    return float((torch.nan_to_num((said - true).abs()) * share).sum())

"""How good are features? Several draws of training labels, one test set apart from each, scores with their uncertainty.

Labels come in groups (polygons, places). A draw says which groups train and which test; confidence intervals resample groups,
not pixels, because pixels of a polygon are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from everysat.find import suggest
from everysat.nn.probe import Linear, Neighbours, fit_linear, fit_neighbours
from everysat.nn.scores import SCORES, calibration_error, confusion_matrix, reliability, risk_coverage
from everysat.progress import Progress
from everysat.table import Table

HOW: dict[str, Callable[..., Linear | Neighbours]] = {"probe": fit_linear, "knn": fit_neighbours}
REPLICATES = 1000

Draw = tuple[Sequence[int], Sequence[int]]
"""Groups that train, groups that test."""


@dataclass(frozen=True)
class Samples:
    """Labelled features: ``x`` [n, dim], ``label`` int64 [n] (index into ``classes``), ``group`` int64 [n]."""

    x: Tensor
    label: Tensor
    group: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.x) == len(self.label) == len(self.group):
            raise ValueError(f"x, label and group have {len(self.x)}, {len(self.label)} and {len(self.group)} rows")

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def of_grid(cls, x: Tensor, label: Tensor, group: Tensor, classes: Sequence[str]) -> Samples:
        """Of dense features [row, dim, y, x] (or [dim, y, x]): one sample per pixel whose ``label`` and ``group`` [.., y, x]
        are not negative and whose features are not NaN."""
        x = x[None] if x.ndim == 3 else x
        label, group = (part.reshape(len(x), *part.shape[-2:]) for part in (label, group))
        keep = (label >= 0) & (group >= 0) & torch.isfinite(x).all(1)
        return cls(x.movedim(1, -1)[keep].float(), label[keep].long(), group[keep].long(), tuple(classes))

    def of_groups(self, groups: Sequence[int]) -> Tensor:
        """Which samples are of these groups, bool [n]."""
        return torch.isin(self.group, torch.as_tensor(groups, dtype=torch.int64))


@dataclass(frozen=True)
class Score:
    """A score over draws: ``mean``, ``std`` between draws (0 for one draw), ``low`` and ``high`` of the 95 % interval that comes
    from resampling test groups, ``draws``, ``groups`` (test groups in all draws together), ``definition``."""

    name: str
    mean: float
    std: float
    low: float
    high: float
    draws: int
    groups: int
    definition: str
    values: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.std:.3f}"


@dataclass(frozen=True)
class Evaluation:
    """What was predicted on the test groups of each draw.

    Attributes:
        confusion: per draw float64 [group, class, class], rows are labels.
        groups: per draw the group id of each of these matrices, int64 [group].
        confidence, correct: per draw and test sample, the probability of the predicted class, and whether it was right.
        fitted: per draw the classifier, or None where predictions came from a function.
    """

    classes: tuple[str, ...]
    confusion: list[Tensor] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    fitted: list[Any] = field(default_factory=list)

    def score(self, name: str = "macro_f1", *, seed: int = 0) -> Score:
        """The score of that name over all draws."""
        function = _function(name)
        each = torch.stack([function(c.sum(0)) for c in self.confusion])
        low, high = _interval(self._replicates(function, seed))
        std = float(each.std(correction=1)) if len(each) > 1 else 0.0
        groups = len(torch.cat(self.groups).unique())
        return Score(name, float(each.mean()), std, low, high, len(each), groups, SCORES[name][0], tuple(each.tolist()))

    def less(self, other: Evaluation, name: str = "macro_f1", *, seed: int = 0) -> Score:
        """This score minus that of ``other`` on the same draws; replicates and draws are paired, so that an interval above 0
        says that this one is better on this kind of place."""
        if [g.tolist() for g in self.groups] != [g.tolist() for g in other.groups]:
            raise ValueError("the two evaluations tested other groups: give both the same draws")
        function = _function(name)
        each = torch.stack(
            [function(a.sum(0)) - function(b.sum(0)) for a, b in zip(self.confusion, other.confusion, strict=True)]
        )
        low, high = _interval(self._replicates(function, seed) - other._replicates(function, seed))
        std = float(each.std(correction=1)) if len(each) > 1 else 0.0
        groups = len(torch.cat(self.groups).unique())
        what = f"difference of: {SCORES[name][0]}"
        return Score(
            f"{name} difference", float(each.mean()), std, low, high, len(each), groups, what, tuple(each.tolist())
        )

    def _replicates(self, function: Callable[[Tensor], Tensor], seed: int) -> Tensor:
        """Mean score over draws in each bootstrap replicate; a group has the same weight in all draws of a replicate."""
        every = torch.cat(self.groups).unique()
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(every), (REPLICATES, len(every)), generator=generator)
        counts = torch.zeros(REPLICATES, len(every), dtype=torch.float64)
        counts.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
        scores = []
        for confusion, groups in zip(self.confusion, self.groups, strict=True):
            mine = counts[:, torch.searchsorted(every, groups)]
            scores.append(function((mine @ confusion.flatten(1)).view(REPLICATES, *confusion.shape[1:])))
        return torch.stack(scores).nanmean(0)

    def matrix(self) -> Tensor:
        """Confusion matrix over all draws, float64 [class, class]."""
        return torch.stack([c.sum(0) for c in self.confusion]).sum(0)

    def confusion_table(self, title: str = "Confusion matrix") -> Table:
        """Shares of the labels of a class (rows) that were predicted as each class (columns)."""
        matrix = self.matrix()
        share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
        rows = tuple((name, *map(float, row)) for name, row in zip(self.classes, share, strict=True))
        return Table(
            title, ("label", *self.classes), rows, ("Rows are labels and add up to 1; columns are predictions.",)
        )

    def calibration(self, bins: int = 15) -> dict[str, Any]:
        """Over the test samples of all draws: ``error`` (expected calibration error), the ``reliability`` curve (mean
        confidence, accuracy, share), the ``risk_coverage`` curve (coverage, risk) and the area ``risk_area`` under it."""
        confidence, correct = torch.cat(self.confidence), torch.cat(self.correct)
        coverage, risk, area = risk_coverage(confidence, correct)
        return {
            "error": calibration_error(confidence, correct, bins),
            "reliability": reliability(confidence, correct, bins),
            "risk_coverage": (coverage, risk),
            "risk_area": area,
        }


def evaluate(
    samples: Samples,
    draws: Iterable[Draw],
    how: str | Callable[[Draw], Tensor] = "probe",
    *,
    title: str = "Evaluating",
    quiet: bool = True,
    seed: int = 0,
    **options: Any,
) -> Evaluation:
    """Fits on the training groups of each draw and predicts all samples of its test groups.

    Args:
        how: ``probe`` (logistic regression) or ``knn`` on the frozen ``samples.x``; or a function that is given the draw and
            returns the probabilities [n, class] of all test samples, in their order - fine-tuning, for instance.
        options: of :func:`everysat.nn.probe.fit_linear` or :func:`everysat.nn.probe.fit_neighbours`.

    Raises:
        ValueError: a group is in training and test, or a part is empty.
    """
    if isinstance(how, str) and how not in HOW:
        raise LookupError(f"how={how!r} is unknown. {suggest(how, HOW)}")
    draws = list(draws)
    if not draws:
        raise ValueError("draws is empty: give at least one (training groups, test groups)")
    result = Evaluation(samples.classes)
    with Progress(title, len(draws), quiet=quiet) as bar:
        for index, draw in enumerate(draws):
            train, test = _parts(samples, draw)
            model = None
            if isinstance(how, str):
                given = samples.x[train], samples.label[train], samples.group[train]
                model = HOW[how](*given, classes=samples.classes, seed=seed + index, **options)
                probabilities = model.probabilities(samples.x[test])
            else:
                probabilities = how(draw)
            _record(result, samples, test, probabilities, model)
            bar.advance()
    return result


def _parts(samples: Samples, draw: Draw) -> tuple[Tensor, Tensor]:
    train, test = (samples.of_groups(groups) for groups in draw)
    if both := set(map(int, draw[0])) & set(map(int, draw[1])):
        raise ValueError(f"{len(both)} groups are in training and test, such as {min(both)}")
    for name, part in (("training", train), ("test", test)):
        if not part.any():
            raise ValueError(f"no sample is of the {name} groups of a draw")
    return train, test


def _record(result: Evaluation, samples: Samples, test: Tensor, probabilities: Tensor, model: Any) -> None:
    label = samples.label[test]
    if probabilities.shape != (len(label), len(samples.classes)):
        raise ValueError(
            f"probabilities have shape {tuple(probabilities.shape)}, expected {(len(label), len(samples.classes))}"
        )
    if not torch.isfinite(probabilities).all():
        raise ValueError("probabilities are not finite: leave out samples whose features are NaN")
    confidence, predicted = probabilities.max(1)
    groups, where = samples.group[test].unique(return_inverse=True)
    result.confusion.append(confusion_matrix(label, predicted, len(samples.classes), where, len(groups)))
    result.groups.append(groups)
    result.confidence.append(confidence)
    result.correct.append(predicted == label)
    result.fitted.append(model)


def results_table(
    evaluations: Mapping[str, Evaluation] | Mapping[tuple[str, ...], Evaluation],
    *,
    title: str = "Results",
    columns: Sequence[str] = ("features",),
    scores: Sequence[str] = ("macro_f1", "accuracy"),
) -> Table:
    """One row per evaluation, its key in the first ``columns``: each score as mean ± std over draws with its 95 % interval."""
    rows = []
    for key, evaluation in evaluations.items():
        row: dict[str, Any] = dict(zip(columns, (key,) if isinstance(key, str) else key, strict=True))
        for name in scores:
            score = evaluation.score(name)
            row[name], row[f"{name} 95 %"] = score, f"{score.low:.3f} – {score.high:.3f}"
        row["draws"], row["groups"] = score.draws, score.groups
        rows.append(row)
    notes = [f"{name}: {SCORES[name][0]}." for name in scores]
    notes.append("Mean ± standard deviation over draws; 95 % interval from resampling test groups.")
    return Table.of(title, rows, notes)


def _function(name: str) -> Callable[[Tensor], Tensor]:
    if name not in SCORES:
        raise LookupError(f"no score is called {name!r}. {suggest(name, SCORES)}")
    return SCORES[name][1]


def _interval(replicates: Tensor) -> tuple[float, float]:
    finite = replicates[torch.isfinite(replicates)]
    low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=finite.dtype)).tolist()
    return low, high

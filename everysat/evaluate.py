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
from everysat.nn.forest import fit_forest
from everysat.nn.probe import fit_labels, fit_linear, fit_neighbours, fit_ridge
from everysat.nn.risk import risk_coverage
from everysat.nn.scores import (
    KINDS,
    calibration_error,
    confusion_matrix,
    label_counts,
    moments,
    reliability,
)
from everysat.progress import Progress
from everysat.table import Table

HOW: dict[str, dict[str, Callable[..., Any]]] = {
    "classes": {"probe": fit_linear, "knn": fit_neighbours, "forest": fit_forest},
    "labels": {"probe": fit_labels, "forest": fit_forest},
    "values": {"probe": fit_ridge, "forest": fit_forest},
}
"""Models on frozen features, by the kind of the target: ``probe`` is linear (logistic or ridge regression)."""
REPLICATES = 1000

Draw = tuple[Sequence[int], Sequence[int]] | tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Groups that train, groups that test; and, if there are such, groups on which a model's settings are chosen."""


@dataclass(frozen=True)
class Samples:
    """Labelled features: ``x`` [n, dim], ``group`` int64 [n] and ``label``: int64 [n], index into ``classes``; or bool [n, class], several
    classes at once; or float [n], values, of which ``classes`` names one."""

    x: Tensor
    label: Tensor
    group: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.x) == len(self.label) == len(self.group):
            raise ValueError(f"x, label and group have {len(self.x)}, {len(self.label)} and {len(self.group)} rows")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def kind(self) -> str:
        """Of the target, see :data:`everysat.nn.scores.KINDS`."""
        return "values" if self.label.is_floating_point() else "labels" if self.label.ndim == 2 else "classes"

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
        counts: per draw, of each test group, what its scores are made of, float64 [group, ...], see :mod:`everysat.nn.scores`;
            for one class of several the confusion matrix [group, class, class], rows are labels.
        groups: per draw the group id of each of these matrices, int64 [group].
        confidence, correct: per draw and test sample, the probability of the predicted class, and whether it was right (one
            class of several).
        fitted: per draw the model on the features, or None where predictions came from a function.
    """

    classes: tuple[str, ...]
    kind: str = "classes"
    counts: list[Tensor] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    fitted: list[Any] = field(default_factory=list)
    _resampled: dict[tuple[str, int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def score(self, name: str = "macro_f1", *, seed: int = 0) -> Score:
        """The score of that name over all draws."""
        definition, function = self._score(name)
        each = torch.stack([function(c.sum(0)) for c in self.counts])
        return self._over_draws(name, each, self._replicates(name, seed), definition)

    def less(self, other: Evaluation, name: str = "macro_f1", *, seed: int = 0) -> Score:
        """This score minus that of ``other`` on the same draws; replicates and draws are paired, so that an interval above 0
        says that this one is better on this kind of place."""
        if [g.tolist() for g in self.groups] != [g.tolist() for g in other.groups]:
            raise ValueError("the two evaluations tested other groups: give both the same draws")
        definition, function = self._score(name)
        each = torch.stack(
            [function(a.sum(0)) - function(b.sum(0)) for a, b in zip(self.counts, other.counts, strict=True)]
        )
        replicates = self._replicates(name, seed) - other._replicates(name, seed)
        return self._over_draws(f"{name} difference", each, replicates, f"difference of: {definition}")

    def _over_draws(self, name: str, each: Tensor, replicates: Tensor, definition: str) -> Score:
        std = float(each.std(correction=1)) if len(each) > 1 else 0.0
        groups, values = len(torch.cat(self.groups).unique()), tuple(each.tolist())
        return Score(name, float(each.mean()), std, *_interval(replicates), len(each), groups, definition, values)

    def _score(self, name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        known = KINDS[self.kind]
        if name not in known:
            raise LookupError(f"no score of {self.kind} is called {name!r}. {suggest(name, known)}")
        return known[name]

    def _replicates(self, name: str, seed: int) -> Tensor:
        """Mean score over draws in each bootstrap replicate; a group has the same weight in all draws of a replicate. Groups are resampled among
        those of the same draws and the same (most frequent) label: a replicate that lacked a rare class would score too well. Kept, for tables ask often."""
        asked = (name, seed, len(self.counts))
        if asked not in self._resampled:
            self._resampled[asked] = self._resample(self._score(name)[1], seed)
        return self._resampled[asked]

    def _resample(self, function: Callable[[Tensor], Tensor], seed: int) -> Tensor:
        every = torch.cat(self.groups).unique()
        strata = self._strata(every)
        generator = torch.Generator().manual_seed(seed)
        counts = torch.zeros(REPLICATES, len(every), dtype=torch.float64)
        for stratum in strata.unique():
            mine = (strata == stratum).nonzero()[:, 0]
            picks = mine[torch.randint(len(mine), (REPLICATES, len(mine)), generator=generator)]
            counts.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
        scores = []
        for each, groups in zip(self.counts, self.groups, strict=True):
            weight = counts[:, torch.searchsorted(every, groups)]
            scores.append(function((weight @ each.flatten(1)).view(REPLICATES, *each.shape[1:])))
        return torch.stack(scores).nanmean(0)

    def _strata(self, every: Tensor) -> Tensor:
        """Which groups may stand for each other, int64 [group]."""
        told = torch.zeros(len(every), len(self.groups) + 1, dtype=torch.int64)
        for number, (each, groups) in enumerate(zip(self.counts, self.groups, strict=True)):
            where = torch.searchsorted(every, groups)
            told[where, number] = 1
            if self.kind == "classes":
                told[where, -1] = each.sum(2).argmax(1)
        return told.unique(dim=0, return_inverse=True)[1]

    def matrix(self) -> Tensor:
        """Confusion matrix over all draws, float64 [class, class]."""
        return torch.stack([c.sum(0) for c in self.counts]).sum(0)

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
        curve = risk_coverage(confidence, 1.0 - correct.double())
        steps = torch.linspace(1 / 101, 1, 101)
        return {
            "error": calibration_error(confidence, correct, bins),
            "reliability": reliability(confidence, correct, bins),
            "risk_coverage": (steps, torch.tensor([curve.at(float(share)) for share in steps])),
            "risk_area": curve.aurc,
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
        how: ``probe`` (logistic or ridge regression), ``knn`` or ``forest`` on the frozen ``samples.x``; or a function that is given
            the draw and returns the probabilities [n, class] (or values [n]) of all test samples, in their order - fine-tuning, for
            instance.
        options: of the function in :data:`HOW`.

    Raises:
        ValueError: a group is in training and test, or a part is empty. LookupError: ``how`` is unknown for this kind of target.
    """
    known = HOW[samples.kind]
    if isinstance(how, str) and how not in known:
        raise LookupError(f"how={how!r} is unknown for {samples.kind}. {suggest(how, known)}")
    draws = list(draws)
    if not draws:
        raise ValueError("draws is empty: give at least one (training groups, test groups)")
    result = Evaluation(samples.classes, samples.kind)
    with Progress(title, len(draws), quiet=quiet) as bar:
        for index, draw in enumerate(draws):
            same = draws.index(draw)
            if (
                isinstance(how, str) and same < index
            ):  # with all labels, draws differ in nothing: what was fitted stands for both
                for values in (result.counts, result.groups, result.confidence, result.correct, result.fitted):
                    if values:
                        values.append(values[same])
                bar.advance()
                continue
            train, test, *apart = _parts(samples, draw)
            model = None
            if isinstance(how, str):
                given, *held_out = (
                    (samples.x[part], samples.label[part], samples.group[part]) for part in (train, *apart)
                )
                held = {"held_out": held_out[0]} if held_out else {}
                model = known[how](*given, classes=samples.classes, seed=seed + index, **held, **options)
                x = samples.x[test]
                probabilities = model(x)[:, 0] if samples.kind == "values" else model.probabilities(x)
            else:
                probabilities = how(draw)
            _record(result, samples, test, probabilities, model)
            bar.advance()
    return result


def of_predictions(samples: Samples, predictions: Iterable[Tensor]) -> Evaluation:
    """Scores of what was predicted elsewhere: of all samples, once or (by several seeds) several times, probabilities [n, class] or values [n]."""
    result, every = Evaluation(samples.classes, samples.kind), torch.ones(len(samples), dtype=torch.bool)
    for one in predictions:
        _record(result, samples, every, one, None)
    return result


def _parts(samples: Samples, draw: Draw) -> list[Tensor]:
    """Which samples are of each part of the draw."""
    titles = ("training", "test", "validation")
    seen: dict[int, str] = {}
    for title, groups in zip(titles, draw, strict=False):
        for group in map(int, groups):
            if seen.setdefault(group, title) != title:
                raise ValueError(f"group {group} is in {seen[group]} and {title}")
    parts = [samples.of_groups(groups) for groups in draw]
    for title, part in zip(titles, parts, strict=False):
        if not part.any():
            raise ValueError(f"no sample is of the {title} groups of a draw")
    return parts


def _record(result: Evaluation, samples: Samples, test: Tensor, probabilities: Tensor, model: Any) -> None:
    label = samples.label[test]
    expected = (len(label),) if samples.kind == "values" else (len(label), len(samples.classes))
    if probabilities.shape != expected:
        raise ValueError(f"predictions have shape {tuple(probabilities.shape)}, expected {expected}")
    if not torch.isfinite(probabilities).all():
        raise ValueError("predictions are not finite: leave out samples whose features are NaN")
    groups, where = samples.group[test].unique(return_inverse=True)
    if samples.kind == "values":
        counts = moments(label, probabilities, where, len(groups))
    elif samples.kind == "labels":
        counts = label_counts(label, probabilities > 0.5, where, len(groups))
    else:
        confidence, predicted = probabilities.max(1)
        counts = confusion_matrix(label, predicted, len(samples.classes), where, len(groups))
        result.confidence.append(confidence)
        result.correct.append(predicted == label)
    result.counts.append(counts)
    result.groups.append(groups)
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
    kind = next(iter(evaluations.values())).kind if evaluations else "classes"
    notes = [f"{name}: {KINDS[kind][name][0]}." for name in scores]
    notes.append("Mean ± standard deviation over draws; 95 % interval from resampling test groups.")
    return Table.of(title, rows, notes)


def _interval(replicates: Tensor) -> tuple[float, float]:
    finite = replicates[torch.isfinite(replicates)]
    low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=finite.dtype)).tolist()
    return low, high

"""Simple models on frozen features: linear classifier, nearest neighbours, ridge regression.

Samples come in groups (the pixels of one polygon, the tiles of one place). Whatever is chosen by cross-validation is chosen
on groups that were left out, because pixels of one polygon are near copies of each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from everysat.find import suggest
from everysat.nn.scores import confusion_matrix, fit_temperature, macro_f1

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
WEIGHTINGS = {
    "none": "every sample counts the same",
    "class": "every class counts the same, every sample the same within its class",
    "sqrt": "a class counts by the square root of its samples",
    "group": "every group counts the same",
    "class+group": "every class counts the same, and every group the same within its class",
}
NEVER = -1e4
Samples3 = tuple[Tensor, Tensor, Tensor]
"""Features, label and group of samples."""
CHOOSING = 20
"""Samples per group on which the strength and the temperature are chosen; more cost time and change little."""


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each feature."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scale:
        """Of the rows of ``x`` [n, dim] without NaN."""
        x = x[torch.isfinite(x).all(1)].double()
        return cls(x.mean(0).float(), x.std(0, correction=0).clamp(min=1e-6).float())

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@dataclass(frozen=True)
class Linear:
    """A linear classifier of standardised features, with calibrated probabilities. ``strength`` is the L2 penalty it had."""

    scale: Scale
    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    temperature: float = 1.0
    strength: float = 0.0

    def logits(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., class], already over the temperature."""
        return (self.scale(x) @ self.weight + self.bias) / self.temperature

    def probabilities(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., class]; NaN where a feature is NaN."""
        return self.logits(x).softmax(-1)

    def save(self, path: str | Path) -> None:
        """As safetensors; the classes stand in its metadata."""
        from safetensors.torch import save_file

        path = Path(path)
        facts = {"classes": self.classes, "temperature": self.temperature, "strength": self.strength}
        tensors = {"mean": self.scale.mean, "std": self.scale.std, "weight": self.weight, "bias": self.bias}
        beside = path.with_name(f".{path.name}.part")
        save_file({k: v.contiguous() for k, v in tensors.items()}, beside, {"linear": json.dumps(facts)})
        beside.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Linear:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("linear")
            if text is None:
                raise ValueError(f"{path} holds no linear classifier: its metadata lack 'linear'")
            t = {name: file.get_tensor(name) for name in ("mean", "std", "weight", "bias")}
        facts = json.loads(text)
        return cls(
            Scale(t["mean"], t["std"]),
            t["weight"],
            t["bias"],
            tuple(facts["classes"]),
            facts["temperature"],
            facts["strength"],
        )


@dataclass(frozen=True)
class PerClass:
    """A classifier for each of several classes that may be there at once."""

    each: tuple[Linear, ...]
    classes: tuple[str, ...]

    def probabilities(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., class], each by itself."""
        return torch.stack([one.probabilities(x)[..., 1] for one in self.each], -1)


@dataclass(frozen=True)
class Neighbours:
    """k nearest neighbours by cosine of standardised features, votes weighted by ``exp(cosine / tau)``."""

    scale: Scale
    x: Tensor
    label: Tensor
    weight: Tensor
    classes: tuple[str, ...]
    k: int = 20
    tau: float = 0.07
    rows: int = 4096

    def probabilities(self, x: Tensor) -> Tensor:
        """[n, dim] -> [n, class]; NaN where a feature is NaN."""
        parts = [self._votes(part) for part in x.split(self.rows)]
        return torch.cat(parts) if parts else x.new_zeros(0, len(self.classes))

    def _votes(self, x: Tensor) -> Tensor:
        near = (F.normalize(self.scale(x), dim=1) @ self.x.T).topk(min(self.k, len(self.x)), 1)
        vote = ((near.values - near.values[:, :1]) / self.tau).exp() * self.weight[near.indices]
        total = x.new_zeros(len(x), len(self.classes)).scatter_add_(1, self.label[near.indices], vote)
        return total / total.sum(1, keepdim=True)


@dataclass(frozen=True)
class Ridge:
    """A linear regression of standardised features with an L2 penalty."""

    scale: Scale
    weight: Tensor
    bias: Tensor
    strength: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., target]."""
        return self.scale(x) @ self.weight + self.bias


def subsample(group: Tensor, per_group: int, generator: torch.Generator) -> Tensor:
    """Indices of at most ``per_group`` random samples of each group, ascending."""
    order = torch.randperm(len(group), generator=generator)
    order = order[group[order].argsort(stable=True)]
    starts = torch.searchsorted(group[order].contiguous(), group[order].contiguous())
    return order[torch.arange(len(order)) - starts < per_group].sort().values


def sample_weights(label: Tensor, group: Tensor, weighting: str) -> Tensor:
    """Weights [n] that add up to 1; see :data:`WEIGHTINGS`."""
    if weighting not in WEIGHTINGS:
        raise LookupError(f"weighting={weighting!r} is unknown. {suggest(weighting, WEIGHTINGS)}")
    per_class = torch.bincount(label)[label].double()
    _, where, sizes = group.unique(return_inverse=True, return_counts=True)
    weight = torch.ones(len(label), dtype=torch.float64)
    if "group" in weighting:
        weight = 1 / sizes[where].double()
    if weighting.startswith("class"):
        weight = weight / torch.bincount(label, weight)[label]
    if weighting == "sqrt":
        weight = per_class**-0.5
    return (weight / weight.sum()).float()


def fit_linear(
    x: Tensor,
    label: Tensor,
    group: Tensor,
    *,
    classes: Sequence[str],
    strengths: Sequence[float] = STRENGTHS,
    weighting: str = "class",
    per_group: int = 50,
    folds: int = 5,
    seed: int = 0,
    scale: Scale | None = None,
    calibrate: bool = True,
    held_out: Samples3 | None = None,
) -> Linear:
    """Multinomial logistic regression: weighted mean cross-entropy + strength / 2 |weight|^2, the bias free.

    The strength with the best macro F1 on left-out groups (``folds`` of them, classes mixed) is chosen, and the temperature is fitted on the logits of left-out
    groups. Where no class has two groups, nothing can be left out: the middle strength is taken and the temperature is 1. Labels that are ``held_out`` (x, label,
    group), such as a validation block, take the place of left-out groups.

    Args:
        x: float [n, dim]; rows with NaN are left out. label: int64 [n], index into ``classes``. group: int64 [n].
        per_group: samples of a group that are used at most, so that large polygons do not dominate.
        scale: standardisation, for instance of a whole scene (which needs no labels); by default of these rows.
    """
    keep = _usable(x, label, group, len(classes), per_group, seed)
    x, label, group = x[keep].float(), label[keep], group[keep]
    scale = scale or Scale.of(x)
    x = scale(x)
    strengths = sorted(strengths, reverse=True)
    few = subsample(group, CHOOSING, torch.Generator().manual_seed(seed + 1))
    fold = _folds(label[few], group[few], folds, seed)
    truth, near = label[few][fold >= 0], group[few][fold >= 0]
    chosen, logits = strengths[len(strengths) // 2], []
    if held_out is not None:
        finite = torch.isfinite(held_out[0]).all(1)
        seen, truth, near = scale(held_out[0][finite].float()), held_out[1][finite], held_out[2][finite]
        logits = _held_out(x, label, group, seen, strengths, weighting, len(classes))
    elif len(truth) and (len(strengths) > 1 or calibrate):
        every = _cross_validate(x[few], label[few], group[few], fold, strengths, weighting, len(classes))
        logits = [each[fold >= 0] for each in every]
    best = None
    if len(truth) and logits:
        scores = [_macro_f1(each, truth, len(classes)) for each in logits]
        best = max(range(len(strengths)), key=lambda i: (round(scores[i], 4), strengths[i]))
        chosen = strengths[best]
    weight, bias = _solve(x, label, sample_weights(label, group, weighting), chosen, len(classes))
    temperature = 1.0
    if calibrate and best is not None:
        temperature = fit_temperature(logits[best], truth, sample_weights(truth, near, "group"))
    return Linear(scale, weight, bias, tuple(classes), temperature, chosen)


def fit_labels(
    x: Tensor, label: Tensor, group: Tensor, *, classes: Sequence[str], held_out: Samples3 | None = None, **options: Any
) -> PerClass:
    """A logistic regression for each of several classes that may be there at once: ``label`` bool [n, class]; else as :func:`fit_linear`."""
    found = []
    for c in range(len(classes)):
        apart = None if held_out is None else (held_out[0], held_out[1][:, c].long(), held_out[2])
        found.append(fit_linear(x, label[:, c].long(), group, classes=("no", "yes"), held_out=apart, **options))
    return PerClass(tuple(found), tuple(classes))


def fit_neighbours(
    x: Tensor,
    label: Tensor,
    group: Tensor,
    *,
    classes: Sequence[str],
    k: int = 20,
    tau: float = 0.07,
    weighting: str = "class+group",
    per_group: int = 50,
    seed: int = 0,
    scale: Scale | None = None,
    held_out: Samples3 | None = None,
) -> Neighbours:
    """Nearest neighbours; arguments as for :func:`fit_linear`. Nothing is chosen, so what is ``held_out`` is not looked at."""
    keep = _usable(x, label, group, len(classes), per_group, seed)
    scale = scale or Scale.of(x[keep])
    weight = sample_weights(label[keep], group[keep], weighting)
    return Neighbours(scale, F.normalize(scale(x[keep].float()), dim=1), label[keep], weight, tuple(classes), k, tau)


def fit_ridge(
    x: Tensor,
    target: Tensor,
    group: Tensor,
    *,
    classes: Sequence[str] = (),
    strengths: Sequence[float] = STRENGTHS,
    per_group: int = 50,
    folds: int = 5,
    seed: int = 0,
    scale: Scale | None = None,
    held_out: Samples3 | None = None,
) -> Ridge:
    """Ridge regression of ``target`` [n] or [n, target]: mean squared error + strength |weight|^2, groups counting the same;
    the strength with the least error on left-out groups, or on what is ``held_out`` (x, target, group), is chosen. ``classes`` may name the target."""
    target = target.reshape(len(target), -1).float()
    keep = subsample(group, per_group, torch.Generator().manual_seed(seed))
    keep = keep[torch.isfinite(x[keep]).all(1) & torch.isfinite(target[keep]).all(1)]
    if len(keep) == 0:
        raise ValueError("no sample has both finite features and a finite target")
    x, target, group = x[keep].float(), target[keep], group[keep]
    scale = scale or Scale.of(x)
    x, one = scale(x), torch.zeros(len(x), dtype=torch.int64)
    weight, fold = sample_weights(one, group, "group"), _folds(one, group, folds, seed)
    errors = torch.zeros(len(strengths), dtype=torch.float64)
    for f in fold[fold >= 0].unique() if held_out is None else ():
        out = fold == f
        for i, strength in enumerate(strengths):
            w, b = _ridge(x[~out], target[~out], weight[~out], strength)
            errors[i] += (weight[out, None] * (x[out] @ w + b - target[out]) ** 2).sum()
    if held_out is not None:
        seen, truth = scale(held_out[0].float()), held_out[1].reshape(len(held_out[1]), -1).float()
        for i, strength in enumerate(strengths):
            w, b = _ridge(x, target, weight, strength)
            errors[i] = ((seen @ w + b - truth) ** 2).nansum()
    known = held_out is not None or bool((fold >= 0).any())
    best = strengths[int(errors.argmin())] if known else strengths[len(strengths) // 2]
    return Ridge(scale, *_ridge(x, target, weight, best), best)


def _usable(x: Tensor, label: Tensor, group: Tensor, classes: int, per_group: int, seed: int) -> Tensor:
    if not len(x) == len(label) == len(group):
        raise ValueError(f"x, label and group have {len(x)}, {len(label)} and {len(group)} rows")
    finite = torch.isfinite(x).all(1).nonzero()[:, 0]
    if len(finite) == 0:
        raise ValueError(
            f"none of the {len(x)} samples has finite features: was anything observed where the labels are?"
        )
    if not (int(label.min()) >= 0 and int(label.max()) < classes):
        raise ValueError(f"labels are {int(label.min())}-{int(label.max())}, there are {classes} classes")
    return finite[subsample(group[finite], per_group, torch.Generator().manual_seed(seed))]


def _folds(label: Tensor, group: Tensor, folds: int, seed: int) -> Tensor:
    """Fold of each sample, [n]; -1: always in training, because its class has no other group."""
    groups, where = group.unique(return_inverse=True)
    of_group = torch.zeros(len(groups), dtype=torch.int64).scatter_(0, where, label)
    shuffled = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    fold = torch.full((len(groups),), -1)
    for c in of_group.unique():
        mine = shuffled[of_group[shuffled] == c]
        if len(mine) > 1:
            fold[mine] = (torch.arange(len(mine)) + int(c)) % folds
    return fold[where]


def _cross_validate(
    x: Tensor, label: Tensor, group: Tensor, fold: Tensor, strengths: Sequence[float], weighting: str, classes: int
) -> list[Tensor]:
    """Logits of each sample from a fit without its fold, one tensor [n, class] per strength, the strongest first."""
    logits = [torch.zeros(len(x), classes) for _ in strengths]
    for f in fold[fold >= 0].unique():
        out = fold == f
        weight, start = sample_weights(label[~out], group[~out], weighting), None
        for i, strength in enumerate(strengths):
            start = _solve(x[~out], label[~out], weight, strength, classes, start)
            logits[i][out] = x[out] @ start[0] + start[1]
    return logits


def _held_out(
    x: Tensor, label: Tensor, group: Tensor, other: Tensor, strengths: Sequence[float], weighting: str, classes: int
) -> list[Tensor]:
    """Logits of other samples from a fit to these, one tensor per strength, the strongest first."""
    logits, start, weight = [], None, sample_weights(label, group, weighting)
    for strength in strengths:
        start = _solve(x, label, weight, strength, classes, start)
        logits.append(other @ start[0] + start[1])
    return logits


def _macro_f1(logits: Tensor, label: Tensor, classes: int) -> float:
    zero = torch.zeros_like(label)
    return float(macro_f1(confusion_matrix(label, logits.argmax(1), classes, zero, 1)[0]))


def _solve(
    x: Tensor,
    label: Tensor,
    weight: Tensor,
    strength: float,
    classes: int,
    start: tuple[Tensor, Tensor] | None = None,
    steps: int = 60,
) -> tuple[Tensor, Tensor]:
    """Weight [dim, class] and bias [class] of the minimum, by L-BFGS. A class without samples is never predicted.

    The gradient is written out: automatic differentiation costs ten times the arithmetic for problems this small.
    """
    rows, target, share = x.numpy(), torch.nn.functional.one_hot(label, classes).numpy(), weight.numpy()[:, None]
    absent = torch.where(torch.bincount(label, minlength=classes) > 0, 0.0, NEVER).numpy()
    shape = (x.shape[1] + 1, classes)
    begin = np.zeros(shape) if start is None else np.vstack([start[0].numpy(), start[1].numpy() - absent])

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        both = flat.reshape(shape).astype(np.float32)
        logits = rows @ both[:-1] + (both[-1] + absent)
        logits -= logits.max(1, keepdims=True)
        odds = np.exp(logits)
        total = odds.sum(1, keepdims=True)
        value = float((share * (np.log(total) - (logits * target).sum(1, keepdims=True))).sum(dtype=np.float64))
        residual = share * (odds / total - target)
        gradient = np.vstack([rows.T @ residual + strength * both[:-1], residual.sum(0)])
        return value + strength / 2 * float((both[:-1] ** 2).sum()), gradient.ravel().astype(np.float64)

    with threadpool_limits(
        1
    ):  # products this small lose time, many times over on a busy machine, when shared by threads
        found = minimize(cost, begin.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": steps, "ftol": 1e-7})
    both = torch.from_numpy(found.x.reshape(shape).astype(np.float32))
    return both[:-1], both[-1] + torch.from_numpy(absent)


def _ridge(x: Tensor, target: Tensor, weight: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    weight = (weight / weight.sum())[:, None].double()
    x, target = x.double(), target.double()
    x_mean, t_mean = (weight * x).sum(0), (weight * target).sum(0)
    x, target = x - x_mean, target - t_mean
    gram = x.T @ (weight * x) + strength * torch.eye(x.shape[1], dtype=torch.float64)
    w = torch.linalg.solve(gram, x.T @ (weight * target))
    return w.float(), (t_mean - x_mean @ w).float()

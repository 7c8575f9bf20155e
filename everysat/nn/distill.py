"""Several modalities while training, each alone when used: what is common, what is a modality's own, and what is of no use.

DisCoM-KD (Ienco and Dantas, BMVC 2024, arXiv:2408.07080): every modality has an encoder of what is invariant and one of what is specific to it, whose
vector is split into an informative and an irrelevant half. Labels must be told from invariant and informative parts; the modality from informative and
irrelevant ones, and not from the invariant part (through a gradient that is turned around); parts are orthogonal. A classifier of one modality reads
its invariant and informative parts. There is no teacher, and samples of the modalities need not be of the same places. Its successor MDiCo (Mena et al.,
Machine Learning 2025) has any number of modalities and contrasts invariant parts in place of the adversary, which needs samples of the same places.

The released script of DisCoM-KD makes targets of floats, all ones or all zeros, where the number of the modality was meant: a cross-entropy then pulls
one modality to even odds and ignores the other, so nothing is told apart. Here they are numbers; ``released`` gives the script's losses. Beside that, plain
distillation of logits and of features. Encoders are in :mod:`everysat.models.students`, what trains them in :mod:`everysat.tasks.distill`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.contrast import info_nce, over_pairs
from everysat.nn.gather import gather_rows, global_mean
from everysat.types import Features

TERMS = ("task", "auxiliary", "modality", "invariance", "orthogonality")
INVARIANCE = ("adversarial", "solved", "contrastive")


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """``x``, whose gradient comes back multiplied by -``strength`` (Ganin and Lempitsky 2015)."""
    turned: Tensor = _Reverse.apply(x, strength)
    return turned


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


def modality_loss(logits: Tensor, modality: Tensor, *, released: bool = False) -> Tensor:
    """Cross-entropy of ``logits`` [n, modality] against the number of the modality, int64 [n]. ``released``: the script's, whose target is that number
    in both columns, of two modalities."""
    if not released:
        return global_mean(F.cross_entropy(logits, modality, reduction="none"))
    if logits.shape[1] != 2:
        raise ValueError(f"released=True is for two modalities, there are {logits.shape[1]}")
    soft = modality[:, None].expand_as(logits).to(logits.dtype)
    return global_mean(F.cross_entropy(logits, soft, reduction="none"))


def told_apart(x: Tensor, modality: Tensor, modalities: int, *, ridge: float = 0.01) -> Tensor:
    """Share of the variance of the modality (one of ``modalities`` numbers, int64 [n]) that the best linear function of vectors [n, dim] explains: 0 if none tells
    one from another, 1 if one does always. The function is solved for by ridge regression on standardised vectors, so that a gradient against it is one
    against an adversary at its best, which a learned one never is (not in the papers; a linear probe fails where means agree: Belrose et al. 2023)."""
    with torch.autocast(x.device.type, enabled=False):
        (x, _), (modality, _) = gather_rows(x.float()), gather_rows(modality)
        if len(x) < 2:
            return x.sum() * 0
        x = x - x.mean(0)
        x = x / (x.detach().std(0) + 1e-3)
        y = F.one_hot(modality, modalities).to(x.dtype)
        y = y - y.mean(0)
        with_ridge = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], device=x.device)
        explained = x @ torch.linalg.solve(with_ridge, x.T @ y / len(x))
        return (explained * y).sum() / y.square().sum().clamp(min=1e-6)


def orthogonality(a: Tensor, b: Tensor, *, released: bool = False) -> Tensor:
    """Mean squared cosine of vectors [n, dim]. ``released``: mean cosine, whose least value is not 0 but -1 unless all numbers are positive."""
    cosine = F.cosine_similarity(a, b, dim=-1)
    return global_mean(cosine if released else cosine.square())


def logit_distillation(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, multilabel: bool = False
) -> Tensor:
    """What a student's logits [n, class] miss of a teacher's: the Kullback-Leibler divergence at ``temperature``, times its square so that the gradient
    keeps its size (Hinton et al. 2015); of several classes at once, of each class by itself. No gradient reaches the teacher."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    student, teacher = student / temperature, teacher.detach() / temperature
    if multilabel:
        p = teacher.sigmoid()
        own = F.binary_cross_entropy_with_logits(teacher, p, reduction="none")
        each = F.binary_cross_entropy_with_logits(student, p, reduction="none") - own
    else:
        each = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return global_mean(each) * temperature**2


def feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine between features [n, dim], the student's after a projection to the width of the teacher's. No gradient reaches the teacher."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"features have shapes {list(student.shape)} and {list(teacher.shape)}: project the student's to the teacher's width"
        )
    return global_mean(1 - F.cosine_similarity(student, teacher.detach(), dim=-1))


@dataclass(frozen=True)
class Parts:
    """Of a modality's samples, [n, dim] each, not negative."""

    invariant: Tensor
    informative: Tensor
    irrelevant: Tensor

    @property
    def useful(self) -> Tensor:
        """What the classifier of the modality reads."""
        return torch.cat([self.invariant, self.informative], -1)

    def __getitem__(self, keep: Tensor) -> Parts:
        return Parts(self.invariant[keep], self.informative[keep], self.irrelevant[keep])


@dataclass(frozen=True)
class Witness:
    """What one modality says: its useful ``features``, and of which parts they are made, of ``cells`` (one for each token of the features) and of
    ``places`` (zeros where it was not ``observed``, bool [row])."""

    features: Features
    cells: Parts
    places: Parts
    observed: Tensor


@dataclass(frozen=True)
class Witnessed(Features):
    """Features of several modalities together, and what ``each`` says by itself, by name."""

    each: Mapping[str, Witness] = field(default_factory=dict)


class Disentangling(nn.Module):
    """Losses on the parts that modalities are made of. What labels cost, from a modality's useful parts and from each of them by the head that all share,
    comes from the task.

    Args:
        modalities: names. dim: of each part.
        invariance: ``adversarial``, with a learned adversary, as published; ``solved``, with the best linear one, see :func:`told_apart`; or ``contrastive``, for
            which some places must have several modalities.
        tau: temperature of the contrast. strength: of the reversed gradient.
        hidden: width of a hidden layer of the learned adversary; 0 for a linear one, as published.
        released: the released script's losses, see the module's text.
        weights: of :data:`TERMS`, 1 where not given.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        dim: int,
        *,
        invariance: Literal["adversarial", "solved", "contrastive"] = "adversarial",
        tau: float = 0.1,
        strength: float = 1.0,
        hidden: int = 0,
        released: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if len(set(modalities)) != len(modalities) or len(modalities) < 2:
            raise ValueError(f"modalities={list(modalities)} must be two or more different names")
        if released and len(modalities) != 2:
            raise ValueError(f"released=True is for two modalities, there are {len(modalities)}")
        if invariance not in INVARIANCE:
            raise LookupError(f"invariance={invariance!r} is unknown. {suggest(invariance, INVARIANCE)}")
        for name in weights or ():
            if name not in TERMS:
                raise LookupError(f"weights name the term {name!r}. {suggest(name, TERMS)}")
        self.modalities, self.invariance, self.tau, self.strength = tuple(modalities), invariance, tau, strength
        self.released, self.weights = released, {**dict.fromkeys(TERMS, 1.0), **(weights or {})}
        count = len(modalities)
        self.of_informative, self.of_irrelevant = nn.Linear(dim, count), nn.Linear(dim, count)
        if invariance == "adversarial":
            layers = (
                [nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, count)] if hidden else [nn.Linear(dim, count)]
            )
            self.discriminator = nn.Sequential(*layers)

    def forward(
        self, parts: Mapping[str, Parts], task: Tensor, auxiliary: Tensor, same: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``{"loss": ..., each term}``.

        Args:
            parts: of each modality; numbers of samples may differ, and those that a step lacks are left out.
            task, auxiliary: what labels cost.
            same: for the contrast, the samples of one place (or cell), int64 [n, modality], -1 where there is none. By default sample i of all modalities is
                of one place.
        """
        if not parts:
            raise ValueError("parts is empty: a step needs samples of at least one modality")
        own, other = (
            torch.cat(some)
            for some in zip(
                *((p.informative, x) for p in parts.values() for x in (p.irrelevant, p.invariant)), strict=True
            )
        )
        terms = {
            "task": task,
            "auxiliary": auxiliary,
            "modality": self._modality(parts),
            "invariance": self._contrast(parts, same) if self.invariance == "contrastive" else self._adversary(parts),
            "orthogonality": orthogonality(own, other, released=self.released),
        }
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def _numbers(self, parts: Mapping[str, Parts]) -> Tensor:
        each = [
            torch.full((len(p.invariant),), self.modalities.index(n), device=p.invariant.device)
            for n, p in parts.items()
        ]
        return torch.cat(each)

    def _modality(self, parts: Mapping[str, Parts]) -> Tensor:
        logits = [self.of_informative(torch.cat([p.informative for p in parts.values()]))]
        logits.append(self.of_irrelevant(torch.cat([p.irrelevant for p in parts.values()])))
        return modality_loss(torch.cat(logits), self._numbers(parts).repeat(2), released=self.released)

    def _adversary(self, parts: Mapping[str, Parts]) -> Tensor:
        together = torch.cat([p.invariant for p in parts.values()])
        if self.invariance == "solved":
            return told_apart(together, self._numbers(parts), len(self.modalities))
        said = self.discriminator(reverse_gradient(together, self.strength))
        return modality_loss(said, self._numbers(parts), released=self.released)

    def _contrast(self, parts: Mapping[str, Parts], same: Tensor | None) -> Tensor:
        x = next(iter(parts.values())).invariant
        if same is None:
            if len({len(p.invariant) for p in parts.values()}) > 1:
                raise ValueError(
                    "invariance='contrastive' needs to know which samples are of one place (same), or sample i of all modalities to be: their "
                    "numbers differ; otherwise use 'adversarial'"
                )
            there = torch.tensor([name in parts for name in self.modalities], device=x.device)
            same = torch.where(there, torch.arange(len(x), device=x.device)[:, None], -1)
        losses, counts = [], []
        for a, b in combinations(range(len(self.modalities)), 2):  # also those that only other processes have
            both = same[(same[:, a] >= 0) & (same[:, b] >= 0)]
            pair = [
                parts[self.modalities[m]].invariant[both[:, m]] if self.modalities[m] in parts else x[:0]
                for m in (a, b)
            ]
            losses.append(info_nce(*pair, tau=self.tau))
            counts.append(len(both))
        return over_pairs(losses, counts)

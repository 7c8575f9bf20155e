"""Several modalities while training, each alone when used: what is common, what is a modality's own, and what is of no use.

DisCoM-KD (Ienco and Dantas, BMVC 2024, arXiv:2408.07080): every modality has an encoder of what is invariant and one of what is specific to it, whose
vector is split into an informative and an irrelevant half. Labels must be told from invariant and informative parts; the modality from informative and
irrelevant ones, and not from the invariant part (through a gradient that is turned around); parts are orthogonal. A classifier of one modality reads
its invariant and informative parts. There is no teacher, and samples of the modalities need not be of the same places. Its successor MDiCo (Mena et al.,
Machine Learning 2025) has any number of modalities and contrasts invariant parts in place of the adversary, which needs samples of the same places.

The released script of DisCoM-KD makes targets of floats, all ones or all zeros, where the number of the modality was meant: a cross-entropy then pulls
one modality to even odds and ignores the other, so nothing is told apart. Here they are numbers; ``released`` gives the script's losses. Beside that, plain
distillation of logits and of features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.find import suggest
from everysat.objectives.contrastive import info_nce

TERMS = ("task", "auxiliary", "modality", "invariance", "orthogonality")


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
        return F.cross_entropy(logits, modality)
    if logits.shape[1] != 2:
        raise ValueError(f"released=True is for two modalities, there are {logits.shape[1]}")
    return F.cross_entropy(logits, modality[:, None].expand_as(logits).to(logits.dtype))


def orthogonality(a: Tensor, b: Tensor, *, released: bool = False) -> Tensor:
    """Mean squared cosine of vectors [n, dim]. ``released``: mean cosine, whose least value is not 0 but -1 unless all numbers are positive."""
    cosine = F.cosine_similarity(a, b, dim=-1)
    return cosine.mean() if released else cosine.square().mean()


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
        own = F.binary_cross_entropy_with_logits(teacher, p)
        return (F.binary_cross_entropy_with_logits(student, p) - own) * temperature**2
    return (
        F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
        * temperature**2
    )


def feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine between features [n, dim], the student's after a projection to the width of the teacher's. No gradient reaches the teacher."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"features have shapes {list(student.shape)} and {list(teacher.shape)}: project the student's to the teacher's width"
        )
    return (1 - F.cosine_similarity(student, teacher.detach(), dim=-1)).mean()


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


class Disentangling(nn.Module):
    """Heads and losses on what two encoders of each modality give.

    Args:
        modalities: names. width: of the vectors, of both kinds of encoders. classes: number of logits.
        dim: of each part.
        invariance: ``adversarial``, or ``contrastive``, for which sample i of all modalities must be of one place.
        tau: temperature of the contrast. strength: of the reversed gradient.
        multilabel: several classes at once, labels are 0 and 1 [n, class].
        released: the released script's losses, see the module's text.
        weights: of :data:`TERMS`, 1 where not given.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        width: int,
        classes: int,
        *,
        dim: int = 256,
        invariance: Literal["adversarial", "contrastive"] = "adversarial",
        tau: float = 0.1,
        strength: float = 1.0,
        multilabel: bool = False,
        released: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if len(set(modalities)) != len(modalities) or len(modalities) < 2:
            raise ValueError(f"modalities={list(modalities)} must be two or more different names")
        if released and len(modalities) != 2:
            raise ValueError(f"released=True is for two modalities, there are {len(modalities)}")
        if invariance not in ("adversarial", "contrastive"):
            raise LookupError(
                f"invariance={invariance!r} is unknown. {suggest(invariance, ('adversarial', 'contrastive'))}"
            )
        for name in weights or ():
            if name not in TERMS:
                raise LookupError(f"weights name the term {name!r}. {suggest(name, TERMS)}")
        self.modalities, self.invariance, self.tau, self.strength = tuple(modalities), invariance, tau, strength
        self.multilabel, self.released = multilabel, released
        self.weights = {**dict.fromkeys(TERMS, 1.0), **(weights or {})}
        self.invariant = nn.ModuleDict({name: _projection(width, dim) for name in modalities})
        self.specific = nn.ModuleDict({name: _projection(width, 2 * dim) for name in modalities})
        self.heads = nn.ModuleDict({name: nn.Linear(2 * dim, classes) for name in modalities})
        self.auxiliary = nn.Linear(dim, classes)
        self.discriminator, self.of_informative, self.of_irrelevant = (
            nn.Linear(dim, len(modalities)) for _ in range(3)
        )

    def parts(self, name: str, invariant: Tensor, specific: Tensor) -> Parts:
        """Of vectors [n, width] of the two encoders of a modality."""
        if name not in self.modalities:
            raise LookupError(f"no modality is called {name!r}. {suggest(name, self.modalities)}")
        return Parts(self.invariant[name](invariant), *self.specific[name](specific).chunk(2, -1))

    def logits(self, name: str, invariant: Tensor, specific: Tensor) -> Tensor:
        """What the classifier of one modality says, from that modality alone: [n, class]."""
        useful = self.parts(name, invariant, specific).useful
        said: Tensor = self.heads[name](useful)
        return said

    def forward(self, vectors: Mapping[str, tuple[Tensor, Tensor]], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"loss": ..., each term}`` of vectors (invariant, specific) [n, width] of each modality and its own labels. Modalities may have different
        numbers of samples; those that a step lacks are left out."""
        if not vectors:
            raise ValueError("vectors is empty: a step needs samples of at least one modality")
        parts = {name: self.parts(name, *both) for name, both in vectors.items()}
        terms = {
            "task": _mean(self._cost(self.heads[n](p.useful), labels[n]) for n, p in parts.items()),
            "auxiliary": _mean(
                self._cost(self.auxiliary(x), labels[n]) for n, p in parts.items() for x in (p.invariant, p.informative)
            ),
            "modality": self._modality(parts),
            "invariance": self._invariance(parts),
            "orthogonality": _mean(
                orthogonality(p.informative, other, released=self.released)
                for p in parts.values()
                for other in (p.irrelevant, p.invariant)
            ),
        }
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def _cost(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.multilabel:
            return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype))
        return F.cross_entropy(logits, label)

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

    def _invariance(self, parts: Mapping[str, Parts]) -> Tensor:
        if self.invariance == "adversarial":
            together = torch.cat([p.invariant for p in parts.values()])
            said = self.discriminator(reverse_gradient(together, self.strength))
            return modality_loss(said, self._numbers(parts), released=self.released)
        if len({len(p.invariant) for p in parts.values()}) > 1:
            raise ValueError(
                "invariance='contrastive' needs sample i of all modalities to be of one place: their numbers differ; use 'adversarial'"
            )
        pairs = list(combinations(parts.values(), 2))
        if not pairs:
            return next(iter(parts.values())).invariant.sum() * 0
        return _mean(info_nce(a.invariant, b.invariant, tau=self.tau) for a, b in pairs)


def _projection(width: int, dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ReLU())


def _mean(terms: Any) -> Tensor:
    return torch.stack(list(terms)).mean()

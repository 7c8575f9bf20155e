"""What several witnesses say of one latent vector, each with a confidence per dimension, as one Gaussian.

A witness (a modality of a place) gives, for each latent dimension, a mean and the logarithm of a variance. Whatever set of witnesses is there is
fused into one mean and variance; where none is there, the result is the prior N(0, 1), and ``observed`` says so. All fusions leave the order of
witnesses without meaning and have gradients to means and variances. Sums run over precisions 1 / variance, as softmax and logsumexp of negative log
variances in float32, so that neither tiny nor infinite variances overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.find import suggest

WIDEST = 60.0
"""Largest |log variance|: beyond, a witness knows nothing (or everything) as far as float32 is concerned."""
LARGEST_SUBSETS = 8
"""Witnesses of a mixture over all of their subsets."""


@dataclass(frozen=True)
class Gaussian:
    """Independent dimensions: ``mean`` and ``log_var`` [..., dim]; ``observed`` [...] is false where it is the prior because nobody said anything."""

    mean: Tensor
    log_var: Tensor
    observed: Tensor

    @property
    def var(self) -> Tensor:
        return self.log_var.exp()

    def __getitem__(self, keep: Tensor) -> Gaussian:
        return Gaussian(self.mean[keep], self.log_var[keep], self.observed[keep])

    def sample(self, noise: Tensor) -> Tensor:
        """mean + deviation x ``noise``, standard normal numbers of the same shape; gradients reach mean and variance."""
        return self.mean + (self.log_var / 2).exp() * noise

    def information(self) -> Tensor:
        """See :func:`information`."""
        return information(self.var)


Fusion = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From means, log variances [..., witness, dim], which are there [..., witness] and weights [..., witness] to mean and log variance [..., dim]. Log
variances are finite, and in each set at least one is there."""
FUSIONS: dict[str, Fusion] = {}
"""By name; each says in its first line what it is."""


def fuse(fusion: str, mean: Tensor, log_var: Tensor, there: Tensor, weight: Tensor | None = None) -> Gaussian:
    """One Gaussian from the witnesses that are ``there``.

    Args:
        fusion: one of :data:`FUSIONS`.
        mean, log_var: float [..., witness, dim]; what a witness that is not there says has no meaning and no effect.
        there: bool [..., witness].
        weight: [witness] or [..., witness], above 0: the power to which each witness's density is raised (its precision is multiplied by it), below 1
            for witnesses that repeat each other. Of mixtures and of ``mean`` the share of the witness.

    Raises:
        LookupError: no such fusion. ValueError: shapes that do not fit.
    """
    if fusion not in FUSIONS:
        raise LookupError(f"no fusion is called {fusion!r}. {suggest(fusion, FUSIONS)}")
    if mean.shape != log_var.shape or there.shape != mean.shape[:-1]:
        shapes = [list(x.shape) for x in (mean, log_var, there)]
        raise ValueError(
            f"mean, log_var, there have shapes {shapes}, expected [..., witness, dim] twice, [..., witness]"
        )
    with torch.autocast(mean.device.type, enabled=False):
        observed = there.any(-1)
        absent = ~there[..., None]
        mean = mean.float().masked_fill(absent, 0.0)
        log_var = log_var.float().clamp(-WIDEST, WIDEST).masked_fill(absent, 0.0)
        weights = torch.ones_like(log_var[..., 0]) if weight is None else weight.to(log_var).expand(there.shape)
        anyone = (
            there | ~observed[..., None]
        )  # sets of nobody take part as if they were full: no NaN, and no effect below
        m, s = FUSIONS[fusion](mean, log_var, anyone, weights)
        nobody = ~observed[..., None]
        return Gaussian(m.masked_fill(nobody, 0.0), s.masked_fill(nobody, 0.0), observed)


def _fusion(function: Fusion) -> Fusion:
    FUSIONS[function.__name__] = function
    return function


def _log_precision(log_var: Tensor, there: Tensor, weight: Tensor) -> Tensor:
    return (weight.log()[..., None] - log_var).masked_fill(~there[..., None], -math.inf)


@_fusion
def max_conf(mean: Tensor, log_var: Tensor, there: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """In each dimension, the witness of the smallest variance alone; of several with the same, their average."""
    s = log_var.masked_fill(~there[..., None], math.inf)
    smallest = s.amin(-2, keepdim=True)
    chosen = (s == smallest).float()
    return (mean * chosen).sum(-2) / chosen.sum(-2), smallest[..., 0, :]


@_fusion
def precision_average(mean: Tensor, log_var: Tensor, there: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Average weighted by precision, whose variance is 1 / the sum of precisions: a product of experts without a prior."""
    precision = _log_precision(log_var, there, weight)
    return (mean * precision.softmax(-2)).sum(-2), -precision.logsumexp(-2)


@_fusion
def product(mean: Tensor, log_var: Tensor, there: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Product of experts with the prior N(0, 1) as one more (Hinton 2002; Wu and Goodman 2018): little evidence stays near the prior."""
    precision = _log_precision(log_var, there, weight)
    total = F.pad(precision, (0, 0, 0, 1)).logsumexp(-2)
    return (mean * (precision - total[..., None, :]).exp()).sum(-2), -total


@_fusion
def tempered_product(mean: Tensor, log_var: Tensor, there: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Product with the prior, where n witnesses count as one together: each to the power weight / sum of weights. For witnesses that repeat each
    other, whose errors are the same (log-linear pooling)."""
    share = weight * there
    return product(mean, log_var, there, share / share.sum(-1, keepdim=True))


@_fusion
def soft_max_conf(mean: Tensor, log_var: Tensor, there: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Average weighted by the square of precision: between ``precision_average`` and ``max_conf``."""
    log_share = (2 * _log_precision(log_var, there, weight)).log_softmax(-2)
    spread = (2 * log_share + log_var).masked_fill(~there[..., None], -math.inf)
    return (mean * log_share.exp()).sum(-2), spread.logsumexp(-2)


@_fusion
def mixture(mean: Tensor, log_var: Tensor, there: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture of the witnesses, in shares of ``weight``: where they disagree, it is unsure."""
    share = weight * there
    return _moments(mean, log_var, (share / share.sum(-1, keepdim=True))[..., None])


@_fusion
def subset_mixture(mean: Tensor, log_var: Tensor, there: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of an even mixture of the products of all subsets of the witnesses that are there (Sutter et al. 2021)."""
    count = there.shape[-1]
    if count > LARGEST_SUBSETS:
        raise ValueError(
            f"subset_mixture of {count} witnesses would take {2**count - 1} products; at most {LARGEST_SUBSETS}"
        )
    chosen = torch.arange(1, 2**count, device=there.device)[:, None] >> torch.arange(count, device=there.device) & 1 > 0
    parts = [product(mean, log_var, there & subset, weight) for subset in chosen]
    possible = torch.stack([(there | ~subset).all(-1) for subset in chosen], -1).float()
    means, log_vars = (torch.stack(list(x), -2) for x in zip(*parts, strict=True))
    return _moments(means, log_vars, (possible / possible.sum(-1, keepdim=True))[..., None])


@_fusion
def mean(mean: Tensor, log_var: Tensor, there: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Average in shares of ``weight`` that heeds no confidence (the baseline), with the variance of an average of independent errors."""
    share = weight * there
    share = (share / share.sum(-1, keepdim=True))[..., None]
    return (mean * share).sum(-2), (share.square() * log_var.exp()).sum(-2).log()


def _moments(mean: Tensor, log_var: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    middle = (share * mean).sum(-2)
    return middle, (share * (log_var.exp() + (mean - middle[..., None, :]).square())).sum(-2).log()


def information(var: Tensor) -> Tensor:
    """How sure a Gaussian is, [...] of ``var`` [..., dim]: nats per dimension that its entropy is below that of the prior N(0, 1), which is the mean of
    -log(var) / 2. 0 is no evidence; the variances of a product with the prior never give less."""
    return -0.5 * var.float().log().mean(-1)


def divergence(g: Gaussian) -> Tensor:
    """Kullback-Leibler divergence from the prior, sum over dimensions of (mean^2 + var - 1 - log var) / 2, [...]."""
    return 0.5 * (g.mean.square() + g.var - 1 - g.log_var).sum(-1)


def disagreement(a: Gaussian, b: Gaussian) -> Tensor:
    """-log density, mean over dimensions, of the difference between the means of ``a`` and ``b`` [n, dim] if both are the same vector, each with an
    error of its own: N(0, var_a + var_b). Least where variances are the mean squared errors (Kendall and Gal 2017)."""
    log_var = torch.logaddexp(a.log_var, b.log_var)
    scaled = (a.mean - b.mean).square() * (-log_var).exp()
    return 0.5 * (math.log(2 * math.pi) + log_var + scaled).mean(-1)


def expected_match(a: Gaussian, b: Gaussian) -> Tensor:
    """Similarity [a, b] of every pair: the cosine of the means less half of the mean variance of both. This is ProLIP's
    mu_a . mu_b - (sum var_a + sum var_b) / 2 (Chun et al. 2025) for vectors of length sqrt(dim) instead of 1, so that N(0, 1) is a fitting prior."""
    cosine = F.normalize(a.mean, dim=-1, eps=1e-6) @ F.normalize(b.mean, dim=-1, eps=1e-6).T
    return cosine - 0.5 * (a.var.mean(-1)[:, None] + b.var.mean(-1))


def containment(a: Gaussian, b: Gaussian) -> Tensor:
    """How far ``a`` lies inside ``b``, mean over dimensions of log integral p_a^2 p_b - log integral p_a p_b^2, [...]: above 0 if the narrower one is
    ``a`` (the inclusion test of ProLIP, Chun et al. 2025, here with variances, not deviations, in their places)."""
    return (_log_overlap(a, b) - _log_overlap(b, a)).mean(-1)


def _log_overlap(a: Gaussian, b: Gaussian) -> Tensor:
    """log of the integral of p_a^2 p_b, per dimension: p_a^2 is a Gaussian of half the variance times (4 pi var_a)^-1/2."""
    log_var = torch.logaddexp(a.log_var - math.log(2), b.log_var)
    scaled = (a.mean - b.mean).square() * (-log_var).exp()
    return -0.5 * (math.log(4 * math.pi) + a.log_var) - 0.5 * (math.log(2 * math.pi) + log_var + scaled)


class GaussianHead(nn.Module):
    """Mean and log variance [..., dim] of vectors [..., width].

    The mean has the length sqrt(dim), whatever the vector: without that, means grow (or, with distances in the loss, shrink to a point) in place of
    variances learning. The log variance stays in ``low`` to ``high`` by tanh, so that no witness can outweigh the others without bound, and begins at
    the middle: weights are small, and there is no bias at first. A hidden layer of its own lets it see what is unusual, which is no direction.
    """

    def __init__(self, width: int, dim: int, low: float = -9.0, high: float = 3.0) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.norm = nn.LayerNorm(width)
        self.mean, self.spread = nn.Linear(width, dim), nn.Linear(width, dim)
        self.doubt = nn.Sequential(nn.Linear(width, width), nn.GELU())
        nn.init.normal_(self.spread.weight, std=0.01 / math.sqrt(width))
        nn.init.zeros_(self.spread.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        mean = self.mean(x).float()
        mean = F.normalize(mean, dim=-1, eps=1e-6) * math.sqrt(mean.shape[-1])
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        return mean, middle + half * torch.tanh(self.spread(self.doubt(x)).float())

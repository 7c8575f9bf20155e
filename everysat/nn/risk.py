"""Whether confidence is worth anything: what is left wrong when only the most confident are kept, who is told apart, how far from the truth.

Risk is any loss per sample, 0 or 1 for errors, squared errors for values. Samples of one confidence count as one: their order, which means
nothing, has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everysat.nn.gaussian import Gaussian


@dataclass(frozen=True)
class RiskCoverage:
    """``risk`` [n]: mean loss of the share ``coverage`` [n] of samples that are the most confident. ``aurc``: its mean over all samples, the area under
    the curve (Geifman and El-Yaniv 2017). ``best``: the same if confidence had the order of the loss; ``excess`` is the difference, 0 for a perfect
    order (Geifman et al. 2019). ``chance``: that of a confidence that knows nothing, the mean loss."""

    coverage: Tensor
    risk: Tensor
    aurc: float
    best: float
    chance: float

    @property
    def excess(self) -> float:
        return self.aurc - self.best

    def at(self, coverage: float) -> float:
        """Risk of that share of the samples."""
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage={coverage} must be a share above 0, up to 1")
        return float(self.risk[int((self.coverage < coverage - 1e-9).sum())])

    def coverage_at(self, risk: float) -> float:
        """Largest share that can be kept at no more than that risk; 0 if there is none."""
        fits = self.risk <= risk
        return float(self.coverage[fits].max()) if fits.any() else 0.0


def risk_coverage(confidence: Tensor, loss: Tensor) -> RiskCoverage:
    """The curve of ``loss`` [n] by ``confidence`` [n]; NaN confidence is none at all.

    Raises:
        ValueError: no samples, or lengths that differ.
    """
    if confidence.shape != loss.shape or confidence.ndim != 1 or not len(loss):
        raise ValueError(
            f"confidence and loss have shapes {list(confidence.shape)} and {list(loss.shape)}, expected [n] twice, n > 0"
        )
    each = loss.double()
    risk = _risk(torch.nan_to_num(confidence.double(), nan=-torch.inf), each)
    n = len(each)
    return RiskCoverage(
        torch.arange(1, n + 1) / n, risk, float(risk.mean()), float(_risk(-each, each).mean()), float(each.mean())
    )


def _risk(confidence: Tensor, loss: Tensor) -> Tensor:
    order = confidence.argsort(descending=True)
    _, level = confidence[order].unique_consecutive(return_inverse=True)
    count = torch.bincount(level)
    expected = (torch.bincount(level, loss[order]) / count)[level]  # among equals, any order is as likely
    return expected.cumsum(0) / torch.arange(1, len(loss) + 1, dtype=torch.float64)


def auroc(score: Tensor, positive: Tensor) -> float:
    """Chance that the ``score`` [n] of one that is ``positive`` is above that of one that is not; equals count half. NaN if there is no such pair."""
    _, level = score.unique(return_inverse=True)
    count = torch.bincount(level).double()
    rank = (count.cumsum(0) - (count - 1) / 2)[level]  # mean rank of equals, from 1
    n, m = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def error_ratio(said: Gaussian, truth: Tensor) -> Tensor:
    """(truth - mean)^2 / var, mean over dimensions, [n]: 1 on average where variances are right, above where they are too small."""
    return ((truth - said.mean).square() / said.var).mean(-1)


def calibration_by_count(said: Gaussian, truth: Tensor, there: Tensor) -> dict[int, float]:
    """Mean of :func:`error_ratio` by the number of witnesses, of ``there`` [n, witness], that ``said`` is made of."""
    ratio, count = error_ratio(said, truth), there.sum(-1)
    return {int(k): float(ratio[count == k].mean()) for k in count.unique()}


def fitted_scale(said: Gaussian, truth: Tensor) -> float:
    """The factor on all variances that makes ``truth`` most likely, which is the mean of :func:`error_ratio` (of samples that were not trained on)."""
    return float(error_ratio(said, truth).mean())

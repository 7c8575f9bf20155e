"""Supervised losses over what was labelled. Each takes ``logits`` [n, class] and targets of the n labelled pixels or places.

Selecting the labelled ones (:func:`labelled`) is how labels are ignored: what is not valid never reaches a loss. Where nothing
is labelled a loss is 0, with a gradient of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from everysat.find import suggest

Loss = Callable[..., Tensor]


def labelled(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """``prediction`` [obs, channel, y, x] and ``target``, ``valid`` [obs, y, x] -> [n, channel] and [n], where valid."""
    return prediction.movedim(1, -1)[valid], target[valid]


def cross_entropy(logits: Tensor, target: Tensor, *, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Mean of ``-log p(target)``; with ``weight`` [class] the mean is weighted by the weight of the target's class.

    ``smoothing`` mixes the target with the uniform distribution (Szegedy et al. 2016).
    """
    if len(target) == 0:
        return logits.sum() * 0
    return F.cross_entropy(logits, target, _like(weight, logits), label_smoothing=smoothing)


def focal(logits: Tensor, target: Tensor, *, weight: Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Mean of ``-(1 - p)^gamma log p`` of the target's probability p (Lin et al. 2017); ``gamma`` 0 is cross-entropy."""
    if len(target) == 0:
        return logits.sum() * 0
    log_p = F.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
    each = torch.ones_like(log_p) if weight is None else weight.to(logits)[target]
    return -(each * (1 - log_p.exp()) ** gamma * log_p).sum() / each.sum()


def dice(logits: Tensor, target: Tensor, *, eps: float = 1.0) -> Tensor:
    """1 - Dice, mean over the classes that occur in ``target``; sums run over all labelled pixels of the batch.

    Dice of a class = (2 sum p t + eps) / (sum p + sum t + eps) (Milletari et al. 2016, without squares).
    """
    if len(target) == 0:
        return logits.sum() * 0
    p, truth = logits.softmax(-1), F.one_hot(target, logits.shape[1]).to(logits)
    score = (2 * (p * truth).sum(0) + eps) / (p.sum(0) + truth.sum(0) + eps)
    return 1 - score[truth.any(0)].mean()


def cross_entropy_dice(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, smoothing: float = 0.0, share: float = 0.5
) -> Tensor:
    """``(1 - share)`` cross-entropy + ``share`` Dice."""
    return (1 - share) * cross_entropy(logits, target, weight=weight, smoothing=smoothing) + share * dice(
        logits, target
    )


def binary_cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Mean over all labelled (place, class) of the binary cross-entropy; ``target`` 0 or 1, same shape as ``logits``.

    ``weight`` [class] multiplies the positives' term; ``smoothing`` pulls targets towards one half.
    """
    if target.numel() == 0:
        return logits.sum() * 0
    soft = target.to(logits) * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, soft, pos_weight=_like(weight, logits))


def heat_focal(logits: Tensor, heat: Tensor, *, alpha: float = 2.0, beta: float = 4.0) -> Tensor:
    """Focal loss of a map with peaks of 1 (``heat`` [n, class], 0 to 1, same shape as ``logits``), summed, over the number of peaks.

    Of p at a peak ``-(1 - p)^alpha log p``, elsewhere ``-(1 - heat)^beta p^alpha log(1 - p)``: a wrong answer near a peak costs less (Law
    and Deng 2018, eq. 1; Zhou et al. 2019, eq. 1). Where there is no peak, over 1.
    """
    if heat.numel() == 0:
        return logits.sum() * 0
    p, peak = logits.sigmoid(), heat >= 1
    at = (1 - p) ** alpha * F.logsigmoid(logits)
    beside = (1 - heat) ** beta * p**alpha * F.logsigmoid(-logits)
    return -torch.where(peak, at, beside).sum() / peak.sum().clamp(min=1)


def mean_squared(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of the squared error."""
    return F.mse_loss(predicted, target) if target.numel() else predicted.sum() * 0


def huber(predicted: Tensor, target: Tensor, *, delta: float = 1.0) -> Tensor:
    """Squared error / 2 below ``delta``, linear beyond (Huber 1964)."""
    return F.huber_loss(predicted, target, delta=delta) if target.numel() else predicted.sum() * 0


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": cross_entropy,
    "focal": focal,
    "dice": dice,
    "ce+dice": cross_entropy_dice,
    "bce": binary_cross_entropy,
    "mse": mean_squared,
    "huber": huber,
}


def loss(name: str, **options: object) -> Loss:
    """The loss of that name with these options; options left at None are the loss's own defaults.

    Raises:
        LookupError: no such loss. TypeError: an option that the loss does not take.
    """
    if name not in LOSSES:
        raise LookupError(f"no loss is called {name!r}. {suggest(name, LOSSES)}")
    given = {key: value for key, value in options.items() if value is not None}
    taken = LOSSES[name].__kwdefaults__ or {}
    for key in given:
        if key not in taken:
            raise TypeError(f"loss {name!r} takes no option {key!r}; it takes {', '.join(taken) or 'none'}")
    return partial(LOSSES[name], **given)


def _like(weight: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(logits)

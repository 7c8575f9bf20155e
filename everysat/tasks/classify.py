"""Classification of places or of pixels, one class each or several.

The target is a raster layer of the batch. One class: one band of class codes, as the ``classes`` option lists them; codes that
are not listed count as not labelled. Several classes at once: one band of 0 and 1 per class. Places: one pixel per place.
What is not ``valid`` is ignored by loss and metrics. To make a classifier robust against missing sensors, drop whole layers
while fine-tuning: that is an augmentation of the batch, not a matter of the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchmetrics.classification as tm
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from everysat.nn.heads import PixelHead, PlaceHead, aligned, build_head
from everysat.nn.losses import labelled, loss
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Encoder, Features, Raster, Task

DEFINITIONS = {
    "accuracy": "share of the labelled pixels or places whose most probable class is the label (overall accuracy, micro F1)",
    "macro_f1": "F1 per class, mean over the classes that occur in labels or predictions; undefined F1 counts as 0",
    "weighted_f1": "F1 per class, mean weighted by the number of labels of the class",
    "miou": "intersection over union per class, mean over the classes that occur in labels or predictions",
    "multilabel_micro_f1": "F1 over all (place, class) decisions together, probability above 0.5",
    "multilabel_macro_f1": "F1 per class at probability above 0.5, unweighted mean over all classes; undefined F1 counts as 0",
    "multilabel_weighted_f1": "F1 per class at probability above 0.5, mean weighted by the number of positive labels",
    "multilabel_map": "average precision per class, mean over the classes that have a positive label",
}
"""What each metric of this module means, in full."""


class Classify(Task):
    """See :func:`build`."""

    codes: Tensor
    weight: Tensor | None

    def __init__(self, head: PlaceHead | PixelHead, classes: Mapping[int, str], config: dict[str, Any]) -> None:
        super().__init__()
        self.head, self.config = head, config
        self.target = config["target"]
        self.multilabel = config["multilabel"]
        self.names = tuple(classes.values())
        self.register_buffer("codes", torch.tensor(list(classes), dtype=torch.int64), persistent=False)
        self.register_buffer("weight", _weight(config["weight"], classes), persistent=False)
        self.sensor = Sensor(
            f"{self.target}-probability",
            "classes",
            tuple(Band(name, 1.0, "probability", range=(0.0, 1.0)) for name in self.names),
            source="predicted",
        )
        self.loss = loss(
            config["loss"], smoothing=config["smoothing"] or None, weight=self.weight, **config["loss_options"]
        )

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        logits, seen = self.head(self.features(encoder, batch), batch)
        return self.supervised(logits, seen, batch)

    def supervised(self, logits: Tensor, seen: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss of ``logits`` [row, class, y, x] that are ``seen`` [row, y, x] against the labels of the batch."""
        chosen, truth = self._labelled(logits, seen, batch)
        weight = {} if self.weight is None else {"weight": self.weight}
        return {"loss": self.loss(chosen, truth, **weight), "labelled": chosen.new_tensor(float(len(truth)))}

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """Probabilities, one band per class. ``batch`` is needed by heads that read local pixels."""
        logits, seen = self.head(features, batch)
        return self.head.raster(self.sensor, logits.sigmoid() if self.multilabel else logits.softmax(1), seen, features)

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """What ``metrics()`` are updated with: probabilities [n, class] and labels [n] (several classes: [n, class])."""
        return self._labelled(prediction.values, prediction.valid[:, 0], batch)

    def metrics(self) -> Mapping[str, Any]:
        n = len(self.names)
        if self.multilabel:
            return {
                "micro_f1": tm.MultilabelF1Score(n, average="micro"),
                "macro_f1": tm.MultilabelF1Score(n, average="macro"),
                "weighted_f1": tm.MultilabelF1Score(n, average="weighted"),
                "map": MeanAveragePrecision(n),
            }
        return {
            "accuracy": tm.MulticlassAccuracy(n, average="micro"),
            "macro_f1": tm.MulticlassF1Score(n, average="macro"),
            "weighted_f1": tm.MulticlassF1Score(n, average="weighted"),
            "miou": tm.MulticlassJaccardIndex(n, average="macro"),
        }

    def _labelled(self, values: Tensor, seen: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        values, seen, truth, valid = aligned(values, seen, batch.raster(self.target))
        if self.multilabel:
            if truth.shape[1] != len(self.names):
                raise ValueError(f"target {self.target!r} has {truth.shape[1]} bands for {len(self.names)} classes")
            return labelled(values, (truth > 0.5).long().movedim(1, -1), valid.all(1) & seen)
        index, known = self._index(truth[:, 0])
        return labelled(values, index, valid[:, 0] & known & seen)

    def _index(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Position of each code in the list of classes, and whether it is listed."""
        hit = codes.round().long()[..., None] == self.codes
        return hit.long().argmax(-1), hit.any(-1)


class MeanAveragePrecision(tm.MultilabelAveragePrecision):
    """Mean over the classes that have a positive label; torchmetrics counts the others as 0. NaN where no class has one."""

    def compute(self) -> Tensor:  # type: ignore[override]
        p, truth = (torch.cat(part) if isinstance(part, list) else part for part in (self.preds, self.target))
        each = [binary_average_precision(p[:, c], truth[:, c]) for c in truth.any(0).nonzero()[:, 0].tolist()]
        return torch.stack(each).mean() if each else p.new_tensor(torch.nan)


def build(
    variant: str = "pixel",
    *,
    encoder: Encoder,
    classes: Mapping[int, str] | Sequence[str],
    target: str = "label",
    multilabel: bool = False,
    head: str = "norm",
    loss: str = "",
    weight: Sequence[float] | None = None,
    smoothing: float = 0.0,
    loss_options: Mapping[str, Any] | None = None,
    gsd_m: float | None = None,
    token_size_m: float | None = None,
    local: Sequence[str] = (),
) -> Classify:
    """A classifier on ``encoder``.

    Args:
        variant: ``place`` (from the summary) or ``pixel`` (each token gives the pixels that it covers).
        classes: names by code, or names alone, whose codes are 0, 1, 2, ...
        target: name of the layer that holds the labels.
        multilabel: several classes at once; probabilities are then independent.
        head: ``linear``, ``norm`` (LayerNorm + linear), ``mlp``, or for pixels ``upernet`` (:class:`everysat.nn.heads.UperNet`).
        loss: ``ce``, ``focal``, ``dice``, ``ce+dice``; for several classes ``bce``. Default ``ce`` or ``bce``.
        weight: per class, for the loss. smoothing: of the labels. loss_options: ``gamma``, ``share``, ``eps``.
        gsd_m, token_size_m: pixel of the target and side of the encoder's tokens, metres; needed for ``pixel``.
        local: layers whose own pixels are read beside the tokens (``pixel`` only).

    Raises:
        ValueError, LookupError: the options do not fit together; the message says which.
    """
    variant = variant or "pixel"
    listed = {int(c): n for c, n in classes.items()} if isinstance(classes, Mapping) else dict(enumerate(classes))
    if len(listed) < (1 if multilabel else 2):
        raise ValueError(f"classes={classes!r} must name at least {1 if multilabel else 2} classes")
    loss = loss or ("bce" if multilabel else "ce")
    if multilabel != (loss == "bce"):
        raise ValueError(f"loss={loss!r} does not fit multilabel={multilabel}; use bce for several classes, only there")
    config = {
        "variant": variant,
        "classes": {str(c): n for c, n in listed.items()},
        "target": target,
        "multilabel": multilabel,
        "head": head,
        "loss": loss,
        "weight": None if weight is None else [float(w) for w in weight],
        "smoothing": smoothing,
        "loss_options": dict(loss_options or {}),
        "gsd_m": gsd_m,
        "token_size_m": token_size_m,
        "local": list(local),
    }
    chosen = build_head(variant, head, encoder, len(listed), gsd_m=gsd_m, token_size_m=token_size_m, local=local)
    return Classify(chosen, listed, config)


def _weight(weight: Sequence[float] | None, classes: Mapping[int, str]) -> Tensor | None:
    if weight is not None and len(weight) != len(classes):
        raise ValueError(f"weight has {len(weight)} values for {len(classes)} classes")
    return None if weight is None else torch.tensor(weight, dtype=torch.float32)

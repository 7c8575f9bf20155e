"""What has changed between two times: one encoder sees both, and what it says of them is compared, place by place or token by token.

The two times are either two layers of the batch (``before`` and ``after``), or two periods of the layers that the encoder reads: then each
gets the observations that begin in it. For a time series of changes, the same task is asked about one pair of periods after another, see
:meth:`Change.between`. The target is a layer of classes of change or, with ``states``, what is there at both times: a pixel whose class
differs has changed. What either time lacks is not predicted and not scored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torchmetrics.classification as tm
from torch import Tensor
from torchmetrics.wrappers import LambdaInputTransformer

from everysat.find import suggest
from everysat.io import dates
from everysat.nn.heads import build_head
from everysat.sensors import Band, Sensor
from everysat.tasks.classify import Classify
from everysat.types import Batch, Encoder, Features, Layer, Raster, Task

DEFINITIONS = {
    "f1_changed": "F1 of changed against unchanged over all labelled pixels or places; changed is any most probable class but the "
    "unchanged one; 0 where nothing changed and nothing was found",
    "iou_changed": "intersection over union of changed, decided in the same way; 0 where nothing changed and nothing was found",
    "precision_changed": "share of what was found changed that has changed; 0 where nothing was found",
    "recall_changed": "share of what has changed that was found; 0 where nothing has changed",
    "kappa": "Cohen's kappa of all classes: (accuracy - chance agreement) / (1 - chance agreement), chance from the margins; NaN where "
    "labels and predictions are all of one class",
    "accuracy": "share of the labelled pixels or places whose most probable class is the label (overall accuracy, micro F1)",
    "miou": "intersection over union per class, the unchanged one among them, mean over the classes that occur in labels or predictions",
}
"""What each metric of this module means, in full."""

FUSIONS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "difference": (1, lambda b, a: a - b, lambda b, a: (a - b).abs()),
    "concat": (2, lambda b, a: torch.cat([b, a], -1), lambda b, a: torch.cat([b.minimum(a), b.maximum(a)], -1)),
    "both": (
        3,
        lambda b, a: torch.cat([b, a, a - b], -1),
        lambda b, a: torch.cat([b.minimum(a), b.maximum(a), (a - b).abs()], -1),
    ),
}
"""By name: how many times as wide as a feature, of a feature before and after; and the same where the order of the two is not to matter."""

ENDS = "ends"


class Change(Task):
    """See :func:`build`."""

    def __init__(self, classify: Classify, config: dict[str, Any]) -> None:
        super().__init__()
        self.classify, self.config = classify, config
        self.target, self.sensor = classify.target, classify.sensor
        self.unchanged = classify.codes.tolist().index(config["unchanged"])

    def between(self, before: Any, after: Any) -> Change:
        """The same task, sharing its weights, of two other periods: the steps of a time series of changes are
        ``[task.between(a, b) for a, b in itertools.pairwise(periods)]``."""
        if self.config["periods"] is None:
            raise ValueError(
                f"the task compares the layers {self.config['pairs']}, not periods; build it with periods=..."
            )
        twin = copy.copy(self)
        twin.config = {**self.config, "periods": _periods([before, after])}
        return twin

    def features(self, encoder: Encoder, batch: Batch) -> Features:
        """Features of each place (``place``) or token (``pixel``) that both times have, fused."""
        return self.fused(encoder(encoder.tokenize(self.apart(encoder, batch))))

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        features = self.features(encoder, batch)
        if len(features.coords) == 0:  # nothing that both times have: nothing to learn from, and no grid to make
            nothing = 0.0 * (features.mean.sum() + features.summary.sum())
            return {"loss": nothing, "labelled": nothing.detach()}
        logits, seen = self.classify.head(features)
        return self.classify.supervised(logits, seen, self._labelled(batch))

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """Probabilities of the classes of change from fused features, which :meth:`features` gives."""
        return self.classify.predict(features)

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """What ``metrics()`` are updated with: probabilities [n, class] and classes [n] of what is labelled."""
        return self.classify.pairs(prediction, self._labelled(batch))

    def metrics(self) -> Mapping[str, Any]:
        def changed(metric: Any) -> Any:
            return LambdaInputTransformer(
                metric, lambda p: (p.argmax(1) != self.unchanged).long(), lambda truth: (truth != self.unchanged).long()
            )

        n = len(self.classify.names)
        return {
            "f1_changed": changed(tm.BinaryF1Score()),
            "iou_changed": changed(tm.BinaryJaccardIndex()),
            "precision_changed": changed(tm.BinaryPrecision()),
            "recall_changed": changed(tm.BinaryRecall()),
            "kappa": tm.MulticlassCohenKappa(n),
            "accuracy": tm.MulticlassAccuracy(n, average="micro"),
            "miou": tm.MulticlassJaccardIndex(n, average="macro"),
        }

    def apart(self, encoder: Encoder, batch: Batch) -> Batch:
        """A batch of twice as many places under the encoder's names of layers: all as they were before, then all as they are after.
        A layer that has no date, or no pair, is the same at both times.

        Raises:
            LookupError: neither layer of a pair is there.
        """
        n, pairs = len(batch), self.config["pairs"] or {}
        layers = {
            name: _stacked([_layer(batch, each, names) for each in names], n, name)
            for name, names in pairs.items()
            if name != self.target
        }
        shared = encoder.known(
            batch.without(self.target, *layers, *(each for names in pairs.values() for each in names))
        )
        for name, layer in shared.layers.items():
            layers[name] = _stacked(_times(layer, self.config["periods"]), n, name)
        return Batch(batch.places * 2, layers, batch.source)

    def fused(self, features: Features) -> Features:
        """Features of the places of :meth:`apart`, those of before and after made one."""
        n, coords = len(features.places) // 2, features.coords
        late, row = coords.row >= n, coords.row % max(n, 1)
        key = row
        if self.config["variant"] == "pixel":
            cells = coords.cells()
            height, width = (int(side.max()) + 1 if len(side) else 1 for side in cells.unbind(1))
            key = (row * height + cells[:, 0]) * width + cells[:, 1]
            for side in (late, ~late):
                if len(key[side].unique()) < int(side.sum()):
                    raise ValueError(
                        "several tokens lie in one cell; pool dates and groups, or select one of them, first"
                    )
        before, after = _matched(key, late)
        _, ordered, symmetric = FUSIONS[self.config["fuse"]]
        wide = symmetric if self.config["symmetric"] else ordered
        kept = replace(coords[before], row=row[before])
        mean, summary = (
            wide(features.mean[before], features.mean[after]),
            wide(features.summary[:n], features.summary[n:]),
        )
        return Features(mean, kept, summary, features.places[:n])

    def _labelled(self, batch: Batch) -> Batch:
        """With the map of changes as the target, also where the batch has states."""
        if not self.config["states"]:
            return batch
        if self.config["pairs"] is None:
            before, after = _times(batch.raster(self.target), self.config["periods"])
        else:
            before, after = (batch.raster(name) for name in self.config["pairs"][self.target])
        return batch.adding(**{self.target: _difference(before, after, self.target, self.config["classes"])})


def build(
    variant: str = "pixel",
    *,
    encoder: Encoder,
    pairs: Mapping[str, Sequence[str]] | None = None,
    periods: Sequence[Any] | str | None = None,
    states: bool = False,
    classes: Mapping[int, str] | Sequence[str] = ("unchanged", "changed"),
    unchanged: int | None = None,
    fuse: str = "both",
    symmetric: bool = False,
    target: str = "label",
    head: str = "norm",
    loss: str = "",
    weight: Sequence[float] | None = None,
    smoothing: float = 0.0,
    loss_options: Mapping[str, Any] | None = None,
    gsd_m: float | None = None,
    token_size_m: float | None = None,
) -> Change:
    """A change detector on ``encoder``.

    Args:
        variant: ``place`` (from the summaries) or ``pixel`` (each token gives the pixels that it covers).
        pairs: names of the layers before and after, by the encoder's name of the layer; by default ``before`` and ``after`` of its only
            input.
        periods: instead, the two periods (``"2019"``, ``["2018-05", "2018-09"]``, seconds), or ``"ends"`` for the first and the last
            date of each place and layer.
        states: the target says what is there, at both times: a dated layer for ``periods``; for ``pairs``, the two layers that ``pairs``
            names for it.
        classes: of change, names by code, or names alone, whose codes are 0, 1, ...; unchanged: the code of no change, by default the
            first.
        fuse: ``difference``, ``concat`` (both features) or ``both``. symmetric: the order of the two times does not matter.
        target, head, loss, weight, smoothing, loss_options, gsd_m, token_size_m: as for classification; ``ce+dice`` or ``focal`` suit
            changes that are rare.

    Raises:
        ValueError, LookupError: the options do not fit together; the message says which.
    """
    variant = variant or "pixel"
    listed = {int(c): n for c, n in classes.items()} if isinstance(classes, Mapping) else dict(enumerate(classes))
    unchanged = next(iter(listed), 0) if unchanged is None else unchanged
    if fuse not in FUSIONS:
        raise LookupError(f"fuse={fuse!r} is unknown. {suggest(fuse, FUSIONS)}")
    if len(listed) < 2 or unchanged not in listed or (states and (sorted(listed), unchanged) != ([0, 1], 0)):
        wanted = "the codes 0 (unchanged) and 1 for states" if states else "at least two, unchanged among them"
        raise ValueError(f"classes={listed} with unchanged={unchanged}: expected {wanted}")
    named = _pairs(encoder, pairs, target if states else None) if periods is None else None
    if periods is not None and pairs is not None:
        raise ValueError("give pairs (two layers) or periods (of one layer), not both")
    config = {
        "variant": variant, "pairs": named, "periods": _periods(periods), "states": states, "classes": {str(c): n for c, n in listed.items()},
        "unchanged": unchanged, "fuse": fuse, "symmetric": symmetric, "target": target, "head": head, "loss": loss or "ce",
        "weight": None if weight is None else [float(w) for w in weight], "smoothing": smoothing, "loss_options": dict(loss_options or {}),
        "gsd_m": gsd_m, "token_size_m": token_size_m,
    }  # fmt: skip
    dim = FUSIONS[fuse][0] * encoder.dim
    chosen = build_head(variant, head, encoder, len(listed), gsd_m=gsd_m, token_size_m=token_size_m, dim=dim)
    return Change(Classify(chosen, listed, {**config, "multilabel": False}), config)


def _pairs(encoder: Encoder, pairs: Mapping[str, Sequence[str]] | None, target: str | None) -> dict[str, list[str]]:
    if pairs is None:
        if len(encoder.inputs) != 1 or target is not None:
            raise ValueError(
                f"the encoder reads {', '.join(encoder.inputs) or 'any layer'}{' and states are asked for' if target else ''}: say in "
                "pairs which layers are before and after, {layer: [before, after]}, or in periods which dates"
            )
        pairs = {next(iter(encoder.inputs)): ("before", "after")}
    for name, names in pairs.items():
        if len(names) != 2 or isinstance(names, str):
            raise ValueError(f"pairs: {name!r} has {names!r}, expected two names of layers, before and after")
        if name != target and encoder.inputs and name not in encoder.inputs:
            raise LookupError(f"pairs: {name!r} is no input of the encoder. {suggest(name, encoder.inputs)}")
    if target is not None and target not in pairs:
        raise ValueError(f"states: say in pairs which layers hold {target!r} before and after")
    return {name: list(names) for name, names in pairs.items()}


def _periods(given: Sequence[Any] | str | None) -> list[list[float]] | str | None:
    if given is None or given == ENDS:
        return given
    if isinstance(given, str) or len(given) != 2:
        raise ValueError(f"periods={given!r}: expected two of them, before and after, or {ENDS!r}")
    before, after = (list(dates.span(each)) for each in given)
    if before == after:
        raise ValueError(f"periods={given!r} are one and the same: nothing changes in no time")
    return [before, after]


def _layer(batch: Batch, name: str, names: Sequence[str]) -> Raster | None:
    """The layer of that name, or None where only its pair is there."""
    if name in batch.layers or not any(each in batch.layers for each in names):
        return batch.raster(name)
    return None


def _times(layer: Layer, periods: Any) -> list[Any]:
    """A layer before and after. What has no dates is the same at both times."""
    if not isinstance(layer, Raster) or periods is None:
        return [layer, layer]
    start, always = layer.time_s[:, 0], ~torch.isfinite(layer.time_s).all(1)
    if periods == ENDS:
        first, last = (_extreme(layer.row, start, ~always, how)[layer.row] for how in ("amin", "amax"))
        return [layer.obs(always | (start == first)), layer.obs(always | ((start == last) & (last > first)))]
    return [layer.obs(always | ((start >= first) & (start < last))) for first, last in periods]


def _extreme(row: Tensor, start: Tensor, dated: Tensor, how: str) -> Tensor:
    """The first (``amin``) or last (``amax``) start of each row among what is dated; infinite where nothing is."""
    rows = int(row.max()) + 1 if len(row) else 0
    fill = torch.inf if how == "amin" else -torch.inf
    return start.new_full((rows,), fill).scatter_reduce(0, row[dated], start[dated], how)


def _stacked(parts: Sequence[Any], n: int, name: str) -> Layer:
    """Layers of the places before and after as one of twice as many places."""
    there = [(part, shift) for part, shift in zip(parts, (0, n), strict=True) if part is not None]
    kind = type(there[0][0])
    if any(type(part) is not kind for part, _ in there):
        raise ValueError(f"the layers before and after of {name!r} are of different kinds")
    return kind._cat([part for part, _ in there], [shift for _, shift in there])


def _matched(key: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the first early and of the first late entry of each key that has both, in the order of keys."""
    found = []
    for side in (~late, late):
        index = side.nonzero()[:, 0]
        order = key[index].argsort(stable=True)
        index = index[order]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = key[index][1:] != key[index][:-1]
        found.append(index[first])
    before, after = found
    return before[torch.isin(key[before], key[after])], after[torch.isin(key[after], key[before])]


def _difference(before: Raster, after: Raster, name: str, classes: Mapping[str, str]) -> Raster:
    """1 where the class of a pixel differs, 0 where it does not; valid where both are."""
    for part, when in ((before, "before"), (after, "after")):
        if len(part.row.unique()) < len(part.row):
            raise ValueError(f"{name!r} has several maps of one place {when}: take a period in which there is one")
    row = torch.cat([before.row, after.row])
    early, late = _matched(row, torch.arange(len(row), device=row.device) >= len(before.row))
    old, new = before.obs(early), after.obs(late - len(before.row))
    if old.values.shape != new.values.shape:
        raise ValueError(
            f"{name!r} has maps of {tuple(old.values.shape[1:])} before and {tuple(new.values.shape[1:])} after"
        )
    band = Band("change", old.gsd_m, "class", classes={int(code): text for code, text in classes.items()})
    changed = (old.values[:, :1].round() != new.values[:, :1].round()).to(old.values)
    times = torch.stack([old.time_s[:, 0], new.time_s[:, 1]], 1)
    return Raster(
        Sensor("change", "classes", (band,), source="derived"),
        changed,
        (old.valid & new.valid)[:, :1],
        times,
        old.row,
        old.gsd_m,
    )

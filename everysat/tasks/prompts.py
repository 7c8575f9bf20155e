"""Classes that are words: the prompts of a model that reads text, in place of labels, and a few examples beside them if there are any.

A class is a prompt in one or several ways of saying it ("forest", "an image of many trees"), which the model reads as one bag: a Gaussian
(:meth:`everysat.models.georeset.GeoReset.text`). A cell or a place is compared with each by the likeness that words and images were trained on,
:meth:`everysat.models.georeset.GeoReset.match`. In training its sigmoid told the one text of a place from those of strangers, so that its bias
says how many strangers there were. Among prompts of which one is right, the odds of each are exp(match), and the probabilities their
softmax: the bias, and with it the size of a training batch, cancels. So does how sure the cell is (its variance is in all of its logits alike);
``least_nats`` is what heeds it.

With ``reject``, what is not likely enough, or of which too little is known, is *unsure*, a class of its own (the rule of Chow 1970: to abstain is
worth ``reject``, to be right is worth 1). Where nothing was observed there is no class at all.

Examples are places of a class as the model sees them. Images and words of one thing do not lie at one point (the modality gap, Liang et al.
2022), so that one class with examples would draw everything to itself. Thus prompts are first moved to where images lie, all by the same step, and then
each towards its examples, by maximum a posteriori adaptation (Gauvain and Lee 1994), see :func:`mixed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.nn.gaussian import Gaussian, expected_match, fuse, information
from everysat.nn.grid import grid_shape
from everysat.nn.heads import LEVELS, PixelHead, PlaceHead
from everysat.nn.mappers import Dense
from everysat.nn.ragged import side_by_side
from everysat.sensors import Band, Sensor
from everysat.tasks.classify import Classify
from everysat.types import Batch, ContractError, Encoder, Features, Raster

UNSURE = "unsure"
"""Name of the class of what is rejected."""
FIXED: dict[str, Any] = {"multilabel": False, "weight": None, "loss": "ce", "smoothing": 0.0, "loss_options": {}}
"""What :class:`Classify` lets one choose and a task of prompts does not."""


def mixed(prompts: Gaussian, examples: Mapping[int, Gaussian], worth: float) -> Gaussian:
    """Prompts [class, dim] moved towards ``examples`` [n, dim] of some classes, by their number.

    With u the unit vector of a prompt, e that of its n examples (their means weighted by precision), w = n / (n + ``worth``) and the step
    g from words to images, the mean of e - u over classes with examples in shares of w, the class lies at (1 - w) (u + g) + w e. Without
    examples of its own that is u + g; with many, e. Variances stay those of the prompts.
    """
    mean = F.normalize(prompts.mean, dim=-1, eps=1e-6)
    if not examples:
        return prompts
    index = torch.tensor(sorted(examples), device=mean.device)
    seen = torch.stack([_centre(examples[i]) for i in index.tolist()]).to(mean)
    count = mean.new_tensor([len(examples[i].mean) for i in index.tolist()])
    w = (count / (count + worth))[:, None]
    apart = seen - mean[index]
    step = (w * apart).sum(0) / w.sum()
    moved = (mean + step).index_add(0, index, w * (apart - step))
    return replace(prompts, mean=moved * prompts.mean.shape[-1] ** 0.5)


def _centre(examples: Gaussian) -> Tensor:
    """The unit vector [dim] of the mean of examples [n, dim], weighted by precision."""
    there = torch.ones(1, len(examples.mean), dtype=torch.bool, device=examples.mean.device)
    found = fuse("precision_average", examples.mean[None], examples.log_var[None], there)
    return F.normalize(found.mean[0], dim=-1, eps=1e-6)


class PromptHead(nn.Module):
    """Logits [row, class, y, x] of cells or places, see :meth:`GeoReset.match`; no weights are learned. ``classes``: Gaussians [class, dim]."""

    mean: Tensor
    log_var: Tensor

    def __init__(
        self, classes: Gaussian, scale: float, level: str, token_size_m: float | None, gsd_m: float | None
    ) -> None:
        super().__init__()
        self.scale, self.level, self.gsd_m, self.side = scale, level, gsd_m, 1
        self.token_size_m = token_size_m or 0.0
        if level == "pixel":
            if token_size_m is None or gsd_m is None:
                raise ValueError(
                    "level 'pixel' needs token_size_m (side of the tokens), metres: the encoder does not say"
                )
            self.side = round(token_size_m / gsd_m)
            if self.side < 1 or abs(self.side * gsd_m - token_size_m) > 1e-3 * gsd_m:
                raise ValueError(f"token_size_m={token_size_m:g} is not a multiple of gsd_m={gsd_m:g}")
        self.register_buffer("mean", classes.mean, persistent=False)
        self.register_buffer("log_var", classes.log_var, persistent=False)

    def match(self, mean: Tensor, var: Tensor) -> Tensor:
        """Logits [n, class] of [n, dim]: softmax of them is that of ``model.match``, whose bias cancels."""
        every = torch.ones(len(self.mean), dtype=torch.bool, device=self.mean.device)
        seen = Gaussian(mean.float(), var.float().log(), every.new_ones(len(mean)))
        return self.scale * expected_match(seen, Gaussian(self.mean, self.log_var, every))

    def forward(self, features: Features, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """Logits [row, class, y, x], and which of them come from something that was observed [row, y, x]."""
        found, _, seen = self.judged(features)
        return found, seen

    def judged(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [row, class, y, x], :func:`information` of what they come from [row, 1, y, x], and where there is any [row, y, x]."""
        if self.level == "place":
            image = self._said(features.summary, features.summary_var)[:, :, None, None]
            seen = features.summary.any(1)[:, None, None]  # the prior alone has a mean of 0
        else:
            said = self.of_cells(features)
            shape = grid_shape(features.places, self.token_size_m)
            image = said.new_full((len(features.places), said.shape[1], *shape), torch.nan)
            if len(features.coords):
                image = replace(features, mean=said, var=None).grid()
            image = image.repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)
            seen = torch.isfinite(image).all(1)
        return torch.nan_to_num(image[:, :-1]), torch.nan_to_num(image[:, -1:]), seen

    def of_cells(self, features: Features) -> Tensor:
        """Logits and information of each token, [token, class + 1]."""
        return self._said(features.mean, features.var)

    def _said(self, mean: Tensor, var: Tensor | None) -> Tensor:
        if var is None:
            raise ValueError(
                "the features have no variance: prompts need those of a model that reads text, such as georeset"
            )
        return torch.cat([self.match(mean, var), information(var)[:, None]], 1)

    def raster(self, sensor: Sensor, values: Tensor, seen: Tensor, features: Features) -> Raster:
        """As a layer."""
        form: Any = PlaceHead.raster if self.level == "place" else PixelHead.raster
        found: Raster = form(self, sensor, values, seen, features)
        return found


class Prompts(Classify):
    """See :func:`build`. ``names`` are those of the classes, without :data:`UNSURE`."""

    head: Any

    def __init__(self, head: PromptHead, codes: Mapping[int, str], config: dict[str, Any]) -> None:
        super().__init__(head, codes, {**FIXED, **config})  # type: ignore[arg-type]
        self.config = config
        if self._rejecting:
            unsure = Band(UNSURE, 1.0, "probability", range=(0.0, 1.0))
            self.sensor = replace(self.sensor, bands=(*self.sensor.bands, unsure))

    @property
    def _rejecting(self) -> bool:
        return self.config["reject"] > 0 or self.config["least_nats"] > 0

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """Probabilities, one band per class and, with ``reject`` or ``least_nats``, one of :data:`UNSURE`. That is the largest where the most probable
        class has less than ``reject``, p: there, all are in the proportions of p and ``reject``; it is 1 where less is known than
        ``least_nats``, and 0 elsewhere."""
        logits, known, seen = self.head.judged(features)
        return self.head.raster(self.sensor, self.probabilities(logits, known), seen, features)

    def probabilities(self, logits: Tensor, known: Tensor) -> Tensor:
        """As :meth:`predict` says, [row, band, y, x], of logits [row, class, y, x] and information [row, 1, y, x]; NaN stays NaN."""
        p = (logits / self.config["temperature"]).softmax(1)
        if self._rejecting:
            t = self.config["reject"]
            doubt = (p.amax(1, keepdim=True) < t) * (t / (1 + t))
            doubt = torch.where(known < self.config["least_nats"], 1.0, doubt)
            p = torch.cat([p * (1 - doubt), doubt + 0 * known], 1)
        return p

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """As of :class:`Classify`, of the classes alone: where it is unsure, the most probable of them counts."""
        return super().pairs(prediction.select(self.names), batch)


@dataclass(frozen=True)
class Judged:
    """In place of an encoder: features [token, class + 1] are the logits of the classes, and the information that they come from."""

    encoder: Encoder
    head: PromptHead

    def __call__(self, batch: Batch) -> Features:
        features = self.encoder.embed(batch)
        return replace(features, mean=self.head.of_cells(features), var=None)


@dataclass(frozen=True)
class Said:
    """In place of an encoder: features [token, 2 dim] are mean and log variance of what the model says of a cell."""

    encoder: Encoder

    def __call__(self, batch: Batch) -> Features:
        features = self.encoder.embed(batch)
        assert features.var is not None
        return replace(features, mean=torch.cat([features.mean, features.var.log()], 1), var=None)


@dataclass(frozen=True)
class Finer(Dense):
    """A map of ``task`` with pixels smaller than tokens: logits are interpolated between their centres. ``embed`` is :class:`Judged`."""

    task: Prompts | None = None

    @property
    def names(self) -> tuple[str, ...]:
        assert self.task is not None
        return tuple(self.task.sensor.names)

    @property
    def probabilistic(self) -> bool:
        return True

    def __call__(self, batch: Batch) -> Tensor:
        assert self.task is not None
        image = super().__call__(batch)
        return self.task.probabilities(image[:, :-1], image[:, -1:])


def exemplars(mean: Tensor, log_var: Tensor, group: Tensor) -> Gaussian:
    """One example for each group (a polygon, say), in the order of their numbers, from Gaussians [n, dim] of its pixels, each to the power 1 / number of pixels:
    near pixels repeat each other, and a large polygon is no more examples than a small one."""
    _, row = torch.unique(group, return_inverse=True)
    rows = int(row.max()) + 1 if len(row) else 0
    means, there, _ = side_by_side(mean, row, rows)
    log_vars, _, _ = side_by_side(log_var, row, rows)
    return fuse("precision_average", means, log_vars, there, (there / there.sum(1, keepdim=True)).clamp(min=1e-12))


def build(
    variant: str = "pixel",
    *,
    encoder: Encoder,
    classes: Mapping[str, Sequence[str]] | Sequence[str],
    reject: float = 0.0,
    least_nats: float = 0.0,
    examples: Mapping[str, Gaussian] | None = None,
    worth: float = 4.0,
    temperature: float = 1.0,
    target: str = "label",
    codes: Mapping[str, int] | None = None,
    gsd_m: float | None = None,
    token_size_m: float | None = None,
    said: Mapping[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
) -> Prompts:
    """A classifier by words, which needs no training.

    Args:
        encoder: a model that reads text, with ``text`` and ``match``, such as georeset.
        variant: ``place`` or ``pixel`` (each token gives the pixels that it covers).
        classes: ways of saying each class by its name, ``{"forest": ["forest", "many trees"]}``, or names, which are the prompts.
        reject: what is less probable than this is :data:`UNSURE`. least_nats: so is what has less information, nats per dimension.
        examples: what the model says of places or cells of a class, Gaussians [n, dim] by the name of the class; see :func:`mixed`. ``worth``:
            how many examples a prompt is worth.
        temperature: of the softmax, such as calibration finds; 1 is the likeness as it was trained.
        target, codes: layer that holds labels and their codes by class (0, 1, 2, ... by default), where there are any, for metrics.
        gsd_m, token_size_m: pixel of the map and side of the encoder's tokens, metres; by default tokens as the encoder has them.
        said, counts: what a saved task knows of its classes, ``mean`` and ``log_var`` [class, dim], and how many examples are in it; then no text is read.

    Raises:
        ContractError: a model that reads no text. ValueError: options that do not fit together.
    """
    variant = variant or "pixel"
    ways = _ways(classes)
    if variant not in LEVELS:
        raise LookupError(f"prompts has no variant {variant!r}; it has {', '.join(LEVELS)}")
    if not hasattr(encoder, "text") or not hasattr(encoder, "match"):
        raise ContractError(f"prompts need a model that reads text, such as georeset; {encoder.family} does not")
    if not (0 <= reject < 1 and least_nats >= 0 and temperature > 0 and worth >= 0):
        raise ValueError(
            f"reject={reject} must be a probability below 1, least_nats={least_nats} and worth={worth} at least 0, temperature={temperature} above 0"
        )
    model: Any = encoder
    found = _given(said, len(ways), encoder.dim) if said else model.text(list(ways.values()))
    if examples:
        found = mixed(found, _numbered(examples, ways, encoder.dim), worth)
        counts = {name: len(examples[name].mean) for name in examples}
    if variant == "pixel":
        token_size_m = token_size_m or getattr(getattr(encoder, "settings", None), "token_m", None)
        gsd_m = gsd_m or token_size_m
    codes = dict(codes or {name: code for code, name in enumerate(ways)})
    if set(codes) != set(ways):
        raise ValueError(f"codes={codes} must give one code to each class: {', '.join(ways)}")
    config = {
        "variant": variant,
        "classes": ways,
        "reject": reject,
        "least_nats": least_nats,
        "worth": worth,
        "temperature": temperature,
        "target": target,
        "codes": codes,
        "gsd_m": gsd_m,
        "token_size_m": token_size_m,
        "said": {"mean": _plain(found.mean), "log_var": _plain(found.log_var)},
        "counts": dict(counts or {}),
    }
    head = PromptHead(found, float(model.scale), variant, token_size_m, gsd_m)
    return Prompts(head, {int(codes[name]): name for name in ways}, config)


def _ways(classes: Mapping[str, Sequence[str]] | Sequence[str]) -> dict[str, list[str]]:
    if isinstance(classes, str):
        raise TypeError(f"classes={classes!r:.60} is one string; expected names, or ways of saying each by name")
    named = dict(classes) if isinstance(classes, Mapping) else {name: [name] for name in classes}
    if len(named) < len(classes) or len(named) < 2 or UNSURE in named:
        raise ValueError(
            f"classes={list(classes)!r} must name at least two classes, each once, and none {UNSURE!r}, the class of what is rejected"
        )
    for name, said in named.items():
        if isinstance(said, str) or not said or not all(isinstance(way, str) and way.strip() for way in said):
            raise ValueError(f"classes: {name!r} is said as {said!r}; expected a list of one or more strings")
    return {name: list(said) for name, said in named.items()}


def _numbered(examples: Mapping[str, Gaussian], ways: Mapping[str, Any], dim: int) -> dict[int, Gaussian]:
    order = list(ways)
    for name, given in examples.items():
        if name not in ways:
            raise ValueError(f"examples are of {name!r}, which is none of the classes {', '.join(ways)}")
        if (
            given.mean.ndim != 2
            or given.mean.shape != given.log_var.shape
            or given.mean.shape[1] != dim
            or not len(given.mean)
        ):
            raise ValueError(
                f"examples of {name!r} have shape {list(given.mean.shape)}; expected [n, {dim}], at least one"
            )
    return {order.index(name): given for name, given in examples.items()}


def _given(said: Mapping[str, Any], classes: int, dim: int) -> Gaussian:
    mean, log_var = (torch.tensor(said[name], dtype=torch.float32) for name in ("mean", "log_var"))
    if mean.shape != (classes, dim) or log_var.shape != mean.shape:
        raise ContractError(
            f"said has shape {list(mean.shape)}, expected [{classes}, {dim}]: is this the model it was made for?"
        )
    return Gaussian(mean, log_var, torch.ones(classes, dtype=torch.bool))


def _plain(x: Tensor) -> list[list[float]]:
    """As numbers that give the same float32 again."""
    return [[float(f"{value:.9g}") for value in row] for row in x.detach().cpu().float().tolist()]

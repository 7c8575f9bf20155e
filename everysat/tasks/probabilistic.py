"""Any task on Gaussian features: trained on samples of them, and its predictions averaged over what they may be.

Where the representation is unsure, samples of it lead to different answers, whose average is less sure: probabilities nearer to each other, values
with a variance. A map of classes then has, as its confidence, a probability that also knows what was missing or corrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from everysat.find import find
from everysat.nn.corruption import corrupted
from everysat.nn.gaussian import Gaussian, disagreement, divergence
from everysat.types import Batch, Encoder, Features, Raster, Task, Tokens


class Probabilistic(Task):
    """See :func:`build`."""

    noise: Tensor

    def __init__(self, task: Task, dim: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.task, self.config = task, config
        self.target, self.sensor = task.target, task.sensor
        drawn = torch.randn(config["samples"] // 2, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", torch.cat([drawn, -drawn]), persistent=False)

    @property
    def head(self) -> Any:
        """Of the task below."""
        return self.task.head

    def features(self, encoder: Encoder, batch: Batch) -> Features:
        return self.task.features(encoder, batch)

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of the task on one sample of the features; ``prior``, their divergence from N(0, 1) per dimension (Alemi et al. 2017); and ``agreement``,
        by which the variances of each modality learn how far its mean is from what the others say (Kendall and Gal 2017), where two saw the same;
        ``alone``, the loss of the task on each modality by itself."""
        sampled: Any = _Sampled(encoder, generator, agreement=self.config["agreement"] > 0)
        if self.config["corruption"]:
            seen = encoder.known(batch.without(self.target))
            batch = replace(
                batch,
                layers={**batch.layers, **corrupted(seen, encoder.inputs, self.config["corruption"], generator).layers},
            )
        terms = self.task(sampled, batch, generator)
        own = {"prior": sampled.divergence, "agreement": sampled.agreement}
        if self.config["alone"]:
            own["alone"] = torch.stack([self.task(one, batch, generator)["loss"] for one in sampled.each()]).mean()
        loss = terms["loss"] + torch.stack([self.config[name] * term for name, term in own.items()]).sum()
        return {**terms, "loss": loss, **{name: term.detach() for name, term in own.items() if self.config[name]}}

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """What the task predicts on average over samples of the features; of values also their variance over samples. All tokens share their noise, so
        that a token's prediction depends on nothing else. Of features without variance: what the task predicts of them."""
        if features.var is None:
            return self.task.predict(features, batch)
        said = [self.task.predict(_drawn(features, noise, noise), batch) for noise in self.noise]
        values = torch.stack([one.values for one in said])
        var = (
            None
            if self.sensor.kind == "classes"
            else values.var(0, correction=0) + (said[0].var if said[0].var is not None else 0)
        )
        return replace(said[0], values=values.mean(0), var=var)

    def metrics(self) -> Mapping[str, Any]:
        return self.task.metrics()

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.task.pairs(prediction, batch)


class _Sampled:
    """In place of an encoder, for one step: its features are a sample of what the encoder says."""

    def __init__(self, encoder: Encoder, generator: torch.Generator, *, agreement: bool) -> None:
        self._encoder, self._generator, self._agree = encoder, generator, agreement
        self._tokens: Tokens | None = None
        self._group: int | None = None
        self.divergence, self.agreement = torch.zeros(()), torch.zeros(())

    def each(self) -> Iterator[_Sampled]:
        """The same, restricted to one modality after the other; their tokens are those that were made before."""
        assert self._tokens is not None
        for group in range(len(self._tokens.groups)):
            one = _Sampled(self._encoder, self._generator, agreement=False)
            one._tokens, one._group = self._tokens, group
            yield one

    def tokenize(self, batch: Batch) -> Tokens:
        if self._tokens is None:
            self._tokens = self._encoder.tokenize(batch)
        return self._tokens if self._group is None else self._tokens[self._tokens.coords.group == self._group]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, tokens: Tokens) -> Features:
        features = self._encoder(tokens)
        if features.var is None or features.summary_var is None:
            return features
        if self._agree:
            said: Any = self._encoder
            self.agreement = torch.stack([_agreement(each, said.fusion) for each in said.witnesses(tokens)[1:]]).mean()
        means, variances = (features.mean, features.summary), (features.var, features.summary_var)
        noise = [torch.randn(mean.shape, generator=self._generator).to(mean.device) for mean in means]
        parts = [
            divergence(Gaussian(m, v.log(), torch.ones_like(m[..., 0], dtype=torch.bool))).sum() / max(m.numel(), 1)
            for m, v in zip(means, variances, strict=True)
        ]
        self.divergence = torch.stack(parts).mean()
        return _drawn(features, *noise)


def _agreement(said: Any, fusion: str) -> Tensor:
    """:func:`disagreement` of each modality with the others together, mean over modalities and cells (or places) that two saw; means learn nothing."""
    total, count = said.mean.new_zeros(()), 0
    for index in range(said.there.shape[1]):
        others = said.there.clone()
        others[:, index] = False
        both = said.there[:, index] & others.any(1)
        rest = said.fused(fusion, others)
        seen = torch.ones_like(both)
        own, rest = (
            Gaussian(said.mean[:, index].detach(), said.log_var[:, index], seen),
            Gaussian(rest.mean.detach(), rest.log_var, seen),
        )
        total = total + disagreement(own[both], rest[both]).sum()
        count += int(both.sum())
    return total / max(count, 1)


def _drawn(features: Features, of_tokens: Tensor, of_places: Tensor) -> Features:
    """A sample of features by standard normal noise."""
    if features.var is None or features.summary_var is None:
        return features
    mean = features.mean + features.var.sqrt() * of_tokens
    return replace(features, mean=mean, summary=features.summary + features.summary_var.sqrt() * of_places)


def build(
    variant: str = "",
    *,
    encoder: Encoder,
    task: Mapping[str, Any],
    samples: int = 8,
    prior: float = 1e-3,
    corruption: float = 0.0,
    agreement: float = 0.0,
    alone: float = 0.0,
    gsd_m: float | None = None,
) -> Probabilistic:
    """A task on a probabilistic encoder.

    Args:
        task: ``{"name": "classify/place", "options": {...}}``, what is to be predicted.
        samples: of the features, that a prediction is averaged over; even, each with its mirror image.
        prior: weight of the features' divergence from N(0, 1).
        corruption: share of the training places whose layer is full of noise, of each layer, see :func:`everysat.nn.corruption.corrupted`.
        agreement: weight of the loss that teaches variances how far modalities are apart, such as 0.1.
        alone: weight of the task's loss on each modality by itself, such as 1: otherwise the modality that is learned fastest leaves the others nothing to learn.
        gsd_m: pixel of the target; that of the task's own options.

    Raises:
        ValueError: the encoder says no variances, or the options do not fit.
    """
    if variant:
        raise LookupError(
            f"task probabilistic has no variant {variant!r}; the task that it is about has: task={{name: classify/place}}"
        )
    if not hasattr(encoder, "witnesses"):
        raise ValueError(
            f"task probabilistic is for Gaussian features, {encoder.family} gives none: set model.probabilistic to true"
        )
    if samples < 2 or samples % 2 or prior < 0 or not 0 <= corruption < 1 or min(agreement, alone) < 0:
        raise ValueError(
            f"samples={samples} must be even, 2 or more, prior={prior}, agreement={agreement} and alone={alone} not negative, and corruption={corruption} at least 0 and below 1"
        )
    if "name" not in task or set(task) - {"name", "options"}:
        raise ValueError(f"task={dict(task)!r} must say what to predict, as {{name: classify/place, options: {{...}}}}")
    module, inner = find("tasks", task["name"])
    given = task.get("options", {})
    below: Task = module.build(encoder=encoder, **({"variant": inner} if inner else {}), **given)
    below_named = {"name": task["name"].partition("/")[0], "options": below.config}
    if gsd_m not in (None, below.config.get("gsd_m")):
        raise ValueError(
            f"gsd_m={gsd_m} is not that of the task, {below.config.get('gsd_m')}: give it in the task's options"
        )
    config = {
        "task": below_named,
        "samples": samples,
        "prior": prior,
        "corruption": corruption,
        "agreement": agreement,
        "alone": alone,
        "gsd_m": below.config.get("gsd_m"),
    }
    return Probabilistic(below, encoder.dim, config)

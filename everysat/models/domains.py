"""An encoder for each domain, such as one sensor with labels and another without, whose features have an invariant and a specific half.

SHeDD (Dantas, Gaetano and Ienco, ECML-PKDD 2024, arXiv:2406.14087) moves a classifier from a source to a target that share classes and nothing else:
other bands, other pixels, no image in common. Each domain has a network of its own; the first half of its features is to be what domains share, the other
what is the domain's own (:mod:`everysat.tasks.adapt` trains them apart). Classifiers read the invariant half alone.

Layers are called ``<domain>/<layer>``, such as ``source/rgb`` and ``target/s2``, so that domains may have layers of one name; a place belongs to the domain
whose layers it has. Features are the invariant halves; of a place that has layers of several domains, their mean. :meth:`Domains.one` is the encoder of one
domain, which reads its layers by their own names and needs nothing of the others: what is used once training is over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from everysat.find import find, suggest
from everysat.nn.batchnorm import RowNorm
from everysat.nn.cells import cells_at
from everysat.nn.inputs import InputConfig
from everysat.types import Batch, Coords, Encoder, Features, Input, Tokens

SPLITS = ("halves", "projected")


class Spec(BaseModel):
    """``family`` and ``config`` of a domain's encoder; its modalities stand beside it, where everything looks for them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    family: str
    config: dict[str, Any]


class OneConfig(BaseModel):
    """Of a :class:`OneDomain`: the wrapped encoder ``of``, its ``modalities``, and as in :class:`Config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    of: Spec
    modalities: dict[str, Any]
    split: Literal["halves", "projected"] = "halves"
    dim: int | None = Field(default=None, ge=1)


class Config(BaseModel):
    """Of :class:`Domains`.

    Attributes:
        domains: the encoder of each, by name. modalities: of all, as ``<domain>/<layer>``.
        split: ``halves``, the encoder's features as they are, cut in two; ``projected``, linear layer, batch normalisation and ReLU before.
        dim: of each half; by default half the encoder's width. Domains must agree.
        shared: parts that all domains' encoders have in common, such as ``[stages]`` of ``resnet/`` or ``[projectors, cross]``; none in the paper, where a
            classifier is all that domains share.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    domains: dict[str, Spec] = Field(min_length=1)
    modalities: dict[str, Any]
    split: Literal["halves", "projected"] = "halves"
    dim: int | None = Field(default=None, ge=1)
    shared: list[str] = []


@dataclass(frozen=True)
class Halves:
    """Of the places of a domain: their numbers in the batch, ``row`` int64 [n], and both halves of their summaries [n, dim]; and of their tokens, at
    ``coords`` of the batch, [token, dim]."""

    row: Tensor
    invariant: Tensor
    specific: Tensor
    tokens: Tensor
    coords: Coords


class OneDomain(Encoder):
    """See the module's text. Features are the invariant half of those of ``backbone``; :meth:`halves` gives both."""

    family = "domains"

    def __init__(self, config: OneConfig, backbone: Encoder) -> None:
        super().__init__()
        self.backbone, self.inputs, width = backbone, backbone.inputs, backbone.dim
        self.dim = config.dim or width // 2
        if config.split == "halves" and 2 * self.dim != width:
            raise ValueError(
                f"split='halves' cuts features of {backbone.family}, {width} wide, into two of dim={self.dim}: take split='projected'"
            )
        inner = json.loads(json.dumps(backbone.config))
        modalities = inner.pop("modalities", None)
        if not isinstance(modalities, dict):
            raise ValueError(f"{backbone.family} lists no modalities: a domain is known by them; give modalities")
        own = {"of": {"family": backbone.family, "config": inner}, "modalities": modalities, "dim": self.dim}
        self.own = config
        self.config = {**own, "split": config.split}
        apart = config.split == "projected"
        self.of_places = _Projection(width, 2 * self.dim) if apart else nn.Identity()
        self.of_tokens = _Projection(width, 2 * self.dim) if apart else nn.Identity()

    @property
    def settings(self) -> Any:
        return getattr(self.backbone, "settings", None)

    def at(self, **changes: Any) -> OneDomain:
        """The same encoder, sharing its weights, with what the wrapped encoder lets one change."""
        twin = OneDomain(self.own, self.backbone.at(**changes)) if changes else self
        if changes:
            twin.of_places, twin.of_tokens = self.of_places, self.of_tokens
            twin.train(self.training)
        return twin

    def tokenize(self, batch: Batch) -> Tokens:
        return self.backbone.tokenize(batch)

    def forward(self, tokens: Tokens) -> Features:
        found = self.backbone(tokens)
        mean, summary = (
            part(x)[:, : self.dim] for part, x in ((self.of_tokens, found.mean), (self.of_places, found.summary))
        )
        return Features(mean, found.coords, summary, found.places)

    def halves(self, batch: Batch) -> Halves:
        """Both halves of all places of a batch."""
        found = self.backbone(self.backbone.tokenize(batch))
        invariant, specific = self.of_places(found.summary).split(self.dim, 1)
        row = torch.arange(len(batch), device=found.summary.device)
        return Halves(row, invariant, specific, self.of_tokens(found.mean)[:, : self.dim], found.coords)


class Domains(Encoder):
    """See the module's text."""

    family = "domains"

    def __init__(self, config: Config, encoders: Mapping[str, OneDomain]) -> None:
        super().__init__()
        widths = {name: encoder.dim for name, encoder in encoders.items()}
        self.dim = next(iter(widths.values()))
        if set(widths.values()) != {self.dim}:
            raise ValueError(f"halves of domains differ in width: {widths}. Give dim and split='projected'")
        self.inputs: dict[str, Input] = {
            f"{name}/{layer}": wanted for name, encoder in encoders.items() for layer, wanted in encoder.inputs.items()
        }
        self.encoders = nn.ModuleDict(dict(encoders))
        for part in config.shared:
            _share([self.one(name).backbone for name in encoders], part)
        self.config = {
            "domains": {name: encoder.config["of"] for name, encoder in encoders.items()},
            "modalities": {
                f"{name}/{layer}": entry
                for name, encoder in encoders.items()
                for layer, entry in encoder.config["modalities"].items()
            },
            "split": config.split,
            "dim": self.dim,
            "shared": config.shared,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains."""
        return tuple(self.encoders)

    def one(self, name: str) -> OneDomain:
        """The encoder of one domain, sharing its weights, which reads layers by their own names."""
        if name not in self.encoders:
            raise LookupError(f"no domain is called {name!r}. {suggest(name, self.encoders)}")
        encoder = self.encoders[name]
        assert isinstance(encoder, OneDomain)
        return encoder

    def part(self, batch: Batch, name: str, keep: Tensor | None = None) -> tuple[Tensor, Batch]:
        """Numbers of the places that a domain observed, int64 [n], and these alone, with its layers by their own names; with ``keep``, bool [row], some of
        them."""
        layers = {key: batch.raster(key) for key in self.inputs if key in batch.layers and key.startswith(f"{name}/")}
        mine = torch.zeros(len(batch), dtype=torch.bool, device=next(self.parameters()).device)
        for raster in layers.values():
            mine[raster.row[raster.valid.flatten(1).any(1)]] = True
        mine = mine if keep is None else mine & keep
        row, number = mine.nonzero()[:, 0], mine.cumsum(0) - 1
        part = {}
        for key, raster in layers.items():
            there = raster.obs(mine[raster.row])
            if len(there.row):
                part[key.partition("/")[2]] = replace(there, row=number[there.row])
        return row, Batch(tuple(batch.places[i] for i in row.tolist()), part)

    def halves(self, batch: Batch) -> dict[str, Halves]:
        """Both halves of what each domain observed; domains that the batch lacks are left out."""
        found = {}
        for name in self.names:
            row, part = self.part(batch, name)
            if len(row):
                one = self.one(name).halves(part)
                found[name] = replace(one, row=row, coords=replace(one.coords, row=row[one.coords.row]))
        return found

    def tokenize(self, batch: Batch) -> Tokens:
        """Invariant halves of the tokens of all domains; ``memo`` has those of the summaries."""
        found, like = self.halves(batch), next(self.parameters())
        nowhere = torch.zeros(0, dtype=torch.long, device=like.device)
        parts = [(like.new_zeros(0, self.dim), cells_at(nowhere, nowhere, nowhere, 1.0, 0))]
        parts += [
            (one.tokens, replace(one.coords, group=torch.full_like(one.coords.group, number)))
            for number, one in enumerate(found.values())
        ]
        summaries = [(one.row, one.invariant) for one in found.values()]
        x, coords = torch.cat([x for x, _ in parts]), Coords.cat([c for _, c in parts])
        return Tokens(x, coords, tuple(found), batch.places, {"summaries": summaries})

    def forward(self, tokens: Tokens) -> Features:
        """One feature per place, size of token and cell, and per place; means over the domains that it was seen in."""
        coords = tokens.coords
        sizes, size = coords.size_m.unique(return_inverse=True)
        keys, where = torch.unique(
            torch.cat([coords.row[:, None], size[:, None], coords.cells()], 1), dim=0, return_inverse=True
        )
        size_m = sizes[keys[:, 1]]
        at = cells_at(keys[:, 0], keys[:, 2], keys[:, 3], 1.0, 0)
        at = replace(at, at_m=at.at_m * size_m[:, None], size_m=size_m)
        nowhere = coords.row.new_zeros(0)
        rows = torch.cat([nowhere, *(row for row, _ in tokens.memo["summaries"])])
        summaries = torch.cat([tokens.x.new_zeros(0, self.dim), *(x for _, x in tokens.memo["summaries"])])
        return Features(
            _mean(tokens.x, where, len(keys)), at, _mean(summaries, rows, len(tokens.places)), tokens.places
        )


def _share(encoders: list[Encoder], part: str) -> None:
    """The part of that name of the first encoder becomes that of all."""
    first, *others = encoders
    known = [name for name, _ in first.named_modules() if name]
    for encoder in encoders:
        if part not in dict(encoder.named_modules()):
            raise LookupError(f"shared: the {encoder.family} has no part {part!r}. {suggest(part, known)}")
    kept = first.get_submodule(part)
    sizes = {name: tensor.shape for name, tensor in kept.state_dict().items()}
    for encoder in others:
        if {name: tensor.shape for name, tensor in encoder.get_submodule(part).state_dict().items()} != sizes:
            raise ValueError(
                f"shared: {part!r} has other sizes or layers in another domain; share what bands and pixels have no say in"
            )
        above, _, leaf = part.rpartition(".")
        setattr(encoder.get_submodule(above), leaf, kept)


class _Projection(nn.Module):
    """Linear layer, batch normalisation and ReLU; one sample alone is normalised by the running statistics."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(before, after), RowNorm(after)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(x)))


def _mean(x: Tensor, index: Tensor, count: int) -> Tensor:
    total = x.new_zeros(count, x.shape[1]).index_add(0, index, x)
    return total / torch.bincount(index, minlength=count).clamp(min=1)[:, None].to(x.dtype)


# --- building, from names, from a config -------------------------------------------------------------------------------

_NANO_S1 = {"sensor": "sentinel-1-grd", "bands": ["VV", "VH"], "gsd_m": 10.0, "mean": [0.0] * 2, "std": [1.0] * 2}
_NANO_S2 = {
    "sensor": "sentinel-2-l2a",
    "bands": ["B02", "B03", "B04", "B08"],
    "gsd_m": 10.0,
    "mean": [0.0] * 4,
    "std": [1.0] * 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "nano": {
        "encoder": {"name": "resnet/", "options": {"width": 2, "blocks": [1, 1, 1, 1], "tile": 2}},
        "modalities": {"source/s2": _NANO_S2, "target/s1": _NANO_S1},
        "split": "projected",
    }
}
"""For tests."""


def build(
    variant: str = "",
    *,
    modalities: Mapping[str, Any] | None = None,
    encoder: Mapping[str, Any] | None = None,
    encoders: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Domains:
    """A fresh model.

    Args:
        modalities: of all domains, by ``<domain>/<layer>``, as the domain's encoder describes its layers; or ``data`` in a recipe.
        encoder: ``{"name": "resnet/", "options": {...}}``, what every domain has one of.
        encoders: the same by domain, in place of ``encoder``.
        options: ``split``, ``dim`` and ``shared``, see :class:`Config`.
    """
    if variant and variant not in VARIANTS:
        raise LookupError(f"domains has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    preset = dict(VARIANTS.get(variant, {}))
    modalities, encoder = modalities or preset.pop("modalities", None), encoder or preset.pop("encoder", None)
    if not modalities:
        raise ValueError("modalities is empty: list the layers of each domain as <domain>/<layer>, or say data")
    by_domain: dict[str, dict[str, Any]] = {}
    for key, entry in modalities.items():
        domain, slash, layer = key.partition("/")
        if not (domain and slash and layer) or "." in domain:
            raise ValueError(
                f"modalities name {key!r}; layers of domains are called <domain>/<layer>, such as source/rgb"
            )
        by_domain.setdefault(domain, {})[layer] = entry
    config = {**{k: v for k, v in preset.items() if k in ("split", "dim", "shared")}, **options}
    built = {name: _built(name, (encoders or {}).get(name, encoder), layers) for name, layers in by_domain.items()}
    found = {name: {"family": one.family, "config": one.config} for name, one in built.items()}
    told = Config.model_validate({"domains": found, "modalities": dict(modalities), **config})
    return Domains(told, {name: _one(told, one) for name, one in built.items()})


def _built(domain: str, described: Any, layers: Mapping[str, Any]) -> Encoder:
    """The encoder of a domain, whose layers come as :func:`layer` or as it describes them."""
    if not isinstance(described, Mapping) or "name" not in described or set(described) - {"name", "options"}:
        raise ValueError(
            f"encoder={described!r} of the domain {domain!r} must say what it is, as {{name: resnet/, options: {{...}}}}"
        )
    module, variant = find("models", described["name"])
    options = dict(described.get("options", {}))
    entries = {}
    for name, entry in layers.items():
        facts = {key: value for key, value in entry.items() if key != "in_data"}
        if "in_data" in entry:
            wanted = InputConfig(**facts).input(dated=entry["in_data"]["dated"])
            facts |= module.layer(wanted, **options)
        entries[name] = facts
    built: Encoder = module.build(variant, **options, modalities=entries)
    return built


def _one(config: Config, backbone: Encoder) -> OneDomain:
    inner = {"family": backbone.family, "config": {}}
    return OneDomain(
        OneConfig.model_validate({"of": inner, "modalities": {}, "split": config.split, "dim": config.dim}), backbone
    )


def layer(wanted: Input, **_: Any) -> dict[str, Any]:
    """A mark by which :func:`build` knows layers of a dataset, for ``modalities: data``: how they are taken is for each domain's encoder to say."""
    return {"in_data": {"dated": wanted.dated}}


def from_config(config: Mapping[str, Any]) -> Domains | OneDomain:
    if "of" in config:
        one = OneConfig.model_validate(dict(config))
        return OneDomain(one, _rebuilt(one.of, one.modalities))
    told = Config.model_validate(dict(config))
    encoders = {}
    for name, spec in told.domains.items():
        own = {key.partition("/")[2]: entry for key, entry in told.modalities.items() if key.startswith(f"{name}/")}
        encoders[name] = _one(told, _rebuilt(spec, own))
    return Domains(told, encoders)


def _rebuilt(spec: Spec, modalities: Mapping[str, Any]) -> Encoder:
    built: Encoder = find("models", spec.family)[0].from_config({**spec.config, "modalities": dict(modalities)})
    return built

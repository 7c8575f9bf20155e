"""Encoders that are trained together and used alone: one student per modality, each of which sees its own modality only.

After DisCoM-KD (Ienco and Dantas, BMVC 2024): a modality has an encoder of what is invariant and one of what is specific to it; a projection of the
first (linear, batch normalisation, ReLU) is the invariant part, one of the second is split into the informative and the irrelevant half. What a student says
is the invariant and the informative part beside each other. The encoders may be any of the toolkit, also of a different kind for each modality. What
trains them is :mod:`everysat.tasks.distill`.

Layers that belong together (``groups``) are one modality. A place that a modality did not observe takes no part in its batch statistics, so that places
may have all modalities, some, or one. Places and cells share the projections but have batch statistics of their own. The features of several students
together are the mean over the modalities that observed a place or a cell. ``one("s2")`` is the student of one modality: an encoder like any other, with the
contract of that modality.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from everysat.find import find, suggest
from everysat.models import weights
from everysat.nn.batchnorm import RowNorm
from everysat.nn.cells import cells_at
from everysat.nn.distill import Parts, Witness, Witnessed
from everysat.types import Batch, Coords, Encoder, Features, Input, Task, Tokens


class Config(BaseModel):
    """Of :class:`Students`.

    Attributes:
        encoders: by modality ``family`` and ``config`` of its encoders; their layers stand in ``modalities``, where everything looks for them.
        groups: by modality the layers that it has.
        dim: of each part; a student's features have twice that.
        pair: an encoder of what is invariant and one of what is specific; false for one that both parts are projected from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    encoders: dict[str, dict[str, Any]] = Field(min_length=1)
    groups: dict[str, list[str]]
    modalities: dict[str, Any] = {}
    dim: int = Field(default=256, ge=1)
    pair: bool = True


class Projection(nn.Module):
    """Linear, batch normalisation, ReLU, with statistics of their own for ``cells`` and for ``places``."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.cells, self.places = RowNorm(dim), RowNorm(dim)

    def forward(self, x: Tensor, level: str) -> Tensor:
        norm = self.cells if level == "cells" else self.places
        return F.relu(norm(self.linear(x)))


class Students(Encoder):
    """See the module's text. ``encoders`` by modality: of the invariant and of the specific part, or one for both."""

    family = "students"

    def __init__(self, config: Config, encoders: Mapping[str, Sequence[Encoder]]) -> None:
        super().__init__()
        self.own, self.members, self.dim = config, config.groups, 2 * config.dim
        self.inputs: dict[str, Input] = {}
        for name, some in encoders.items():
            _refuse_other_layers(name, config.groups[name], some[0], self.inputs)
            self.inputs |= {layer: some[0].inputs[layer] for layer in config.groups[name]}
        self.encoders = nn.ModuleDict({name: nn.ModuleList(some) for name, some in encoders.items()})
        self.invariant = nn.ModuleDict({n: Projection(some[0].dim, config.dim) for n, some in encoders.items()})
        self.specific = nn.ModuleDict({n: Projection(some[-1].dim, 2 * config.dim) for n, some in encoders.items()})
        self.config = _described(config, encoders)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the modalities."""
        return tuple(self.members)

    @property
    def settings(self) -> Any:
        """Of the first encoder: sizes of tokens and chips."""
        return getattr(self._of(self.names[0])[0], "settings", None)

    def _of(self, name: str) -> list[Encoder]:
        return [cast(Encoder, e) for e in cast(nn.ModuleList, self.encoders[name])]

    def one(self, name: str) -> Students:
        """The student of one modality, sharing its weights: what is deployed.

        Raises:
            LookupError: no such modality.
        """
        if name not in self.members:
            raise LookupError(f"no modality is called {name!r}. {suggest(name, self.members)}")
        config = Config(encoders={name: {}}, groups={name: self.members[name]}, dim=self.own.dim, pair=self.own.pair)
        with torch.random.fork_rng(
            devices=[]
        ):  # the projections that are replaced at once draw nothing from the caller's generator
            student = Students(config, {name: self._of(name)})
        student.invariant[name], student.specific[name] = self.invariant[name], self.specific[name]
        return student.train(self.training)

    def at(self, **changes: Any) -> Students:
        """The same students, sharing their weights, with what their encoders let one change at a call."""
        if not changes:
            return self
        encoders = {name: [e.at(**changes) for e in self._of(name)] for name in self.members}
        with torch.random.fork_rng(devices=[]):
            twin = Students(self.own, encoders)
        twin.invariant, twin.specific = self.invariant, self.specific
        return twin.train(self.training)

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per place, modality and cell: the three parts beside each other [token, 3 dim]. ``memo`` holds those of places,
        [modality, place, 3 dim], and which of them are ``observed`` [modality, place]."""
        like = next(self.parameters())
        nowhere = torch.zeros(0, dtype=torch.long, device=like.device)
        xs, where = [like.new_zeros(0, 3 * self.own.dim)], [cells_at(nowhere, nowhere, nowhere, 1.0, 0)]
        places, observed = [], []
        groups = tuple(name for name, layers in self.members.items() if any(n in batch.layers for n in layers))
        for group, name in enumerate(groups):
            own = batch.only(*self.members[name])
            found = [encoder(encoder.tokenize(own)) for encoder in self._of(name)]
            coords = found[0].coords
            seen = torch.zeros(len(batch), dtype=torch.bool, device=coords.row.device)
            seen[coords.row] = True
            xs.append(self._projected(name, [f.mean for f in found], "cells"))
            where.append(
                Coords(coords.row, coords.at_m, coords.size_m, coords.time_s, torch.full_like(coords.row, group))
            )
            said = self._projected(name, [f.summary[seen] for f in found], "places")
            places.append(said.new_zeros(len(batch), said.shape[1]).index_put((seen.nonzero()[:, 0],), said))
            observed.append(seen)
        memo = {"places": torch.stack(places), "observed": torch.stack(observed)} if groups else {}
        return Tokens(torch.cat(xs), Coords.cat(where), groups, batch.places, memo)

    def _projected(self, name: str, found: Sequence[Tensor], level: str) -> Tensor:
        """The parts of vectors [n, width] of a modality's encoders, beside each other."""
        parts = [self.invariant[name](found[0], level), self.specific[name](found[-1], level)]
        return torch.cat([part.to(found[0].dtype) for part in parts], -1)

    def forward(self, tokens: Tokens) -> Witnessed:
        """Features of all modalities together, and of each by itself. A place that none observed has no token, and zeros as its summary."""
        each = {}
        for group, name in enumerate(tokens.groups):
            mine = tokens.coords.group == group
            cells, places = (_parts(x) for x in (tokens.x[mine], tokens.memo["places"][group]))
            alone = Features(cells.useful, tokens.coords[mine], places.useful, tokens.places)
            each[name] = Witness(alone, cells, places, tokens.memo["observed"][group])
        useful, coords = _parts(tokens.x).useful, tokens.coords
        size_m = coords.size_m
        if len(tokens.groups) != 1 and (len(size_m) == 0 or torch.allclose(size_m, size_m[:1])):
            useful, coords = _together(useful, coords)
        summary = tokens.x.new_zeros(len(tokens.places), self.dim)
        if tokens.groups:
            count = tokens.memo["observed"].sum(0).clamp(min=1)[:, None]
            summary = _parts(tokens.memo["places"]).useful.sum(0) / count
        return Witnessed(useful, coords, summary, tokens.places, each=each)


def _parts(x: Tensor) -> Parts:
    return Parts(*x.chunk(3, -1))


def _together(x: Tensor, coords: Coords) -> tuple[Tensor, Coords]:
    """The mean of what lies at one cell."""
    keys, cell = torch.unique(torch.cat([coords.row[:, None], coords.cells()], 1), dim=0, return_inverse=True)
    total = x.new_zeros(len(keys), x.shape[1]).index_add(0, cell, x)
    count = torch.bincount(cell, minlength=len(keys)).clamp(min=1)[:, None]
    size = float(coords.size_m[0]) if len(coords) else 1.0
    return total / count, cells_at(keys[:, 0], keys[:, 1], keys[:, 2], size, 0)


def _refuse_other_layers(name: str, layers: Sequence[str], encoder: Encoder, taken: Mapping[str, Any]) -> None:
    for layer in layers:
        if layer in taken:
            raise ValueError(f"layer {layer!r} is of two modalities, one of them {name!r}: groups may name it once")
        if layer not in encoder.inputs:
            raise ValueError(f"modality {name!r} names the layer {layer!r}. {suggest(layer, encoder.inputs)}")
    if set(layers) != set(encoder.inputs):
        raise ValueError(
            f"modality {name!r} is of {', '.join(layers)}, its encoder, {encoder.family}, reads {', '.join(encoder.inputs) or 'no listed layer'}"
        )


def _described(config: Config, encoders: Mapping[str, Sequence[Encoder]]) -> dict[str, Any]:
    """The config with what the encoders have become."""
    described: dict[str, Any] = {}
    modalities: dict[str, Any] = {}
    for name, some in encoders.items():
        inner = json.loads(json.dumps(some[0].config))
        if isinstance(inner.get("modalities"), dict):
            modalities |= inner.pop("modalities")
        described[name] = {"family": some[0].family, "config": inner}
    return {**config.model_dump(mode="json"), "encoders": described, "modalities": modalities}


# --- building, from names, from encoders, from a config ----------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {"nano": {"encoder": {"name": "simplesat/nano"}, "dim": 4}}
"""For tests."""


def build(variant: str = "", **options: Any) -> Students:
    """Fresh students.

    Args:
        encoder: ``{"name": "omnisat/treesat", "options": {...}}``, of every modality, with the layers of that modality alone. Or:
        encoders: the same by modality, such as ``{"s2": {...}, "radar": {...}}``.
        modalities: the layers' descriptions as those encoders take them, in place of those in their options.
        groups: layers that are one modality, such as ``{"radar": ["s1-asc", "s1-des"]}``; the others are one each.
        dim, pair: of :class:`Config`.

    Raises:
        ValueError, LookupError: the options do not fit together; the message says which.
    """
    if variant and variant not in VARIANTS:
        raise LookupError(f"students has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    options = {**VARIANTS.get(variant, {}), **options}
    one, several = options.pop("encoder", None), options.pop("encoders", None)
    modalities, groups = options.pop("modalities", None), options.pop("groups", {})
    if (one is None) == (several is None):
        raise ValueError("give either encoder, of every modality, or encoders, by modality")
    if several is None:
        whole = _made(one, modalities)
        grouped = [layer for layers in groups.values() for layer in layers]
        groups = {**groups, **{layer: [layer] for layer in whole.inputs if layer not in grouped}}
        configs = {name: _of_layers(whole, name, layers) for name, layers in groups.items()}
    else:
        given = {
            name: {n: (modalities or {})[n] for n in groups.get(name, [name]) if n in (modalities or {})}
            for name in several
        }
        made = {name: _made(several[name], given[name] or None) for name in several}
        groups = {name: list(encoder.inputs) for name, encoder in made.items()}
        configs = {name: {"family": e.family, "config": e.config} for name, e in made.items()}
    inner = {name: described["config"].get("modalities") or {} for name, described in configs.items()}
    plain = {
        n: {**d, "config": {k: v for k, v in d["config"].items() if k != "modalities" or not inner[n]}}
        for n, d in configs.items()
    }
    layers = {layer: told for some in inner.values() for layer, told in some.items()}
    return from_config({**options, "encoders": plain, "groups": groups, "modalities": layers})


def _made(described: Any, modalities: Mapping[str, Any] | None) -> Encoder:
    if not isinstance(described, Mapping) or "name" not in described or set(described) - {"name", "options"}:
        raise ValueError(
            f"encoder={described!r} must say what to train, as {{name: omnisat/treesat, options: {{...}}}}"
        )
    module, inner = find("models", described["name"])
    more = {} if modalities is None else {"modalities": dict(modalities)}
    encoder: Encoder = module.build(inner, **{**described.get("options", {}), **more})
    if not encoder.inputs:
        raise ValueError(f"{encoder.family} lists no layers, so there are no modalities: give modalities")
    return encoder


def _of_layers(whole: Encoder, name: str, layers: Sequence[str]) -> dict[str, Any]:
    """Family and config of an encoder like ``whole`` of some of its layers."""
    every = whole.config.get("modalities")
    if not isinstance(every, dict) or not set(whole.inputs) <= set(every):
        raise ValueError(f"{whole.family} cannot be asked for some of its layers: give encoders, one for each modality")
    for layer in layers:
        if layer not in every:
            raise ValueError(f"groups: {name!r} names the layer {layer!r}. {suggest(layer, every)}")
    return {"family": whole.family, "config": {**whole.config, "modalities": {n: every[n] for n in layers}}}


def layer(wanted: Input, encoder: Mapping[str, Any] | None = None, **_: Any) -> dict[str, Any]:
    """How the encoder takes a layer of a dataset, for ``modalities: data``."""
    if encoder is None:
        raise ValueError(
            "modalities: data needs encoder: {name: omnisat/, options: {...}}; with encoders, describe the layers"
        )
    module, _variant = find("models", encoder["name"])
    return module.layer(wanted, **encoder.get("options", {}))


def from_config(config: Mapping[str, Any]) -> Students:
    own = Config.model_validate(dict(config))
    encoders = {}
    for name, described in own.encoders.items():
        layers = {n: own.modalities[n] for n in own.groups[name] if n in own.modalities}
        whole = {**described["config"], **({"modalities": layers} if layers else {})}
        module = find("models", described["family"])[0]
        encoders[name] = [module.from_config(whole) for _ in range(1 + own.pair)]
    return Students(own, encoders)


def teacher(file: str) -> tuple[Encoder, Task]:
    """Encoder and task of a weights file, for tasks that learn from another model."""
    return weights.load_task(file)

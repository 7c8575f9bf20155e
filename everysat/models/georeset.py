"""One representation of a place from any set of witnesses: images of any sensor, sentences, shapes with tags, and where it lies.

The idea is that of the project GEO-ReSeT (ANR; Lobry and others): a place is one latent vector, and whatever is known of it says something of that vector,
as a Gaussian that is wide where it cannot know. Nothing is published that could be reproduced; this is a design of its own from published parts:
Gaussian witnesses and their product (:mod:`everysat.models.prommrs`), the similarity of ProLIP (Chun et al. 2025), bags of sentences weighted by
what the other witnesses see (WINCEL, Zermatten et al. 2025), exact transforms of shapes (Poly2Vec, Siampou et al. 2024), and spherical harmonics with a
sinusoidal network for positions (SatCLIP, Klemmer et al. 2025). There are no published weights.

Witnesses of a place are its ``text``, ``shapes`` and ``location``, and each modality of the wrapped image encoder. All means have one length, so that
cosines compare them. Images also say something of each cell, by the same heads, so that words find their place in an image. A place of which nothing is
known is the prior N(0, 1): :meth:`GeoReset.place` says so by ``observed``, features by a variance of 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from everysat.find import find, suggest
from everysat.models import prommrs, weights
from everysat.models.prommrs import ProMM, Witnesses
from everysat.nn import shapes
from everysat.nn.cells import _mean_by
from everysat.nn.gaussian import Gaussian, GaussianHead, expected_match
from everysat.nn.location import cartesian, check
from everysat.nn.minilm import text_encoder
from everysat.nn.places import Bag, Blind, Where
from everysat.nn.spectral import LABEL
from everysat.types import Batch, ContractError, Coords, Encoder, Input, Place, Text, Tokens, Vector

WORDLESS = ("question", "answer")
"""Roles of strings that say nothing of the place."""
OTHERS = ("shapes", "location", "text")
"""Witnesses beside images."""


class Part(BaseModel):
    """What all parts of a config are: fields that cannot be changed, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Words(Part):
    """``encoder``: a name that :func:`everysat.nn.minilm.text_encoder` knows. ``vector``: length of its vectors. ``hidden``: of the network on it."""

    encoder: str = "minilm"
    vector: int = Field(default=384, ge=1)
    hidden: int = Field(default=256, ge=1)


class Shapes(Part):
    """``longest_m``, ``shortest_m``, ``count``: wavelengths of the transform; ``keys``: attributes that are read, None for all; ``words``: the encoder of
    these; the rest are sizes of :class:`everysat.nn.shapes.ShapeSet`."""

    longest_m: float = 10_000.0
    shortest_m: float = 20.0
    count: int = Field(default=6, ge=2)
    keys: tuple[str, ...] | None = None
    words: Words = Words()
    width: int = 128
    latents: int = 8
    heads: int = 4
    depth: int = 1


class Location(Part):
    """See :class:`everysat.nn.places.Where`; ``encoder``: ``family`` and ``config`` of the frozen one."""

    kind: Literal["harmonics", "fourier", "frozen"] = "harmonics"
    degrees: int = Field(default=10, ge=1)
    sigmas: tuple[float, ...] = (0.5, 4.0, 32.0)
    width: int = 256
    encoder: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Location:
        if (self.kind == "frozen") != (self.encoder is not None):
            raise ValueError(f"encoder={self.encoder} belongs to kind='frozen', kind is {self.kind!r}")
        return self


class Config(prommrs.Config):
    """Of a :class:`GeoReset`. The fields of :class:`everysat.models.prommrs.Config` are of the images, an empty ``backbone`` stands for none, and ``temper``
    may name all witnesses. A witness that is None is not read."""

    backbone: dict[str, Any] = Field(default_factory=dict)
    dim: int = Field(default=256, ge=1)
    text: Words | None = None
    shapes: Shapes | None = None
    location: Location | None = None


@dataclass(frozen=True)
class Evidence:
    """What the witnesses say: ``cells`` of images at ``coords``, and ``places``. ``known`` [place, width] by witness is what it said before any
    trained head: summaries of the image encoder, means of vectors of sentences and tags, positions on the sphere; zeros where it is absent."""

    coords: Coords
    cells: Witnesses
    places: Witnesses
    known: dict[str, Tensor]


class GeoReset(ProMM):
    """See the module's text. ``scale`` and ``bias`` are of :meth:`match`; training sets them."""

    family = "georeset"
    own: Config
    scale: Tensor
    bias: Tensor

    def __init__(self, config: Config, backbone: Encoder) -> None:
        super().__init__(config, backbone)
        self.cell_heads = self.place_heads  # what words match of a place, they match of its cells
        if isinstance(backbone, Blind):
            self.cell_heads = self.place_heads = nn.ModuleDict()
        sizes = config.dim, config.low, config.high
        if config.text:
            self.bag = Bag(config.text.vector, config.text.hidden, *sizes)
        if own := config.shapes:
            self.frequency = shapes.frequencies(own.longest_m, own.shortest_m, own.count)
            lengths = len(self.frequency), own.words.vector
            self.set = shapes.ShapeSet(*lengths, own.width, own.latents, own.heads, own.depth)
            self.set_head = GaussianHead(own.width, *sizes)
        if at := config.location:
            module = None if at.encoder is None else find("models", at.encoder["family"])[0]
            frozen = None if module is None or at.encoder is None else module.from_config(at.encoder["config"])
            self.where = Where(at.kind, at.width, degrees=at.degrees, sigmas=at.sigmas, frozen=frozen)
            self.where_head = GaussianHead(at.width, *sizes)
        self.register_buffer("scale", torch.tensor(10.0))
        self.register_buffer("bias", torch.tensor(-10.0))

    def _take(self, config: prommrs.Config, backbone: Encoder) -> None:
        others = [name for name in OTHERS if getattr(config, name)]
        temper = config.temper
        if isinstance(temper, dict):  # of which the images know theirs
            super()._take(
                config.model_copy(update={"temper": {n: t for n, t in temper.items() if n not in others}}), backbone
            )
        else:
            super()._take(config, backbone)
        if twice := [name for name in others if name in self.members]:
            raise ValueError(f"a modality of images has the name {twice[0]!r} of another witness; rename it")
        if isinstance(backbone, Blind) and not others:
            raise ValueError("there are no witnesses: give images (encoder=...), text, shapes or location")
        assert isinstance(config, Config)
        self.own, self.config = config, prommrs._described(config, backbone)
        if isinstance(backbone, Blind):
            self.config["backbone"] = {}

    def known(self, batch: Batch) -> Batch:
        """Layers of the image encoder, all texts and all vectors but the label."""
        kinds = [kind for kind, read in ((Text, self.own.text), (Vector, self.own.shapes)) if read]
        told = [n for n, layer in batch.layers.items() if isinstance(layer, tuple(kinds)) and n != LABEL]
        return batch.only(*self.backbone.known(batch).layers, *told)

    def at(self, **changes: Any) -> GeoReset:
        """The same model, sharing its weights, with another ``fusion`` or ``temper``, or with what the image encoder lets one change."""
        own = {name: changes.pop(name) for name in ("fusion", "temper") if name in changes}
        twin = copy.copy(self)
        twin._modules = {**self._modules, "backbone": self.backbone.at(**changes)}
        twin._take(Config.model_validate({**self.own.model_dump(), **own}), twin.backbone)
        return twin

    def modalities(self, batch: Batch) -> dict[str, list[str]]:
        return super().modalities(self.backbone.known(batch))

    # --- from layers to Gaussians -----------------------------------------------------------------------------------

    def tokenize(self, batch: Batch) -> Tokens:
        """Tokens of the image encoder, one per place, modality and cell; what else there is to know stands in ``memo``."""
        tokens, batch = super().tokenize(batch), self.known(batch)
        memo: dict[str, Any] = dict(tokens.memo)
        if self.own.text:
            memo["text"] = self._sentences(batch, self.own.text)
        if self.own.shapes:
            memo["shapes"] = self._shapes(batch, self.own.shapes)
        return replace(tokens, memo=memo)

    def _sentences(self, batch: Batch, words: Words) -> tuple[Tensor, Tensor]:
        """Vectors [sentence, width] of all strings about places, and the places [sentence]."""
        texts = [layer for _, layer in sorted(batch.layers.items()) if isinstance(layer, Text)]
        every = [entry for t in texts for entry in zip(t.strings, t.role, t.row.tolist(), strict=True)]
        told = [(string, row) for string, role, row in every if role not in WORDLESS]
        rows = torch.tensor([row for _, row in told], dtype=torch.long, device=self.scale.device)
        return Reader(words)([string for string, _ in told]).to(self.scale), rows

    def _shapes(self, batch: Batch, own: Shapes) -> shapes.Features:
        layers = [layer for _, layer in sorted(batch.layers.items()) if isinstance(layer, Vector)]
        nothing = Vector((), (), torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, dtype=torch.long))
        every = Vector._cat([nothing, *(layer.to("cpu") for layer in layers)], [0] * (len(layers) + 1))
        found = shapes.features(every, batch.places, self.frequency, Reader(own.words), own.keys)
        return found.to(self.scale.device)

    def witnesses(self, tokens: Tokens) -> tuple[Coords, Witnesses, Witnesses]:
        """See :class:`Evidence`."""
        said = self.said_by(tokens)
        return said.coords, said.cells, said.places

    def said_by(self, tokens: Tokens, attend: Tensor | None = None) -> Evidence:
        """What each witness says of each cell and place. ``attend`` bool [place]: whose sentences are weighted by what the others see; all by default."""
        rows = len(tokens.places)
        coords, cells, places = super().witnesses(tokens)
        count = len(tokens.groups)  # without images, there is a place-holder for nobody
        parts = {"": Gaussian(places.mean[:, :count], places.log_var[:, :count], places.there[:, :count])}
        known = dict(zip(tokens.groups, tokens.memo["summary"].detach(), strict=True))
        if self.own.shapes:
            parts["shapes"], known["shapes"] = self._of_shapes(tokens.memo["shapes"], rows)
        if self.own.location:
            parts["location"], known["location"] = self._of_places(tokens.places)
        if self.own.text:
            context = self._together(tokens.groups, parts).fused(self.fusion)
            seen = context.observed if attend is None else context.observed & attend
            x, row = tokens.memo["text"]
            text = self.bag(x, row, rows, Gaussian(context.mean.detach(), context.log_var.detach(), seen))
            parts["text"], known["text"] = _one(text), _mean_by(x, row, rows)
        return Evidence(coords, cells, self._together(tokens.groups, parts), known)

    def _together(self, groups: tuple[str, ...], parts: Mapping[str, Gaussian]) -> Witnesses:
        mean, log_var, there = (
            torch.cat([getattr(g, k) for g in parts.values()], 1) for k in ("mean", "log_var", "observed")
        )
        names, temper = (*groups, *(name for name in parts if name)), self.own.temper
        power = mean.new_tensor([temper.get(n, 1.0) if isinstance(temper, dict) else temper for n in names])
        row = torch.arange(len(mean), device=mean.device)
        return Witnesses(mean.new_zeros(*mean.shape[:2], 0), mean, log_var, there, power, row, names)

    def _of_shapes(self, found: shapes.Features, rows: int) -> tuple[Gaussian, Tensor]:
        x, there = self.set(found, rows)
        mean, log_var = self.set_head(x)
        return _one(Gaussian(mean, log_var, there)), _mean_by(found.tags, found.row, rows)

    def _of_places(self, places: Sequence[Place]) -> tuple[Gaussian, Tensor]:
        device, told = self.scale.device, [place.lonlat or (0.0, 0.0) for place in places]
        lonlat = check(torch.tensor(told, dtype=torch.float64, device=device).view(-1, 2))
        radius = torch.tensor([math.hypot(p.height_m, p.width_m) / 2 for p in places], device=device).view(-1)
        there = torch.tensor([place.lonlat is not None for place in places], dtype=torch.bool, device=device)
        return self._where(lonlat, radius, there), cartesian(lonlat).to(self.scale) * there[:, None]

    def _where(self, lonlat: Tensor, radius_m: Tensor, there: Tensor) -> Gaussian:
        mean, log_var = self.where_head(self.where(lonlat, radius_m))
        return _one(Gaussian(mean, log_var, there))

    # --- what is asked of it -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def place(self, batch: Batch) -> Gaussian:
        """What is known of each place, mean and log variance [place, dim]; ``observed`` [place] is false where nothing is, and the prior stands."""
        was_training = self.training
        self.eval()
        try:
            return self.said_by(self.tokenize(batch.to(self.scale.device))).places.fused(self.fusion)
        finally:
            self.train(was_training)

    @torch.no_grad()
    def text(self, strings: Sequence[str | Sequence[str]]) -> Gaussian:
        """What strings say of a place, [string, dim]; in place of a string there may be several, such as ways to ask for the same.

        Raises:
            ContractError: the model reads no text. FileNotFoundError: the text encoder is not installed.
        """
        return self.reading(strings)

    def reading(self, strings: Sequence[str | Sequence[str]]) -> Gaussian:
        """:meth:`text` with gradients."""
        if self.own.text is None:
            raise ContractError("this model reads no text: build or load one with text={}")
        if isinstance(strings, str):
            raise TypeError(f"strings={strings!r:.60} is one string; expected a list of strings: [{strings!r:.60}]")
        bags = [[string] if isinstance(string, str) else list(string) for string in strings]
        row = torch.tensor([i for i, bag in enumerate(bags) for _ in bag], dtype=torch.long, device=self.scale.device)
        x = Reader(self.own.text)([string for bag in bags for string in bag]).to(self.scale)
        return self._together((), {"text": _one(self.bag(x, row, len(bags)))}).fused(self.fusion)

    @torch.no_grad()
    def locations(self, lonlat: Tensor, radius_m: Tensor | float) -> Gaussian:
        """What is known of places from where they lie: ``lonlat`` [n, 2] in degrees, ``radius_m`` [n] or one for all, metres. [n, dim].

        Raises:
            ContractError: the model reads no positions, or one is none on Earth. ValueError: a radius that is not above 0.
        """
        if self.own.location is None:
            raise ContractError("this model reads no positions: build or load one with location={}")
        at = check(lonlat.double().to(self.scale.device))
        radius = torch.as_tensor(radius_m, dtype=torch.float64, device=at.device).expand(len(at))
        if not (radius > 0).all():
            raise ValueError(f"radius_m={float(radius.min()):g} must be above 0 (metres)")
        return self._together((), {"location": self._where(at, radius, radius > 0)}).fused(self.fusion)

    def match(self, a: Gaussian, b: Gaussian) -> Tensor:
        """Logits [a, b] that one of ``a`` and one of ``b`` are the same place: scale x :func:`expected_match` + bias (ProLIP)."""
        return self.scale * expected_match(a, b) + self.bias


def _one(said: Gaussian) -> Gaussian:
    """As one witness of several, [place, 1, ...]."""
    return Gaussian(said.mean[:, None], said.log_var[:, None], said.observed[:, None])


@dataclass(frozen=True)
class Reader:
    """The text encoder that ``words`` names, which is loaded when there is something to read."""

    words: Words

    @property
    def dim(self) -> int:
        return self.words.vector

    def __call__(self, strings: Sequence[str]) -> Tensor:
        if not strings:
            return torch.zeros(0, self.dim)
        encoder = text_encoder(self.words.encoder)
        if encoder.dim != self.dim:
            raise ContractError(
                f"text encoder {self.words.encoder!r} gives vectors of {encoder.dim} numbers, the model was made for {self.dim}: take the encoder "
                f"that it was trained with, or build a model with vector={encoder.dim}"
            )
        return encoder(strings)


# --- building, from names, from a config ---------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"text": {}, "shapes": {}, "location": {}},
    "words": {"text": {}},
    "nano": {"encoder": {"name": "simplesat/nano"}, "location": {"degrees": 4, "width": 16}, "dim": 16},
}
"""``base`` and ``words``: witnesses beside images. ``nano`` is for tests, and needs no text encoder."""


def build(variant: str = "base", **options: Any) -> GeoReset:
    """A fresh model.

    Args:
        encoder: ``{"name": "resnet/large", "options": {...}}``, the image encoder to wrap, with ``weights`` (a file, or a name of installed ones) if it
            was trained; none for no images.
        modalities: of that encoder, in place of those in its options.
        location: fields of :class:`Location`; ``{"encoder": "geoclip/base"}`` is the encoder of installed weights, frozen.
        options: the other fields of :class:`Config`.

    Raises:
        LookupError: no such variant or encoder. FileNotFoundError: weights that are not there. ValueError: no witnesses, or options that do not fit.
    """
    if variant and variant not in VARIANTS:
        raise LookupError(f"georeset has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    options = {**VARIANTS.get(variant, {}), **options}
    backbone = _backbone(options.pop("encoder", None), options.pop("modalities", None))
    options = {"heads": "each" if backbone.inputs and not backbone.any_sensor else "shared", **options}
    place, frozen = options.get("location"), None
    if isinstance(place, Mapping) and isinstance(place.get("encoder"), str):
        frozen = _trained(place["encoder"])
        options["location"] = {**place, "kind": "frozen", "encoder": {"family": frozen.family, "config": frozen.config}}
    model = GeoReset(Config.model_validate(options), backbone)
    if frozen is not None:
        model.where.frozen.load_state_dict(frozen.state_dict())
    return model


def _backbone(described: Any, modalities: Any) -> Encoder:
    if described is None:
        return Blind()
    if not isinstance(described, Mapping) or "name" not in described or set(described) - {"name", "options", "weights"}:
        raise ValueError(f"encoder={described!r} must say what to wrap, as {{name: resnet/large, options: {{...}}}}")
    module, inner = find("models", described["name"])
    changes = {**described.get("options", {}), **({} if modalities is None else {"modalities": modalities})}
    built: Encoder = (
        weights.load(described["weights"], **changes) if "weights" in described else module.build(inner, **changes)
    )
    return built


def _trained(name: str) -> Encoder:
    """The location encoder whose weights are installed under that name."""
    if not weights.installed(name).is_file():
        raise FileNotFoundError(
            f"location.encoder={name!r}: no weights are installed under that name, and without them a frozen encoder knows nothing. Install "
            f"published ones (everysat convert {name} FILE), or take kind='harmonics'"
        )
    return weights.load(name)


def layer(wanted: Input, encoder: Mapping[str, Any] | None = None, **_: Any) -> dict[str, Any]:
    """How the wrapped encoder takes a layer of a dataset, for ``modalities: data``."""
    return prommrs.layer(wanted, encoder)


def from_config(config: Mapping[str, Any]) -> GeoReset:
    own = Config.model_validate(dict(config))
    if not own.backbone:
        return GeoReset(own, Blind())
    modalities = {} if own.modalities is None else {"modalities": own.modalities}
    return GeoReset(
        own, find("models", own.backbone["family"])[0].from_config({**own.backbone["config"], **modalities})
    )

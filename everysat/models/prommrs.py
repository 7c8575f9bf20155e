"""ProMM-RS, reconstructed: any encoder, asked about each modality by itself, says per dimension how sure it is, and what is there is fused.

After Houdre, Marcos, Ienco, Wendling, Kurtz and Lobry, "ProMM-RS: Exploring Probabilistic Learning for Multi-Modal Remote Sensing Image
Representations" (WACV workshops 2025). Neither text nor code could be read; known is what the project GEO-ReSeT says of it: modalities are projected
to one latent space; some latent dimensions are irrelevant to a modality, so that its encoder gives, per dimension, a value and a confidence, which is a
variance; then latents are merged by functions that can be exchanged, such as the most confident modality per dimension or the average weighted by
confidence. All else is a reconstruction: heads (length-normalised mean, bounded log variance), prior, other fusions, and the training in
:mod:`everysat.objectives.probabilistic`. No number of the paper is claimed, and there are no weights.

``tokenize`` runs the wrapped encoder once for each modality, on that modality alone; its features are the tokens, one per place, modality and cell.
``forward`` makes a Gaussian of each and fuses those of a cell; likewise the summaries of a place. Leaving out tokens leaves out evidence.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from everysat.find import find, suggest
from everysat.nn.cells import cells_at
from everysat.nn.gaussian import FUSIONS, Gaussian, GaussianHead, fuse
from everysat.types import Batch, Coords, Encoder, Features, Input, Tokens


class Config(BaseModel):
    """Of a :class:`ProMM`.

    Attributes:
        backbone: ``family`` and ``config`` of the wrapped encoder; its ``modalities`` stand beside it, where everything looks for them.
        groups: layers that are one modality, by its name, such as ``{"radar": ["s1-asc", "s1-des"]}``; the others are one each.
        heads: a head for ``each`` modality, or one that all have ``shared``, as encoders for any sensor need.
        dim: of the latent space; by default that of the wrapped encoder.
        fusion: one of :data:`everysat.nn.gaussian.FUSIONS`.
        temper: the power to which a modality's density is raised, for all or by name; below 1 for those that repeat others.
        low, high: bounds of log variances.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    backbone: dict[str, Any]
    modalities: dict[str, Any] | None = None
    groups: dict[str, list[str]] = {}
    heads: Literal["each", "shared"] = "each"
    dim: int = Field(ge=1)
    fusion: str = "product"
    temper: float | dict[str, float] = 1.0
    low: float = -9.0
    high: float = 3.0

    @field_validator("fusion")
    @classmethod
    def _known(cls, fusion: str) -> str:
        if fusion not in FUSIONS:
            raise ValueError(f"no fusion is called {fusion!r}. {suggest(fusion, FUSIONS)}")
        return fusion

    @field_validator("temper")
    @classmethod
    def _positive(cls, temper: float | dict[str, float]) -> float | dict[str, float]:
        if not all(0 < value <= 1 for value in (temper.values() if isinstance(temper, dict) else [temper])):
            raise ValueError(f"temper={temper} must be above 0 and at most 1")
        return temper


@dataclass(frozen=True)
class Witnesses:
    """What each modality says of each of n cells or places: ``x`` [n, modality, width] of the wrapped encoder, and its Gaussian ``mean`` and
    ``log_var`` [n, modality, dim]; ``there`` bool [n, modality]; ``weight`` [modality], see :func:`fuse`; ``row`` [n] is the place."""

    x: Tensor
    mean: Tensor
    log_var: Tensor
    there: Tensor
    weight: Tensor
    row: Tensor
    names: tuple[str, ...]

    def fused(self, fusion: str, there: Tensor | None = None) -> Gaussian:
        """One Gaussian for each of n, from those that are there or from some of them."""
        return fuse(fusion, self.mean, self.log_var, self.there if there is None else there, self.weight)


class ProMM(Encoder):
    """See the module's text. ``backbone`` is the wrapped encoder, whose settings (of its tokens' sizes) are also the settings of this one."""

    family = "prommrs"

    def __init__(self, config: Config, backbone: Encoder) -> None:
        super().__init__()
        self.any_sensor, self.dim = backbone.any_sensor, config.dim
        self._take(config, backbone)
        self.backbone = backbone
        kinds = list(self.members) if config.heads == "each" else ["shared"]
        if not kinds:
            raise ValueError(f"{backbone.family} lists no layers: there are no modalities; give heads='shared'")
        sizes = (backbone.dim, config.dim, config.low, config.high)
        self.cell_heads = nn.ModuleDict({name: GaussianHead(*sizes) for name in kinds})
        self.place_heads = nn.ModuleDict({name: GaussianHead(*sizes) for name in kinds})

    def _take(self, config: Config, backbone: Encoder) -> None:
        self.own, self.inputs = config, backbone.inputs
        grouped = {layer: name for name, layers in config.groups.items() for layer in layers}
        for layer in grouped:
            if layer not in backbone.inputs and config.heads == "each":
                raise ValueError(f"groups name the layer {layer!r}. {suggest(layer, backbone.inputs)}")
        if sum(map(len, config.groups.values())) > len(grouped):
            raise ValueError(f"groups={config.groups} name a layer twice")
        alone = {name: [name] for name in backbone.inputs if name not in grouped}
        self.members: dict[str, list[str]] = {**config.groups, **alone}
        for name in config.temper if isinstance(config.temper, dict) else ():
            if name not in self.members and config.heads == "each":
                raise ValueError(f"temper names the modality {name!r}. {suggest(name, self.members)}")
        self.config = _described(config, backbone)

    @property
    def settings(self) -> Any:
        return getattr(self.backbone, "settings", None)

    @property
    def fusion(self) -> str:
        return self.own.fusion

    @property
    def reads(self) -> Mapping[str, Input] | None:
        return self.backbone.reads

    def known(self, batch: Batch) -> Batch:
        return self.backbone.known(batch)

    def at(self, **changes: Any) -> ProMM:
        """The same encoder, sharing its weights, with another ``fusion`` or ``temper``, or with what the wrapped encoder lets one change."""
        own = {name: changes.pop(name) for name in ("fusion", "temper") if name in changes}
        twin = copy.copy(self)
        twin._modules = {**self._modules, "backbone": self.backbone.at(**changes)}
        twin._take(Config.model_validate({**self.own.model_dump(), **own}), twin.backbone)
        return twin

    def modalities(self, batch: Batch) -> dict[str, list[str]]:
        """Layers of the batch by the modality that they belong to, in the order of the contract."""
        there = self.known(batch).layers
        members = {name: [layer for layer in layers if layer in there] for name, layers in self.members.items()}
        if self.own.heads == "shared":
            grouped = {layer for layers in self.members.values() for layer in layers}
            members |= {name: [name] for name in sorted(there) if name not in grouped}
        return {name: layers for name, layers in members.items() if layers}

    def tokenize(self, batch: Batch) -> Tokens:
        """The wrapped encoder's features of each modality alone; ``memo`` holds its summaries [modality, place, width]."""
        modalities, width, like = self.modalities(batch), self.backbone.dim, next(self.parameters())
        nowhere = torch.zeros(0, dtype=torch.long, device=like.device)
        parts = [(like.new_zeros(0, width), cells_at(nowhere, nowhere, nowhere, 1.0, 0))]
        summaries = []
        for group, layers in enumerate(modalities.values()):
            found = self.backbone(self.backbone.tokenize(batch.only(*layers)))
            coords = found.coords
            mine = torch.full_like(coords.row, group)
            parts.append((found.mean, Coords(coords.row, coords.at_m, coords.size_m, coords.time_s, mine)))
            summaries.append(found.summary)
        summary = torch.stack(summaries) if summaries else like.new_zeros(0, len(batch.places), width)
        x, every = torch.cat([x for x, _ in parts]), Coords.cat([c for _, c in parts])
        return Tokens(x, every, tuple(modalities), batch.places, {"summary": summary})

    def forward(self, tokens: Tokens) -> Features:
        """One fused feature per place and cell that any modality observed, and per place, with variances. A place that none observed has no
        feature, and the prior N(0, 1) as its summary."""
        coords, cells, places = self.witnesses(tokens)
        cell, place = cells.fused(self.fusion), places.fused(self.fusion)
        return Features(cell.mean, coords, place.mean, tokens.places, cell.var, place.var)

    def witnesses(self, tokens: Tokens) -> tuple[Coords, Witnesses, Witnesses]:
        """Cells that any modality observed, what each says of each of them, and what each says of each place."""
        size_m = tokens.coords.size_m
        if len(size_m) and not torch.allclose(size_m, size_m[:1]):
            raise ValueError(
                f"{self.backbone.family} gives tokens of {float(size_m.min()):g} to {float(size_m.max()):g} m: they share no cells to be fused "
                "in. Choose one size for all modalities"
            )
        keys, cell = torch.unique(
            torch.cat([tokens.coords.row[:, None], tokens.coords.cells()], 1), dim=0, return_inverse=True
        )
        rows, device = len(tokens.places), tokens.x.device
        modalities = max(len(tokens.groups), 1)
        group = tokens.coords.group
        there = torch.zeros(len(keys), modalities, dtype=torch.bool, device=device).index_put((cell, group), group >= 0)
        x = tokens.x.new_zeros(len(keys), modalities, tokens.x.shape[1]).index_put((cell, group), tokens.x)
        observed = torch.zeros(rows, modalities, dtype=torch.bool, device=device)
        observed = observed.index_put((tokens.coords.row, group), group >= 0)
        summary = tokens.memo["summary"].transpose(0, 1)
        if not tokens.groups:
            summary = summary.new_zeros(rows, 1, summary.shape[2])
        cells = self._said(self.cell_heads, x, there, keys[:, 0], tokens.groups)
        places = self._said(self.place_heads, summary, observed, torch.arange(rows, device=device), tokens.groups)
        size = float(size_m[0]) if len(size_m) else 1.0
        return cells_at(keys[:, 0], keys[:, 1], keys[:, 2], size, 0), cells, places

    def _said(self, heads: nn.ModuleDict, x: Tensor, there: Tensor, row: Tensor, names: tuple[str, ...]) -> Witnesses:
        shared = self.own.heads == "shared"
        said = [heads["shared" if shared else name](x[:, i]) for i, name in enumerate(names)]
        nothing = x.new_zeros(len(x), 1, self.dim)
        mean, log_var = (torch.stack(list(part), 1) for part in zip(*said, strict=True)) if said else (nothing, nothing)
        temper = self.own.temper
        power = [temper.get(name, 1.0) if isinstance(temper, dict) else temper for name in names or ("",)]
        return Witnesses(x, mean, log_var, there, mean.new_tensor(power), row, names)


def _described(config: Config, backbone: Encoder) -> dict[str, Any]:
    """The config with what the wrapped encoder has become."""
    inner = json.loads(json.dumps(backbone.config))
    modalities = inner.pop("modalities", None)
    described = {"family": backbone.family, "config": inner}
    return {
        **config.model_dump(mode="json", exclude_none=True),
        "backbone": described,
        **({} if modalities is None else {"modalities": modalities}),
    }


# --- building, from names, from an encoder, from a config --------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {"nano": {"encoder": {"name": "simplesat/nano"}}}
"""For tests."""


def build(variant: str = "", **options: Any) -> ProMM:
    """A fresh model.

    Args:
        encoder: ``{"name": "omnisat/treesat", "options": {...}}``, the encoder to wrap.
        modalities: of that encoder, in place of those in its options.
        options: fields of :class:`Config`.
    """
    if variant and variant not in VARIANTS:
        raise LookupError(f"prommrs has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    options = {**VARIANTS.get(variant, {}), **options}
    described = options.pop("encoder", None)
    if not isinstance(described, Mapping) or "name" not in described or set(described) - {"name", "options"}:
        raise ValueError(f"encoder={described!r} must say what to wrap, as {{name: omnisat/treesat, options: {{...}}}}")
    module, inner = find("models", described["name"])
    modalities = options.pop("modalities", None)
    return wrap(
        module.build(
            inner, **{**described.get("options", {}), **({} if modalities is None else {"modalities": modalities})}
        ),
        **options,
    )


def wrap(encoder: Encoder, **options: Any) -> ProMM:
    """Gaussian heads on an encoder, which may have been trained; ``options`` are fields of :class:`Config`."""
    heads = "each" if encoder.inputs and not encoder.any_sensor else "shared"
    config = {"backbone": {}, "dim": encoder.dim, "heads": heads, **options}
    return ProMM(Config.model_validate(config), encoder)


def layer(wanted: Input, encoder: Mapping[str, Any] | None = None, **_: Any) -> dict[str, Any]:
    """How the wrapped encoder takes a layer of a dataset, for ``modalities: data``."""
    if encoder is None:
        raise ValueError("encoder is missing: say what to wrap, as {name: omnisat/, options: {...}}")
    module, _variant = find("models", encoder["name"])
    return module.layer(wanted, **encoder.get("options", {}))


def from_config(config: Mapping[str, Any]) -> ProMM:
    own = Config.model_validate(dict(config))
    modalities = {} if own.modalities is None else {"modalities": own.modalities}
    backbone = find("models", own.backbone["family"])[0].from_config({**own.backbone["config"], **modalities})
    return ProMM(own, backbone)

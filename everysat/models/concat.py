"""Plain concatenation: any encoder, asked about each layer by itself; what it says of them is put side by side, and zeros stand for what is not there.

The usual way to fuse modalities, and what others are compared with, see :mod:`everysat.models.prommrs`. Trained with layers left out at random, it also
stands missing ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everysat.find import find, suggest
from everysat.nn.cells import cells_at, side_by_layer
from everysat.types import Batch, Coords, Encoder, Features, Input, Tokens


class Concatenation(Encoder):
    """``dim`` is that of the wrapped ``backbone`` times the number of layers in its contract."""

    family = "concat"

    def __init__(self, backbone: Encoder) -> None:
        super().__init__()
        if not backbone.inputs:
            raise ValueError(
                f"{backbone.family} lists no layers: it is not known how many there are to put side by side"
            )
        self.backbone, self.inputs, self.dim = backbone, backbone.inputs, backbone.dim * len(backbone.inputs)
        inner = json.loads(json.dumps(backbone.config))
        modalities = inner.pop("modalities", None)
        self.config = {"backbone": {"family": backbone.family, "config": inner}}
        self.config |= {} if modalities is None else {"modalities": modalities}

    @property
    def settings(self) -> Any:
        return getattr(self.backbone, "settings", None)

    @property
    def reads(self) -> Mapping[str, Input] | None:
        return self.backbone.reads

    def at(self, **changes: Any) -> Concatenation:
        """The same encoder, sharing its weights, with what the wrapped one lets one change at a call."""
        twin = copy.copy(self)
        twin._modules = {**self._modules, "backbone": self.backbone.at(**changes)}
        return twin

    def tokenize(self, batch: Batch) -> Tokens:
        """The wrapped encoder's features of each layer alone; ``memo`` holds its summaries [layer, place, width] and the layers' numbers."""
        there = [(number, name) for number, name in enumerate(self.inputs) if name in batch.layers]
        nowhere = torch.zeros(0, dtype=torch.long, device=next(self.parameters()).device)
        parts = [(next(self.parameters()).new_zeros(0, self.backbone.dim), cells_at(nowhere, nowhere, nowhere, 1.0, 0))]
        summaries: list[Tensor] = []
        for number, name in there:
            found = self.backbone(self.backbone.tokenize(batch.only(name)))
            at = found.coords
            parts.append((found.mean, Coords(at.row, at.at_m, at.size_m, at.time_s, torch.full_like(at.row, number))))
            summaries.append(found.summary)
        memo = {"summaries": summaries, "layers": [number for number, _ in there]}
        return Tokens(
            torch.cat([x for x, _ in parts]), Coords.cat([c for _, c in parts]), tuple(self.inputs), batch.places, memo
        )

    def forward(self, tokens: Tokens) -> Features:
        """One feature [dim] per place and cell that any layer observed."""
        size_m, rows = tokens.coords.size_m, len(tokens.places)
        if len(size_m) and not torch.allclose(size_m, size_m[:1]):
            raise ValueError(
                f"{self.backbone.family} gives tokens of {float(size_m.min()):g} to {float(size_m.max()):g} m, "
                f"which share no cells: choose one size for all layers"
            )
        row, device = torch.arange(rows, device=tokens.x.device), tokens.x.device
        group = torch.tensor(tokens.memo["layers"], dtype=torch.long, device=device).repeat_interleave(rows)
        pooled = torch.cat([*tokens.memo["summaries"], tokens.x.new_zeros(0, self.backbone.dim)])
        # A layer's summary of a place that it did not observe says nothing.
        seen = torch.zeros(rows, len(self.inputs), dtype=torch.bool, device=device)
        seen[tokens.coords.row, tokens.coords.group] = True
        row = row.repeat(len(tokens.memo["layers"]))
        pooled = pooled * seen[row, group][:, None]
        return side_by_layer(tokens.x, tokens.coords, pooled, row, group, tokens.places, len(self.inputs))


VARIANTS: dict[str, dict[str, Any]] = {"nano": {"encoder": {"name": "simplesat/nano"}}}
"""For tests."""


def build(
    variant: str = "", *, encoder: Mapping[str, Any] | None = None, modalities: Mapping[str, Any] | None = None
) -> Concatenation:
    """A fresh model around ``encoder``, ``{"name": "omnisat/", "options": {...}}``; ``modalities`` in place of those in its options."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"concat has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    described = encoder or VARIANTS.get(variant, {}).get("encoder")
    if not described or "name" not in described or set(described) - {"name", "options"}:
        raise ValueError(f"encoder={described!r} must say what to wrap, as {{name: omnisat/treesat, options: {{...}}}}")
    module, inner = find("models", described["name"])
    more = {} if modalities is None else {"modalities": dict(modalities)}
    return Concatenation(module.build(inner, **{**described.get("options", {}), **more}))


def layer(wanted: Input, encoder: Mapping[str, Any] | None = None, **_: Any) -> dict[str, Any]:
    """How the wrapped encoder takes a layer of a dataset, for ``modalities: data``."""
    if encoder is None:
        raise ValueError("encoder is missing: say what to wrap, as {name: omnisat/, options: {...}}")
    module, _variant = find("models", encoder["name"])
    return module.layer(wanted, **encoder.get("options", {}))


def from_config(config: Mapping[str, Any]) -> Concatenation:
    inner = config["backbone"]
    modalities = {"modalities": config["modalities"]} if "modalities" in config else {}
    return Concatenation(find("models", inner["family"])[0].from_config({**inner["config"], **modalities}))

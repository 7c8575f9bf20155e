"""Scale-MAE (Reed et al., ICCV 2023, arXiv 2212.14532), encoder: a vision transformer whose positions count ground distance.

The sine and cosine code of a patch is that of its number times the pixel size (over ``reference_m``, 1 m), so that the same numbers
mean the same ground at every resolution. It reads red, green and blue alone, in this order; every observation of every layer is an
image of its own; features are means over the dates of a layer, layers beside each other.

A patch is 16 pixels; by default those of the finest layer, so that this is read as it is. With ``patch_m``, images are resampled to
pixels of ``patch_m`` / 16, which is then what positions count, as the authors do when they enlarge images for evaluation.
Pixels are the data's, standardised by the statistics of the contract; those of pre-training are ImageNet's, on colours of 0 to 255:
:data:`PUBLISHED_COLOURS`. An invalid pixel is the mean of the data; a patch without any valid pixel gives no token.

Source of facts: github.com/bair-climate-initiative/scale-mae. Its code and weights are CC-BY-NC-4.0: weights converted from it may not
be used commercially. Nothing of the code is here, only what it computes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.attention import Block
from everysat.nn.cells import refuse_without_statistics
from everysat.nn.images import Embedded, embedded, encoded, resampled, together
from everysat.nn.inputs import InputConfig
from everysat.nn.position import grid_sinusoid
from everysat.sensors import Band
from everysat.types import Batch, ContractError, Encoder, Features, Input, Place, Raster, Tokens

COLOURS = {"red": (0.6, 0.7), "green": (0.52, 0.6), "blue": (0.45, 0.52)}
"""Bands that the model reads, in order, and where their wavelengths lie, micrometres."""


class Config(BaseModel):
    """Layers and sizes of a :class:`ScaleMae`, and what is asked for at a call.

    Attributes:
        patch_m: side of a patch and of what a feature stands for, metres; None for ``patch`` pixels of the finest layer.
        summary: of a place: the ``mean`` of the patches, or the ``class`` token.
        reference_m: pixel size at which the code of a patch is that of its number.
        cells: patches along the squares that maps of large places are made of; the model was trained on 14.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modalities: dict[str, InputConfig]
    patch_m: float | None = None
    summary: Literal["mean", "class"] = "mean"
    reference_m: float = 1.0
    cells: int = 14
    patch: int = 16
    dim: int = 1024
    depth: int = 24
    heads: int = 16

    @model_validator(mode="after")
    def _sizes_agree(self) -> Config:
        if not self.modalities:
            raise ValueError("modalities is empty: name at least one layer")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim={self.dim} must be divisible by heads={self.heads} and by 4")
        if not (self.patch_m is None or self.patch_m > 0) or not self.reference_m > 0:
            raise ValueError(f"patch_m={self.patch_m} and reference_m={self.reference_m} must be positive (metres)")
        return self

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        return self.patch_m or self.patch * min(modality.gsd_m for modality in self.modalities.values())

    @property
    def chip_m(self) -> float:
        return self.token_m * self.cells


class ScaleMae(Encoder):
    """See the module's text. ``tokenize`` gives one token per observation and patch; ``forward`` encodes each observation."""

    family = "scalemae"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._take(config)
        self.patches = nn.Conv2d(len(COLOURS), config.dim, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, config.dim) * 0.02)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        nn.init.xavier_uniform_(self.patches.weight.view(config.dim, -1))
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def _take(self, config: Config) -> None:
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = config.dim * len(config.modalities)
        self.inputs = {name: modality.input(dated=False) for name, modality in config.modalities.items()}
        for name, wanted in self.inputs.items():
            _refuse_other_colours(name, wanted.sensor.bands)

    def at(self, **changes: Any) -> ScaleMae:
        """The same encoder, sharing its weights, with another ``patch_m``, ``summary`` or ``cells``, or with other pixels,
        ``gsd_m={layer: metres}``."""
        known = ("patch_m", "summary", "cells", "gsd_m")
        for name in changes:
            if name not in known:
                raise TypeError(f"{name} cannot be changed at a call. {suggest(name, known)}")
        modalities = dict(self.config["modalities"])
        for name, gsd_m in (changes.pop("gsd_m", None) or {}).items():
            if name not in modalities:
                raise LookupError(f"gsd_m names the layer {name!r}. {suggest(name, modalities)}")
            modalities[name] = {**modalities[name], "gsd_m": gsd_m}
        twin = copy.copy(self)
        twin._take(Config.model_validate({**self.config, "modalities": modalities, **changes}))
        return twin

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per observation and patch with any valid pixel, position included; ``memo`` as in
        :func:`everysat.nn.images.together`."""
        groups = tuple(name for name in self.inputs if name in batch.layers)
        sizes = [(place.height_m, place.width_m) for place in batch.places]
        parts, layers = [], []
        for group, name in enumerate(groups):
            refuse_without_statistics(name, self.settings.modalities[name])
            raster = self.inputs[name].fit(batch.raster(name), name)
            for size in dict.fromkeys(sizes):
                alike = torch.tensor([s == size for s in sizes], device=raster.row.device)
                part = raster.obs(alike[raster.row] & raster.valid.flatten(1).any(1))
                if len(part.row):
                    parts.append(self._embedded(name, part, batch.places[sizes.index(size)], group))
                    layers.append(group)
        return together(parts, layers, groups, batch.places, self.class_token.new_zeros(0, self.settings.dim))

    def _embedded(self, name: str, raster: Raster, place: Place, group: int) -> Embedded:
        """Tokens of observations of places of the size of ``place``."""
        k, patch_m = self.settings.patch, self.settings.token_m
        values, valid = self.inputs[name].normalise(raster), raster.valid
        values, seen = resampled(values, valid, raster.gsd_m, place, patch_m / k, k)
        x = self.patches(values)
        there = F.max_pool2d(seen[:, None].to(values.dtype), k)[:, 0] > 0
        return embedded(x, there, self._positions(*x.shape[2:]), raster, patch_m, group)

    def _positions(self, height: int, width: int) -> Tensor:
        """Codes [y, x, dim]: of the number of a patch, times the pixel size it is read at."""
        y, x = (torch.arange(n, device=self.class_token.device) for n in (height, width))
        scale = self.settings.token_m / self.settings.patch / self.settings.reference_m
        return grid_sinusoid(torch.stack(torch.meshgrid(y, x, indexing="ij"), -1) * scale, self.settings.dim)

    def forward(self, tokens: Tokens) -> Features:
        """One feature per place and patch, layers beside each other, and the same of the whole place as summary."""
        return encoded(tokens, self.class_token, self.blocks, self.norm, self.settings.summary, self.inputs)


def _refuse_other_colours(name: str, bands: tuple[Band, ...]) -> None:
    """ContractError unless the bands are red, green and blue."""
    if len(bands) != len(COLOURS) or any(_from(b, c) is None for b, c in zip(bands, COLOURS, strict=True)):
        raise ContractError(
            f"layer {name!r} has the bands {', '.join(band.name for band in bands)}; Scale-MAE reads red, green and blue, in this order. "
            "Name these bands of the sensor in modalities, or leave the layer out"
        )


def _from(band: Band, colour: str) -> float | None:
    """How far a band lies from the middle of a colour, micrometres; by name, where its table has no wavelength. None if it is not
    of that colour."""
    low, high = COLOURS[colour]
    if band.wavelength_um is None:
        return 0.0 if colour in (label.lower() for label in (band.name, *band.aliases)) else None
    return abs(band.wavelength_um - (low + high) / 2) if low <= band.wavelength_um <= high else None


# --- variants, and weights under the names of the published code ---------------------------------------------------------

PUBLISHED_COLOURS: dict[str, Any] = {
    "sensor": "rgb-image",
    "bands": ("red", "green", "blue"),
    "gsd_m": 1.0,
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
}
"""Colours of 0 to 255 with the statistics of pre-training, ImageNet's; the pixel size is to be set to that of the images."""

VARIANTS: dict[str, dict[str, Any]] = {
    "large": {"modalities": {"rgb": PUBLISHED_COLOURS}},
    "base": {"modalities": {"rgb": PUBLISHED_COLOURS}, "dim": 768, "depth": 12, "heads": 12},
    "small": {"modalities": {"rgb": PUBLISHED_COLOURS}, "dim": 384, "depth": 12, "heads": 6},
    "nano": {
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "patch": 4,
        "modalities": {
            "spot": {**PUBLISHED_COLOURS, "sensor": "spot-6-7", "gsd_m": 5.0, "mean": (0.0,) * 3, "std": (1.0,) * 3},
            "s2": {
                **PUBLISHED_COLOURS,
                "sensor": "sentinel-2-l2a",
                "bands": ("B04", "B03", "B02"),
                "gsd_m": 20.0,
                "mean": (0.1, 0.2, 0.3),
                "std": (0.5, 1.0, 2.0),
            },
        },
    },
}
"""``large`` has the sizes of the published weights; ``base`` and ``small`` have none; ``nano`` is for tests."""


def build(variant: str = "large", **changes: Any) -> ScaleMae:
    """A fresh Scale-MAE: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"scalemae has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def layer(wanted: Input, **_: Any) -> dict[str, Any]:
    """How a layer of a dataset is read, for ``modalities: data``: of its bands, the red, green and blue ones nearest to the middle of
    :data:`COLOURS`. A layer without them is taken as it is, and refused."""
    found = [[(d, i) for i, b in enumerate(wanted.sensor.bands) if (d := _from(b, c)) is not None] for c in COLOURS]
    if not all(found):
        return {}
    chosen = [min(fits)[1] for fits in found]
    per_band = {"bands": wanted.sensor.names, "mean": wanted.mean, "std": wanted.std}
    return {key: [values[i] for i in chosen] for key, values in per_band.items()}


def from_config(config: Mapping[str, Any]) -> ScaleMae:
    return ScaleMae(Config.model_validate(dict(config)))


DROPPED = {
    r"^(decoder_|mask_token|fpn\.|fcn|pos_emb_projection)": "of the decoder of pre-training",
    r"^pos_embed$": "not read by the published encoder: positions are computed from the pixel size",
    r"^head\.": "makes classes of features: the task's head does",
}
"""Keys of published weights that have no counterpart here, by pattern, and why."""

_RENAMES = (
    (r"^patch_embed\.proj\.", "patches."),
    (r"^cls_token$", "class_token"),
    (r"^fc_norm\.", "norm."),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published masked autoencoder, or of its fine-tuned ``VisionTransformer``, under the names used here."""
    if "norm.weight" in state and "fc_norm.weight" in state:
        raise ContractError("the weights have both norm and fc_norm, of which one is the last: remove the other")
    out = {}
    for key, value in state.items():
        if any(re.search(pattern, key) for pattern in DROPPED):
            continue
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        out[key] = value
    return out

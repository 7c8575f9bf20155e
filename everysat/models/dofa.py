"""DOFA (Xiong et al. 2024, arXiv 2403.15356): a vision transformer whose patch embedding is made from the bands' wavelengths.

A small transformer reads the wavelengths of an image's bands and writes, for each band, the kernel that turns its patches into tokens.
Every observation of every layer is an image of its own; features are means over the dates of a layer, layers beside each other. Places
are resampled such that a patch of 16 pixels is ``patch_m`` metres long; upstream resizes every image to 224 pixels, which is
``patch_m`` = side of the place / 14.

What is refused rather than guessed: a band without statistics in the contract, for the weights saw standardised values of each sensor
(on the authors' 0-255 scale, which has no place here); and a band without a wavelength. Sentinel-1 has the number that the
published weights of version 1 were trained with, 3.75, which is no wavelength (version 2 has 5.405, its frequency in GHz);
other radars, terrain and weather need ``wavelength_um`` of the layer, at the user's own risk.

A band that an observation lacks wholly is left out, as if it had not been listed. An invalid pixel is the mean of the data; a patch
without any valid pixel gives no token.

Source of facts: github.com/zhu-xlab/DOFA (MIT), weights CC-BY-4.0.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.attention import Block
from everysat.nn.images import Embedded, embedded, encoded, resampled, together
from everysat.nn.inputs import AnyInput
from everysat.nn.position import grid_sinusoid, sine_cosine
from everysat.nn.spectral import AnySensor, listing
from everysat.types import Batch, ContractError, Features, Input, Place, Raster, Tokens

Quirk = Literal["scrambled_kernels"]
"""``scrambled_kernels``: kernels are read in another order than they were written in, so that they mix bands and channels: the first
published weights (up to May 2024) were trained so; those that replaced them under the same names were not."""

GRID = 14
"""Patches along the images that the position table was made for: 224 pixels."""


class Modality(AnyInput):
    """One input layer. ``wavelength_um``: of its bands in order, in place of what the sensor's table says."""

    wavelength_um: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _one_each(self) -> Modality:
        if self.wavelength_um is not None and len(self.wavelength_um) != len(self.bands):
            raise ValueError(f"wavelength_um has {len(self.wavelength_um)} values for {len(self.bands)} bands")
        return self


class Config(BaseModel):
    """Layers and sizes of a :class:`Dofa`, and what is asked for at a call.

    Attributes:
        patch_m: side of a patch and of what a feature stands for, metres.
        summary: of a place: the ``mean`` of the patches, or the ``class`` token.
        cells: patches along the squares that maps of large places are made of.
        sentinel1: the number that stands for the wavelength of Sentinel-1's bands.
        wave_dim, wave_tokens, wave_hidden: of the network that writes kernels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modalities: dict[str, Modality] = {}
    patch_m: float = 160.0
    summary: Literal["mean", "class"] = "mean"
    cells: int = GRID
    sentinel1: float = 3.75
    patch: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    wave_dim: int = 128
    wave_tokens: int = 128
    wave_hidden: int = 2048
    quirks: tuple[Quirk, ...] = ()

    @model_validator(mode="after")
    def _sizes_agree(self) -> Config:
        if self.dim % self.heads or self.dim % 4 or self.wave_dim % 4:
            raise ValueError(
                f"dim={self.dim} must be divisible by heads={self.heads} and 4, wave_dim={self.wave_dim} by 4"
            )
        if not self.patch_m > 0:
            raise ValueError(f"patch_m={self.patch_m} must be positive (metres)")
        return self

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        return self.patch_m

    @property
    def chip_m(self) -> float:
        return self.patch_m * self.cells


class Kernels(nn.Module):
    """From wavelengths to the convolution that embeds patches (section 3 of the paper)."""

    def __init__(self, dim: int, patch: int, wave_dim: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.dim, self.patch = dim, patch
        self.wave1, self.wave2 = nn.Linear(wave_dim, wave_dim), nn.Linear(wave_dim, wave_dim)
        self.tokens, self.last = nn.Parameter(torch.empty(tokens, wave_dim)), nn.Parameter(torch.empty(1, wave_dim))
        self.mix = nn.TransformerEncoderLayer(wave_dim, 4, hidden, dropout=0.0, activation="gelu")
        self.weight, self.bias = nn.Linear(wave_dim, patch * patch * dim), nn.Linear(wave_dim, dim)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.constant_(layer.bias, 0.01)
        for token in (self.tokens, self.last):
            nn.init.normal_(token, std=0.02)

    def forward(self, wavelength_um: Tensor, *, scrambled: bool = False) -> tuple[Tensor, Tensor]:
        """Weights [dim, band, y, x] and bias [dim] for bands of these wavelengths [band]."""
        waves = sine_cosine(wavelength_um * 1000, self.wave1.in_features, torch.float32)
        waves = waves + F.relu(self.wave2(F.relu(self.wave1(waves))))
        mixed = self.mix(torch.cat([self.tokens, waves, self.last]))
        flat = self.weight(mixed[len(self.tokens) : -1] + waves) * 0.01
        k, bands = self.patch, len(waves)
        weight = flat.view(self.dim, bands, k, k) if scrambled else flat.view(bands, k, k, self.dim).permute(3, 0, 1, 2)
        return weight, self.bias(mixed[-1]) * 0.01


class Dofa(AnySensor):
    """See the module's text. ``tokenize`` gives one token per observation and patch; ``forward`` encodes each observation."""

    family = "dofa"
    position: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._take(config)
        self.kernels = Kernels(config.dim, config.patch, config.wave_dim, config.wave_tokens, config.wave_hidden)
        self.class_token = nn.Parameter(torch.randn(1, 1, config.dim) * 0.02)
        at = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
        self.register_buffer("position", F.pad(grid_sinusoid(at, config.dim), (0, 0, 1, 0))[None])
        self.blocks = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def _take(self, config: Config) -> None:
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = config.dim * max(1, len(config.modalities))
        self.inputs = {name: modality.input(dated=modality.dated) for name, modality in config.modalities.items()}

    def at(self, **changes: Any) -> Dofa:
        """The same encoder, sharing its weights, with another ``patch_m``, ``summary`` or ``cells``."""
        known = ("patch_m", "summary", "cells")
        for name in changes:
            if name not in known:
                raise TypeError(f"{name} cannot be changed at a call. {suggest(name, known)}")
        twin = copy.copy(self)
        twin._take(Config.model_validate({**self.config, **changes}))
        return twin

    def contracted(self, name: str, raster: Raster) -> tuple[Raster, Input]:
        """As :meth:`AnySensor.contracted`, but mean and std must be those of the band itself: none are derived from others."""
        raster, wanted = super().contracted(name, raster)
        described = [i for n, i in self.inputs.items() if self.settings.modalities[n].mean is not None]
        for band in raster.sensor.names:
            if not any(i.sensor.name == raster.sensor.name and band in i.sensor for i in described):
                raise ContractError(
                    f"the model has no mean and std for layer {name!r} band {band} ({raster.sensor.name}), and those of other bands would "
                    "be a guess. Compute them (everysat stats ... -o stats.json) and load the model with statistics='stats.json'; in "
                    "a recipe, set model.statistics to data"
                )
        return raster, wanted

    def wavelengths(self, name: str, raster: Raster) -> list[float]:
        """What stands for the wavelength of each band, micrometres. ContractError where nothing is defined."""
        listed = self.settings.modalities.get(name)
        own: dict[str, float] = {}
        if listed is not None and listed.wavelength_um is not None:
            own = dict(zip(self.inputs[name].sensor.names, listed.wavelength_um, strict=True))
        found = []
        for band in raster.sensor.bands:
            optical = raster.sensor.kind in ("optical", "thermal")
            number = own.get(band.name, band.wavelength_um if optical else None)
            if number is None and raster.sensor.kind == "sar" and raster.sensor.name.startswith("sentinel-1"):
                number = self.settings.sentinel1
            if number is None:
                raise ContractError(
                    f"layer {name!r} band {band.name} ({raster.sensor.name}, {raster.sensor.kind}) has no wavelength, by which DOFA reads "
                    f"bands. Leave the layer out with batch.without({name!r}), or give wavelength_um of its bands in modalities"
                )
            found.append(number)
        return found

    # --- from pixels to tokens -----------------------------------------------------------------------------------------

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per observation and patch with any valid pixel, position included; ``memo`` as in
        :func:`everysat.nn.images.together`."""
        batch = self.known(batch)
        groups = tuple(name for name in dict.fromkeys([*self.inputs, *batch.layers]) if name in batch.layers)
        parts, layers = [], []
        for group, name in enumerate(groups):
            raster, wanted = self.contracted(name, batch.raster(name))
            waves = torch.tensor(self.wavelengths(name, raster), device=self.class_token.device)
            for alike, bands in _alike(raster, batch.places):
                part = raster.obs(alike)
                place = batch.places[int(part.row[0])]
                parts.append(self._embedded(part, wanted, bands, waves[bands], place, group))
                layers.append(group)
        return together(parts, layers, groups, batch.places, self.class_token.new_zeros(0, self.settings.dim))

    def _embedded(
        self, raster: Raster, wanted: Input, bands: Tensor, waves: Tensor, place: Place, group: int
    ) -> Embedded:
        """Tokens of observations, of places of the size of ``place``, that have these bands."""
        k, patch_m = self.settings.patch, self.settings.patch_m
        values, valid = wanted.normalise(raster)[:, bands], raster.valid[:, bands]
        values, seen = resampled(values, valid, raster.gsd_m, place, patch_m / k, k)
        weight, bias = self.kernels(waves, scrambled="scrambled_kernels" in self.settings.quirks)
        # One pixel of padding on each side, as published: patches begin a pixel before their cell.
        x = F.conv2d(values, weight, bias, stride=k, padding=1)
        there = F.max_pool2d(seen[:, None].to(values.dtype), k, padding=1)[:, 0] > 0
        return embedded(x, there, self._positions(*x.shape[2:]), raster, patch_m, group)

    def _positions(self, height: int, width: int) -> Tensor:
        """The position table [y, x, dim] for images of that many patches, interpolated where it was made for others."""
        table = rearrange(self.position[:, 1:], "1 (h w) d -> 1 d h w", h=GRID)
        if (height, width) != (GRID, GRID):
            table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        return rearrange(table, "1 d h w -> h w d")

    def forward(self, tokens: Tokens) -> Features:
        """One feature per place and patch, layers beside each other, and the same of the whole place as summary."""
        first = self.class_token + self.position[:, :1]
        return encoded(tokens, first, self.blocks, self.norm, self.settings.summary, self.inputs)


def _alike(raster: Raster, places: tuple[Place, ...]) -> list[tuple[Tensor, Tensor]]:
    """Indices of the observations of places of one size that have the same bands, and of these bands; none for those without any."""
    some = raster.valid.flatten(2).any(2).cpu()
    found: dict[Any, list[int]] = {}
    for number, (row, bands) in enumerate(zip(raster.row.tolist(), some.tolist(), strict=True)):
        if any(bands):
            found.setdefault((places[row].height_m, places[row].width_m, *bands), []).append(number)
    device = raster.values.device
    return [
        (torch.tensor(numbers, device=device), torch.nonzero(torch.tensor(key[2:], device=device)).flatten())
        for key, numbers in found.items()
    ]


# --- variants, and weights under the names of the published code ---------------------------------------------------------

_NANO: dict[str, Any] = {
    "s2": {
        "sensor": "sentinel-2-l2a",
        "bands": ("B02", "B03", "B04"),
        "gsd_m": 10.0,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 1.0, 2.0),
        "dated": True,
    },
    "s1": {"sensor": "sentinel-1-asc", "bands": ("VV", "VH"), "gsd_m": 20.0, "mean": (0.0, 0.0), "std": (1.0, 1.0)},
    "spot": {
        "sensor": "spot-6-7",
        "bands": ("red", "green", "blue"),
        "gsd_m": 5.0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    },
}
_SMALL_KERNELS = {"wave_dim": 16, "wave_tokens": 8, "wave_hidden": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "small": {"dim": 384, "heads": 6},
    "nano": {
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "patch": 4,
        "patch_m": 40.0,
        "modalities": _NANO,
        **_SMALL_KERNELS,
    },
}
"""``base`` and ``large`` have the sizes of published weights; ``small`` has none; ``nano`` is for tests."""


def build(variant: str = "base", **changes: Any) -> Dofa:
    """A fresh DOFA: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"dofa has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def layer(wanted: Input, **_: Any) -> dict[str, Any]:
    """How a layer of a dataset is read, for ``modalities: data``: its bands that have a physics."""
    return listing("", wanted) or {}


def from_config(config: Mapping[str, Any]) -> Dofa:
    return Dofa(Config.model_validate(dict(config)))


DROPPED = {
    r"^mask_token$": "stands for hidden patches in pre-training",
    r"^projector\.": "matches features of a teacher in pre-training",
    r"^head\.": "makes classes of features: the task's head does",
}
"""Keys of published weights that have no counterpart here, by pattern, and why."""

_RENAMES = (
    (r"^patch_embed\.weight_generator\.transformer_encoder\.layers\.0\.", "kernels.mix."),
    (r"^patch_embed\.weight_generator\.fc_", "kernels."),
    (r"^patch_embed\.weight_generator\.weight_tokens$", "kernels.tokens"),
    (r"^patch_embed\.weight_generator\.bias_token$", "kernels.last"),
    (r"^patch_embed\.fclayer\.w", "kernels.wave"),
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "position"),
    (r"^fc_norm\.", "norm."),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published masked autoencoder, of TorchGeo's copies, or of a fine-tuned ``OFAViT``, under the names used here."""
    if "norm.weight" in state and "fc_norm.weight" in state:
        raise ContractError("the weights have both norm and fc_norm, of which one is the last: remove the other")
    out = {}
    for key, value in state.items():
        if any(re.search(pattern, key) for pattern in DROPPED):
            continue
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        out[key] = value
    if "class_token" in out and "norm.weight" not in out:  # copies without the last norm are used with a plain one
        dim = out["class_token"].shape[-1]
        out |= {"norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)}
    return out

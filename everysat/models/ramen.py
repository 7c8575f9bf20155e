"""RAMEN (Houdré et al., CVPR 2026): any sensor by the physics of its bands, at the resolution that one asks for.

A band has a vector, made from its wavelength, its polarisation and orbit, or its terrain quantity; a pixel is the sum of its bands'
vectors times their values. The image of pixels is resampled to ``gsd_m`` metres, the user's choice, series are pooled over their dates by
L-TAE, and transformer blocks mix the cells of all layers, with positions in metres. Cost follows the number of cells: ``gsd_m`` trades
detail for time.

Projection, resampling and the scale experts are linear, so bands are resampled before they become vectors, and one matrix from bands to
``dim`` stands for all three: what is not a cell is never as wide as ``dim``. In inference the first layer of L-TAE joins that matrix.

The published weights were trained with resampling that reads few pixels when it reduces (0.44 % from 0.2 to 3 m); ``antialias``
reads them all and is on for what is trained here.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.attention import Block
from everysat.nn.inputs import AnyInput
from everysat.nn.position import day_number, grid_sinusoid
from everysat.nn.ragged import side_by_side
from everysat.nn.resample import axis_weights, resample_valid
from everysat.nn.spectral import ORBITS, POLARISATIONS, TERRAIN, AnySensor, BandVectors, ScaleExperts
from everysat.nn.temporal import Ltae
from everysat.types import ALWAYS, Batch, ContractError, Coords, Features, Input, Raster, Tokens

Quirk = Literal["stretched"]
"""``stretched``: a place has as many whole cells as fit, and images are resampled by PyTorch's interpolation, in two steps where
sizes do not agree, which shifts what is on the ground."""

CHUNK_ELEMENTS = 8_000_000
"""Numbers of the widest intermediate that series hold at once in inference, 32 MB in single precision."""


class Config(BaseModel):
    """Sizes of a :class:`Ramen`, and what is asked for at a call.

    Attributes:
        modalities: the band contract, whose moments also serve for bands like those listed; may be empty.
        layers: read the ``listed`` layers, or ``all`` whose bands have a physics.
        gsd_m: side of a cell, metres: the resolution of the features.
        output: one feature per ``cell``, the mean over layers, or one per ``layer`` and cell.
        antialias: resampling to larger cells averages all pixels, instead of the nearest two per axis.
        spread: cells larger than pixels also tell the standard deviation of their pixels per band, as further bands (not in the paper,
            whose cells know nothing of texture).
        skip: a feature is what the blocks made of a cell, and behind it what the cell was before them, without its position (not in
            the paper): positions and neighbours otherwise cover what little data says.
        cells: along the squares that maps of large places are made of.
        wavelength_unit_nm: what wavelengths are counted in. At 1 nm, as published, the codes of bands 10 nm apart have little in
            common; larger units make bands alike that are near each other, also those that training did not have.
        block_norm_eps: of the blocks' layer norms; that of the published weights depends on the version of a library that was not
            recorded, most likely 1e-5.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modalities: dict[str, AnyInput] = {}
    layers: Literal["listed", "all"] = "listed"
    gsd_m: float = 40.0
    output: Literal["cell", "layer"] = "cell"
    antialias: bool = True
    spread: bool = False
    skip: bool = False
    cells: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    time_heads: int = 16
    key_dim: int = 16
    experts: int = 4
    wavelength_unit_nm: float = 1.0
    block_norm_eps: float = 1e-5
    quirks: tuple[Quirk, ...] = ()

    @model_validator(mode="after")
    def _sizes_agree(self) -> Config:
        for name in ("heads", "time_heads"):
            if self.dim % getattr(self, name):
                raise ValueError(f"dim={self.dim} must be divisible by {name}={getattr(self, name)}")
        if self.dim % 4:
            raise ValueError(f"dim={self.dim} must be a multiple of 4, for positions along two axes")
        if not self.gsd_m > 0:
            raise ValueError(f"gsd_m={self.gsd_m} must be positive (metres)")
        return self

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        return self.gsd_m

    @property
    def chip_m(self) -> float:
        """Side of the squares of which maps of large places are made."""
        return self.gsd_m * self.cells


@dataclass(frozen=True)
class Seen:
    """A layer on the cells of a batch: normalised band ``values`` [obs, cell, band], ``some`` bool [obs, cell] where any band was
    observed, and the raster and contract that they are of."""

    values: Tensor
    some: Tensor
    raster: Raster
    wanted: Input

    @property
    def obs(self) -> Tensor:
        """Which observations have anything, bool [obs]."""
        return self.some.any(1)


class Ramen(AnySensor):
    """See the module's text. ``tokenize`` gives one token per place, layer and cell; ``forward`` mixes them."""

    family = "ramen"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._take(config)
        self.bands = BandVectors(config.dim, config.wavelength_unit_nm)
        self.texture = nn.Linear(config.dim, config.dim, bias=False) if config.spread else None
        self.scale = ScaleExperts(config.dim, config.experts)
        self.temporal = Ltae(
            config.dim,
            (config.dim,),
            (config.dim, 2 * config.dim, config.dim),
            heads=config.time_heads,
            key_dim=config.key_dim,
            dropout=0.0,
            normalise_out=False,
        )
        self.class_token = nn.Parameter(torch.randn(1, 1, config.dim) * 0.02)
        self.in_norm, self.norm = nn.LayerNorm(config.dim, eps=1e-6), nn.LayerNorm(config.dim, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, eps=config.block_norm_eps) for _ in range(config.depth)
        )
        self.apply(_initialise)
        for expert in self.scale.experts:
            # The norm behind takes lengths away. Against a bias of the length of a vector, dark and bright still differ.
            nn.init.normal_(expert.bias, std=config.experts**0.5)  # type: ignore[arg-type]

    def _take(self, config: Config) -> None:
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = config.dim * (2 if config.skip else 1)
        self.inputs = {name: modality.input(dated=modality.dated) for name, modality in config.modalities.items()}

    def at(self, **changes: Any) -> Ramen:
        """The same encoder, sharing its weights, at another ``gsd_m``, or with other ``output``, ``skip``, ``antialias``, ``layers`` or
        ``cells``."""
        known = ("gsd_m", "output", "skip", "antialias", "layers", "cells")
        for name in changes:
            if name not in known:
                raise TypeError(f"{name} cannot be changed at a call. {suggest(name, known)}")
        twin = copy.copy(self)
        twin._take(Config.model_validate({**self.config, **changes}))
        return twin

    # --- from pixels to tokens -----------------------------------------------------------------------------------------

    def grid_of(self, batch: Batch) -> tuple[int, int]:
        """Height and width of the grid of cells that covers every place of the batch."""
        return self._cells(batch.height_m), self._cells(batch.width_m)

    def _cells(self, extent_m: float) -> int:
        if "stretched" in self.settings.quirks:
            return max(1, math.floor(extent_m / self.settings.gsd_m + 1e-6))
        return math.ceil(extent_m / self.settings.gsd_m - 1e-4)

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per place, layer and cell with any valid value. ``memo`` has the ``grid``, what was
        ``seen`` of each layer, and, for a decoder, what is ``asked`` of it."""
        grid = self.grid_of(batch)
        batch = self.known(batch)
        groups = tuple(dict.fromkeys(name for name in [*self.inputs, *batch.layers] if name in batch.layers))
        seen = {name: self._seen(name, batch, grid) for name in groups}
        found = [self._tokens(name, layer, len(batch), grid[0] * grid[1]) for name, layer in seen.items()]
        x = torch.cat([self.class_token.new_zeros(0, self.settings.dim), *(x for x, _ in found)])
        slot = torch.cat([torch.zeros(0, dtype=torch.long, device=x.device), *(slot for _, slot in found)])
        counts = torch.tensor([0, *(len(slot) for _, slot in found)])
        group = torch.repeat_interleave(torch.arange(len(counts)) - 1, counts).to(x.device)
        asked = {name: (layer.raster, layer.wanted) for name, layer in seen.items()}
        return Tokens(
            x, self._coords(slot, group, grid), groups, batch.places, {"grid": grid, "seen": seen, "asked": asked}
        )

    def _seen(self, name: str, batch: Batch, grid: tuple[int, int]) -> Seen:
        raster, wanted = self.contracted(name, batch.raster(name))
        pixels, (obs, bands) = wanted.normalise(raster), raster.values.shape[:2]
        values = pixels.new_zeros(obs, bands * (1 if self.texture is None else 2), *grid)
        some = torch.zeros(obs, *grid, dtype=torch.bool, device=pixels.device)
        extents = [(place.height_m, place.width_m) for place in batch.places]
        for extent in dict.fromkeys(extents):  # places of different sizes are padded, and each ends where it ends
            mine = torch.tensor([e == extent for e in extents], device=raster.row.device)[raster.row]
            cells = [self._cells(side) for side in extent]
            size = [min(n, math.ceil(m / raster.gsd_m - 1e-4)) for n, m in zip(pixels.shape[2:], extent, strict=True)]
            part = (mine, slice(None), slice(size[0]), slice(size[1]))
            found, seen = self._resampled(pixels[part], raster.valid[part], raster.gsd_m, cells)
            values[mine, :, : cells[0], : cells[1]] = found
            some[mine, : cells[0], : cells[1]] = seen
        return Seen(rearrange(values, "o b y x -> o (y x) b"), some.flatten(1), raster, wanted)

    def _resampled(self, pixels: Tensor, valid: Tensor, gsd_m: float, cells: list[int]) -> tuple[Tensor, Tensor]:
        """Values of cells [obs, band, y, x], and where any band was observed [obs, y, x]. With ``spread``, the standard deviation of the
        valid pixels that a cell reads follows, per band; it is 0 where cells are no larger than pixels."""
        ratio, settings = gsd_m / self.settings.gsd_m, self.settings
        weights = [
            axis_weights(count, cell, ratio, settings.antialias, "stretched" in settings.quirks)
            for count, cell in zip(pixels.shape[2:], cells, strict=True)
        ]
        mean, seen = resample_valid(pixels, valid, *weights)
        if self.texture is None:
            return mean, seen.any(1)
        spread = torch.zeros_like(mean)
        if ratio < 1 - 1e-6:
            square, _ = resample_valid(pixels.square(), valid, *weights)
            spread = (square - mean.square()).clamp(min=0.0).sqrt()
        return torch.cat([mean, spread], 1), seen.any(1)

    def _tokens(self, name: str, layer: Seen, places: int, cells: int) -> tuple[Tensor, Tensor]:
        """Tokens of a layer, and their numbers place x cells + cell."""
        vectors = self.bands(layer.raster.sensor)
        if self.texture is not None:
            vectors = torch.cat([vectors, self.texture(vectors)])
        mixing, bias = self.scale(layer.raster.gsd_m / self.settings.gsd_m)
        matrix = vectors @ mixing
        row = layer.raster.row
        several = torch.bincount(row[layer.obs], minlength=places) > 1
        if several.any() and not torch.isfinite(layer.raster.time_s[several[row]]).all():
            raise ContractError(
                f"layer {name!r} has several observations of a place without dates, which a series needs. Give times=... when reading, or "
                "keep one of them"
            )
        one = layer.some & ~several[row][:, None]
        at = torch.nonzero(one)
        found, slots = [layer.values[one] @ matrix + bias], [row[at[:, 0]] * cells + at[:, 1]]
        if several.any():
            pooled, slot = self._series(layer, several, cells, matrix, bias)
            found.append(pooled)
            slots.append(slot)
        x, slot = torch.cat(found), torch.cat(slots)
        order = torch.argsort(slot)
        return x[order], slot[order]

    def _series(self, layer: Seen, several: Tensor, cells: int, matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Places with several observations, pooled over them; cells in chunks when nothing is trained."""
        keep = several[layer.raster.row] & layer.obs
        values, some, row = layer.values[keep], layer.some[keep], layer.raster.row[keep]
        day = day_number(layer.raster.time_s[keep], self._origin(layer))
        step = cells
        if not (self.training or torch.is_grad_enabled()):
            step = max(1, CHUNK_ELEMENTS // (len(row) * self.settings.dim))
        observation = _joined(self.temporal.observation, matrix, bias)
        parts = []
        for start in range(0, cells, step):
            here = some[:, start : start + step]
            at = torch.nonzero(here)
            slot, series = torch.unique(row[at[:, 0]] * cells + start + at[:, 1], return_inverse=True)
            x = observation(values[:, start : start + step][here])
            parts.append((self.temporal.pooled(x, series, day[at[:, 0]], len(slot))[0], slot))
        return torch.cat([x for x, _ in parts]), torch.cat([slot for _, slot in parts])

    def _origin(self, layer: Seen) -> float | None:
        """What day numbers count from, if the contract says so of a layer of that sensor."""
        sensor = layer.raster.sensor.name
        origins = (m.origin_s for n, m in self.settings.modalities.items() if self.inputs[n].sensor.name == sensor)
        return next(origins, None)

    def _coords(self, slot: Tensor, group: Tensor, grid: tuple[int, int]) -> Coords:
        row, cell = slot // (grid[0] * grid[1]), slot % (grid[0] * grid[1])
        side = self.settings.gsd_m
        at_m = (torch.stack([cell // grid[1], cell % grid[1]], -1) + 0.5) * side
        always = torch.tensor(ALWAYS, dtype=torch.float64, device=slot.device).expand(len(slot), 2)
        return Coords(row, at_m, torch.full((len(slot),), side, device=slot.device), always, group)

    # --- from tokens to features ---------------------------------------------------------------------------------------

    def forward(self, tokens: Tokens) -> Features:
        """One feature per place and observed cell (or per layer too, see ``output``), and the class token as summary."""
        features = self.levels(tokens, (self.settings.depth - 1,))[0]
        if not self.settings.skip:
            return features
        x, rows = self.in_norm(tokens.x), len(tokens.places)
        total = x.new_zeros(rows, x.shape[1]).index_add(0, tokens.coords.row, x)
        place = total / torch.bincount(tokens.coords.row, minlength=rows).clamp(min=1)[:, None]
        own = self._features(place, x, tokens)
        mean, summary = torch.cat([features.mean, own.mean], 1), torch.cat([features.summary, own.summary], 1)
        return replace(features, mean=mean, summary=summary)

    def levels(self, tokens: Tokens, depths: Sequence[int]) -> list[Features]:
        """Features after these blocks, counted from 0; only those after the last are normalised, as the published probes take them."""
        rows = len(tokens.places)
        x = self.in_norm(tokens.x) + self.positions(tokens.coords)
        z, keep, slot = side_by_side(x, tokens.coords.row, rows)
        z = torch.cat([self.class_token.expand(rows, -1, -1).to(z.dtype), z], 1)
        there = None if keep.all() else F.pad(keep, (1, 0), value=True)
        found = []
        for depth, block in enumerate(self.blocks):
            z = block(z, None, there)
            if depth in depths:
                last = depth == self.settings.depth - 1
                done = self.norm(z) if last else z
                found.append(self._features(done[:, 0], done[:, 1:].flatten(0, 1)[slot], tokens))
        return found

    def positions(self, coords: Coords) -> Tensor:
        """Codes [token, dim] of the north-west corners of cells, in metres from that of the place."""
        return grid_sinusoid(coords.cells() * coords.size_m[:, None].double(), self.settings.dim)

    def _features(self, summary: Tensor, mean: Tensor, tokens: Tokens) -> Features:
        """Features of tokens, or their means over the layers of each cell."""
        coords = tokens.coords
        if self.settings.output == "cell" and len(tokens.groups) > 1:
            height, width = tokens.memo["grid"]
            cells = coords.cells()
            number = (coords.row * height + cells[:, 0]) * width + cells[:, 1]
            distinct, where, count = torch.unique(number, return_inverse=True, return_counts=True)
            mean = mean.new_zeros(len(distinct), mean.shape[1]).index_add(0, where, mean) / count[:, None]
            coords = self._coords(distinct, torch.zeros_like(distinct), (height, width))
        return Features(mean, coords, summary, tokens.places)


def _joined(layers: nn.Sequential, matrix: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """The layers for single observations, of band values [n, band]: their first map joined with ``matrix`` and ``bias``, by which these
    become vectors, and with the normalisation behind it where its statistics are fixed."""
    first, norm, *rest = layers
    assert isinstance(first, nn.Linear)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    weight, shift = first.weight @ matrix.T, F.linear(bias, first.weight, first.bias)
    if norm.training:
        rest = [norm, *rest]
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight, shift = weight * factor[:, None], (shift - norm.running_mean) * factor + norm.bias

    def observe(values: Tensor) -> Tensor:
        x = F.linear(values, weight, shift)
        for layer in rest:
            x = layer(x)
        return x

    return observe


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


S2_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
_NANO: dict[str, Any] = {
    "s2": {
        "sensor": "sentinel-2-l2a",
        "bands": S2_BANDS[1:4],
        "gsd_m": 10.0,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 1.0, 2.0),
        "dated": True,
    },
    "s1": {"sensor": "sentinel-1-asc", "bands": ("VV", "VH"), "gsd_m": 20.0, "mean": (-12.0, -19.0), "std": (5.0, 5.0)},
    "dem": {"sensor": "copernicus-dem", "bands": ("elevation",), "gsd_m": 40.0, "mean": (0.0,), "std": (1.0,)},
}
_OURS: dict[str, Any] = {"wavelength_unit_nm": 10.0, "spread": True, "skip": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "small": {"dim": 384, "heads": 6, **_OURS},
    "tiny": {"dim": 192, "depth": 6, "heads": 6, **_OURS},
    "nano": {
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "time_heads": 4,
        "key_dim": 4,
        "gsd_m": 20.0,
        "modalities": _NANO,
        **_OURS,
    },
}
"""``base`` has the sizes of the published weights; the others have none. ``nano`` is for tests."""

PUBLISHED: dict[str, Any] = {"antialias": False, "quirks": ("stretched",)}
"""What the config of converted weights says beside the variant."""


def build(variant: str = "base", **changes: Any) -> Ramen:
    """A fresh RAMEN: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"ramen has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def from_config(config: Mapping[str, Any]) -> Ramen:
    return Ramen(Config.model_validate(dict(config)))


DROPPED = {r"^ltae\.attention_heads\.fc1_k\.bias$": "cancels in the softmax over dates"}
"""Keys of published weights that have no counterpart here, by pattern, and why."""

_RENAMES = (
    (r"^ltae\.attention_heads\.Q$", "temporal.query"),
    (r"^ltae\.attention_heads\.fc1_k\.", "temporal.key."),
    (r"^ltae\.inconv\.", "temporal.observation."),
    (r"^ltae\.mlp\.", "temporal.out."),
    (r"^ltae\.", "temporal."),
    (r"^cls_token$", "class_token"),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published ``RamenViT`` encoder under the names used here."""
    out = {}
    for key, value in channels(state).items():
        if any(re.search(pattern, key) for pattern in DROPPED):
            continue
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        out[key] = value
    return out


def channels(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The band vectors and scale experts of a published encoder or decoder under the names used here; all else as it was."""
    out = {}
    for key, value in state.items():
        key = re.sub(r"^spectral_projector\.", "bands.spectral.", key)
        key = re.sub(r"^radar_projector\.mlp", "bands.radar.mlp", key)
        key = re.sub(r"^dem_projector\.mlp", "bands.terrain.mlp", key)
        key = re.sub(r"^resampler\.", "scale.", key)
        if not key.endswith("_param"):
            out[key] = value.flatten(1) if re.search(r"experts\.\d+\.weight$", key) else value
    radar = [f"radar_projector.{orbit}_{p}_param" for orbit in ORBITS for p in POLARISATIONS]
    terrain = [f"dem_projector.{name}_param" for name in TERRAIN]
    for part, keys in {"radar": radar, "terrain": terrain}.items():
        if keys[0] in state:
            out[f"bands.{part}.codes"] = torch.stack([state[key].flatten() for key in keys])
    return out

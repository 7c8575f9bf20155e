"""OmniSat (Astruc et al., ECCV 2024): one token per patch and modality, fused over modalities and patches.

Every modality is cut into the same grid of patches of ``patch_m`` metres. A projector turns each patch of each modality into a
token: a CNN for very high resolution images, L-TAE for time series and single dates. Transformer blocks mix all tokens, with
relative positions on the ground; a cross-attention block with one learned query per patch reads them into one token per patch
and a class token, whatever modalities were there.

Modalities, sizes and units come from :class:`Config`: any number and kind of sensors, not only the published layouts. The
published code was never released with weights; where it has a defect, its behaviour is a named quirk, off unless asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.attention import Block, CrossBlock
from everysat.nn.gather import world
from everysat.nn.inputs import InputConfig
from everysat.nn.patch import PatchCnn, TexturePool
from everysat.nn.position import Grid, day_number
from everysat.nn.temporal import Ltae
from everysat.types import ALWAYS, Batch, Coords, Encoder, Features, Input, Raster, Tokens

Quirk = Literal["sequence_grid", "leaked_drop_path"]
"""``sequence_grid``: relative positions on one square grid laid over the whole sequence, whatever its tokens are (right for a
single modality alone). ``leaked_drop_path``: the cross block's drop-path rate is that of block number M-1."""


class Modality(InputConfig):
    """One input layer and how it becomes tokens.

    ``image``: a CNN on each patch (very high resolution). ``texture``: mean and spread of bands and learned features over each
    patch, for images whose patches have few pixels (not in the paper). ``series``: L-TAE over the dates of each patch, whose pixels are
    flattened. ``mono``: the same with one date, set to ``mono_day``.
    """

    projector: Literal["image", "texture", "series", "mono"]
    mono_day: float = 120.0
    normalise_series: bool = False
    widths: tuple[int, ...] | None = None
    out_widths: tuple[int, ...] | None = None


class Config(BaseModel):
    """Sizes and modalities of an :class:`OmniSat`. ``grid`` is the side, in patches, of the learned position tables; other
    tile sizes interpolate them. ``absolute`` and ``relative`` switch the two kinds of positions, ``modality_code`` a learned
    vector per modality (both ablations of the paper); ``locality`` as in :class:`RelativeTable`. With ``skip``, the
    feature of a patch is its fused token followed by its projected token of each modality (zeros where it has none). With ``windows``, see
    :class:`Ltae`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    modalities: dict[str, Modality]
    patch_m: float = 10.0
    grid: int = 6
    dim: int = 256
    depth: int = 6
    heads: int = 16
    key_dim: int = 8
    dropout: float = 0.2
    drop_path: float = 0.2
    absolute: bool = True
    relative: bool = True
    locality: float = 0.0
    modality_code: bool = False
    skip: bool = False
    windows: bool = False
    quirks: tuple[Quirk, ...] = ()

    @model_validator(mode="after")
    def _sizes_agree(self) -> Config:
        if not self.modalities:
            raise ValueError("modalities is empty: name at least one layer")
        for name, modality in self.modalities.items():
            ratio = self.patch_m / modality.gsd_m
            if abs(ratio - round(ratio)) > 1e-3 or round(ratio) < 1:
                raise ValueError(
                    f"patch_m={self.patch_m} is no multiple of gsd_m={modality.gsd_m} of modality {name!r}"
                )
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be divisible by heads={self.heads}")
        return self

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        return self.patch_m

    @property
    def chip_m(self) -> float:
        """Side of the squares that position tables were learned on, of which maps of large places are made."""
        return self.patch_m * self.grid

    def patch(self, name: str) -> int:
        """Pixels along a patch of that modality."""
        return round(self.patch_m / self.modalities[name].gsd_m)


@dataclass(frozen=True)
class Patches:
    """A modality cut into patches: normalised ``values`` and ``valid`` [obs, patch, band, y, x], ``row`` and ``day`` [obs]."""

    values: Tensor
    valid: Tensor
    row: Tensor
    day: Tensor

    @property
    def seen(self) -> Tensor:
        """Patches with any valid value, bool [obs, patch]."""
        return self.valid.flatten(2).any(-1)


class OmniSat(Encoder):
    """See the module's text. ``tokenize`` gives projected tokens without positions; ``forward`` fuses them."""

    family = "omnisat"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = config.dim * (1 + len(config.modalities) if config.skip else 1)
        self.inputs = {
            name: modality.input(dated=modality.projector == "series") for name, modality in config.modalities.items()
        }
        self.projectors = nn.ModuleDict({name: self._projector(name) for name in config.modalities})
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        table = (1, 1 + config.grid**2, config.dim)
        self.position = nn.Parameter(torch.empty(table)) if config.absolute else None
        self.query_position = nn.Parameter(torch.zeros(table))
        self.modality_code = nn.Parameter(torch.zeros(len(self.inputs), config.dim)) if config.modality_code else None
        options: dict[str, Any] = {"relative": config.relative, "locality": config.locality, "dropout": config.dropout}
        rates = torch.linspace(0, config.drop_path, config.depth).tolist() or [config.drop_path]
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, drop_path=rates[i], **options) for i in range(config.depth)
        )
        leaked = "leaked_drop_path" in config.quirks
        self.cross = CrossBlock(
            config.dim, config.heads, drop_path=rates[len(self.inputs) - 1 if leaked else -1], **options
        )
        self.apply(_initialise)
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)

    def _projector(self, name: str) -> nn.Module:
        config, modality = self.settings, self.settings.modalities[name]
        patch, bands = config.patch(name), len(modality.bands)
        if modality.projector == "image":
            return PatchCnn(bands, config.dim, patch)
        if modality.projector == "texture":
            return TexturePool(bands, config.dim, patch)
        return Ltae(
            bands * patch * patch,
            modality.widths or (config.dim // 8, config.dim // 2, config.dim),
            modality.out_widths or (2 * config.dim, config.dim),
            heads=config.heads,
            key_dim=config.key_dim,
            period=modality.period_days,
            normalise=modality.normalise_series,
            dropout=config.dropout,
            windows=config.windows,
        )

    def grid_of(self, batch: Batch) -> tuple[int, int]:
        """Height and width of the patch grid that covers every place of the batch."""
        side = self.settings.patch_m
        return math.ceil(batch.height_m / side - 1e-4), math.ceil(batch.width_m / side - 1e-4)

    def tokenize(self, batch: Batch, *, indices: bool = False) -> Tokens:
        """One token per place, modality and patch with any valid value. ``memo`` holds what a decoder asks for: the patches
        of each modality, the attention of each date, and, with ``indices``, where the image CNN found its maxima."""
        grid = self.grid_of(batch)
        parts: list[tuple[Tensor, Tensor]] = []
        memo: dict[str, dict[str, Any]] = {"patches": {}, "attention": {}, "indices": {}, "series": {}}
        # An input without observations is left out, unless another process may have some: then all take part in its sums.
        groups = tuple(n for n in self.inputs if n in batch.layers and (len(batch.raster(n).row) or world()[1] > 1))
        for name in groups:
            patches = self._cut(name, self.inputs[name].fit(batch.raster(name), name), grid)
            image = self.settings.modalities[name].projector in ("image", "texture")
            project = self._image_tokens if image else self._series_tokens
            found, where, side_products = project(name, patches, indices)
            parts.append((found, where))
            memo["patches"][name] = patches
            for key, value in side_products.items():
                memo[key][name] = value
        if not parts:
            nothing = self.class_token.new_zeros(0, self.settings.dim)
            parts, counts = [(nothing, torch.zeros(0, dtype=torch.long, device=nothing.device))], [0]
        else:
            counts = [len(where) for _, where in parts]
        group = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(parts[0][1].device)
        coords = self._coords(torch.cat([where for _, where in parts]), group, grid)
        return Tokens(torch.cat([found for found, _ in parts]), coords, groups, batch.places, {**memo, "grid": grid})

    def _cut(self, name: str, raster: Raster, grid: tuple[int, int]) -> Patches:
        modality, patch = self.settings.modalities[name], self.settings.patch(name)
        raster = raster._padded(grid[0] * patch, grid[1] * patch)
        size = {"h": grid[0], "w": grid[1], "y": patch, "x": patch}
        window = (slice(None), slice(None), slice(0, grid[0] * patch), slice(0, grid[1] * patch))
        cut = "o b (h y) (w x) -> o (h w) b y x"
        values = rearrange(self.inputs[name].normalise(raster)[window], cut, **size)
        valid = rearrange(raster.valid[window], cut, **size)
        if modality.projector == "series":
            day = day_number(raster.time_s, modality.origin_s)
        else:
            day = torch.full((len(raster.row),), modality.mono_day, dtype=torch.float64, device=values.device)
        return Patches(values, valid, raster.row, day)

    def _image_tokens(self, name: str, patches: Patches, indices: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
        seen = patches.seen
        images = patches.values[seen] if not seen.all() else patches.values.flatten(0, 1)
        projector, where = self.projectors[name], None
        if isinstance(projector, TexturePool):
            found = projector(images, patches.valid[seen].any(1))
        else:
            found, where = cast(PatchCnn, projector)(images, indices=indices)
        series = _series(patches)[seen]
        present, position = torch.unique(series, return_inverse=True)
        if len(present) < len(series):  # several dates of one patch: their mean
            total = found.new_zeros(len(present), found.shape[1]).index_add(0, position, found)
            vectors = total / torch.bincount(position)[:, None]
        else:
            vectors = found.new_zeros(found.shape).index_copy(0, position, found)
        return vectors, present, {"indices": where, "series": series}

    def _series_tokens(self, name: str, patches: Patches, indices: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
        seen = patches.seen
        x = patches.values.flatten(2)
        x = x.flatten(0, 1) if seen.all() else x[seen]
        present, position = torch.unique(_series(patches)[seen], return_inverse=True)
        day = patches.day[:, None].expand(seen.shape)[seen]
        found, attention = cast(Ltae, self.projectors[name])(x, position, day, len(present))
        obs = torch.arange(len(patches.row), device=seen.device)[:, None].expand(seen.shape)[seen]
        total = attention.new_zeros(len(patches.row)).index_add(0, obs, attention)
        return found, present, {"attention": total / seen.sum(1).clamp(min=1)}

    def _coords(self, series: Tensor, group: Tensor, grid: tuple[int, int]) -> Coords:
        row, cell = series // (grid[0] * grid[1]), series % (grid[0] * grid[1])
        side = self.settings.patch_m
        at_m = (torch.stack([cell // grid[1], cell % grid[1]], -1) + 0.5) * side
        always = torch.tensor(ALWAYS, dtype=torch.float64, device=series.device).expand(len(series), 2)
        return Coords(row, at_m, torch.full((len(series),), side, device=series.device), always, group)

    def forward(self, tokens: Tokens, *, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Features:
        """One feature per place and observed patch, and the class token as summary. ``hidden`` [token] marks tokens that
        ``mask_token`` replaces, position included, in pre-training."""
        grid = tokens.memo["grid"]
        height, width = grid
        cells = tokens.coords.cells()
        cell = cells[:, 0] * width + cells[:, 1]
        x = tokens.x
        if self.position is not None:
            x = x + self._table(self.position, grid)[0, 1:][cell]
        if hidden is not None and mask_token is not None:
            x = torch.where(hidden[:, None], mask_token.view(1, -1), x)
        if self.modality_code is not None:
            order = torch.tensor([list(self.inputs).index(name) for name in tokens.groups], device=cell.device)
            x = x + self.modality_code[order][tokens.coords.group]
        z, keep = self._fill(x, tokens, cell, height * width)
        copies = max(len(tokens.groups), 1)
        keys = Grid(1, copies, height, width)
        layout = Grid.guessed(len(keys)) if "sequence_grid" in self.settings.quirks else keys
        for block in self.blocks:
            z = block(z, layout, keep)
        z = self.cross(z, self._table(self.query_position, grid), Grid(1, 1, height, width), keys, keep)
        return self._features(z, tokens, cell, grid)

    def _fill(self, x: Tensor, tokens: Tokens, cell: Tensor, cells: int) -> tuple[Tensor, Tensor | None]:
        """Class token and tokens of each place as [place, 1 + modality x patch, dim], and which of them are there."""
        rows, length = len(tokens.places), max(len(tokens.groups), 1) * cells
        slot = tokens.coords.row * length + tokens.coords.group * cells + cell
        z = x.new_zeros(rows * length, x.shape[1]).index_copy(0, slot, x).view(rows, length, -1)
        first = self.class_token + (0 if self.position is None else self.position[:, :1])
        z = torch.cat([first.expand(rows, -1, -1).to(z.dtype), z], dim=1)
        if len(tokens) == rows * length:
            return z, None
        keep = torch.zeros(rows * length, dtype=torch.bool, device=x.device).index_fill_(0, slot, True)
        return z, F.pad(keep.view(rows, length), (1, 0), value=True)

    def _features(self, z: Tensor, tokens: Tokens, cell: Tensor, grid: tuple[int, int]) -> Features:
        cells = grid[0] * grid[1]
        series = torch.unique(tokens.coords.row * cells + cell)
        coords = self._coords(series, torch.zeros_like(series), grid)
        mean, summary = z[:, 1:].flatten(0, 1)[series], z[:, 0]
        if self.settings.skip:
            mean, summary = self._beside_tokens(mean, summary, tokens, cell, cells, series)
        return Features(mean, coords, summary, tokens.places)

    def _beside_tokens(
        self, mean: Tensor, summary: Tensor, tokens: Tokens, cell: Tensor, cells: int, series: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fused features with the projected tokens of each modality behind them; for the summary, their means."""
        rows, kinds = len(tokens.places), len(self.inputs)
        order = torch.tensor([list(self.inputs).index(name) for name in tokens.groups], device=cell.device).long()
        kind = order[tokens.coords.group]
        own = tokens.x.new_zeros(rows * cells, kinds, tokens.x.shape[1])
        own = own.index_put((tokens.coords.row * cells + cell, kind), tokens.x)
        count = torch.bincount(tokens.coords.row * kinds + kind, minlength=rows * kinds).view(rows, kinds, 1)
        means = own.view(rows, cells, kinds, -1).sum(1) / count.clamp(min=1)
        return torch.cat([mean, own[series].flatten(1)], 1), torch.cat([summary, means.flatten(1)], 1)

    def _table(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """A learned position table [1, 1 + patch, dim] for this grid, interpolated when it was learned on another."""
        side = self.settings.grid
        if grid == (side, side):
            return table
        image = rearrange(table[:, 1:], "1 (h w) d -> 1 d h w", h=side)
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], rearrange(image, "1 d h w -> 1 (h w) d")], dim=1)


def _series(patches: Patches) -> Tensor:
    """Number of the series that each patch of each observation belongs to: place x patches + patch, [obs, patch]."""
    count = patches.values.shape[1]
    return patches.row[:, None] * count + torch.arange(count, device=patches.row.device)


def _initialise(module: nn.Module) -> None:
    """As timm's vision transformer: small normal weights in the blocks, zero biases."""
    if isinstance(module, Block | CrossBlock):
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)


# --- variants, and weights under the names of the published code ---------------------------------------------------------

_S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


def _s2(**changes: Any) -> dict[str, Any]:
    base = {"sensor": "sentinel-2-l2a", "bands": _S2, "gsd_m": 10.0, "projector": "series", "normalise_series": True}
    return {**base, **changes}


def _s1(bands: tuple[str, ...] = ("VV", "VH"), **changes: Any) -> dict[str, Any]:
    return {"sensor": "sentinel-1-grd", "bands": bands, "gsd_m": 10.0, "projector": "series", **changes}


_AERIAL = {"sensor": "treesatai-aerial", "bands": ("nir", "red", "green", "blue"), "gsd_m": 0.2, "projector": "image"}
_FLAIR = {
    "sensor": "flair-aerial",
    "bands": ("red", "green", "blue", "nir", "elevation"),
    "gsd_m": 0.2,
    "projector": "image",
}
_SPOT = {"sensor": "spot-6-7", "bands": ("red", "green", "blue"), "gsd_m": 1.0, "projector": "image"}
_PASTIS_DAYS = {"period_days": 734.0, "origin": "2018-09-01"}

VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "grid": 4,
        "dim": 32,
        "depth": 2,
        "heads": 4,
        "modalities": {
            "spot": _SPOT,
            "texture": {**_SPOT, "projector": "texture"},
            "s2": _s2(),
            "s1": _s1(),
            "s2-mono": _s2(projector="mono"),
        },
    },
    "treesat": {"grid": 6, "modalities": {"aerial": _AERIAL, "s2": _s2(), "s1-asc": _s1()}},
    "treesat-mono": {
        "grid": 6,
        "modalities": {
            "aerial": _AERIAL,
            "s2-mono": _s2(projector="mono"),
            "s1-mono": _s1(projector="mono"),
        },
    },
    "flair": {"grid": 10, "modalities": {"aerial": _FLAIR, "s2": _s2()}},
    "pastis": {
        "grid": 32,
        "patch_m": 40.0,
        "modalities": {
            "spot": _SPOT,
            "s2": _s2(**_PASTIS_DAYS),
            "s1-asc": _s1(("VV", "VH", "ratio"), **_PASTIS_DAYS),
        },
    },
}


def build(variant: str = "treesat", **changes: Any) -> OmniSat:
    """A fresh OmniSat: one of :data:`VARIANTS`, with fields of :class:`Config` changed. Without a variant, give modalities."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"omnisat has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def layer(wanted: Input, patch_m: float = 10.0, **_: Any) -> dict[str, Any]:
    """How a layer of a dataset becomes tokens, for ``modalities: data``: series by their dates, undated images of many pixels a patch by a CNN."""
    large = round(patch_m / wanted.gsd_m) >= 8
    return {"projector": "series" if wanted.dated else "image" if large else "texture"}


def from_config(config: Mapping[str, Any]) -> OmniSat:
    return OmniSat(Config.model_validate(dict(config)))


DROPPED = {r"\.attention_heads\.fc1_k\.bias$": "cancels in the softmax over dates"}
"""Keys of published weights that have no counterpart here, by pattern, and why."""


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published code's ``OmniModule`` under the names used here; ``config`` gives the number of blocks, behind
    which the cross block stands."""
    depth = Config.model_validate(dict(config)).depth
    kept = (key for key in state if not any(re.search(pattern, key) for pattern in DROPPED))
    return {_rename(key, depth): state[key] for key in kept}


def _rename(key: str, depth: int) -> str:
    if key.startswith("projector_"):
        renames: list[tuple[str, Any]] = [
            (r"^projector_([^.]+)\.", r"projectors.\1."),
            (r"\.attention_heads\.Q$", ".query"),
            (r"\.attention_heads\.fc1_k\.", ".key."),
            (r"\.inconv\.", ".observation."),
            (r"\.mlp\.", ".out."),
            (r"\.proj\.0\.", ".stem."),
            (r"\.proj\.1\.", ".norm."),
            # Residual blocks stand behind every pooling but the last, from position 4 on, two apart.
            (r"\.proj\.(\d+)\.", lambda found: f".residuals.{int(found[1]) // 2 - 2}."),
            (r"\.bn\.", ".norm."),
        ]
    else:
        renames = [
            (r"^cls_token$", "class_token"),
            (r"^pos_embed$", "position"),
            (rf"^blocks\.{depth}\.attn\.pos_embed$", "query_position"),
            (rf"^blocks\.{depth}\.", "cross."),
            (r"^cross\.attn\.q_learned$", "cross.attn.query"),
            (r"^cross\.attn\.wk\.", "cross.attn.key."),
            (r"^cross\.attn\.wv\.", "cross.attn.value."),
            (r"\.rpe_k\.lookup_table_weight$", ".relative.table"),
        ]
    for pattern, new in renames:
        key = re.sub(pattern, new, key)
    return key

"""AnySat (Astruc et al., CVPR 2025): one encoder for any resolution, scale and mix of sensors.

Each layer is cut into patches of ``patch_m`` metres, chosen at every call, and each patch into sub-patches of a fixed number of
pixels. A projector of the layer turns sub-patches into vectors (images: one linear map and an MLP; series: L-TAE over the
dates of each pixel). The spatial encoder, shared by all sensors, reads the sub-patches of a patch, with positions in
metres, into one token; the fusion reads the tokens of all sensors, with positions in units of 10 m, into one feature per
patch and one of the place. A layer whose pixels are larger than a patch (MODIS) gives context tokens that every patch sees.

Patches are encoded in chunks, so that memory beside the input grows with the number of tokens alone. Where the published
implementation has a defect that its weights were trained with, its behaviour is a named quirk, off unless asked for.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.attention import Block, CrossBlock
from everysat.nn.inputs import InputConfig
from everysat.nn.position import Grid, day_number, grid_sinusoid
from everysat.nn.ragged import ordinal, side_by_side
from everysat.nn.temporal import Ltae
from everysat.types import ALWAYS, Batch, ContractError, Coords, Encoder, Features, Input, Place, Raster, Tokens

Quirk = Literal["first_head_bias", "across_heads", "nested_subpatches", "padded", "placeless_context"]
"""``first_head_bias``: the relative bias of the first head is added to all heads. ``across_heads``: attention of the fusion
runs over the heads of each token (flash attention with its axes swapped). ``nested_subpatches``: positions count
sub-patches within 10 m squares, and those squares within the patch, as if they stood row by row. ``padded``: invalid values
count as the mean instead of being left out. ``placeless_context``: context tokens carry no position."""

CHUNK_ELEMENTS = 16_000_000
"""Numbers of the largest intermediate that encoding holds at once, 64 MB in single precision."""
UNIT_M = 10.0
"""What positions of patches are counted in."""


class Modality(InputConfig):
    """One input layer: an ``image`` cut into sub-patches of ``pixels`` x ``pixels``, or a ``series`` with one sub-patch per
    pixel. ``normalise_series``: group-normalise each series over its dates (published: Sentinel-2 alone)."""

    projector: Literal["image", "series"]
    pixels: int = 1
    normalise_series: bool = False

    @property
    def sub_m(self) -> float:
        """Side of a sub-patch, metres."""
        return self.gsd_m * self.pixels


class Config(BaseModel):
    """Sizes, modalities, and what is asked for at a call.

    Attributes:
        patch_m: side of a patch, metres; a multiple of the sub-patches of the layers.
        output: ``patch``, one feature per patch, or ``dense``, one of twice the width per sub-patch of layer ``dense`` (by default
            the first layer at hand): that of its patch, and its own behind it.
        window, halo: fuse squares of ``window`` patches and ``halo`` more on each side, instead of the whole place at once:
            the cost is then linear in the area. 0: no windows.
        grid: patches along the squares that maps of large places are made of.
        depth: of the spatial encoder and of the fusion, each. dropout: in the projectors of series.
        metric: positions count metres rather than cells. spatial: whether there is a spatial encoder, or the mean of
            sub-patches. fusion: whether layers are fused, or their tokens averaged (three ablations).
        locality: how much the fused feature of a patch begins by reading its own tokens, see :class:`RelativeTable`; the
            published model has none, and needs long training to find out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modalities: dict[str, Modality]
    patch_m: float = 40.0
    output: Literal["patch", "dense"] = "patch"
    dense: str = ""
    window: int = 0
    halo: int = 1
    grid: int = 12
    dim: int = 768
    depth: int = 6
    heads: int = 12
    time_heads: int = 16
    key_dim: int = 8
    dropout: float = 0.2
    metric: bool = True
    spatial: bool = True
    fusion: bool = True
    locality: float = 0.0
    quirks: tuple[Quirk, ...] = ()

    @model_validator(mode="after")
    def _sizes_agree(self) -> Config:
        if not self.modalities:
            raise ValueError("modalities is empty: name at least one layer")
        if self.dim % self.heads or self.dim % 64:
            raise ValueError(f"dim={self.dim} must be divisible by heads={self.heads} and by 64")
        if self.dense and self.dense not in self.modalities:
            raise ValueError(f"dense={self.dense!r} is no modality. {suggest(self.dense, self.modalities)}")
        if self.patch_m <= 0 or self.window < 0 or not self.halo >= 0:
            raise ValueError(f"patch_m={self.patch_m}, window={self.window} and halo={self.halo} must not be negative")
        return self

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        if self.output != "dense":
            return self.patch_m
        fine = [m.sub_m for m in self.modalities.values() if m.sub_m <= self.patch_m]
        return self.modalities[self.dense].sub_m if self.dense else (fine or [self.patch_m])[0]

    @property
    def chip_m(self) -> float:
        return self.patch_m * self.grid


@dataclass(frozen=True)
class Subpatches:
    """Encoded sub-patches ``x`` [patch, sub-patch, dim] of some patches (``row``, ``cell``), ``side`` along each, where ``keep``."""

    x: Tensor
    keep: Tensor
    row: Tensor
    cell: Tensor
    side: int
    size_m: float


class ImageProjector(nn.Module):
    """Sub-patches [n, band x y x] to vectors: a linear map without bias, then (linear, layer norm, ReLU) twice."""

    def __init__(self, bands: int, dim: int, pixels: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(bands, dim, pixels, stride=pixels, bias=False)
        wide = [nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.ReLU()]
        self.mlp = nn.Sequential(*wide, nn.Linear(2 * dim, dim), nn.LayerNorm(dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(F.linear(x, self.embed.weight.flatten(1)))


class SpatialEncoder(nn.Module):
    """Sub-patches of a patch to one vector: a class token and transformer blocks with relative positions."""

    def __init__(self, dim: int, depth: int, heads: int, *, first_head: bool) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        options: dict[str, Any] = {"relative": True, "first_head": first_head, "eps": 1e-5}
        self.blocks = nn.ModuleList(Block(dim, heads, **options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, keep: Tensor | None, *, whole: bool) -> Tensor:
        """Class token, and with ``whole`` sub-patches behind it, of ``x`` [patch, sub-patch, dim] with positions."""
        side = math.isqrt(x.shape[1])
        z = torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        keep = None if keep is None else F.pad(keep, (1, 0), value=True)
        grid = Grid(1, 1, side, side)
        for number, block in enumerate(self.blocks):
            last = number == len(self.blocks) - 1
            z = block(z, grid, keep, None if whole or not last else 1)
        return self.norm(z if whole else z[:, :1])


class AnySat(Encoder):
    """See the module's text. ``tokenize`` gives one token per place, layer and patch; ``forward`` fuses them."""

    family = "anysat"

    def __init__(self, config: Config) -> None:
        super().__init__()
        quirks = config.quirks
        self._take(config)
        self.projectors = nn.ModuleDict({name: self._projector(m) for name, m in config.modalities.items()})
        first_head = "first_head_bias" in quirks
        self.spatial = (
            SpatialEncoder(config.dim, config.depth, config.heads, first_head=first_head) if config.spatial else None
        )
        if config.fusion:
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
            across = "across_heads" in quirks
            self.blocks = nn.ModuleList(
                Block(config.dim, config.heads, across_heads=across) for _ in range(config.depth)
            )
            self.cross = CrossBlock(config.dim, config.heads, first_head=first_head, locality=config.locality)
        self._initialise()

    def _take(self, config: Config) -> None:
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = config.dim * (2 if config.output == "dense" else 1)
        self.inputs = {n: m.input(dated=m.projector == "series") for n, m in config.modalities.items()}

    def _projector(self, modality: Modality) -> nn.Module:
        dim, bands = self.settings.dim, len(modality.bands)
        if modality.projector == "image":
            return ImageProjector(bands, dim, modality.pixels)
        ltae = Ltae(
            bands * modality.pixels**2,
            (dim // 8, dim // 2, dim, 2 * dim, dim),
            (dim,),
            heads=self.settings.time_heads,
            key_dim=self.settings.key_dim,
            period=modality.period_days,
            normalise=modality.normalise_series,
            dropout=self.settings.dropout,
            norm="group",
        )
        # What invalid values count as under the quirk "padded"; the published training never changes it.
        ltae.register_buffer("pad", torch.zeros(()))
        return ltae

    def at(self, **changes: Any) -> AnySat:
        """The same encoder (sharing its weights) at another ``patch_m``, ``output``, ``dense``, ``window``, ``halo``, or with other
        pixels, ``gsd_m={layer: metres}``: positions then say the true size, whatever the projector was trained on."""
        known = ("patch_m", "output", "dense", "window", "halo", "grid", "gsd_m")
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

    # --- from pixels to tokens ---------------------------------------------------------------------------------------

    def grid_of(self, batch: Batch) -> tuple[int, int]:
        """Height and width of the patch grid that covers every place of the batch."""
        return self._cells(batch, self.settings.patch_m)

    @staticmethod
    def _cells(batch: Batch, side_m: float) -> tuple[int, int]:
        return math.ceil(batch.height_m / side_m - 1e-4), math.ceil(batch.width_m / side_m - 1e-4)

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per place, layer and patch with any valid value, and per pixel of layers coarser than a patch.

        Raises:
            ContractError: a layer does not fit its contract, has no statistics, or cannot be cut into patches of ``patch_m``.
        """
        groups = tuple(name for name in self.inputs if name in batch.layers)
        wanted = self._dense_layer(groups)
        parts: list[tuple[Tensor, Coords]] = []
        dense = None
        for group, name in enumerate(groups):
            raster = self.inputs[name].fit(batch.raster(name), name)
            side = self._side(name)
            size_m = self.settings.patch_m if side else self.settings.modalities[name].sub_m
            grid = self._cells(batch, size_m)
            x, row, cell, subs = self._encoded(name, raster, batch, side or 1, grid, name == wanted)
            parts.append((x, _coords(row, cell, group, grid[1], size_m)))
            if subs is not None:
                dense = Subpatches(*subs, side, self.settings.modalities[name].sub_m)
        if not parts:
            nowhere = torch.zeros(0, dtype=torch.long, device=self._device)
            parts = [(torch.zeros(0, self.settings.dim, device=self._device), _coords(nowhere, nowhere, 0, 1, 1.0))]
        context = torch.tensor([self._side(name) == 0 for name in groups], dtype=torch.bool)
        memo = {"grid": self.grid_of(batch), "context": context, "dense": dense}
        x, coords = torch.cat([x for x, _ in parts]), Coords.cat([c for _, c in parts])
        return Tokens(x, coords, groups, batch.places, memo)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _dense_layer(self, groups: tuple[str, ...]) -> str:
        if self.settings.output != "dense":
            return ""
        fine = [name for name in groups if self._side(name)]
        if self.settings.dense and self.settings.dense not in fine:
            raise ContractError(
                f"dense={self.settings.dense!r} needs that layer in the batch, with sub-patches no larger than a patch; "
                f"such layers here: {', '.join(fine) or 'none'}"
            )
        return self.settings.dense or (fine[0] if fine else "")

    def _side(self, name: str) -> int:
        """Sub-patches along a patch; 0 for a layer that gives context tokens, whose pixels do not fit into patches."""
        modality, patch_m = self.settings.modalities[name], self.settings.patch_m
        ratio = patch_m / modality.sub_m
        if round(ratio) >= 1 and abs(ratio - round(ratio)) < 1e-3:
            return round(ratio)
        if ratio < 2:
            return 0
        raise ContractError(
            f"patch_m={patch_m:g} is no multiple of {modality.sub_m:g} m, the sub-patch of layer {name!r}; choose one that is, "
            f"or leave the layer out with batch.without({name!r})"
        )

    def _encoded(
        self, name: str, raster: Raster, batch: Batch, side: int, grid: tuple[int, int], whole: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor] | None]:
        """Tokens of one layer with their row and cell; with ``whole``, also the sub-patches of the same patches."""
        if self.settings.modalities[name].mean is None:
            raise ContractError(
                f"the model has no mean and std for layer {name!r}, and its input must be normalised. Compute them with "
                "`everysat stats`, then load(..., statistics=FILE); in a recipe, set model.statistics to data; for values that "
                "are normalised already, give mean 0 and std 1"
            )
        tokens, rows, cells, subs, kept = [], [], [], [], []
        for first, values, seen in self._strips(name, raster, batch, side, grid):
            x, keep = self._projected(name, raster, values, seen, len(batch))
            row, cell = torch.nonzero(keep.any(-1), as_tuple=True)
            z = self._spatial(x[row, cell], keep[row, cell], side, self.settings.modalities[name].sub_m, whole)
            tokens.append(z[:, 0])
            rows.append(row)
            cells.append(cell + first)
            if whole:
                subs.append(z[:, 1:])
                kept.append(keep[row, cell])
        row, cell = torch.cat(rows), torch.cat(cells)
        order = torch.argsort(row, stable=True)  # strips hold all places: put each place's cells together
        row, cell = row[order], cell[order]
        dense = (torch.cat(subs)[order], torch.cat(kept)[order], row, cell) if whole else None
        return torch.cat(tokens)[order], row, cell, dense

    def _strips(
        self, name: str, raster: Raster, batch: Batch, side: int, grid: tuple[int, int]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Normalised values [obs, cell, sub-patch, band x y x] of some rows of cells, the number of their first cell, and which
        sub-patches of which observations count [obs, cell, sub-patch]."""
        k = self.settings.modalities[name].pixels
        px = side * k
        size = {"h": 1, "w": grid[1], "y": side, "x": side, "k": k, "l": k}
        per_row = max(1, len(raster.row) * raster.values.shape[1] * grid[1] * px * px)
        step = max(1, CHUNK_ELEMENTS // per_row)
        for top in range(0, grid[0], step):
            size["h"] = min(step, grid[0] - top)
            window = (..., slice(top * px, (top + size["h"]) * px), slice(0, grid[1] * px))
            strip = replace(raster, values=raster.values[window], valid=raster.valid[window], var=None)
            strip = strip._padded(size["h"] * px, grid[1] * px)
            values = self.inputs[name].normalise(strip)
            valid = strip.valid
            if "padded" in self.settings.quirks and self.settings.modalities[name].projector == "series":
                values = torch.where(valid, values, cast(Tensor, self.projectors[name].pad).to(values.dtype))
                valid = self._inside(strip, batch, top * px)
            cut = "o b (h y k) (w x l) -> o (h w) (y x) (b k l)"
            seen = rearrange(valid, cut, **size).any(-1)
            yield top * grid[1], rearrange(values, cut, **size), seen

    @staticmethod
    def _inside(strip: Raster, batch: Batch, top: int) -> Tensor:
        """Which pixels of the strip begin inside the place, as ``valid``."""
        extents = torch.tensor([(p.height_m, p.width_m) for p in batch.places], device=strip.values.device)[strip.row]
        south, east = (
            (torch.arange(n, device=extents.device) + start) * strip.gsd_m < extents[:, axis, None] - 1e-3
            for axis, (n, start) in enumerate(zip(strip.values.shape[2:], (top, 0), strict=True))
        )
        return (south[:, None, :, None] & east[:, None, None, :]).expand_as(strip.valid)

    def _projected(self, name: str, raster: Raster, values: Tensor, seen: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Vectors of sub-patches [row, cell, sub-patch, dim], and which there are."""
        shape = (rows, *seen.shape[1:])
        image = self.settings.modalities[name].projector == "image"
        values, seen = values.flatten(1, 2), seen.flatten(1)
        step = max(1, CHUNK_ELEMENTS // max(1, len(raster.row) * 2 * self.settings.dim))
        project = self._image_vectors if image else self._series_vectors
        parts = [
            project(name, raster, values[:, i : i + step], seen[:, i : i + step], rows)
            for i in range(0, values.shape[1], step)
        ]
        x, keep = (torch.cat(t, 1) for t in zip(*parts, strict=True))
        return x.view(*shape, -1), keep.view(shape)

    def _image_vectors(
        self, name: str, raster: Raster, values: Tensor, seen: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Several dates of an image count as their mean."""
        x = self.projectors[name](values[seen] if not seen.all() else values.flatten(0, 1))
        count = seen.new_zeros(rows, seen.shape[1], dtype=torch.long).index_add(0, raster.row, seen.long())
        series = _series(raster.row, seen)
        out = x.new_zeros(count.numel(), x.shape[1]).index_add(0, series, x)
        return (out / count.flatten().clamp(min=1)[:, None]).view(rows, seen.shape[1], -1), count > 0

    def _series_vectors(
        self, name: str, raster: Raster, values: Tensor, seen: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        day = day_number(raster.time_s, self.settings.modalities[name].origin_s)
        x = values.flatten(0, 1) if seen.all() else values[seen]
        series = _series(raster.row, seen)
        keep = torch.bincount(series, minlength=rows * seen.shape[1]) > 0
        number = torch.cumsum(keep, 0) - 1
        found, _ = self.projectors[name](x, number[series], day[:, None].expand(seen.shape)[seen], int(keep.sum()))
        out = found.new_zeros(len(keep), found.shape[1]).index_copy(0, torch.nonzero(keep).flatten(), found)
        return out.view(rows, seen.shape[1], -1), keep.view(rows, -1)

    def _spatial(self, x: Tensor, keep: Tensor, side: int, sub_m: float, whole: bool) -> Tensor:
        """Token and, with ``whole``, sub-patches of each patch [patch, 1 + sub-patch, dim]."""
        if self.spatial is None:
            mean = (x * keep[..., None]).sum(1, keepdim=True) / keep.sum(1)[:, None, None]
            return torch.cat([mean, x], 1) if whole else mean
        place = _grid_code(side, side, sub_m if self.settings.metric else 1.0, self.settings.dim, x.device).to(x.dtype)
        order = nested(side, sub_m) if "nested_subpatches" in self.settings.quirks else None
        order = None if order is None else order.to(x.device)
        x = (x if order is None else x[:, order]) + place
        all_there = bool(keep.all())
        keep = keep if order is None else keep[:, order]
        step = max(1, CHUNK_ELEMENTS // (4 * self.settings.dim * (side * side + 1)))
        parts = [
            self.spatial(x[i : i + step], None if all_there else keep[i : i + step], whole=whole)
            for i in range(0, len(x), step)
        ]
        z = torch.cat(parts) if parts else x.new_zeros(0, 1 + side * side if whole else 1, x.shape[-1])
        if whole and order is not None:
            z = torch.cat([z[:, :1], z[:, 1:][:, torch.argsort(order)]], 1)
        return z

    # --- from tokens to features -------------------------------------------------------------------------------------

    def forward(self, tokens: Tokens, *, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Features:
        """One feature per patch that has a token or lies under one, and the class token as summary. ``hidden`` [token] marks
        tokens that ``mask_token`` replaces, position included, in pre-training."""
        height, width = tokens.memo["grid"]
        window = self.settings.window
        if window and len(tokens) and self.settings.fusion and (height > window or width > window):
            features = self._by_windows(tokens, hidden, mask_token)
        else:
            features = self._fused(tokens, hidden, mask_token)
        if self.settings.output == "dense":
            features = self._dense(features, tokens.memo["dense"], width)
        return features

    def _fused(self, tokens: Tokens, hidden: Tensor | None, mask_token: Tensor | None) -> Features:
        height, width = tokens.memo["grid"]
        cells, rows = height * width, len(tokens.places)
        covered = self._covered(tokens)
        row, cell = torch.nonzero(covered, as_tuple=True)
        coords = _coords(row, cell, 0, width, self.settings.patch_m)
        if not self.settings.fusion:
            mean = _means(tokens.x, tokens.coords.row * cells + _cell(tokens), rows * cells)[row * cells + cell]
            return Features(mean, coords, _means(mean, row, rows), tokens.places)
        x = tokens.x + self.positions(tokens)
        if hidden is not None and mask_token is not None:
            x = torch.where(hidden[:, None], mask_token.view(1, -1).to(x.dtype), x)
        z, slot, keep = self._packed(x, tokens.coords.row, rows)
        for block in self.blocks:
            z = block(z, None, keep)
        keys, layout, keep = self._keys(z, slot, tokens)
        place = F.pad(self._grid_positions(height, width, z.device).to(z.dtype), (0, 0, 1, 0))[None]
        if tokens.memo.get("shifted_queries"):
            place = torch.cat([place[:, :1], place[:, :-1]], 1)
        out = self.cross(keys, place, Grid(1, 1, height, width), layout, keep)
        return Features(out[:, 1:][row, cell], coords, out[:, 0], tokens.places)

    def positions(self, tokens: Tokens) -> Tensor:
        """Code of where each token is, [token, dim]."""
        height, width = tokens.memo["grid"]
        code = tokens.x.new_zeros(tokens.x.shape)
        fine = ~_context(tokens)
        code[fine] = self._grid_positions(height, width, code.device).to(code.dtype)[_cell(tokens)[fine]]
        if not fine.all() and "placeless_context" not in self.settings.quirks:
            step = UNIT_M if self.settings.metric else self.settings.patch_m
            at = (tokens.coords.at_m[~fine] - self.settings.patch_m / 2) / step
            code[~fine] = grid_sinusoid(at, self.settings.dim).to(code.dtype)
        return code

    def _grid_positions(self, height: int, width: int, device: torch.device) -> Tensor:
        step = self.settings.patch_m / UNIT_M if self.settings.metric else 1.0
        return _grid_code(height, width, step, self.settings.dim, device)

    def _packed(self, x: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Class token and tokens of each place, [place, 1 + most tokens, dim]; where each token went; which are there."""
        z, there, slot = side_by_side(x, row, rows)
        z = torch.cat([self.class_token.expand(rows, -1, -1).to(z.dtype), z], 1)
        return z, slot, None if len(row) == there.numel() else F.pad(there, (1, 0), value=True)

    def _keys(self, z: Tensor, slot: Tensor, tokens: Tokens) -> tuple[Tensor, Grid, Tensor | None]:
        """What the cross block reads: class token, context tokens, then each layer's grid of patches; and which are there."""
        height, width = tokens.memo["grid"]
        cells, rows = height * width, len(tokens.places)
        context = _context(tokens)
        # Numbers of the layers that have patches; then of the context tokens of each place.
        layer = torch.cumsum(~tokens.memo["context"].to(z.device), 0) - 1
        coarse = tokens.coords.row[context]
        most = int(torch.bincount(coarse, minlength=1).max())
        to = torch.empty_like(slot)
        to[context] = 1 + ordinal(coarse, rows)
        to[~context] = 1 + most + layer[tokens.coords.group[~context]] * cells + _cell(tokens)[~context]
        grid = Grid(1 + most, max(1, int((~tokens.memo["context"]).sum())), height, width)
        to = to + tokens.coords.row * len(grid)
        keys = z.new_zeros(rows * len(grid), z.shape[-1]).index_copy(0, to, z[:, 1:].flatten(0, 1)[slot])
        first = torch.arange(rows, device=z.device) * len(grid)
        keys = keys.index_copy(0, first, z[:, 0])
        if len(slot) == rows * (len(grid) - 1):
            return keys.view(rows, len(grid), -1), grid, None
        keep = torch.zeros(rows * len(grid), dtype=torch.bool, device=z.device)
        keep[to], keep[first] = True, True
        return keys.view(rows, len(grid), -1), grid, keep.view(rows, -1)

    def _covered(self, tokens: Tokens) -> Tensor:
        """Which patches have a token, or have their centre in the pixel of a context token: bool [row, cell]."""
        height, width = tokens.memo["grid"]
        covered = torch.zeros(len(tokens.places), height * width, dtype=torch.bool, device=tokens.x.device)
        context = _context(tokens)
        covered[tokens.coords.row[~context], _cell(tokens)[~context]] = True
        coarse = tokens.coords[context]
        if len(coarse):
            under = []
            for axis, count in enumerate((height, width)):
                centre = (torch.arange(count, device=coarse.row.device) + 0.5) * self.settings.patch_m
                under.append((centre - coarse.at_m[:, axis, None]).abs() <= coarse.size_m[:, None] / 2)
            extent = torch.tensor([(p.height_m, p.width_m) for p in tokens.places], device=coarse.row.device)
            for axis, count in enumerate((height, width)):
                start = torch.arange(count, device=coarse.row.device) * self.settings.patch_m
                under[axis] &= start < extent[coarse.row, axis, None] - 1e-3
            both = (under[0][:, :, None] & under[1][:, None, :]).flatten(1)
            token, cell = torch.nonzero(both, as_tuple=True)
            covered[coarse.row[token], cell] = True
        return covered

    def _by_windows(self, tokens: Tokens, hidden: Tensor | None, mask_token: Tensor | None) -> Features:
        """Each window of patches, with its halo, is fused as a place of its own; summaries are the mean over windows."""
        (height, width), w, h = tokens.memo["grid"], self.settings.window, self.settings.halo
        patch_m, coords = self.settings.patch_m, tokens.coords
        counts, side = (math.ceil(height / w), math.ceil(width / w)), w + 2 * h
        reach = []
        for axis in (0, 1):
            origin = (torch.arange(counts[axis], device=tokens.x.device) * w - h) * patch_m
            at, half = coords.at_m[:, axis, None], coords.size_m[:, None] / 2
            reach.append((at + half > origin + 1e-3) & (at - half < origin + side * patch_m - 1e-3))
        token, south = torch.nonzero(reach[0], as_tuple=True)
        pair, east = torch.nonzero(reach[1][token], as_tuple=True)
        token, south = token[pair], south[pair]
        # A smaller place of the batch has no windows beyond its edge, though their halo would reach it.
        own = (torch.stack([south, east], -1) * w < self._extents(tokens)[coords.row[token]]).all(-1)
        token, south, east = token[own], south[own], east[own]
        origin = torch.stack([south, east], -1) * w - h
        row = (coords.row[token] * counts[0] + south) * counts[1] + east
        used, row = torch.unique(row, return_inverse=True)
        local = replace(coords[token], row=row, at_m=coords.at_m[token] - origin * patch_m)
        some = max(1, CHUNK_ELEMENTS // (4 * self.settings.dim * side * side * max(1, len(tokens.groups))))
        parts = []
        for first in range(0, len(used), some):
            mine = (row >= first) & (row < first + some)
            rows = min(some, len(used) - first)
            piece = Tokens(
                tokens.x[token[mine]],
                replace(local[mine], row=row[mine] - first),
                tokens.groups,
                (Place(side * patch_m, side * patch_m),) * rows,
                {**tokens.memo, "grid": (side, side)},
            )
            found = self._fused(piece, None if hidden is None else hidden[token[mine]], mask_token)
            parts.append(replace(found, coords=replace(found.coords, row=found.coords.row + first)))
        features = Features(
            torch.cat([f.mean for f in parts]),
            Coords.cat([f.coords for f in parts]),
            torch.cat([f.summary for f in parts]),
            tokens.places,
        )
        own = features.coords.cells() - h
        place, window = used // (counts[0] * counts[1]), used % (counts[0] * counts[1])
        start = torch.stack([window // counts[1], window % counts[1]], -1) * w
        cell = start[features.coords.row] + own
        extent = self._extents(tokens)[place[features.coords.row]]
        core = ((own >= 0) & (own < w) & (cell < extent)).all(-1)
        cell, row = cell[core], place[features.coords.row[core]]
        out = _coords(row, cell[:, 0] * width + cell[:, 1], 0, width, patch_m)
        return Features(features.mean[core], out, _means(features.summary, place, len(tokens.places)), tokens.places)

    def _extents(self, tokens: Tokens) -> Tensor:
        """Rows and columns of patches that each place has, [place, 2]."""
        sides = [(p.height_m, p.width_m) for p in tokens.places]
        cells = [[math.ceil(m / self.settings.patch_m - 1e-4) for m in side] for side in sides]
        return torch.tensor(cells, device=tokens.x.device)

    def _dense(self, features: Features, subs: Subpatches | None, width: int) -> Features:
        """Features of sub-patches: that of the patch, and behind it their own."""
        if subs is None:
            return replace(
                features, mean=features.mean.new_zeros(0, self.dim), coords=features.coords[features.coords.row < 0]
            )
        patches = features.coords.cells()
        cells = patches[:, 0] * width + patches[:, 1]
        size = 1 + int(torch.cat([cells, subs.cell, cells.new_zeros(1)]).max())
        where = cells.new_zeros(len(features.places) * size)
        where[features.coords.row * size + cells] = torch.arange(len(cells), device=cells.device)
        patch, sub = torch.nonzero(subs.keep, as_tuple=True)
        row, cell = subs.row[patch], subs.cell[patch]
        mean = torch.cat([features.mean[where[row * size + cell]], subs.x[patch, sub]], 1)
        at = torch.stack([cell // width * subs.side + sub // subs.side, cell % width * subs.side + sub % subs.side], -1)
        columns = width * subs.side
        coords = _coords(row, at[:, 0] * columns + at[:, 1], 0, columns, subs.size_m)
        return Features(mean, coords, features.summary, features.places)

    def _initialise(self) -> None:
        """Small normal weights in blocks; those that write to the residual shrink with depth in the spatial encoder."""
        for module in self.modules():
            if isinstance(module, Block | CrossBlock):
                for layer in module.modules():
                    if isinstance(layer, nn.Linear):
                        nn.init.trunc_normal_(layer.weight, std=0.02)
                        nn.init.zeros_(layer.bias)
                if module.attn.relative is not None:
                    nn.init.trunc_normal_(module.attn.relative.table, std=0.02)
        if self.spatial is not None:
            for number, block in enumerate(cast(list[Block], list(self.spatial.blocks)), start=1):
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.data.div_(math.sqrt(2.0 * number))


def _series(row: Tensor, seen: Tensor) -> Tensor:
    """Number of the series that each seen sub-patch of each observation belongs to: row x sub-patches + sub-patch."""
    number = row[:, None] * seen.shape[1] + torch.arange(seen.shape[1], device=row.device)
    return number.flatten() if seen.all() else number[seen]


def _context(tokens: Tokens) -> Tensor:
    """Which tokens are context rather than patches, bool [token]."""
    kinds = tokens.memo["context"].to(tokens.x.device)
    return kinds[tokens.coords.group] if len(kinds) else torch.zeros(0, dtype=torch.bool, device=tokens.x.device)


def _cell(tokens: Tokens) -> Tensor:
    cells = tokens.coords.cells()
    return cells[:, 0] * tokens.memo["grid"][1] + cells[:, 1]


def _coords(row: Tensor, cell: Tensor, group: int, width: int, size_m: float) -> Coords:
    at_m = (torch.stack([cell // width, cell % width], -1) + 0.5) * size_m
    always = torch.tensor(ALWAYS, dtype=torch.float64, device=row.device).expand(len(row), 2)
    return Coords(row, at_m, torch.full((len(row),), size_m, device=row.device), always, torch.full_like(row, group))


def _means(x: Tensor, index: Tensor, count: int) -> Tensor:
    """Mean of the rows of each index; 0 where there are none."""
    total = x.new_zeros(count, x.shape[1]).index_add(0, index, x)
    return total / torch.bincount(index, minlength=count).clamp(min=1)[:, None].to(x.dtype)


@lru_cache(maxsize=64)
def _grid_code(height: int, width: int, step: float, dim: int, device: torch.device) -> Tensor:
    """Codes of the cells of a grid, row by row, ``step`` apart: [height x width, dim]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return grid_sinusoid(torch.stack([y, x], -1).reshape(-1, 2) * step, dim).to(device)


def nested(side: int, sub_m: float) -> Tensor | None:
    """For each slot of the published order, the sub-patch (counted row by row) that stands there: squares of 10 m row by row,
    and within each its sub-patches. None where that is the same."""
    inner = round(UNIT_M / sub_m) if sub_m < UNIT_M else 1
    if inner == 1 or side <= inner or side % inner:
        return None
    cells = torch.arange(side * side).view(side // inner, inner, side // inner, inner)
    return cells.permute(0, 2, 1, 3).flatten()


# --- variants, and weights under the names of the published code ---------------------------------------------------------


def _image(sensor: str, bands: tuple[str, ...], gsd_m: float, pixels: int) -> dict[str, Any]:
    return {"sensor": sensor, "bands": bands, "gsd_m": gsd_m, "projector": "image", "pixels": pixels}


def _dated(sensor: str, bands: tuple[str, ...], gsd_m: float, **changes: Any) -> dict[str, Any]:
    return {"sensor": sensor, "bands": bands, "gsd_m": gsd_m, "projector": "series", **changes}


_S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
_L8 = ("B8", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11")
MODALITIES: dict[str, dict[str, Any]] = {
    "aerial": _image("treesatai-aerial", ("nir", "red", "green", "blue"), 0.2, 10),
    "aerial-flair": _image("flair-aerial", ("red", "green", "blue", "nir", "elevation"), 0.2, 10),
    "spot": _image("spot-6-7", ("red", "green", "blue"), 1.0, 10),
    "naip": _image("naip", ("red", "green", "blue", "nir"), 1.25, 8),
    "s2": _dated("sentinel-2-l2a", _S2, 10.0, normalise_series=True),
    "s1-asc": _dated("sentinel-1-grd", ("VV", "VH"), 10.0),
    "s1": _dated("sentinel-1-grd", ("VV", "VH", "ratio"), 10.0),
    "l8": _dated("landsat-8-oli-l1", _L8, 10.0, period_days=366.0),
    "l7": _dated("landsat-7-etm", ("B1", "B2", "B3", "B4", "B5", "B7"), 30.0),
    "alos": _dated("alos-2-palsar-2", ("HH", "HV", "ratio"), 30.0),
    "modis": _dated("modis", ("B1", "B2", "B3", "B4", "B5", "B6", "B7"), 250.0),
}
"""The 11 layers of the published model: bands in its order. All bands of l8 are resampled to 10 m, as its training data were."""

TREESAT_STATISTICS: dict[str, dict[str, tuple[float, ...]]] = {
    "aerial": {"mean": (150.8935, 92.7139, 84.8544, 80.7042), "std": (36.7649, 27.6250, 22.4795, 26.7337)},
    "s2": {
        "mean": (0.430433, 0.415927, 0.405778, 0.432895, 0.457122, 0.464487, 0.483725, 0.470026, 0.282326, 0.231997),
        "std": (0.353800, 0.332423, 0.327007, 0.325053, 0.289740, 0.275450, 0.282152, 0.262595, 0.173156, 0.154930),
    },
}
"""Of TreeSatAI-TS, the only set whose statistics the authors published (in the notebook of the repository), in the units of
the sensors: digital numbers, and reflectance (theirs over 10,000)."""

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"dim": 768, "depth": 6, "heads": 12, "modalities": MODALITIES},
    "small": {"dim": 512, "depth": 4, "heads": 8, "modalities": MODALITIES},
    "tiny": {"dim": 256, "depth": 2, "heads": 4, "modalities": MODALITIES},
    "nano": {
        "dim": 64,
        "depth": 2,
        "heads": 4,
        "patch_m": 20.0,
        "modalities": {
            name: {**MODALITIES[name], "mean": (0.0,) * count, "std": (1.0,) * count}
            for name, count in {"spot": 3, "s2": 10, "s1": 3, "l7": 6}.items()
        },
    },
}
"""Sizes as in the published model's torch.hub entry, of which ``base`` alone has weights; ``nano`` is for tests."""

PUBLISHED: dict[str, Any] = {"quirks": ("first_head_bias", "nested_subpatches", "padded", "placeless_context")}
"""What the config of converted weights says beside the variant. Whether they were trained with ``across_heads`` too is not known."""


def build(variant: str = "base", **changes: Any) -> AnySat:
    """A fresh AnySat: one of :data:`VARIANTS`, with fields of :class:`Config` changed. ``modalities`` may be a list of names of
    :data:`MODALITIES`."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"anysat has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    chosen = changes.get("modalities")
    if isinstance(chosen, list | tuple):
        for name in chosen:
            if name not in MODALITIES:
                raise LookupError(f"anysat has no modality {name!r}. {suggest(name, MODALITIES)}")
        changes["modalities"] = {name: MODALITIES[name] for name in chosen}
    return from_config({**VARIANTS.get(variant, {}), **changes})


def layer(wanted: Input, patch_m: float = 40.0, **_: Any) -> dict[str, Any]:
    """How a layer of a dataset becomes sub-patches, for ``modalities: data``: series pixel by pixel, undated images by squares of pixels of
    which a patch has at least two along each side."""
    if wanted.dated:
        return {"projector": "series"}
    side = round(patch_m / wanted.gsd_m)
    return {
        "projector": "image",
        "pixels": next(n for n in (10, 5, 4, 2, 1) if n == 1 or (side % n == 0 and side >= 2 * n)),
    }


def from_config(config: Mapping[str, Any]) -> AnySat:
    return AnySat(Config.model_validate(dict(config)))


DROPPED = {r"\.attention_heads\.fc1_k\.bias$": "cancels in the softmax over dates"}
"""Keys of published weights that have no counterpart here, by pattern, and why."""


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published ``AnyModule`` under the names used here; ``config`` gives the number of blocks, behind which the
    cross block stands."""
    depth = Config.model_validate(dict(config)).depth
    kept = (key for key in state if not any(re.search(pattern, key) for pattern in DROPPED))
    return {_rename(key, depth): state[key] for key in kept}


def _rename(key: str, depth: int) -> str:
    renames = [
        (r"^projector_([^.]+)\.patch_embed\.weight$", r"projectors.\1.embed.weight"),
        (r"^projector_([^.]+)\.patch_embed\.mlp\.", r"projectors.\1.out."),
        (r"^projector_([^.]+)\.patch_embed\.", r"projectors.\1."),
        (r"^projector_([^.]+)\.", r"projectors.\1."),
        (r"\.pad_parameter$", ".pad"),
        (r"\.attention_heads\.Q$", ".query"),
        (r"\.attention_heads\.fc1_k\.", ".key."),
        (r"\.inconv\.", ".observation."),
        (r"^spatial_encoder\.predictor_", "spatial."),
        (r"^spatial_encoder\.", "spatial."),
        (rf"^blocks\.{depth}\.", "cross."),
        (r"^cross\.attn\.q_learned$", "cross.attn.query"),
        (r"^cross\.attn\.wk\.", "cross.attn.key."),
        (r"^cross\.attn\.wv\.", "cross.attn.value."),
        (r"\.rpe_k\.lookup_table_weight$", ".relative.table"),
        (r"\bcls_token$", "class_token"),
    ]
    for pattern, new in renames:
        key = re.sub(pattern, new, key)
    return key

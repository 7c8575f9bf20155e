"""A simpler OmniSat: known networks per layer, one space shared by all, and cross-attention between what lies at one cell.

Each layer has a network of its own: a series a U-TAE (Sainte Fare Garnot & Landrieu, ICCV 2021), an image a residual network (He et al.
2016). Their maps are brought to one grid of tokens, and a head per layer projects them into a space that all layers share, in which tokens of
the same ground can be contrasted (as in CLIP, Radford et al. 2021, and OmniSat, Astruc et al. 2024). At each cell, one learned query reads the
tokens that are there, whichever these are. Context comes from the networks alone: fusion does not look beyond a cell.

A layer that a place lacks, or that observed nothing at a cell, gives no token there. Unlike OmniSat there is no transformer over patches, no
position, and no reconstruction; features are per pixel of a series and not per patch. Invalid pixels are the mean of the data to the
convolutions. Not a published model: there are no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.models.utae import S1, S2, Modality, Ready, prepared
from everysat.nn.attention import CrossBlock
from everysat.nn.cells import cells_at, joined, refuse_uneven
from everysat.nn.image_unet import Residual
from everysat.nn.position import Grid
from everysat.nn.resample import axis_weights, resample_valid
from everysat.nn.series_unet import SeriesUnet, Sizes
from everysat.types import Batch, Coords, Encoder, Features, Input, Place, Raster, Tokens

AT_ONCE = 32768
"""Cells that are fused together; attention on a GPU takes no more than 65535 sequences."""


class Config(Sizes):
    """Layers and sizes of a :class:`SimpleSat`; ``widths`` to ``dropout`` are of U-TAE.

    Attributes:
        modalities: ``dated`` layers go through a U-TAE, others through a residual network.
        token_m: side of a token, metres. Maps of finer layers are averaged over it, those of coarser ones interpolated.
        dim, fusion_heads: of the shared space and of the attention between layers.
        image_widths, image_blocks: channels of the first convolution and of the stages behind it, and residual blocks of each stage. The first
            ones halve the resolution, as long as pixels stay finer than a token.
        tile: tokens along the squares that maps of large places are made of.
    """

    modalities: dict[str, Modality]
    token_m: float = Field(default=10.0, gt=0)
    dim: int = 128
    fusion_heads: int = 8
    image_widths: tuple[int, ...] = (64, 64, 128, 256)
    image_blocks: tuple[int, ...] = (2, 2, 2)
    tile: int = 128

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        if not self.modalities:
            raise ValueError("modalities is empty: name at least one layer")
        if self.dim % self.fusion_heads:
            raise ValueError(f"dim={self.dim} must be divisible by fusion_heads={self.fusion_heads}")
        if len(self.image_widths) != len(self.image_blocks) + 1:
            raise ValueError(f"image_widths={self.image_widths} must be one more than image_blocks={self.image_blocks}")
        return self

    @property
    def chip_m(self) -> float:
        """Side of the squares that maps of large places are made of, metres."""
        return self.token_m * self.tile


class ImageNet(nn.Module):
    """A residual network that keeps its map: a convolution of 7 x 7 pixels, then stages, of which the first ``halvings`` parts
    halve the resolution."""

    def __init__(self, bands: int, config: Config, halvings: int) -> None:
        super().__init__()
        widths, blocks = config.image_widths, config.image_blocks
        strides = [2 if i < halvings else 1 for i in range(len(widths))]
        self.stride = math.prod(strides)
        self.conv = nn.Conv2d(bands, widths[0], 7, stride=strides[0], padding=3, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(
                Residual(widths[i], widths[i + 1], strides[i + 1]),
                *(Residual(widths[i + 1], widths[i + 1], 1) for _ in range(count - 1)),
            )
            for i, count in enumerate(blocks)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [obs, channel, y, x] of images [obs, band, y, x], at ``stride`` of their pixels, and in which cells anything was ``seen``
        [obs, y, x]."""
        pad = (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride)
        x = F.relu(self.norm(self.conv(F.pad(x, pad))))
        for stage in self.stages:
            x = stage(x)
        there = F.max_pool2d(F.pad(seen, pad)[:, None].to(x.dtype), self.stride)[:, 0] > 0
        return x, there


class SimpleSat(Encoder):
    """See the module's text. ``tokenize`` gives one token per place, layer and cell that it observed, in the shared space; ``forward``
    fuses the tokens of each cell, whichever are left."""

    family = "simplesat"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = config.dim
        self.inputs = {name: modality.input(dated=modality.dated) for name, modality in config.modalities.items()}
        self.projectors, self.shared = nn.ModuleDict(), nn.ModuleDict()
        for name, modality in config.modalities.items():
            bands, width = len(modality.bands), config.out_widths[0] if modality.dated else config.image_widths[-1]
            if modality.dated:
                self.projectors[name] = SeriesUnet(bands, config, modality.period_days)
            else:
                finer = max(1.0, config.token_m / modality.gsd_m)
                self.projectors[name] = ImageNet(bands, config, math.floor(math.log2(finer) + 1e-6))
            self.shared[name] = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim)
            )
        self.code = nn.Parameter(torch.empty(len(self.inputs), config.dim))
        self.cross = CrossBlock(config.dim, config.fusion_heads, relative=False)
        for learned in (self.code, self.cross.attn.query):
            nn.init.trunc_normal_(learned, std=0.02)

    def tokenize(self, batch: Batch) -> Tokens:
        groups = tuple(name for name in self.inputs if name in batch.layers)
        refuse_uneven(batch, groups, training=self.training)
        nowhere = torch.zeros(0, dtype=torch.long, device=self.code.device)
        parts = [(self.code.new_zeros(0, self.dim), cells_at(nowhere, nowhere, nowhere, self.settings.token_m, 0))]
        for group, name in enumerate(groups):
            raster = self.inputs[name].fit(batch.raster(name), name)
            for size_m in dict.fromkeys((p.height_m, p.width_m) for p in batch.places):
                found = self._found(name, raster, batch.places, size_m)
                if found is not None:
                    x, seen, places = found
                    row, down, across = torch.nonzero(seen, as_tuple=True)
                    coords = cells_at(places[row], down, across, self.settings.token_m, group)
                    parts.append((self.shared[name](x.permute(0, 2, 3, 1)[seen]), coords))
        return Tokens(torch.cat([x for x, _ in parts]), Coords.cat([c for _, c in parts]), groups, batch.places)

    def _found(
        self, name: str, raster: Raster, places: tuple[Place, ...], size_m: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What the network of a layer makes of all places of that size, on the grid of tokens: [n, channel, y, x], which cells it observed
        [n, y, x], and the numbers of the n places; None if there is nothing."""
        modality = self.settings.modalities[name]
        ready = prepared(name, modality, self.inputs[name], raster, places, size_m, self.settings)
        if ready is None:
            return None
        if modality.dated:
            network = cast(SeriesUnet, self.projectors[name])
            deep, _, skips = network.encoded(ready.values, ready.seen, ready.row, ready.day, len(ready.places))
            maps = network.decoded(deep, skips)[..., : ready.size[0], : ready.size[1]]
            return *self._on_grid(maps, ready.ever, modality.gsd_m, size_m), ready.places
        image = cast(ImageNet, self.projectors[name])
        maps, seen = image(ready.values, ready.seen)
        maps, seen = self._on_grid(maps, seen, modality.gsd_m * image.stride, size_m)
        return *_mean(maps, seen, ready), ready.places

    def _on_grid(
        self, maps: Tensor, seen: Tensor, pixel_m: float, size_m: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Maps of pixels of ``pixel_m`` as means of what was ``seen`` in each cell of the grid of tokens."""
        side = self.settings.token_m
        cells = [math.ceil(m / side - 1e-4) for m in size_m]
        axes = [axis_weights(*n, pixel_m / side, True) for n in zip(maps.shape[2:], cells, strict=True)]
        values, there = resample_valid(maps, seen[:, None], *axes)
        return values, there[:, 0]

    def forward(self, tokens: Tokens) -> Features:
        """One feature per place and cell that any layer observed; the summary of a place is their mean."""
        coords = tokens.coords
        at = coords.cells()
        height, width = (at.amax(0) + 1).tolist() if len(at) else (1, 1)
        keys, where = torch.unique((coords.row * height + at[:, 0]) * width + at[:, 1], return_inverse=True)
        order = torch.tensor([list(self.inputs).index(name) for name in tokens.groups], device=at.device).long()
        slot = where * len(self.inputs) + order[coords.group]
        size = len(keys) * len(self.inputs)
        z = tokens.x.new_zeros(size, self.dim).index_copy(0, slot, tokens.x + self.code[order[coords.group]])
        keep = torch.zeros(size, dtype=torch.bool, device=z.device).index_fill_(0, slot, True)
        shape = len(keys), len(self.inputs)
        cells = cells_at(keys // (height * width), keys // width % height, keys % width, self.settings.token_m, 0)
        return joined([(self._fused(z.view(*shape, self.dim), keep.view(shape)), cells)], tokens, self.dim)

    def _fused(self, z: Tensor, keep: Tensor) -> Tensor:
        """One vector for each cell [cell, dim], from its tokens [cell, layer, dim] of which some are there [cell, layer]."""
        query, keys = Grid(1, 0, 0, 0), Grid(z.shape[1], 0, 0, 0)
        parts = zip(z.split(AT_ONCE), keep.split(AT_ONCE), strict=True)
        return torch.cat(
            [self.cross(a, torch.zeros_like(self.code[:1, None, :]), query, keys, b)[:, 0] for a, b in parts]
        )


def _mean(maps: Tensor, seen: Tensor, ready: Ready) -> tuple[Tensor, Tensor]:
    """Means over the images of a place, of those that observed a cell: [n, channel, y, x], and where there is any [n, y, x]."""
    weight = seen[:, None].to(maps.dtype)
    total = maps.new_zeros(len(ready.places), *maps.shape[1:]).index_add(0, ready.row, maps * weight)
    count = maps.new_zeros(len(ready.places), 1, *maps.shape[2:]).index_add(0, ready.row, weight)
    return total / count.clamp(min=1), count[:, 0] > 0


# --- variants ------------------------------------------------------------------------------------------------------------

_PASTIS_S1 = {**S1, "bands": ("VV", "VH", "ratio")}
_SPOT = {"sensor": "spot-6-7", "bands": ("red", "green", "blue"), "gsd_m": 1.0, "dated": False}
PASTIS: dict[str, dict[str, Any]] = {"spot": _SPOT, "s2": S2, "s1-asc": _PASTIS_S1, "s1-des": _PASTIS_S1}
"""Layers of PASTIS-HD."""

_NARROW: dict[str, Any] = {"widths": (32, 32, 64), "out_widths": (32, 32, 64), "heads": 8, "time_dim": 64}
SMALL: dict[str, Any] = {**_NARROW, "dim": 64, "image_widths": (16, 32, 64), "image_blocks": (1, 1)}
NANO: dict[str, Any] = {
    "widths": (8, 16), "out_widths": (8, 16), "heads": 4, "time_dim": 16, "key_dim": 2,
    "dim": 16, "fusion_heads": 2, "image_widths": (4, 8), "image_blocks": (1,), "tile": 8,
}  # fmt: skip


def _standard(modality: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    count = len(modality["bands"])
    return {**modality, "mean": (0.0,) * count, "std": (1.0,) * count, **changes}


VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"modalities": PASTIS},
    "small": {"modalities": PASTIS, **SMALL},
    "nano": {
        "modalities": {
            "s2": _standard(S2),
            "s1": _standard(S1, gsd_m=20.0),
            "spot": _standard(_SPOT, gsd_m=2.5),
        },
        **NANO,
    },
}
"""``base`` has U-TAE's published sizes and a network of the depth of ResNet-18; ``nano`` is for tests."""


def build(variant: str = "base", **changes: Any) -> SimpleSat:
    """A fresh model: one of :data:`VARIANTS`, with fields of :class:`Config` changed. Without a variant, give modalities."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"simplesat has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def layer(wanted: Input, **_: Any) -> dict[str, Any]:
    """How a layer of a dataset is read, for ``modalities: data``."""
    return {"dated": wanted.dated}


def from_config(config: Mapping[str, Any]) -> SimpleSat:
    return SimpleSat(Config.model_validate(dict(config)))

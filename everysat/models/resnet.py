"""ResNet-18 (He et al., CVPR 2016) for one layer of single-date images of any bands: DisCoM-KD and SHeDD train it from scratch on small chips.

A first convolution, which fits the bands, then four stages of residual blocks; the last map are the tokens, their mean is the summary. Small chips keep their
resolution through the first convolution (3 x 3 pixels, ``stem="small"``); large images are halved there and again by a maximum over 3 x 3 (7 x 7 pixels,
``stem="large"``, as published). Invalid pixels are the mean of the data to the convolutions; cells of the map below which nothing was observed are left out
of the mean. Several images of one place are averaged. There are no published weights here: those of photographs have red, green and blue alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.models.utae import Modality, prepared
from everysat.nn.cells import cells_at, joined, refuse_uneven
from everysat.nn.image_unet import Residual
from everysat.types import Batch, Coords, Encoder, Features, Input, Tokens


class Image(Modality):
    """The input layer: an image, or several whose order in time does not matter."""

    dated: bool = False


class Config(BaseModel):
    """Sizes of a :class:`ResNet`.

    Attributes:
        modalities: the one layer.
        width: channels of the first stage; the others have twice as many each, features 8 times as many (512 of 64).
        blocks: residual blocks of each stage.
        stem: ``small`` for chips of up to about 100 pixels, a token is then 8 pixels wide; ``large``, a token is then 32 pixels wide.
        tile: tokens along the squares that maps of large places are made of.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modalities: dict[str, Image]
    width: int = Field(default=64, ge=1)
    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    stem: Literal["small", "large"] = "small"
    tile: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _one_layer(self) -> Config:
        if len(self.modalities) != 1:
            raise ValueError(
                f"modalities lists {len(self.modalities)} layers ({', '.join(self.modalities) or 'none'}); this network reads one. "
                "Name that one, or take a model of several layers, such as simplesat"
            )
        if min(self.blocks) < 1:
            raise ValueError(f"blocks={self.blocks}: every stage needs at least one block")
        return self

    @property
    def stride(self) -> int:
        """Pixels along a token."""
        return 8 if self.stem == "small" else 32

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        return self.stride * next(iter(self.modalities.values())).gsd_m

    @property
    def chip_m(self) -> float:
        """Side of the squares that maps of large places are made of, metres."""
        return self.token_m * self.tile


class ResNet(Encoder):
    """See the module's text. ``tokenize`` runs the network; ``forward`` averages."""

    family = "resnet"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = 8 * config.width
        self.inputs: dict[str, Input] = {name: m.input(dated=False) for name, m in config.modalities.items()}
        (self.layer,) = config.modalities
        bands, small = len(config.modalities[self.layer].bands), config.stem == "small"
        size, stride = (3, 1) if small else (7, 2)
        self.conv = nn.Conv2d(bands, config.width, size, stride=stride, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(config.width)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        widths = [config.width * 2**i for i in range(4)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                Residual(widths[max(i - 1, 0)], widths[i], 1 if i == 0 else 2),
                *(Residual(widths[i], widths[i], 1) for _ in range(count - 1)),
            )
            for i, count in enumerate(config.blocks)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per place and cell of the last map below which any pixel was observed."""
        groups = tuple(name for name in self.inputs if name in batch.layers)
        refuse_uneven(batch, groups, training=self.training)
        nowhere = torch.zeros(0, dtype=torch.long, device=self.conv.weight.device)
        side = self.settings.token_m
        parts = [(self.conv.weight.new_zeros(0, self.dim), cells_at(nowhere, nowhere, nowhere, side, 0))]
        for size_m in dict.fromkeys((p.height_m, p.width_m) for p in batch.places) if groups else ():
            modality, wanted = self.settings.modalities[self.layer], self.inputs[self.layer]
            raster = wanted.fit(batch.raster(self.layer), self.layer)
            sizes: Any = self.settings  # of which the stride alone is read
            ready = prepared(self.layer, modality, wanted, raster, batch.places, size_m, sizes)
            if ready is not None:
                seen = F.max_pool2d(ready.seen[:, None].float(), self.settings.stride)
                x, there = _mean(self._map(ready.values), seen, ready.row, len(ready.places))
                row, y, across = torch.nonzero(there, as_tuple=True)
                parts.append((x.permute(0, 2, 3, 1)[there], cells_at(ready.places[row], y, across, side, 0)))
        return Tokens(torch.cat([x for x, _ in parts]), Coords.cat([c for _, c in parts]), groups, batch.places)

    def _map(self, x: Tensor) -> Tensor:
        """[obs, dim, y, x], a cell of ``stride`` pixels, of images [obs, band, y, x]."""
        x = self.pool(F.relu(self.norm(self.conv(x))))
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, tokens: Tokens) -> Features:
        """One feature per place and cell, and their mean as summary."""
        return joined([(tokens.x, tokens.coords)], tokens, self.dim)


def _mean(maps: Tensor, seen: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Means over the images of a place, of those that observed a cell: [row, channel, y, x], and where there is any [row, y, x].
    ``seen`` [obs, 1, y, x] is 0 or 1."""
    weight = seen.to(maps.dtype)
    total = maps.new_zeros(rows, *maps.shape[1:]).index_add(0, row, maps * weight)
    count = weight.new_zeros(rows, *weight.shape[1:]).index_add(0, row, weight)
    return total / count.clamp(min=1), count[:, 0] > 0


# --- variants ------------------------------------------------------------------------------------------------------------

_IMAGE: dict[str, Any] = {"sensor": "rgb-image", "bands": ("red", "green", "blue"), "gsd_m": 1.0}
_S2: dict[str, Any] = {"sensor": "sentinel-2-l2a", "bands": ("B02", "B03", "B04", "B08"), "gsd_m": 10.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "small": {"modalities": {"rgb": _IMAGE}},
    "large": {"modalities": {"rgb": _IMAGE}, "stem": "large"},
    "nano": {
        "modalities": {"s2": {**_S2, "mean": (0.0,) * 4, "std": (1.0,) * 4}},
        "width": 4,
        "blocks": (1, 1, 1, 1),
        "tile": 2,
    },
}
"""``small`` for chips, ``large`` with the published first layers; ``nano`` is for tests."""


def build(variant: str = "small", **changes: Any) -> ResNet:
    """A fresh model: one of :data:`VARIANTS`, with fields of :class:`Config` changed. Without a variant, give modalities."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"resnet has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def layer(wanted: Input, **_: Any) -> dict[str, Any]:
    """How a layer of a dataset is read, for ``modalities: data``: its dates have no effect."""
    return {}


def from_config(config: Mapping[str, Any]) -> ResNet:
    return ResNet(Config.model_validate(dict(config)))

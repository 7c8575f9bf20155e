"""U-TAE (Sainte Fare Garnot & Landrieu, ICCV 2021, arXiv 2107.07933): a U-Net over the images of a series, one feature per pixel.

Each date goes down the convolutional encoder alone. At the lowest resolution L-TAE makes one map of all dates; its attention, one
mask per head and date, is resampled to the higher levels, where it weights the maps of the dates (each head its share of the channels) into
the one that the decoder takes up. Every layer has a network of its own; several are fused late, by concatenation of their features on
the grid of the finest. A layer that a place lacks counts as zeros.

Invalid pixels are the mean of the data (0 after normalisation) to the convolutions, as are those that fill up a place to whole cells at the
south and east. A date takes part in the attention of a cell of the lowest level if any pixel of the cell is valid; a date without any
valid pixel is left out. Places of different sizes are computed apart, so that the edge of each is its own.

Source of facts: github.com/VSainteuf/utae-paps (MIT). Its ``out_conv``, which makes classes of features, is left to the task's head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.cells import cells_at, joined, refuse_without_statistics
from everysat.nn.inputs import InputConfig
from everysat.nn.position import day_number
from everysat.nn.temporal import Ltae
from everysat.types import Batch, ContractError, Coords, Encoder, Features, Place, Raster, Tokens


class Modality(InputConfig):
    """One input layer. A layer that is not ``dated`` is an image, or several whose order in time does not matter."""

    period_days: float = 1000.0
    dated: bool = True


class Sizes(BaseModel):
    """Channels from the highest to the lowest resolution, of encoder (``widths``) and decoder (``out_widths``), and of L-TAE."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    widths: tuple[int, ...] = (64, 64, 64, 128)
    out_widths: tuple[int, ...] = (32, 32, 64, 128)
    heads: int = 16
    time_dim: int = 256
    key_dim: int = 4
    dropout: float = 0.2

    @model_validator(mode="after")
    def _widths_agree(self) -> Sizes:
        if len(self.widths) < 2 or len(self.widths) != len(self.out_widths) or self.widths[-1] != self.out_widths[-1]:
            raise ValueError(
                f"widths={self.widths} and out_widths={self.out_widths} must have one length, two or more, and end alike"
            )
        for name, numbers in {"widths": self.widths, "time_dim": (self.time_dim,)}.items():
            if any(n % self.heads or n % 4 for n in numbers):
                raise ValueError(f"{name}={numbers} must be divisible by heads={self.heads} and by 4")
        return self

    @property
    def stride(self) -> int:
        """Pixels along a cell of the lowest level."""
        return 2 ** (len(self.widths) - 1)


class Config(Sizes):
    """Layers and sizes of a :class:`Utae`. ``tile``: pixels of the finest layer along the squares that maps of large places are
    made of; the published model was trained on 128."""

    modalities: dict[str, Modality]
    tile: int = 128

    @model_validator(mode="after")
    def _some_layer(self) -> Config:
        if not self.modalities:
            raise ValueError("modalities is empty: name at least one layer")
        return self

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres: a pixel of the finest layer."""
        return min(modality.gsd_m for modality in self.modalities.values())

    @property
    def chip_m(self) -> float:
        return self.token_m * self.tile


def convolution(before: int, after: int, norm: str, *, side: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution with reflected edges, norm (``group``: 4 groups; ``batch``), ReLU."""
    normed = nn.GroupNorm(4, after) if norm == "group" else nn.BatchNorm2d(after)
    conv = nn.Conv2d(before, after, side, stride=stride, padding=1, padding_mode="reflect")
    return nn.Sequential(conv, normed, nn.ReLU())


class Down(nn.Module):
    """Half the resolution, then a convolution and one with a residual."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.down = convolution(before, before, "group", side=4, stride=2)
        self.conv1, self.conv2 = convolution(before, after, "group"), convolution(after, after, "group")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.down(x))
        return x + self.conv2(x)


class Up(nn.Module):
    """Twice the resolution; the map of the encoder behind it; then a convolution and one with a residual."""

    def __init__(self, before: int, after: int, skipped: int) -> None:
        super().__init__()
        self.skip = nn.Sequential(nn.Conv2d(skipped, skipped, 1), nn.BatchNorm2d(skipped), nn.ReLU())
        raised = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
        self.up = nn.Sequential(raised, nn.BatchNorm2d(after), nn.ReLU())
        self.conv1, self.conv2 = convolution(after + skipped, after, "batch"), convolution(after, after, "batch")

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.conv1(torch.cat([self.up(x), self.skip(skip)], 1))
        return x + self.conv2(x)


class SeriesUnet(nn.Module):
    """The network of one layer: :meth:`encoded`, then :meth:`decoded`."""

    def __init__(self, bands: int, sizes: Sizes, period_days: float) -> None:
        super().__init__()
        widths, out = sizes.widths, sizes.out_widths
        self.in_conv = nn.Sequential(
            *convolution(bands, widths[0], "group"), *convolution(widths[0], widths[0], "group")
        )
        levels = range(len(widths) - 1)
        self.down = nn.ModuleList(Down(widths[i], widths[i + 1]) for i in levels)
        self.up = nn.ModuleList(Up(out[i + 1], out[i], widths[i]) for i in reversed(levels))
        self.temporal = Ltae(
            widths[-1],
            (sizes.time_dim,),
            (widths[-1],),
            heads=sizes.heads,
            key_dim=sizes.key_dim,
            period=period_days,
            dropout=sizes.dropout,
            linear=True,
        )

    def encoded(
        self, x: Tensor, valid: Tensor, row: Tensor, day: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images ``x`` [obs, band, y, x] of ``rows`` series, ``valid`` [obs, y, x], to one map each.

        Returns:
            vectors [row, y, x, channel] of the cells of the lowest level, which of them any date observed, bool [row, y, x], and the
            maps [row, channel, y, x] of the levels above, from the lowest of these to the highest resolution.
        """
        maps = [self.in_conv(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        deep = maps.pop().permute(0, 2, 3, 1)
        height, width = deep.shape[1:3]
        side = x.shape[2] // height
        seen = F.max_pool2d(valid[:, None].to(x.dtype), side)[:, 0] > 0
        obs, y, x_ = torch.nonzero(seen, as_tuple=True)
        present, series = torch.unique((row[obs] * height + y) * width + x_, return_inverse=True)
        vectors, attention = self.temporal.by_head(deep[seen], series, day[obs], len(present))
        deep = vectors.new_zeros(rows * height * width, vectors.shape[1]).index_copy(0, present, vectors)
        known = torch.zeros(len(deep), dtype=torch.bool, device=x.device).index_fill_(0, present, True)
        mask = attention.new_zeros(*seen.shape, attention.shape[1]).index_put((obs, y, x_), attention)
        skips = [_weighted(m, mask.permute(0, 3, 1, 2), row, rows) for m in reversed(maps)]
        return deep.view(rows, height, width, -1), known.view(rows, height, width), skips

    def decoded(self, deep: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """The map [row, channel, y, x] of the highest resolution, from vectors [row, y, x, channel] of the lowest."""
        x = deep.permute(0, 3, 1, 2)
        for up, skip in zip(self.up, skips, strict=True):
            x = up(x, skip)
        return x


def _weighted(maps: Tensor, mask: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sums over dates of ``maps`` [obs, channel, y, x] by ``mask`` [obs, head, y, x], of which each head weights its channels."""
    mask = F.interpolate(mask, size=maps.shape[-2:], mode="bilinear", align_corners=False)
    shares = rearrange(maps, "o (h c) y x -> o h c y x", h=mask.shape[1]) * mask[:, :, None]
    return maps.new_zeros(rows, *maps.shape[1:]).index_add(0, row, shares.flatten(1, 2).to(maps.dtype))


@dataclass(frozen=True)
class Piece:
    """A layer of the places of one size: ``places`` int64 [n] (index into the batch), ``size`` in pixels, which pixels were
    observed at any date [n, y, x], cells along the lowest level, and the maps that the decoder takes up."""

    name: str
    places: Tensor
    size: tuple[int, int]
    seen: Tensor
    cells: tuple[int, int]
    skips: list[Tensor]


class Utae(Encoder):
    """See the module's text. ``tokenize`` gives one token per place, layer and cell of the lowest level; ``forward`` decodes."""

    family = "utae"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = config.out_widths[0] * len(config.modalities)
        self.inputs = {name: modality.input(dated=modality.dated) for name, modality in config.modalities.items()}
        self.projectors = nn.ModuleDict(
            {name: SeriesUnet(len(m.bands), config, m.period_days) for name, m in config.modalities.items()}
        )

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per place, layer and cell of the lowest level that any date observed. ``memo["pieces"]`` has what the decoder
        needs beside them."""
        groups = tuple(name for name in self.inputs if name in batch.layers)
        parts: list[tuple[Tensor, Coords]] = []
        pieces = []
        for group, name in enumerate(groups):
            raster = self.inputs[name].fit(batch.raster(name), name)
            for size_m in dict.fromkeys((p.height_m, p.width_m) for p in batch.places):
                found = self._encoded(name, raster, batch.places, size_m)
                if found is not None:
                    piece, deep, known = found
                    row, y, x = torch.nonzero(known, as_tuple=True)
                    side = raster.gsd_m * self.settings.stride
                    parts.append((deep[known], cells_at(piece.places[row], y, x, side, group)))
                    pieces.append(piece)
        if not parts:
            device = next(self.parameters()).device
            nowhere = torch.zeros(0, dtype=torch.long, device=device)
            nothing = torch.zeros(0, self.settings.widths[-1], device=device)
            parts = [(nothing, cells_at(nowhere, nowhere, nowhere, 1.0, 0))]
        coords = Coords.cat([c for _, c in parts])
        return Tokens(torch.cat([x for x, _ in parts]), coords, groups, batch.places, {"pieces": pieces})

    def _encoded(
        self, name: str, raster: Raster, places: tuple[Place, ...], size_m: tuple[float, float]
    ) -> tuple[Piece, Tensor, Tensor] | None:
        """The observations of a layer of all places of that size; None if there are none."""
        modality, stride = self.settings.modalities[name], self.settings.stride
        refuse_without_statistics(name, modality)
        alike = torch.tensor([(p.height_m, p.width_m) == size_m for p in places], device=raster.row.device)
        raster = raster.obs(alike[raster.row] & raster.valid.flatten(1).any(1))
        if len(raster.row) == 0:
            return None
        height, width = (math.ceil(m / raster.gsd_m - 1e-4) for m in size_m)
        # Two cells at least: edges are reflected, which one cell does not suffice for.
        full = [max(2 * stride, math.ceil(n / stride) * stride) for n in (height, width)]
        raster = raster._padded(*(max(a, b) for a, b in zip(full, raster.values.shape[2:], strict=True)))
        inside = (..., slice(full[0]), slice(full[1]))
        within = torch.zeros(*raster.values.shape[2:], dtype=torch.bool, device=raster.row.device)
        within[:height, :width] = True
        valid = raster.valid & within
        values = torch.where(within, self.inputs[name].normalise(raster), 0.0)[inside]
        own, row = torch.unique(raster.row, return_inverse=True)
        day = day_number(raster.time_s, modality.origin_s) if modality.dated else row.new_zeros(len(row)).double()
        seen = valid.any(1)[inside]
        network = cast(SeriesUnet, self.projectors[name])
        deep, known, skips = network.encoded(values, seen, row, day, len(own))
        ever = seen.new_zeros(len(own), *seen.shape[1:], dtype=torch.long).index_add(0, row, seen.long()) > 0
        piece = Piece(name, own, (height, width), ever[:, :height, :width], tuple(deep.shape[1:3]), skips)  # type: ignore[arg-type]
        return piece, deep, known

    def forward(self, tokens: Tokens) -> Features:
        """One feature per place and pixel of the finest layer that any layer observed, and their mean as summary."""
        side = self.settings.token_m
        found: list[tuple[Tensor, Coords]] = []
        for size_m in dict.fromkeys((p.height_m, p.width_m) for p in tokens.places):
            own = torch.tensor([i for i, p in enumerate(tokens.places) if (p.height_m, p.width_m) == size_m])
            own = own.to(tokens.x.device)
            pieces = [p for p in tokens.memo["pieces"] if len(p.places) and bool(torch.isin(p.places[0], own))]
            if pieces:
                height, width = (math.ceil(m / side - 1e-4) for m in size_m)
                maps, seen = self._fused(tokens, pieces, own, height, width)
                row, y, x = torch.nonzero(seen, as_tuple=True)
                found.append((maps.permute(0, 2, 3, 1)[seen], cells_at(own[row], y, x, side, 0)))
        return joined(found, tokens, self.dim)

    def _fused(
        self, tokens: Tokens, pieces: Sequence[Piece], own: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Maps of all layers beside each other on the grid of the finest, [row, channel, y, x], and what was seen [row, y, x]."""
        names, dim = list(self.inputs), self.settings.out_widths[0]
        parts = {piece.name: (self._decoded(tokens, piece), piece) for piece in pieces}
        first = next(iter(parts.values()))[0]
        maps = [first.new_zeros(len(own), dim, height, width) for _ in names]
        seen = torch.zeros(len(own), height, width, dtype=torch.bool, device=first.device)
        for name, (image, piece) in parts.items():
            where = torch.searchsorted(own, piece.places)
            ratio = self.settings.token_m / self.settings.modalities[name].gsd_m
            y, x = (
                ((torch.arange(n, device=own.device) + 0.5) * ratio).floor().long().clamp(max=last - 1)
                for n, last in zip((height, width), piece.size, strict=True)
            )
            maps[names.index(name)] = maps[names.index(name)].index_copy(0, where, image[:, :, y][..., x])
            seen[where] |= piece.seen[:, y][..., x]
        return torch.cat(maps, 1), seen

    def _decoded(self, tokens: Tokens, piece: Piece) -> Tensor:
        coords = tokens.coords
        mine = (coords.group == tokens.groups.index(piece.name)) & torch.isin(coords.row, piece.places)
        cells = coords[mine].cells()
        deep = tokens.x.new_zeros(len(piece.places), *piece.cells, tokens.x.shape[1])
        at = (torch.searchsorted(piece.places, coords.row[mine]), cells[:, 0], cells[:, 1])
        network = cast(SeriesUnet, self.projectors[piece.name])
        return network.decoded(deep.index_put(at, tokens.x[mine]), piece.skips)


# --- variants, and weights under the names of the published code ---------------------------------------------------------

S2 = {
    "sensor": "sentinel-2-l2a",
    "bands": ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
    "gsd_m": 10.0,
}
S1 = {"sensor": "sentinel-1-grd", "bands": ("VV", "VH"), "gsd_m": 10.0}
SMALL: dict[str, Any] = {"widths": (32, 32, 64), "out_widths": (16, 32, 64), "heads": 8, "time_dim": 64}
NANO: dict[str, Any] = {"widths": (8, 16), "out_widths": (8, 16), "heads": 4, "time_dim": 16, "key_dim": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"modalities": {"s2": S2}},
    "pastis": {"modalities": {"s2": {**S2, "origin": "2018-09-01"}}},
    "s2-s1": {"modalities": {"s2": S2, "s1": S1}},
    "small": {"modalities": {"s2": S2}, **SMALL},
    "nano": {
        "modalities": {
            "s2": {**S2, "mean": (0.0,) * 10, "std": (1.0,) * 10},
            "s1": {**S1, "gsd_m": 20.0, "mean": (0.0,) * 2, "std": (1.0,) * 2},
            "spot": {
                "sensor": "spot-6-7",
                "bands": ("red", "green", "blue"),
                "gsd_m": 5.0,
                "mean": (0.0,) * 3,
                "std": (1.0,) * 3,
                "dated": False,
            },
        },
        **NANO,
    },
}
"""``base`` and ``pastis`` have the sizes of the published model, ``pastis`` also its day numbers; ``nano`` is for tests."""


def build(variant: str = "base", **changes: Any) -> Utae:
    """A fresh U-TAE: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"utae has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def from_config(config: Mapping[str, Any]) -> Utae:
    return Utae(Config.model_validate(dict(config)))


DROPPED = {
    r"attention_heads\.fc1_k\.bias$": "cancels in the softmax over dates",
    r"^out_conv\.": "makes classes of features: the task's head does",
}
"""Keys of published weights that have no counterpart here, by pattern, and why."""

_RENAMES = (
    (r"^in_conv\.conv\.conv\.", "in_conv."),
    (r"^down_blocks\.", "down."),
    (r"^up_blocks\.", "up."),
    (r"\.skip_conv\.", ".skip."),
    (r"\.(down|conv1|conv2)\.conv\.", r".\1."),
    (r"^temporal_encoder\.attention_heads\.Q$", "temporal.query"),
    (r"^temporal_encoder\.attention_heads\.fc1_k\.", "temporal.key."),
    (r"^temporal_encoder\.inconv\.", "temporal.observation."),
    (r"^temporal_encoder\.in_norm\.", "temporal.first_norm."),
    (r"^temporal_encoder\.mlp\.", "temporal.out."),
    (r"^temporal_encoder\.", "temporal."),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published ``UTAE`` under the names used here; ``config`` names the one layer that they are of."""
    names = list(Config.model_validate(dict(config)).modalities)
    if len(names) != 1:
        raise ContractError(f"published U-TAE weights are of one layer, the config lists {', '.join(names)}")
    return {f"projectors.{names[0]}.{key}": value for key, value in renamed(state).items()}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of one published ``UTAE`` under the names of :class:`SeriesUnet`."""
    out = {}
    for key, value in state.items():
        if any(re.search(pattern, key) for pattern in DROPPED):
            continue
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        out[key] = value.flatten(1) if key == "temporal.observation.weight" else value
    return out

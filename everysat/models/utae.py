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

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.cells import cells_at, joined, refuse_uneven, refuse_without_statistics
from everysat.nn.inputs import InputConfig
from everysat.nn.position import day_number
from everysat.nn.series_unet import SeriesUnet, Sizes
from everysat.types import Batch, ContractError, Coords, Encoder, Features, Input, Place, Raster, Tokens


class Modality(InputConfig):
    """One input layer. A layer that is not ``dated`` is an image, or several whose order in time does not matter."""

    period_days: float = 1000.0
    dated: bool = True


class Config(Sizes):
    """Layers and sizes of a :class:`Utae`, and what is asked for at a call.

    Attributes:
        cell_m: side of what a feature stands for, metres: the mean of the features of its pixels; None for each pixel of the finest layer.
        tile: pixels of the finest layer along the squares that maps of large places are made of; the published model was trained on 128.
    """

    modalities: dict[str, Modality]
    cell_m: float | None = None
    tile: int = 128

    @model_validator(mode="after")
    def _some_layer(self) -> Config:
        if not self.modalities:
            raise ValueError("modalities is empty: name at least one layer")
        if self.cell_m is not None and not self.cell_m >= self.pixel_m:
            raise ValueError(f"cell_m={self.cell_m:g} must not be smaller than a pixel, {self.pixel_m:g} m")
        return self

    @property
    def pixel_m(self) -> float:
        """Pixel of the finest layer, metres."""
        return min(modality.gsd_m for modality in self.modalities.values())

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        return self.cell_m or self.pixel_m

    @property
    def chip_m(self) -> float:
        return self.pixel_m * self.tile


@dataclass(frozen=True)
class Ready:
    """Observations of a layer of the places of one size: normalised ``values`` [obs, band, y, x] of whole cells, what was ``seen``
    [obs, y, x], the number ``row`` of each among ``places`` int64 [n] (index into the batch), its ``day``, the ``size`` of the
    places in pixels, and what was seen at any date, ``ever`` [n, y, x] of that size."""

    values: Tensor
    seen: Tensor
    row: Tensor
    day: Tensor
    places: Tensor
    size: tuple[int, int]
    ever: Tensor


def prepared(
    name: str,
    modality: Modality,
    wanted: Input,
    raster: Raster,
    places: tuple[Place, ...],
    size_m: tuple[float, float],
    sizes: Sizes,
) -> Ready | None:
    """What a :class:`SeriesUnet` reads of a layer, of all places of that size; None if there is nothing."""
    refuse_without_statistics(name, modality)
    alike = torch.tensor([(p.height_m, p.width_m) == size_m for p in places], device=raster.row.device)
    raster = raster.obs(alike[raster.row] & raster.valid.flatten(1).any(1))
    if len(raster.row) == 0:
        return None
    height, width = (math.ceil(m / raster.gsd_m - 1e-4) for m in size_m)
    # Two cells at least: edges are reflected, which one cell does not suffice for.
    full = [max(2, math.ceil(n / sizes.stride)) * sizes.stride for n in (height, width)]
    raster = raster._padded(*(max(a, b) for a, b in zip(full, raster.values.shape[2:], strict=True)))
    values, valid = (part[..., : full[0], : full[1]] for part in (wanted.normalise(raster), raster.valid))
    within = torch.zeros(*full, dtype=torch.bool, device=values.device)
    within[:height, :width] = True
    values, seen = torch.where(within, values, 0.0), (valid & within).any(1)
    own, row = torch.unique(raster.row, return_inverse=True)
    day = day_number(raster.time_s, modality.origin_s) if modality.dated else torch.zeros_like(row).double()
    ever = torch.zeros(len(own), *full, dtype=torch.long, device=row.device).index_add(0, row, seen.long()) > 0
    return Ready(values, seen, row, day, own, (height, width), ever[:, :height, :width])


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
        self._take(config)
        self.projectors = nn.ModuleDict(
            {name: SeriesUnet(len(m.bands), config, m.period_days) for name, m in config.modalities.items()}
        )

    def _take(self, config: Config) -> None:
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = config.out_widths[0] * len(config.modalities)
        self.inputs = {name: modality.input(dated=modality.dated) for name, modality in config.modalities.items()}

    def at(self, **changes: Any) -> Utae:
        """The same encoder, sharing its weights, with another ``cell_m`` or ``tile``."""
        for name in changes:
            if name not in ("cell_m", "tile"):
                raise TypeError(f"{name} cannot be changed at a call. {suggest(name, ('cell_m', 'tile'))}")
        twin = copy.copy(self)
        twin._take(Config.model_validate({**self.config, **changes}))
        return twin

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per place, layer and cell of the lowest level that any date observed. ``memo["pieces"]`` has what the decoder
        needs beside them."""
        groups = tuple(name for name in self.inputs if name in batch.layers)
        refuse_uneven(batch, groups, training=self.training)
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
        ready = prepared(name, self.settings.modalities[name], self.inputs[name], raster, places, size_m, self.settings)
        if ready is None:
            return None
        network = cast(SeriesUnet, self.projectors[name])
        deep, known, skips = network.encoded(ready.values, ready.seen, ready.row, ready.day, len(ready.places))
        return Piece(name, ready.places, ready.size, ready.ever, (deep.shape[1], deep.shape[2]), skips), deep, known

    def forward(self, tokens: Tokens) -> Features:
        """One feature per place and pixel of the finest layer that any layer observed, or per cell with one, and the mean of the pixels as
        summary."""
        side = self.settings.pixel_m
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
        return joined(found, tokens, self.dim, self.settings.cell_m)

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
            ratio = self.settings.pixel_m / self.settings.modalities[name].gsd_m
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


def layer(wanted: Input, **_: Any) -> dict[str, Any]:
    """How a layer of a dataset is read, for ``modalities: data``."""
    return {"dated": wanted.dated}


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
    (r"^temporal_encoder\.inconv\.", "temporal.observation.0."),
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
        out[key] = value.flatten(1) if key == "temporal.observation.0.weight" else value
    return out

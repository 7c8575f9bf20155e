"""UT&T (Garioud et al. 2023, FLAIR #2, arXiv 2310.13336): U-TAE for series beside a U-Net for an aerial image, one feature per pixel.

The image goes through a U-Net with a ResNet-34 encoder. Each series goes through U-TAE, whose last map is added to the maps of the image's
encoder at every level but that of the input: once resampled to their pixels, through a convolution of 1 x 1 ("crop"), once as its
mean over the place, through an MLP ("collapse"). Features are those of the U-Net's decoder, before the convolution that
makes classes of them, which is left to the task's head.

A layer covers its place here: upstream lets U-TAE see more of the surroundings (40 pixels of 10 m for an image of 102 m), of which it
crops the middle. It also takes the mean of the first place of a batch for all; here each has its own, as a batch of one there. The metadata
of flights that upstream can add is left out. Several images of a place count as the mean of their valid pixels. Invalid pixels, as those
of an image that is not there, are the mean of the data (0 after normalisation); a series that is not there adds nothing.

Source of facts: github.com/IGNF/FLAIR-2 (Apache-2.0) and segmentation-models-pytorch 0.3.3 (MIT).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.models.utae import DROPPED as UTAE_DROPPED
from everysat.models.utae import NANO, S2, Modality, prepared, renamed
from everysat.nn.cells import cells_at, joined, refuse_uneven, refuse_without_statistics
from everysat.nn.grid import mean_over_dates
from everysat.nn.image_unet import STRIDE, ImageUnet
from everysat.nn.resample import axis_weights, resample
from everysat.nn.series_unet import SeriesUnet, Sizes
from everysat.types import Batch, ContractError, Coords, Encoder, Features, Input, Place, Raster, Tokens

Quirk = Literal["days_backwards"]
"""``days_backwards``: dates count from the image's to the origin instead of from the origin, as upstream's do."""


class Layer(Modality):
    """One input layer: the ``image``, of which there is one, or a ``series``."""

    role: Literal["image", "series"] = "series"


class Config(Sizes):
    """Layers and sizes of a :class:`Utt`.

    Attributes:
        image_widths: channels of the image's encoder: of its first convolution, then of its four stages.
        image_blocks: residual blocks of the four stages; (3, 4, 6, 3) is ResNet-34.
        image_out_widths: channels of its decoder, from the lowest to the highest resolution; the last is the width of the features.
        cell_m: side of what a feature stands for, metres: the mean of the features of its pixels; None for each pixel of the image.
        tile: pixels of the image along the squares that maps of large places are made of.
    """

    widths: tuple[int, ...] = (64, 64, 128, 128)
    out_widths: tuple[int, ...] = (64, 64, 128, 128)
    modalities: dict[str, Layer]
    image_widths: tuple[int, int, int, int, int] = (64, 64, 128, 256, 512)
    image_blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    image_out_widths: tuple[int, int, int, int, int] = (256, 128, 64, 32, 16)
    cell_m: float | None = None
    tile: int = 512
    quirks: tuple[Quirk, ...] = ()

    @model_validator(mode="after")
    def _one_image(self) -> Config:
        images = [name for name, layer in self.modalities.items() if layer.role == "image"]
        if len(images) != 1 or len(self.modalities) < 2:
            raise ValueError(
                f"modalities has {', '.join(images) or 'none'} of role 'image' among {len(self.modalities)}: UT&T takes one, and a series"
            )
        if self.cell_m is not None and not self.cell_m >= self.pixel_m:
            raise ValueError(f"cell_m={self.cell_m:g} must not be smaller than a pixel, {self.pixel_m:g} m")
        return self

    @property
    def image(self) -> str:
        """Name of the image's layer."""
        return next(name for name, layer in self.modalities.items() if layer.role == "image")

    @property
    def pixel_m(self) -> float:
        """Pixel of the image, metres."""
        return self.modalities[self.image].gsd_m

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        return self.cell_m or self.pixel_m

    @property
    def chip_m(self) -> float:
        return self.pixel_m * self.tile


class SeriesBranch(nn.Module):
    """U-TAE of a series, and what brings its map to the levels of the image's encoder."""

    def __init__(self, bands: int, config: Config, period_days: float) -> None:
        super().__init__()
        dim = config.out_widths[0]
        self.unet = SeriesUnet(bands, config, period_days)
        self.crop = nn.ModuleList(nn.Conv2d(dim, width, 1) for width in config.image_widths)
        self.collapse = nn.ModuleList(_three_layers(dim, width) for width in config.image_widths)

    def forward(self, maps: Tensor, level: int, rows: Tensor, columns: Tensor) -> Tensor:
        """What is added to the image's map of a level, from ``maps`` [row, channel, y, x] of whole places; ``rows`` and ``columns`` are
        the weights that bring them to its pixels."""
        cropped = resample(self.crop[level](maps), rows, columns)
        return cropped + self.collapse[level](maps.mean((2, 3)))[:, :, None, None]


def _three_layers(before: int, after: int) -> nn.Sequential:
    """An MLP whose two hidden widths lie evenly between the outer ones; twice these where they are equal."""
    step = (after - before) / 3
    hidden = [2 * before] * 2 if after == before else [before + int(step), before + 2 * int(step)]
    layers: list[nn.Module] = []
    for a, b in zip((before, *hidden), hidden, strict=False):
        layers += [nn.Linear(a, b), nn.Dropout(0.3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], after))


class Utt(Encoder):
    """See the module's text. ``tokenize`` gives one token per place and cell of 32 pixels, the lowest level of the image's encoder with
    the series added; ``forward`` decodes."""

    family = "utt"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._take(config)
        image = config.image_widths, config.image_blocks, config.image_out_widths
        self.projectors = nn.ModuleDict()
        for name, taken in config.modalities.items():
            bands = len(taken.bands)
            series = taken.role == "series"
            self.projectors[name] = (
                SeriesBranch(bands, config, taken.period_days) if series else ImageUnet(bands, *image)
            )

    def _take(self, config: Config) -> None:
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim = config.image_out_widths[-1]
        self.inputs = {n: m.input(dated=m.dated and m.role == "series") for n, m in config.modalities.items()}

    def at(self, **changes: Any) -> Utt:
        """The same encoder, sharing its weights, with another ``cell_m`` or ``tile``."""
        for name in changes:
            if name not in ("cell_m", "tile"):
                raise TypeError(f"{name} cannot be changed at a call. {suggest(name, ('cell_m', 'tile'))}")
        twin = copy.copy(self)
        twin._take(Config.model_validate({**self.config, **changes}))
        return twin

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per place with any observation and cell of its lowest level. ``memo["pieces"]`` has, for the places of each size,
        their numbers, the maps above, and which pixels any layer observed."""
        name = self.settings.image
        series = [n for n in self.inputs if n in batch.layers and n != name]
        refuse_uneven(batch, series, training=self.training)
        rasters = {n: wanted.fit(batch.raster(n), n) for n, wanted in self.inputs.items() if n in batch.layers}
        parts: list[tuple[Tensor, Coords]] = []
        pieces = []
        for size_m in dict.fromkeys((p.height_m, p.width_m) for p in batch.places):
            own = [i for i, p in enumerate(batch.places) if (p.height_m, p.width_m) == size_m]
            places = torch.tensor(own, device=self._device)
            maps, seen = self._fused(rasters, batch.places, places, size_m)
            some = seen.flatten(1).any(1)
            if some.any():
                maps, seen, places = [m[some] for m in maps], seen[some], places[some]
                deep = maps[-1].permute(0, 2, 3, 1)
                row, y, x = torch.nonzero(deep.new_ones(deep.shape[:3]), as_tuple=True)
                side = self.settings.pixel_m * STRIDE
                parts.append((deep.flatten(0, 2), cells_at(places[row], y, x, side, 0)))
                pieces.append((places, deep.shape[:3], maps[:-1], seen))
        if not parts:
            nowhere = torch.zeros(0, dtype=torch.long, device=self._device)
            nothing = torch.zeros(0, self.settings.image_widths[-1], device=self._device)
            parts = [(nothing, cells_at(nowhere, nowhere, nowhere, 1.0, 0))]
        x, coords = torch.cat([x for x, _ in parts]), Coords.cat([c for _, c in parts])
        return Tokens(x, coords, (name,), batch.places, {"pieces": pieces})

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _fused(
        self, rasters: Mapping[str, Raster], places: tuple[Place, ...], own: Tensor, size_m: tuple[float, float]
    ) -> tuple[list[Tensor], Tensor]:
        """Maps of the image's encoder with the series added, of the places ``own``, and which pixels any layer observed."""
        side = self.settings.pixel_m
        size = [math.ceil(m / side - 1e-4) for m in size_m]
        full = [math.ceil(n / STRIDE) * STRIDE for n in size]
        image, seen = self._image(rasters.get(self.settings.image), len(places), own, size)
        pad = (0, full[1] - size[1], 0, full[0] - size[0])
        unet = cast(ImageUnet, self.projectors[self.settings.image])
        maps = unet.encoded(F.pad(image, pad))
        for name in self.inputs:
            if name == self.settings.image or name not in rasters:
                continue
            layer = self.settings.modalities[name]
            ready = prepared(name, layer, self.inputs[name], rasters[name], places, size_m, self.settings)
            if ready is None:
                continue
            branch = cast(SeriesBranch, self.projectors[name])
            day = -ready.day if "days_backwards" in self.settings.quirks else ready.day
            deep, _, skips = branch.unet.encoded(ready.values, ready.seen, ready.row, day, len(ready.places))
            series = branch.unet.decoded(deep, skips)[..., : ready.size[0], : ready.size[1]]
            where = torch.searchsorted(own, ready.places)
            for level, image_map in enumerate(maps):
                ratio = layer.gsd_m / (side * 2 ** (level + 1))
                weights = [axis_weights(*n, ratio) for n in zip(ready.size, image_map.shape[2:], strict=True)]
                added = branch(series, level, *weights).to(image_map.dtype)
                maps[level] = image_map.index_add(0, where, added)
            at = [((torch.arange(n, device=own.device) + 0.5) * (side / layer.gsd_m)).long() for n in size]
            y, x = (index.clamp(max=last - 1) for index, last in zip(at, ready.size, strict=True))
            seen[where] |= ready.ever[:, y][..., x]
        return maps, seen

    def _image(self, raster: Raster | None, rows: int, own: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Normalised images [n, band, y, x] of the places ``own`` and which pixels are valid; zeros where there is none."""
        name = self.settings.image
        shape = (len(own), *size)
        if raster is None:
            bands = len(self.inputs[name].sensor.bands)
            values = torch.zeros(shape[0], bands, *size, device=self._device)
            return values, torch.zeros(shape, dtype=torch.bool, device=self._device)
        refuse_without_statistics(name, self.settings.modalities[name])
        raster = raster._padded(*(max(a, b) for a, b in zip(size, raster.values.shape[2:], strict=True)))
        normal = Raster(
            raster.sensor, self.inputs[name].normalise(raster), raster.valid, raster.time_s, raster.row, raster.gsd_m
        )
        values, valid = mean_over_dates(normal, rows)
        inside = (..., slice(size[0]), slice(size[1]))
        return values[own][inside], valid[own].any(1)[inside]

    def forward(self, tokens: Tokens) -> Features:
        """One feature per place and pixel of the image that any layer observed, or per cell with one, and the mean of the pixels as
        summary."""
        found: list[tuple[Tensor, Coords]] = []
        unet = cast(ImageUnet, self.projectors[self.settings.image])
        for places, shape, skips, seen in tokens.memo["pieces"]:
            mine = torch.isin(tokens.coords.row, places)
            cells = tokens.coords[mine].cells()
            deep = tokens.x.new_zeros(*shape, tokens.x.shape[1])
            at = (torch.searchsorted(places, tokens.coords.row[mine]), cells[:, 0], cells[:, 1])
            image = unet.decoded(deep.index_put(at, tokens.x[mine]).permute(0, 3, 1, 2), skips)
            row, y, x = torch.nonzero(seen, as_tuple=True)
            coords = cells_at(places[row], y, x, self.settings.pixel_m, 0)
            found.append((image[row, :, y, x], coords))
        return joined(found, tokens, self.dim, self.settings.cell_m)


# --- variants, and weights under the names of the published code ---------------------------------------------------------

_AERIAL = {
    "sensor": "flair-aerial",
    "bands": ("red", "green", "blue", "nir", "elevation"),
    "gsd_m": 0.2,
    "role": "image",
}
_SPOT = {"sensor": "spot-6-7", "bands": ("red", "green", "blue"), "gsd_m": 1.0, "role": "image"}
_THIN: dict[str, Any] = {
    "image_blocks": (1, 1, 1, 1),
    "image_widths": (8, 8, 12, 16, 16),
    "image_out_widths": (16, 16, 8, 8, 8),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"modalities": {"aerial-flair": _AERIAL, "s2": {**S2, "origin": "2021-05-15"}}},
    "pastis": {"modalities": {"spot": _SPOT, "s2": {**S2, "origin": "2018-09-01"}}},
    "small": {
        "modalities": {"aerial-flair": _AERIAL, "s2": S2},
        "widths": (32, 32, 64),
        "out_widths": (32, 32, 64),
        "heads": 8,
        "time_dim": 64,
        "image_blocks": (2, 2, 2, 2),
        "image_widths": (32, 32, 64, 128, 256),
        "image_out_widths": (128, 64, 32, 32, 16),
    },
    "nano": {
        "modalities": {
            "spot": {**_SPOT, "gsd_m": 5.0, "mean": (0.0,) * 3, "std": (1.0,) * 3},
            "s2": {**S2, "mean": (0.0,) * 10, "std": (1.0,) * 10},
        },
        **NANO,
        **_THIN,
    },
}
"""``base`` has the sizes of the published model and FLAIR's layers, ``pastis`` those of PASTIS-HD; ``nano`` is for tests."""

PUBLISHED: dict[str, Any] = {"quirks": ("days_backwards",)}
"""What the config of converted weights says beside the variant."""


def build(variant: str = "base", **changes: Any) -> Utt:
    """A fresh UT&T: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"utt has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def layer(wanted: Input, **_: Any) -> dict[str, Any]:
    """How a layer of a dataset is read, for ``modalities: data``: what has dates is a series, what has none is the image."""
    return {"dated": wanted.dated, "role": "series" if wanted.dated else "image"}


def from_config(config: Mapping[str, Any]) -> Utt:
    return Utt(Config.model_validate(dict(config)))


DROPPED = {
    **{pattern.replace("^", r"^arch_hr\."): why for pattern, why in UTAE_DROPPED.items()},
    r"^(arch_vhr\.segmentation_head|reshape_utae_output)\.": "makes classes of features: the task's head does",
    r"^fm_utae_featmap_(cropped\.conv_list|collapsed\.mlps)\.0\.": "is added to the image itself, which the decoder does not read",
    r"^mtd_mlp\.": "reads the metadata of flights",
}
"""Keys of published weights that have no counterpart here, by pattern, and why."""

_RENAMES = (
    (r"^encoder\.layer(\d)\.", lambda found: f"stages.{int(found[1]) - 1}."),
    (r"^encoder\.", ""),
    (r"^decoder\.blocks\.(\d)\.conv(\d)\.", lambda found: f"up.{found[1]}.{int(found[2]) - 1}."),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published ``TimeTexture_flair`` under the names used here; ``config`` names the image and the one series."""
    settings = Config.model_validate(dict(config))
    series = [name for name in settings.modalities if name != settings.image]
    if len(series) != 1:
        raise ContractError(f"published UT&T weights are of one series, the config lists {', '.join(series)}")
    branch = f"projectors.{series[0]}."
    kept = {k: v for k, v in state.items() if not any(re.search(pattern, k) for pattern in DROPPED)}
    unet = {k.removeprefix("arch_hr."): v for k, v in kept.items() if k.startswith("arch_hr.")}
    out = {f"{branch}unet.{key}": value for key, value in renamed(unet).items()}
    for key, value in kept.items():
        fusion = re.match(r"fm_utae_featmap_(?:cropped\.conv_list|collapsed\.mlps)\.(\d)\.(.*)", key)
        if fusion:
            part = "crop" if "cropped" in key else "collapse"
            out[f"{branch}{part}.{int(fusion[1]) - 1}.{fusion[2]}"] = value
        elif not key.startswith("arch_hr."):
            own = key.removeprefix("arch_vhr.")
            for pattern, new in _RENAMES:
                own = re.sub(pattern, new, own)
            out[f"projectors.{settings.image}.{own}"] = value
    return out

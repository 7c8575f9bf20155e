"""Galileo (Tseng et al., ICML 2025, arXiv:2502.09356): patches of any size, from radar, optical images, weather, terrain and position.

A place is a set of tokens: one for each patch, month and group of bands, one for the terrain of a patch, one for the weather of each month
and one for where it lies. Transformer blocks mix them. The feature of a patch is the mean of its own tokens and of those that belong to
the whole place; the summary is the mean of all. What is missing has no token; of a patch seen in part, the other pixels take the mean of
those seen. ``patch_m`` may differ at each call: the weights of patches are resampled (FlexiViT, Beyer et al. 2023).

Bands are scaled from two standard deviations below the mean to two above it onto 0 to 1, as in the training code. It was trained on
top-of-atmosphere reflectance (Level-1C); surface reflectance is taken as well. Dynamic World, WorldCereal, TerraClimate, VIIRS and
LandScan, which the published model also takes, are not read. A layer ``s2`` without a band of the contract is refused: of data that
lack B8A, say so by ``at(without=["B8A"])``, and the group that it belongs to is left out.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.attention import Block
from everysat.nn.location import cartesian, check
from everysat.nn.monthly import (
    CHANNELS,
    GROUPS,
    TERRAIN,
    WEATHER,
    WIDTHS,
    MonthlyConfig,
    Months,
    Role,
    contract,
    months,
    seasons,
)
from everysat.nn.ragged import side_by_side
from everysat.types import ALWAYS, Batch, Coords, Encoder, Features, Tokens

KERNEL = 8
"""Pixels along the patches that the weights are kept for, and the most that a patch may have."""
UNIT_M = 10.0
"""What positions on the ground are counted in."""


_MEAN: dict[Role, tuple[float, ...]] = {
    "optical": (
        *(0.13953408730676722, 0.13384026921784578, 0.1343098838103571, 0.15438607982512298, 0.21862022069512263),
        *(0.25250932853316693, 0.2410337718737341, 0.27502854646886754, 0.2234911100607887, 0.14745311266077113),
    ),
    "radar": (-11.728724389184965, -18.85558188024017),
    "weather": (271.5674963541667, 85.54303677156568),
    "terrain": (673.0152819503361, 5.930092668915115),
}
_STD: dict[Role, tuple[float, ...]] = {
    "optical": (
        *(0.09177041440370853, 0.09132988423581528, 0.1092678723527555, 0.10472206083460424, 0.10480101611156767),
        *(0.11436903026819996, 0.1098979177731649, 0.1204472755085893, 0.11459774063078879, 0.09802429840007797),
    ),
    "radar": (4.887145774840316, 5.730270320384293),
    "weather": (79.80828940314429, 116.69547098151486),
    "terrain": (983.0697298296237, 8.167406789813247),
}
"""Of the pixels that it was trained on, after the published config/normalization.json."""
MODALITIES = contract(
    {role: [m - 2 * s for m, s in zip(mean, _STD[role], strict=True)] for role, mean in _MEAN.items()},
    {role: [4 * s for s in std] for role, std in _STD.items()},
    10.0,
)
"""Bands of the published weights, with the lower end of the range for mean and its length for standard deviation; those of rain are of the
millimetres of a calendar month."""


class Config(MonthlyConfig):
    """Layers and sizes of a :class:`Galileo`. ``patch_m``: side of a patch, 1 to 8 pixels (10 m for places of one pixel); ``cells``:
    patches along the squares of which maps of large places are made."""

    patch_m: float = 20.0
    cells: PositiveInt = 6
    dim: int = 128
    depth: int = 4
    heads: int = 8
    drop_path: float = 0.1

    @model_validator(mode="after")
    def _sizes_agree(self) -> Config:
        if self.dim % 16 or self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be a multiple of 16 and of heads={self.heads}")
        ratio = self.patch_m / self.gsd_m
        if abs(ratio - round(ratio)) > 1e-3 or not 1 <= round(ratio) <= KERNEL:
            raise ValueError(f"patch_m={self.patch_m:g} must be 1 to {KERNEL} times gsd_m={self.gsd_m:g}")
        return self

    @property
    def patch(self) -> int:
        """Pixels along a patch."""
        return round(self.patch_m / self.gsd_m)

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        return self.patch_m

    @property
    def chip_m(self) -> float:
        """Side of the squares of which maps of large places are made."""
        return self.cells * self.patch_m


class Galileo(Encoder):
    """See the module's text. ``tokenize`` gives the tokens of a place but for its position, which ``forward`` adds."""

    family = "galileo"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._take(config)
        dim = config.dim
        self.patches = nn.ModuleDict({name: nn.Conv2d(WIDTHS[name], dim, KERNEL) for name in (*CHANNELS, "SRTM")})
        self.weather, self.location = nn.Linear(WIDTHS["ERA5"], dim), nn.Linear(3, dim)
        self.channel = nn.Parameter(torch.zeros(len(GROUPS), dim // 4))
        self.location_channel = nn.Parameter(torch.zeros(dim // 4))
        self.register_buffer("position", _slow_sinusoid(torch.arange(config.steps), dim // 4))
        self.register_buffer("month", seasons(dim // 4))
        rates = {"drop_path": config.drop_path, "eps": 1e-5}
        self.blocks = nn.ModuleList(Block(dim, config.heads, **rates) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.apply(_initialise)

    def _take(self, config: Config) -> None:
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim, self.inputs = config.dim, config.inputs()

    def at(self, **changes: Any) -> Galileo:
        """The same encoder, sharing its weights, with another ``patch_m`` or ``cells``, or ``without`` some optical bands."""
        known = ("patch_m", "cells", "without")
        for name in changes:
            if name not in known:
                raise TypeError(f"{name} cannot be changed at a call. {suggest(name, known)}")
        twin = copy.copy(self)
        twin._take(Config.model_validate({**self.config, **changes}))
        return twin

    # --- from pixels to tokens -----------------------------------------------------------------------------------------

    def grid_of(self, batch: Batch) -> tuple[int, int]:
        """Height and width of the grid of patches that covers every place of the batch."""
        return self._cells(batch.height_m), self._cells(batch.width_m)

    def _cells(self, extent_m: float) -> int:
        return math.ceil(extent_m / self.settings.patch_m - 1e-4)

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per patch, month and group of bands, per patch for its terrain, and per place and month for its weather."""
        grid, config = self.grid_of(batch), self.settings
        pixels = (grid[0] * config.patch, grid[1] * config.patch)
        seen = months(batch, config.layers, self.inputs, pixels, config.steps, "month")
        parts = [self._series(seen, name, group) for group, name in enumerate(GROUPS) if name in CHANNELS]
        parts += [self._terrain(seen), self._weather(seen, batch)]
        x, row, at_m, size_m, time_s, group = (torch.cat([part[i] for part in parts]) for i in range(6))
        return Tokens(x, Coords(row, at_m, size_m, time_s, group), GROUPS, batch.places, {"grid": grid})

    def _cut(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [n, h, w, band y x] of images [n, band, y, x], the mean of a patch where a pixel is not valid; and which have a valid
        pixel of every band, bool [n, h, w]."""
        p = self.settings.patch
        image, valid = (rearrange(t, "n b (h y) (w x) -> n h w b (y x)", y=p, x=p) for t in (image, valid))
        count = valid.sum(-1, keepdim=True)
        mean = torch.where(valid, image, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
        return torch.where(valid, image, mean).flatten(3), (count > 0).flatten(3).all(3)

    def _project(self, name: str, patches: Tensor) -> Tensor:
        """Vectors [n, dim] of patches [n, band y x], by the weights for this size of patches."""
        layer = cast(nn.Conv2d, self.patches[name])
        weight = layer.weight.flatten(2)
        if self.settings.patch != KERNEL:
            weight = weight @ _resampling(self.settings.patch).to(weight).T
        return F.linear(patches.to(weight.dtype), weight.flatten(1), layer.bias)

    def _series(self, seen: Months, name: str, group: int) -> tuple[Tensor, ...]:
        channels = list(CHANNELS[name])
        patches, there = self._cut(seen.series[:, channels], seen.valid[:, channels])
        at, y, x = torch.nonzero(there).unbind(1)
        code = torch.cat([self._when(seen, at, group), self._where(y, x)], 1)
        return (
            self._project(name, patches[there]) + code,
            *self._at(seen.row[at], y, x),
            seen.time_s[at],
            _all(at, group),
        )

    def _terrain(self, seen: Months) -> tuple[Tensor, ...]:
        both = seen.has_terrain[:, None].expand(-1, 2, -1, -1)
        patches, there = self._cut(seen.terrain, both)
        place, y, x = torch.nonzero(there).unbind(1)
        never = self.channel.new_zeros(len(place), self.dim // 2)
        code = torch.cat([self.channel[TERRAIN].expand(len(place), -1), never, self._where(y, x)], 1)
        always = torch.tensor(ALWAYS, dtype=torch.float64, device=place.device).expand(len(place), 2)
        return self._project("SRTM", patches[there]) + code, *self._at(place, y, x), always, _all(place, TERRAIN)

    def _weather(self, seen: Months, batch: Batch) -> tuple[Tensor, ...]:
        at = torch.nonzero(seen.has_weather)[:, 0]
        code = torch.cat([self._when(seen, at, WEATHER), self.channel.new_zeros(len(at), self.dim // 4)], 1)
        sides = [(place.height_m, place.width_m) for place in batch.places]
        extent = torch.tensor(sides, dtype=torch.float32, device=at.device).view(-1, 2)[seen.row[at]]
        x = self.weather(seen.weather[at]) + code
        return x, seen.row[at], extent / 2, extent.amax(1), seen.time_s[at], _all(at, WEATHER)

    def _when(self, seen: Months, at: Tensor, group: int) -> Tensor:
        """Codes of the group of bands, of the step and of the month."""
        position, month = cast(Tensor, self.position)[seen.step[at]], cast(Tensor, self.month)[seen.month[at]]
        return torch.cat([self.channel[group].expand(len(at), -1), position, month], 1)

    def _where(self, y: Tensor, x: Tensor) -> Tensor:
        """Codes of patches: of their column, then of their row, counted in tens of metres."""
        scale = self.settings.patch_m / UNIT_M
        return torch.cat([_slow_sinusoid(cell * scale, self.dim // 8) for cell in (x, y)], 1)

    def _at(self, row: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        side = self.settings.patch_m
        return row, (torch.stack([y, x], -1) + 0.5) * side, torch.full((len(row),), side, device=row.device)

    # --- from tokens to features ---------------------------------------------------------------------------------------

    def forward(self, tokens: Tokens) -> Features:
        """One feature per observed patch (per patch of the place, if there is weather alone), and the mean of all tokens as summary."""
        rows, row, device = len(tokens.places), tokens.coords.row, tokens.x.device
        z, keep, slot = side_by_side(tokens.x, row, rows)
        known = torch.tensor([place.lonlat is not None for place in tokens.places], device=device)
        z = torch.cat([self._location(tokens)[:, None].to(z.dtype), z], 1)
        keep = torch.cat([known[:, None], keep], 1)
        mask = keep.clone()
        mask[:, 0] |= ~keep.any(1)  # something to attend to where nothing is known; it does not count below
        for block in self.blocks:
            z = block(z, None, None if mask.all() else mask)
        z = self.norm(z) * keep[..., None]
        summary = z.sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
        x, weather = z[:, 1:].flatten(0, 1)[slot], tokens.coords.group == WEATHER
        shared = z[:, 0].index_add(0, row[weather], x[weather])
        number = known.long() + torch.bincount(row[weather], minlength=rows)
        return self._patches(tokens, x, weather, shared, number, summary)

    def _location(self, tokens: Tokens) -> Tensor:
        """Tokens of positions, one per place; where it is not known, of nowhere."""
        lonlat = [place.lonlat or (0.0, 0.0) for place in tokens.places]
        at = torch.tensor(lonlat, dtype=torch.float64, device=tokens.x.device).view(-1, 2)
        code = F.pad(self.location_channel, (0, self.dim - len(self.location_channel)))
        out: Tensor = self.location(cartesian(check(at)).to(code.dtype)) + code
        return out

    def _patches(
        self, tokens: Tokens, x: Tensor, weather: Tensor, shared: Tensor, number: Tensor, summary: Tensor
    ) -> Features:
        """Means of the tokens of patches and of those of their places, whose sum is ``shared`` [place, dim] and ``number`` [place]."""
        (height, width), cells = tokens.memo["grid"], tokens.coords.cells()
        own = ((tokens.coords.row * height + cells[:, 0]) * width + cells[:, 1])[~weather]
        pictured = torch.bincount(own // (height * width), minlength=len(tokens.places)) > 0
        bare = torch.bincount(tokens.coords.row[weather], minlength=len(tokens.places)).bool() & ~pictured
        every = [
            own,
            *(self._all_of(r, tokens, width, height).to(own.device) for r in torch.nonzero(bare)[:, 0].tolist()),
        ]
        patch = torch.cat(every).unique()
        slot, row = torch.searchsorted(patch, own), patch // (height * width)
        total = shared[row].index_add(0, slot, x[~weather])
        mean = total / (number[row] + torch.bincount(slot, minlength=len(patch)))[:, None]
        always = torch.tensor(ALWAYS, dtype=torch.float64, device=x.device).expand(len(patch), 2)
        at = self._at(row, patch // width % height, patch % width)
        return Features(mean, Coords(*at, always, torch.zeros_like(row)), summary, tokens.places)

    def _all_of(self, row: int, tokens: Tokens, width: int, height: int) -> Tensor:
        place = tokens.places[row]
        y, x = torch.arange(self._cells(place.height_m)), torch.arange(self._cells(place.width_m))
        return ((row * height + y[:, None]) * width + x).flatten()


def _all(like: Tensor, group: int) -> Tensor:
    return torch.full_like(like, group)


@lru_cache(maxsize=KERNEL)
def _resampling(patch: int) -> Tensor:
    """Matrix [patch^2, KERNEL^2] from weights for patches of :data:`KERNEL` pixels to those for ``patch`` pixels: the pseudo-inverse of the
    resizing of images, so that products with resized images stay as they were, as far as these can show them (Beyer et al. 2023, equation
    4). What these cannot show is lost, so features of patches of different sizes differ, also over even ground."""
    basis = torch.eye(KERNEL**2).view(-1, 1, KERNEL, KERNEL)
    resized = F.interpolate(basis, (patch, patch), mode="bicubic", antialias=True)
    return torch.linalg.pinv(resized.flatten(1))


def _slow_sinusoid(position: Tensor, dim: int) -> Tensor:
    """Sines, then cosines [..., dim] of positions times 10000^(-j / 2 dim), j from 0 to dim / 2: a quarter of the usual exponents, as the
    published weights were trained with, so that wavelengths end at 63."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, device=position.device) / (2 * dim))
    angle = position[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


VARIANTS: dict[str, dict[str, Any]] = {
    "nano": {"modalities": MODALITIES},
    "tiny": {"modalities": MODALITIES, "dim": 192, "depth": 12, "heads": 3},
    "base": {"modalities": MODALITIES, "dim": 768, "depth": 12, "heads": 12},
}
"""The sizes of the published weights."""


def build(variant: str = "nano", **changes: Any) -> Galileo:
    """A fresh Galileo: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"galileo has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS[variant or "nano"], **changes})


def from_config(config: Mapping[str, Any]) -> Galileo:
    return Galileo(Config.model_validate(dict(config)))


DROPPED = {
    r"^space_embed\.(DW|WC)\.": "maps of Dynamic World and WorldCereal, other models' answers, are not read",
    r"^static_embed\.(DW|WC)_static\.": "shares of Dynamic World and WorldCereal, other models' answers, are not read",
    r"^static_embed\.LS\.": "population of LandScan is not read",
    r"^time_embed\.(TC|VIIRS)\.": "TerraClimate and lights of VIIRS are not read",
}
"""Keys of published weights that have no counterpart here, by pattern, and why. The codes of these groups go with them."""

_RENAMES = (
    (r"\.backbone", ""),
    (r"^(?:space_time_embed|space_embed)\.(\w+)\.proj\.", r"patches.\1."),
    (r"^time_embed\.ERA5\.", "weather."),
    (r"^static_embed\.location\.", "location."),
    (r"^month_embed\.weight$", "month"),
    (r"^pos_embed$", "position"),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published ``Encoder`` under the names used here."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if any(re.search(pattern, key) for pattern in DROPPED) or re.search(r"\.attn\.[qkv]\.|_channel_embed$", key):
            continue
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        out[key] = value
    for block in sorted({key.split(".attn.")[0] for key in state if ".attn.q." in key}):
        for kind in ("weight", "bias"):
            out[f"{block}.attn.qkv.{kind}"] = torch.cat([state[f"{block}.attn.{part}.{kind}"] for part in "qkv"])
    series, weather, terrain = (state[f"{part}_channel_embed"] for part in ("s_t", "t", "sp"))
    out["channel"] = torch.cat([series[:-1], weather[:1], terrain[:1], series[-1:]])
    out["location_channel"] = state["st_channel_embed"][1]
    return out

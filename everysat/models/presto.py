"""Presto (Tseng et al. 2023, arXiv:2304.14065): the series of single pixels, from radar, optical images, weather, terrain and position.

A pixel is a set of tokens: one for each month and group of bands, one for its terrain and one for where it lies. Transformer blocks mix them;
their mean is the feature. What is missing has no token. The published weights (MIT, nasaharvest/presto) know all of it and have few parameters;
neighbouring pixels do not see each other.

It was trained on top-of-atmosphere reflectance (Level-1C); surface reflectance is taken as well. A layer ``s2`` without a band of the contract
is refused: of data that lack B8A, say so by ``at(without=["B8A"])``, and the group that it belongs to is left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from pydantic import model_validator
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
    contract,
    months,
    seasons,
)
from everysat.nn.position import sinusoid
from everysat.nn.ragged import side_by_side
from everysat.types import ALWAYS, Batch, Coords, Encoder, Features, Place, Tokens

CHUNK_ELEMENTS = 16_000_000
"""Numbers of the widest intermediate that is held at once in inference."""

MODALITIES = contract(
    {"optical": (0.0,) * 10, "radar": (-25.0,) * 2, "weather": (272.15, 0.0), "terrain": (0.0, 0.0)},
    {"optical": (1.0,) * 10, "radar": (25.0,) * 2, "weather": (35.0, 30.0), "terrain": (2000.0, 50.0)},
    10.0,
)
"""Bands and statistics of the published weights; those of rain are of millimetres a day."""


class Config(MonthlyConfig):
    """Layers and sizes of a :class:`Presto`."""

    dim: int = 128
    depth: int = 2
    heads: int = 8

    @model_validator(mode="after")
    def _sizes_agree(self) -> Config:
        if self.dim % 8 or self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be a multiple of 8 and of heads={self.heads}")
        return self

    @property
    def token_m(self) -> float:
        """Side of what a feature stands for, metres."""
        return self.gsd_m

    @property
    def chip_m(self) -> float:
        """Side of the squares of which maps of large places are made."""
        return 16 * self.gsd_m


class Presto(Encoder):
    """See the module's text. ``tokenize`` gives the tokens of all pixels but for their position, which ``forward`` adds."""

    family = "presto"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._take(config)
        self.groups = nn.ModuleDict({name: nn.Linear(width, config.dim) for name, width in WIDTHS.items()})
        self.location = nn.Linear(3, config.dim)
        self.channel = nn.Parameter(torch.randn(len(GROUPS), config.dim // 4))
        self.register_buffer("position", sinusoid(torch.arange(config.steps), config.dim // 2, 1000.0))
        self.register_buffer("month", seasons(config.dim // 4))
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, eps=1e-5) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.apply(_initialise)

    def _take(self, config: Config) -> None:
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.dim, self.inputs = config.dim, config.inputs()

    def at(self, **changes: Any) -> Presto:
        """The same encoder, sharing its weights, ``without`` some optical bands."""
        for name in changes:
            if name != "without":
                raise TypeError(f"{name} cannot be changed at a call. {suggest(name, ('without',))}")
        twin = copy.copy(self)
        twin._take(Config.model_validate({**self.config, **changes}))
        return twin

    # --- from pixels to tokens -----------------------------------------------------------------------------------------

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per pixel, month and group of bands, and one per pixel for its terrain. Weather is every observed pixel's, or, where a
        place has nothing else, that of all its pixels."""
        grid = self._pixels(batch.height_m), self._pixels(batch.width_m)
        seen = months(batch, self.settings.layers, self.inputs, grid, self.settings.steps, "day")
        parts = [self._series(seen, name, group, grid) for group, name in enumerate(GROUPS) if name in CHANNELS]
        parts.append(self._terrain(seen))
        parts.append(self._weather(seen, torch.cat([pixel for _, pixel, _, _ in parts]).unique(), batch.places, grid))
        x, pixel, time_s, group = (torch.cat([part[i] for part in parts]) for i in range(4))
        return Tokens(x, self._coords(pixel, time_s, group, grid), GROUPS, batch.places, {"grid": grid})

    def _pixels(self, extent_m: float) -> int:
        return int(-(-(extent_m / self.settings.gsd_m - 1e-4) // 1))

    def _codes(self, seen: Months, at: Tensor, group: int) -> Tensor:
        """What tells month, group and step: added to the tokens of steps ``at``."""
        month, position = cast(Tensor, self.month)[seen.month[at]], cast(Tensor, self.position)[seen.step[at]]
        return torch.cat([month, self.channel[group].expand(len(at), -1), position], 1)

    def _series(self, seen: Months, name: str, group: int, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        channels = list(CHANNELS[name])
        at, y, x = torch.nonzero(seen.valid[:, channels].all(1)).unbind(1)
        values = self.groups[name](seen.series[:, channels].movedim(1, -1)[at, y, x])
        pixel = (seen.row[at] * grid[0] + y) * grid[1] + x
        return values + self._codes(seen, at, group), pixel, seen.time_s[at], torch.full_like(at, group)

    def _terrain(self, seen: Months) -> tuple[Tensor, ...]:
        place, y, x = torch.nonzero(seen.has_terrain).unbind(1)
        blank = self.dim // 4, self.dim // 2
        code = torch.cat([self.channel.new_zeros(blank[0]), self.channel[TERRAIN], self.channel.new_zeros(blank[1])])
        values = self.groups["SRTM"](seen.terrain.movedim(1, -1)[place, y, x]) + code
        pixel = (place * seen.has_terrain.shape[1] + y) * seen.has_terrain.shape[2] + x
        always = torch.tensor(ALWAYS, dtype=torch.float64, device=place.device).expand(len(place), 2)
        return values, pixel, always, torch.full_like(place, TERRAIN)

    def _weather(
        self, seen: Months, pixel: Tensor, places: tuple[Place, ...], grid: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """Every step of weather of a place for each of its pixels."""
        at = torch.nonzero(seen.has_weather)[:, 0]
        pictured = (pixel // (grid[0] * grid[1])).unique().tolist()
        bare = [row for row in seen.row[at].unique().tolist() if row not in pictured]
        pixel = torch.cat([pixel, *(self._all_of(row, places[row], grid).to(pixel.device) for row in bare)])
        count = torch.bincount(seen.row[at], minlength=len(places))
        times = count[pixel // (grid[0] * grid[1])]
        start = (torch.cumsum(count, 0) - count)[pixel // (grid[0] * grid[1])]
        within = torch.arange(int(times.sum()), device=pixel.device)
        within = within - torch.repeat_interleave(torch.cumsum(times, 0) - times, times)
        chosen = torch.repeat_interleave(start, times) + within
        values = (self.groups["ERA5"](seen.weather[at]) + self._codes(seen, at, WEATHER))[chosen]
        return values, torch.repeat_interleave(pixel, times), seen.time_s[at][chosen], torch.full_like(chosen, WEATHER)

    def _all_of(self, row: int, place: Place, grid: tuple[int, int]) -> Tensor:
        y, x = torch.arange(self._pixels(place.height_m)), torch.arange(self._pixels(place.width_m))
        return ((row * grid[0] + y[:, None]) * grid[1] + x).flatten()

    def _coords(self, pixel: Tensor, time_s: Tensor, group: Tensor, grid: tuple[int, int]) -> Coords:
        cell, side = pixel % (grid[0] * grid[1]), self.settings.gsd_m
        at_m = (torch.stack([cell // grid[1], cell % grid[1]], -1) + 0.5) * side
        size_m = torch.full((len(pixel),), side, device=pixel.device)
        return Coords(pixel // (grid[0] * grid[1]), at_m, size_m, time_s, group)

    # --- from tokens to features ---------------------------------------------------------------------------------------

    def forward(self, tokens: Tokens) -> Features:
        """One feature per observed pixel; the summary is their mean, or, of a place without any, what its position alone says."""
        grid = tokens.memo["grid"]
        cells, area, rows = tokens.coords.cells(), grid[0] * grid[1], len(tokens.places)
        number = (tokens.coords.row * grid[0] + cells[:, 0]) * grid[1] + cells[:, 1]
        pixel, sequence = torch.unique(number, return_inverse=True)
        count = torch.bincount(pixel // area, minlength=rows)
        row = torch.cat([pixel // area, torch.nonzero(count == 0)[:, 0]])
        found = self._mixed(tokens.x, sequence, row, tokens.places)
        total = found.new_zeros(rows, self.dim).index_add(0, row, found)
        always = torch.tensor(ALWAYS, dtype=torch.float64, device=row.device).expand(len(pixel), 2)
        coords = self._coords(pixel, always, torch.zeros_like(pixel), grid)
        return Features(found[: len(pixel)], coords, total / count.clamp(min=1)[:, None], tokens.places)

    def _mixed(self, x: Tensor, sequence: Tensor, row: Tensor, places: tuple[Place, ...]) -> Tensor:
        """Features [sequence, dim] of tokens and of their places' positions; sequences in chunks when nothing is trained."""
        known = torch.tensor([place.lonlat is not None for place in places], device=row.device)
        lonlat = torch.tensor([place.lonlat or (0.0, 0.0) for place in places], dtype=torch.float64, device=row.device)
        location = self.location(cartesian(check(lonlat.view(-1, 2))).to(self.channel.dtype))
        order = torch.argsort(sequence, stable=True)
        counts = torch.bincount(sequence, minlength=len(row))
        ends, longest = torch.cumsum(counts, 0), int(counts.max()) if len(row) else 0
        step = max(1, len(row))
        if not torch.is_grad_enabled():
            step = max(1, CHUNK_ELEMENTS // ((longest + 1) * 4 * self.dim))
        parts = [x.new_zeros(0, self.dim)]
        for start in range(0, len(row), step):
            some = slice(start, start + step)
            mine = order[int(ends[start - 1]) if start else 0 : int(ends[some][-1])]
            z, keep, _ = side_by_side(x[mine], sequence[mine] - start, len(row[some]))
            z = torch.cat([location[row[some], None].to(z.dtype), z], 1)
            parts.append(self._attended(z, torch.cat([known[row[some], None], keep], 1)))
        return torch.cat(parts)

    def _attended(self, z: Tensor, keep: Tensor) -> Tensor:
        mask = keep.clone()
        mask[:, 0] |= ~keep.any(1)  # something to attend to where nothing is known; it does not count below
        for block in self.blocks:
            z = block(z, None, None if mask.all() else mask)
        mean = (z * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
        out: Tensor = self.norm(mean)
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"modalities": MODALITIES},
    "nano": {
        "modalities": {name: MODALITIES[name] for name in ("s2", "s1", "era5", "srtm")},
        "dim": 32,
        "depth": 1,
        "heads": 4,
    },
}
"""``base`` has the sizes of the published weights; ``nano`` is for tests."""


def build(variant: str = "base", **changes: Any) -> Presto:
    """A fresh Presto: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"presto has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS[variant or "base"], **changes})


def from_config(config: Mapping[str, Any]) -> Presto:
    return Presto(Config.model_validate(dict(config)))


DROPPED = {
    r"^decoder\.": "reconstructs what was hidden in pre-training",
    r"^(encoder\.)?dw_embed\.": "maps of Dynamic World, another model's answer, are not read",
}
"""Keys of published weights that have no counterpart here, by pattern, and why. The code of Dynamic World, the last of ``channel_embed``, goes
with them."""

_RENAMES = (
    (r"^encoder\.", ""),
    (r"^eo_patch_embed\.", "groups."),
    (r"^latlon_embed\.", "location."),
    (r"^month_embed\.weight$", "month"),
    (r"^channel_embed\.weight$", "channel"),
    (r"^pos_embed$", "position"),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published ``Presto`` (or of its encoder alone) under the names used here."""
    out = {}
    for key, value in state.items():
        if any(re.search(pattern, key) for pattern in DROPPED):
            continue
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        out[key] = value[: len(GROUPS)] if key == "channel" else value[0] if key == "position" else value
    return out

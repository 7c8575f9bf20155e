"""Atomizer (Riffaud de Turckheim et al., BMVC 2025): every valid value of every band of every date is a token of its own.

A token says which band it is of (wavelength and width, as the reach of the band into a set of Gaussians), its value, and where it lies in
metres. A Perceiver reads the tokens into latents: layers of cross-attention to all tokens and self-attention among latents. No
sensor, size, resolution or set of bands is built in, nothing is padded, and what is invalid is no token.

This is a re-implementation from descriptions: the published code has no licence, no weights, and no record of the paper's
hyper-parameters. ``bmvc`` has the formulas and quirks of the submitted code, with sizes that are assumed. All else adds what the paper
promises and the code lacks: dates, resolution, radar and elevation; and a read-out per cell of ``token_m`` metres, in the manner of
the authors' later code, because the published model says one thing per place.

Cost is linear in the number of tokens: their vectors are never written, see :mod:`everysat.nn.atoms`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.atoms import SEASONS, Atoms, Fourier, Part, date_code, kept_at_random, spectral_code, spread_evenly
from everysat.nn.draws import key
from everysat.nn.gather import row_offset
from everysat.nn.inputs import AnyInput
from everysat.nn.perceiver import GatedMlp, LatentAttention, Pooling, Reading
from everysat.nn.spectral import ORBITS, POLARISATIONS, TERRAIN, AnySensor, Physics, physics
from everysat.types import ALWAYS, Batch, ContractError, Coords, Features, Raster, Tokens

Quirk = Literal[
    "double_extent", "corner_positions", "short_phase", "sampled_bands", "own_first_layer", "temperature_10"
]
"""``double_extent``: a pixel counts as twice as large as it is (all bands of images at 10 m as 20 m). ``corner_positions``: positions
are stretched so that the outermost pixels lie on the edges of the place. ``short_phase``: codes of numbers turn by 0.75 pi, not pi.
``sampled_bands``: a band's reach is taken at 50 wavelengths. ``own_first_layer``: of tied layers, the first keeps all its weights to
itself, not the cross-attention alone. ``temperature_10``: logits of the pooling are divided by 10 more (code of June 2025)."""

YEARS, LOGARITHM, OFFSET = Fourier(8, 4), Fourier(8, 4), Fourier(8, 8)
"""Codes of decades since 2020, of logarithms of resolutions and widths, and of offsets from the middle of a cell."""
CODES = tuple(f"{orbit}_{p}" for orbit in ORBITS for p in POLARISATIONS) + TERRAIN
"""Bands without a wavelength, which have learned codes."""


CHUNK_PAIRS = 1 << 15
"""Pairs of a cell and a token in it, and tokens of a stream, that inference holds at once."""
HELD_ELEMENTS = 256_000_000
"""Numbers of keys and values that inference holds, 1 GB in single precision. If there were more, they are made in parts for each layer."""


class Config(BaseModel):
    """Sizes of an :class:`Atomizer`, and what is asked for at a call.

    Attributes:
        modalities: the band contract, whose moments also serve for bands like those listed; may be empty.
        layers: read the ``listed`` layers, or ``all`` whose bands have a physics.
        token_m: side of a cell, metres, of which each has a feature. cells: along the squares that maps of large places are made of.
        budget: read at most so many tokens of a place, spread evenly over it; 0: all.
        prune: share of the tokens that training leaves out, drawn for each layer anew (``redrawn``) or from what the one before
            had (``cumulative``).
        dim, latents, heads, head_dim: of the latents and their self-attention, ``per_cross`` blocks of it in each of ``depth`` layers;
            cross_heads, cross_head_dim: of the cross-attention. tied: layers share weights, but for the first cross-attention.
        anchors: middle and deviation of the Gaussians that code wavelengths, nanometres.
        value_highest, value_count, place_highest, place_count: :class:`Fourier` codes of values and of positions in units of ``unit_m``.
        time, resolution, codes: tokens carry their date; their resolution and width; radar and terrain have learned codes.
        dense: features are per cell; otherwise one, the summary, per place. local: cells also read the tokens that lie in them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modalities: dict[str, AnyInput] = {}
    layers: Literal["listed", "all"] = "listed"
    token_m: float = 60.0
    cells: int = 12
    budget: int = 0
    prune: float = 0.0
    regime: Literal["redrawn", "cumulative"] = "redrawn"
    dim: int = 512
    latents: int = 512
    depth: int = 4
    per_cross: int = 4
    heads: int = 8
    head_dim: int = 64
    cross_heads: int = 1
    cross_head_dim: int = 64
    tied: bool = True
    anchors: tuple[tuple[float, float], ...]
    value_highest: float = 16.0
    value_count: int = 16
    place_highest: float = 40.0
    place_count: int = 32
    unit_m: float = 400.0
    time: bool = True
    resolution: bool = True
    codes: bool = True
    dense: bool = True
    local: bool = True
    quirks: tuple[Quirk, ...] = ()

    @model_validator(mode="after")
    def _sizes_agree(self) -> Config:
        for name in ("token_m", "unit_m", "cells", "dim", "latents", "depth", "heads", "cross_heads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune={self.prune} must be in [0, 1): something has to stay")
        if self.budget < 0:
            raise ValueError(f"budget={self.budget} must not be negative; 0 reads all tokens")
        if not self.anchors or any(deviation <= 0 for _, deviation in self.anchors):
            raise ValueError("anchors must list at least one (middle, deviation) in nanometres, deviations positive")
        return self

    @property
    def chip_m(self) -> float:
        """Side of the squares of which maps of large places are made."""
        return self.token_m * self.cells

    @property
    def value_code(self) -> Fourier:
        return Fourier(self.value_highest, self.value_count, self._phase)

    @property
    def place_code(self) -> Fourier:
        return Fourier(self.place_highest, self.place_count, self._phase)

    @property
    def _phase(self) -> float:
        return 0.75 * math.pi if "short_phase" in self.quirks else math.pi

    @property
    def band_dim(self) -> int:
        return len(self.anchors) + (2 * LOGARITHM.dim if self.resolution else 0)

    @property
    def date_dim(self) -> int:
        return 1 + 2 * SEASONS + YEARS.dim if self.time else 0


@dataclass(frozen=True)
class Channel:
    """A band as its tokens know it: its physics, and the larger of its own resolution and the pixel, metres."""

    physics: Physics
    resolution_m: float

    @property
    def kind(self) -> int:
        """A number that says the same, 46 bits."""
        return key(repr(self)) >> 17


class Cross(nn.Module):
    """Latents read tokens, then an MLP."""

    def __init__(self, config: Config, context: int) -> None:
        super().__init__()
        self.reading = Reading(config.dim, context, config.cross_heads, config.cross_head_dim)
        self.feed = GatedMlp(config.dim)

    def forward(self, x: Tensor, kv: Tensor, count: Tensor) -> Tensor:
        """Latents ``x`` [place, latent, dim]; keys and values of the places, ``count`` of each."""
        queries = torch.full_like(count, x.shape[1])
        return self.feed(self.reading(x.flatten(0, 1), kv, queries, count).view_as(x))

    def streamed(self, x: Tensor, atoms: Atoms, count: Tensor) -> Tensor:
        """The same, with keys and values that are made in parts."""
        ends = torch.cumsum(count, 0).tolist()
        parts = []
        for place, (end, there) in enumerate(zip(ends, count.tolist(), strict=True)):
            starts = range(end - there, end, CHUNK_PAIRS // 2)
            some = (atoms[slice(a, min(a + CHUNK_PAIRS // 2, end))].projected([self.reading.map])[0] for a in starts)
            parts.append(self.reading.streamed(x[place], some) if there else x[place])
        return self.feed(torch.stack(parts))


class Self(nn.Module):
    """Latents read each other, then an MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention, self.feed = LatentAttention(config.dim, config.heads, config.head_dim), GatedMlp(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.attention(x))


class ReadOut(nn.Module):
    """Features of cells: a query of the cell's position reads the latents of its place and, if ``local``, the tokens in the cell.

    Those pass a layer of their own first: in a mean of vectors that add up the codes of band and value, it would be lost which value
    is of which band. (Latents tell them apart by what each of them attends to.)"""

    def __init__(self, config: Config, context: int) -> None:
        super().__init__()
        self.embed = nn.Linear(2 * config.place_code.dim + 1, config.dim)
        self.latents = Reading(config.dim, config.dim, config.heads, config.head_dim)
        self.own = Reading(config.dim, config.dim, config.heads, config.head_dim) if config.local else None
        if config.local:
            self.token_norm, self.token = nn.LayerNorm(context), nn.Linear(context, config.dim)
        self.feed, self.norm = GatedMlp(config.dim), nn.LayerNorm(config.dim)

    def forward(self, code: Tensor, latents: Tensor, cells: Tensor, atoms: Atoms | None, query: Tensor) -> Tensor:
        """Features [cell, dim] of cells with this ``code``, ``cells`` [place] of each place; ``atoms`` are those in the cells ``query``."""
        kv = self.latents.to_kv(self.latents.context_norm(latents)).flatten(0, 1)
        x = self.latents(self.embed(code), kv, cells, torch.full_like(cells, latents.shape[1]))
        if self.own is not None and atoms is not None and len(atoms):
            x = self._with_own(x, atoms, query)
        return self.norm(self.feed(x))

    def _with_own(self, x: Tensor, atoms: Atoms, query: Tensor) -> Tensor:
        """In inference, some cells at a time."""
        if torch.is_grad_enabled() or len(atoms) <= CHUNK_PAIRS:
            return self._some_with_own(x, atoms, query)
        order = torch.argsort(query, stable=True)
        ends = torch.cumsum(torch.bincount(query, minlength=len(x)), 0)
        parts, cell, done = [], 0, 0
        while cell < len(x):
            last = max(cell + 1, int(torch.searchsorted(ends, done + CHUNK_PAIRS, right=True)))
            pick, done = order[done : int(ends[last - 1])], int(ends[last - 1])
            parts.append(self._some_with_own(x[cell:last], atoms[pick], query[pick] - cell))
            cell = last
        return torch.cat(parts)

    def _some_with_own(self, x: Tensor, atoms: Atoms, query: Tensor) -> Tensor:
        assert self.own is not None
        hidden = F.gelu(atoms.projected([(self.token_norm, self.token.weight)])[0] + self.token.bias)
        return self.own.own(x, self.own.to_kv(self.own.context_norm(hidden)), query)


class Atomizer(AnySensor):
    """See the module's text. A token of ``tokenize`` is a value with its coordinates, the group being its layer and band; ``forward`` gives
    features per cell that any token touches, and as summary what a learned query reads from the latents."""

    family = "atomizer"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._take(config)
        self.dim = config.dim
        common = config.band_dim + config.value_code.dim + config.date_dim
        context = common + 2 * config.place_code.dim
        first = config.tied and "own_first_layer" in config.quirks
        crosses = min(config.depth, 2) if config.tied else config.depth
        selfs = crosses if first or not config.tied else 1
        self.latents = nn.Parameter(torch.empty(config.latents, config.dim))
        self.codes = nn.Parameter(torch.empty(len(CODES), len(config.anchors))) if config.codes else None
        self.crosses = nn.ModuleList(Cross(config, context) for _ in range(crosses))
        self.selfs = nn.ModuleList(nn.ModuleList(Self(config) for _ in range(config.per_cross)) for _ in range(selfs))
        temperature = 10.0 if "temperature_10" in config.quirks else 1.0
        self.pooling = Pooling(config.dim, config.heads, config.head_dim, temperature)
        self.read_out = ReadOut(config, common + 2 * OFFSET.dim) if config.dense else None
        for parameter in (self.latents, self.codes):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02 if parameter is self.latents else 0.5)

    def _take(self, config: Config) -> None:
        self.settings, self.config = config, config.model_dump(mode="json", exclude_none=True)
        self.inputs = {name: modality.input(dated=modality.dated) for name, modality in config.modalities.items()}

    def at(self, **changes: Any) -> Atomizer:
        """The same encoder, sharing its weights, with another ``token_m``, ``budget``, ``layers`` or ``cells``."""
        known = ("token_m", "budget", "layers", "cells")
        for name in changes:
            if name not in known:
                raise TypeError(f"{name} cannot be changed at a call. {suggest(name, known)}")
        twin = copy.copy(self)
        twin._take(Config.model_validate({**self.config, **changes}))
        return twin

    # --- from pixels to tokens -----------------------------------------------------------------------------------------

    def tokenize(self, batch: Batch) -> Tokens:
        """One token per valid value, places behind each other. ``x`` is the normalised value [token, 1]; ``memo`` has the channels of the
        groups.

        Raises:
            ContractError: a band without physics or without moments, or, in a model without codes, of radar or terrain.
        """
        batch = self.known(batch)
        channels: dict[str, Channel] = {}
        parts = [self._values(name, batch.raster(name), channels) for name in sorted(batch.layers)]
        device = self.latents.device
        nowhere = torch.zeros(0, dtype=torch.long, device=device)
        always = torch.zeros(0, 2, dtype=torch.float64, device=device)
        empty = Coords(nowhere, always.float(), always[:, 0].float(), always, nowhere)
        values = torch.cat([self.latents.new_zeros(0), *(v for v, _ in parts)])
        coords = Coords.cat([empty, *(c for _, c in parts)])
        if len(batch) > 1:
            order = torch.argsort(coords.row, stable=True)
            values, coords = values[order], coords[order]
        memo = {"channels": tuple(channels.values())}
        return Tokens(values[:, None], coords, tuple(channels), batch.places, memo)

    def _values(self, name: str, raster: Raster, channels: dict[str, Channel]) -> tuple[Tensor, Coords]:
        """Valid values of a layer, normalised, with their coordinates; adds its bands to ``channels``."""
        raster, wanted = self.contracted(name, raster)
        first = len(channels)
        for band in raster.sensor.bands:
            found = physics(raster.sensor, band)
            assert found is not None
            if found.kind != "optical" and self.codes is None:
                raise ContractError(
                    f"layer {name!r} band {band.name} is of kind {found.kind}, for which this model has no codes: it knows wavelengths alone. "
                    f"Leave the layer out with batch.without({name!r}), or train a model with codes"
                )
            channels[f"{name}/{band.name}"] = Channel(found, max(band.gsd_m, raster.gsd_m))
        obs, band_number, y, x = torch.nonzero(raster.valid, as_tuple=True)
        values = wanted.normalise(raster)[raster.valid].to(self.latents.dtype)
        at_m = (torch.stack([y, x], -1) + 0.5) * raster.gsd_m
        size_m = torch.full((len(y),), raster.gsd_m, device=y.device)
        return values, Coords(raster.row[obs], at_m, size_m, raster.time_s[obs], first + band_number)

    def channel_table(self, channels: Sequence[Channel]) -> Tensor:
        """Codes of bands [channel, band_dim]."""
        device = self.latents.device
        optical = torch.tensor([c.physics.kind == "optical" for c in channels], dtype=torch.bool, device=device)
        wave = torch.tensor([[c.physics.wavelength_nm, c.physics.width_nm] for c in channels], device=device).view(
            -1, 2
        )
        points = 50 if "sampled_bands" in self.settings.quirks else 0
        anchors = torch.tensor(self.settings.anchors, device=device)
        code = torch.where(optical[:, None], spectral_code(wave[:, 0], wave[:, 1], anchors, points), 0.0)
        if self.codes is not None and not optical.all():
            learned = torch.zeros(len(channels), len(CODES), device=device)
            for number, channel in enumerate(channels):
                for name in _code_names(channel.physics):
                    learned[number, CODES.index(name)] += 1.0
            code = code + (learned / learned.sum(1, keepdim=True).clamp(min=1)) @ self.codes
        if not self.settings.resolution:
            return code
        size = torch.tensor([c.resolution_m for c in channels], device=device)
        known = torch.isfinite(wave[:, 1])
        width = LOGARITHM(torch.log2(wave[:, 1].nan_to_num(30.0) / 30.0) / 8) * known[:, None]
        return torch.cat([code, LOGARITHM(torch.log2(size / 10.0) / 8), width], -1)

    def atoms(self, tokens: Tokens) -> Atoms:
        """Values and codes of tokens, as what cross-attention reads."""
        coords = tokens.coords
        at = self._positions(coords, tokens)
        row, column = (_coded(at[:, axis], self.settings.place_code) for axis in (0, 1))
        band = Part(self.channel_table(tokens.memo["channels"]), coords.group)
        return Atoms(band, tokens.x[:, 0], self.settings.value_code, (row, column, *self._dates(coords)))

    def _dates(self, coords: Coords) -> tuple[Part, ...]:
        if not self.settings.time:
            return ()
        middle = coords.time_s.mean(1).nan_to_num(-math.inf)
        found, index = torch.unique(middle, return_inverse=True)
        return (Part(date_code(found, YEARS).to(self.latents.dtype), index),)

    def _positions(self, coords: Coords, tokens: Tokens) -> Tensor:
        """Metres south and east of the middle of the place, in units of ``unit_m``, [token, 2]."""
        extent = _extents(tokens).to(coords.at_m.dtype)[coords.row]
        at = (coords.at_m - extent / 2) / self.settings.unit_m
        if "corner_positions" in self.settings.quirks:
            count = extent / coords.size_m[:, None]
            at = at * count / (count - 1).clamp(min=1)
        return at * 2 if "double_extent" in self.settings.quirks else at

    # --- from tokens to features ---------------------------------------------------------------------------------------

    def forward(
        self, tokens: Tokens, *, hidden: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Features:
        """Features. ``hidden`` bool [token]: not read, though the cells that they touch have features. In training, or with a
        ``generator``, which the draws are then made from, tokens are pruned as the settings say."""
        return self.encoded(tokens, hidden=hidden, generator=generator)[0]

    def encoded(
        self, tokens: Tokens, *, hidden: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Features, Tensor]:
        """What :meth:`forward` says, and the latents [place, latent, dim]."""
        some = self.affordable(tokens if hidden is None else tokens[~hidden])
        kept = self.pruned(some, generator) if self.settings.prune and (self.training or generator is not None) else []
        latents = self.states(self.atoms(some), some.coords.row, len(tokens.places), kept)[-1]
        summary = self.pooling(latents)
        mean, coords = self._whole(tokens, summary) if self.read_out is None else self._cells(tokens, some, latents)
        return Features(mean, coords, summary, tokens.places), latents

    def affordable(self, tokens: Tokens) -> Tokens:
        """The tokens within the budget: see :func:`spread_evenly`."""
        budget, coords, rows = self.settings.budget, tokens.coords, len(tokens.places)
        if not budget or not len(tokens) or int(torch.bincount(coords.row).max()) <= budget:
            return tokens
        kinds = torch.tensor([c.kind for c in tokens.memo["channels"]], device=coords.row.device)
        day = coords.time_s.mean(1).nan_to_num(0.0).long()
        at = coords.at_m / _extents(tokens).to(coords.at_m.dtype)[coords.row]
        return tokens[spread_evenly(coords.row, at, kinds[coords.group] + day, rows, budget)]

    def pruned(self, tokens: Tokens, generator: torch.Generator | None = None) -> list[Tensor]:
        """Which tokens each layer reads in training, as indices."""
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,))))
        row, rows, share = tokens.coords.row, len(tokens.places), self.settings.prune
        first = row_offset(rows, row.device)
        everything = torch.arange(len(row), device=row.device)
        kept: list[Tensor] = []
        for _ in range(self.settings.depth):
            pool = kept[-1] if kept and self.settings.regime == "cumulative" else everything
            count = torch.bincount(row[pool], minlength=rows)
            kept.append(pool[kept_at_random(row[pool], count - (count * share).long(), generator, first)])
        return kept

    def states(self, atoms: Atoms, row: Tensor, rows: int, kept: Sequence[Tensor] = ()) -> list[Tensor]:
        """Latents [place, latent, dim] after each cross-attention block and each self-attention block, in order. ``kept``: for each layer
        the atoms that it reads; by default all."""
        x = self.latents.expand(rows, -1, -1)
        crosses: list[Any] = list(self.crosses)
        maps: list[tuple[nn.LayerNorm, Tensor]] = [cross.reading.map for cross in crosses]
        width = sum(len(weight) for _, weight in maps) if self.settings.tied else len(maps[0][1])
        stream = not torch.is_grad_enabled() and len(atoms) * width > HELD_ELEMENTS
        # Tied layers have the same keys and values. Those of other layers are made when they are needed, not held together.
        held = atoms.projected(maps) if self.settings.tied and not stream else []
        everywhere = torch.bincount(row, minlength=rows)
        states = []
        for layer in range(self.settings.depth):
            number = min(layer, len(crosses) - 1)
            pick = kept[layer] if kept else None
            count = everywhere if pick is None else torch.bincount(row[pick], minlength=rows)
            if stream:
                x = crosses[number].streamed(x, atoms if pick is None else atoms[pick], count)
            else:
                kv = held[number] if held else atoms.projected([maps[number]])[0]
                x = crosses[number](x, kv if pick is None else kv[pick], count)
            for block in self.selfs[min(layer, len(self.selfs) - 1)]:  # type: ignore[attr-defined]
                x = block(x)
            states.append(x)
        return states

    def _whole(self, tokens: Tokens, summary: Tensor) -> tuple[Tensor, Coords]:
        """The summary as the one token of each place that has any."""
        row = torch.unique(tokens.coords.row)
        extent = _extents(tokens).to(tokens.coords.at_m.dtype)[row]
        return summary[row], _undated(row, extent / 2, extent.max(1).values)

    def _cells(self, tokens: Tokens, some: Tokens, latents: Tensor) -> tuple[Tensor, Coords]:
        """Features of all cells that a token touches; those read the tokens of ``some`` that lie in them."""
        side = self.settings.token_m
        grid = (torch.ceil(_extents(tokens) / side - 1e-4)).long()
        _, cell = _touched(tokens.coords, grid, side)
        found = torch.unique(cell)
        height, width = grid.max(0).values.tolist()
        row, y, x = found // (height * width), found // width % height, found % width
        at_m = ((torch.stack([y, x], -1) + 0.5) * side).to(tokens.coords.at_m.dtype)
        coords = _undated(row, at_m, at_m.new_full((len(row),), side))
        atoms, query = None, found
        if self.settings.local:
            token, cell = _touched(some.coords, grid, side)
            query = torch.searchsorted(found, cell)
            atoms = self.own_atoms(some, token, some.coords.at_m[token] - at_m[query])
        return self.read(latents, coords, tokens, atoms, query), coords

    def read(self, latents: Tensor, coords: Coords, tokens: Tokens, atoms: Atoms | None, query: Tensor) -> Tensor:
        """Features [cell, dim] of cells at ``coords``, rows ascending, from latents and from the ``atoms`` in the cells ``query``."""
        assert self.read_out is not None
        at = (coords.at_m - _extents(tokens).to(coords.at_m.dtype)[coords.row] / 2) / self.settings.unit_m
        code = self.settings.place_code(at).flatten(1)
        size = torch.log2(coords.size_m / 10.0)[:, None] / 8
        cells = torch.bincount(coords.row, minlength=len(tokens.places))
        return self.read_out(torch.cat([code, size], 1), latents, cells, atoms, query)

    def own_atoms(self, tokens: Tokens, token: Tensor, offset_m: Tensor) -> Atoms:
        """Values and codes of the tokens with these numbers [pair], with positions relative to the middle of a cell: in cells, and far
        ones drawn nearer."""
        # Rounded, so that what is equal up to the last digit has one code.
        u = (offset_m / self.settings.token_m * 4096).round() / 4096
        row, column = (_coded((u / (1 + u.abs()))[:, axis], OFFSET) for axis in (0, 1))
        coords = tokens.coords
        band = Part(self.channel_table(tokens.memo["channels"]), coords.group)[token]
        dates = tuple(part[token] for part in self._dates(coords))
        return Atoms(band, tokens.x[token, 0], self.settings.value_code, (row, column, *dates))


def _extents(tokens: Tokens) -> Tensor:
    """Height and width of the places, metres, float64 [place, 2]."""
    sides = [(p.height_m, p.width_m) for p in tokens.places]
    return torch.tensor(sides, dtype=torch.float64, device=tokens.x.device).view(-1, 2)


def _undated(row: Tensor, at_m: Tensor, size_m: Tensor) -> Coords:
    always = torch.tensor(ALWAYS, dtype=torch.float64, device=row.device).expand(len(row), 2)
    return Coords(row, at_m, size_m, always, torch.zeros_like(row))


def _coded(x: Tensor, code: Fourier) -> Part:
    found, index = torch.unique(x, return_inverse=True)
    return Part(code(found), index)


def _code_names(p: Physics) -> list[str]:
    """Names of the learned codes of a band, of which it has the mean: radar of unknown orbit has both."""
    if p.kind == "sar":
        return [f"{orbit}_{p.code}" for orbit in ([p.orbit] if p.orbit in ORBITS else ORBITS)]
    return [p.code] if p.kind == "terrain" else []


def _touched(coords: Coords, grid: Tensor, side: float) -> tuple[Tensor, Tensor]:
    """Pairs of a token and a cell, int64 [pair] each: the cell that holds the middle of the token's pixel, or, of pixels larger than
    ``side``, all cells whose middle it holds. ``grid`` [place, 2] counts the cells of the places; those of all places are numbered
    as if all had as many."""
    size = coords.size_m[:, None].double()
    at = coords.at_m.double()
    fine = torch.floor(at / side + 1e-6).long()
    low, high = (torch.ceil((at + sign * size / 2) / side - 0.5 - 1e-6).long() for sign in (-1, 1))
    large = size > side * (1 + 1e-6)
    limit = grid[coords.row]
    low = torch.where(large, low, fine).clamp(min=0)
    high = torch.minimum(torch.where(large, high, fine + 1), limit)
    count = (high - low).clamp(min=0)
    pairs = count.prod(1)
    token = torch.repeat_interleave(pairs)
    within = torch.arange(len(token), device=token.device) - (torch.cumsum(pairs, 0) - pairs)[token]
    y, x = low[token, 0] + within // count[token, 1], low[token, 1] + within % count[token, 1]
    height, width = grid.max(0).values
    return token, (coords.row[token] * height + y) * width + x


# --- variants, and weights under the names of the published code -------------------------------------------------------------

PUBLISHED_ANCHORS = (
    *((float(middle), 15.0) for middle in (380, 424, 468, 513, 557, 602, 646, 691, 735, 780, 850, 940)),
    (1400.0, 30.0),
    (1600.0, 40.0),
    (2100.0, 120.0),
)
"""The only Gaussians that the authors published, in a notebook."""


def _even(lowest_nm: float, highest_nm: float, count: int) -> tuple[tuple[float, float], ...]:
    """Gaussians at even ratios, each as wide as 0.6 of the way to the next."""
    ratio = (highest_nm / lowest_nm) ** (1 / (count - 1))
    return tuple((lowest_nm * ratio**i, 0.6 * (ratio - 1) * lowest_nm * ratio**i) for i in range(count))


ANCHORS = _even(350.0, 2600.0, 32) + _even(3500.0, 13000.0, 8)
"""From the ultraviolet to the thermal infrared without a gap; the published ones leave out, for instance, 1000-1300 nm."""

_SUBMITTED: dict[str, Any] = {
    "anchors": PUBLISHED_ANCHORS,
    "time": False,
    "resolution": False,
    "codes": False,
    "dense": False,
    "local": False,
}
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
VARIANTS: dict[str, dict[str, Any]] = {
    "bmvc": {
        **_SUBMITTED,
        "value_highest": 64.0,
        "value_count": 64,
        "place_highest": 64.0,
        "place_count": 64,
        "quirks": ("double_extent", "corner_positions", "short_phase", "sampled_bands", "own_first_layer"),
    },
    "small": {"anchors": ANCHORS, "dim": 384, "latents": 256, "heads": 6, "depth": 4, "per_cross": 2},
    "tiny": {"anchors": ANCHORS, "dim": 192, "latents": 128, "heads": 3, "depth": 3, "per_cross": 1, "place_count": 16},
    "nano": {
        "anchors": ANCHORS,
        "dim": 32,
        "latents": 8,
        "heads": 2,
        "head_dim": 8,
        "cross_head_dim": 8,
        "depth": 3,
        "per_cross": 1,
        "value_count": 4,
        "place_count": 4,
        "token_m": 20.0,
        "modalities": _NANO,
    },
}
"""``bmvc``: formulas of the submitted code, sizes assumed (the defaults of its signatures, and what later code hints at): the paper's
hyper-parameters are lost. ``small`` and ``tiny`` are this toolkit's own, with dates, resolution, radar, terrain and features per cell;
``nano`` is for tests."""

PUBLISHED: dict[str, Any] = {}
"""The variant ``bmvc`` says all; no weights are published."""


def build(variant: str = "small", **changes: Any) -> Atomizer:
    """A fresh Atomizer: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"atomizer has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({"anchors": ANCHORS, **VARIANTS.get(variant, {}), **changes})


def from_config(config: Mapping[str, Any]) -> Atomizer:
    return Atomizer(Config.model_validate(dict(config)))


DROPPED = {
    r"^transform\.": "codes of bands that the first forward pass kept; they are computed here",
    r"^to_logits\.2\.": "the classifier of BigEarthNet; a task brings its own",
}
"""Keys of published weights that have no counterpart here, by pattern, and why."""

_RENAMES = (
    (r"^layers\.(\d+)\.0\.", r"crosses.\1.reading."),
    (r"^layers\.(\d+)\.1\.", r"crosses.\1.feed."),
    (r"^layers\.(\d+)\.2\.(\d+)\.0\.", r"selfs.\1.\2.attention."),
    (r"^layers\.(\d+)\.2\.(\d+)\.1\.", r"selfs.\1.\2.feed."),
    (r"^to_logits\.0\.(cross\.)?", "pooling."),
    (r"^to_logits\.1\.", "pooling.norm."),
    (r"\.fn\.", "."),
    (r"\.norm_context\.", ".context_norm."),
    (r"\.to_out\.0\.", ".to_out."),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the code of BMVC under the names used here. Its states list tied layers again and again: the copies must be equal."""
    settings = Config.model_validate(dict(config))
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if any(re.search(pattern, name) for pattern in DROPPED):
            continue
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        out[name] = value
    if settings.tied:
        if "own_first_layer" not in settings.quirks:
            raise ContractError("published weights tie all layers but the first: add 'own_first_layer' to quirks")
        for layer in range(2, settings.depth):
            for name in [n for n in out if re.match(r"(crosses|selfs)\.1\.", n)]:
                copy_ = re.sub(r"\.1\.", f".{layer}.", name, count=1)
                if not torch.equal(out.pop(copy_), out[name]):
                    raise ContractError(f"{copy_} differs from {name}, but layers are tied; give tied=False")
    return out

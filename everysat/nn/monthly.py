"""Radar, optical, weather and terrain layers of places in steps of a month, as the models of NASA Harvest (Presto, Galileo) read them.

A step holds the mean of what was observed in it, band by band. Composites of about a month are steps as they are; single images, days and
dekads are first averaged by calendar month. Steps are counted in 30 days from the first, so that a month without any observation leaves a
gap; months are those in which steps begin. Weather is that of the calendar month in which a step begins, and belongs to the whole place.

What was not observed is not there: no band, and no index made of one, is filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from everysat.nn.inputs import InputConfig
from everysat.types import Batch, ContractError, Input, Raster

DAY_S = 86400.0
STEP_S = 30 * DAY_S
SHORT_S, LONG_S = 20 * DAY_S, 62 * DAY_S
"""Observations shorter than the one are averaged by month; one longer than the other is none of a month."""

RADAR = ("VV", "VH")
OPTICAL = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
SERIES = (*RADAR, *OPTICAL, "NDVI")
_BANDS: dict[str, tuple[str, ...]] = {
    "S1": RADAR,
    "S2_RGB": OPTICAL[:3],
    "S2_Red_Edge": OPTICAL[3:6],
    "S2_NIR_10m": ("B08",),
    "S2_NIR_20m": ("B8A",),
    "S2_SWIR": ("B11", "B12"),
    "ERA5": ("temperature", "rain"),
    "SRTM": ("elevation", "slope"),
    "NDVI": ("NDVI",),
}
GROUPS = tuple(_BANDS)
"""Groups of bands, each of which is one token: there, if all its bands are."""
WEATHER, TERRAIN = GROUPS.index("ERA5"), GROUPS.index("SRTM")
CHANNELS = {name: tuple(SERIES.index(b) for b in bands) for name, bands in _BANDS.items() if set(bands) <= set(SERIES)}
"""Of each group that is a series of pixels, its bands by their number in :data:`SERIES`."""
WIDTHS = {name: len(bands) for name, bands in _BANDS.items()}

Role = Literal["radar", "optical", "weather", "terrain"]
LAYERS: dict[str, tuple[Role, str, tuple[str, ...], tuple[str, ...]]] = {
    "s2": ("optical", "sentinel-2-l2a", OPTICAL, ("sentinel-2-l1c",)),
    "s1": ("radar", "sentinel-1-grd", RADAR, ("sentinel-1-asc", "sentinel-1-desc")),
    "s1-asc": ("radar", "sentinel-1-asc", RADAR, ()),
    "s1-des": ("radar", "sentinel-1-desc", RADAR, ()),
    "era5": ("weather", "era5-land-monthly", ("t2m", "tp"), ()),
    "agera5": ("weather", "agera5", ("Temperature_Air_2m_Mean_24h", "Precipitation_Flux"), ()),
    "srtm": ("terrain", "srtm-terrain", ("elevation", "slope"), ()),
}
"""Of each layer its role, sensor and bands, and sensors whose bands are taken just as well."""


class Monthly(InputConfig):
    """A layer and its ``role``. Bands are those of the role in that order: VV and VH; any of :data:`OPTICAL`, where groups that are not whole
    are left out; temperature (K) and sum of rain (mm); elevation (m) and slope (degrees). ``also``: other sensors with the same bands
    that are taken for this one. Layers of one role are averaged. Pixels of weather may have any size."""

    role: Role
    also: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _bands_fit(self) -> Monthly:
        if self.role == "optical" and not set(self.bands) <= set(OPTICAL):
            raise ValueError(f"bands={self.bands} of an optical layer must be of {', '.join(OPTICAL)}")
        if self.role == "radar" and self.bands != RADAR:
            raise ValueError(f"bands={self.bands} of a radar layer must be {', '.join(RADAR)}")
        if self.role in ("weather", "terrain") and len(self.bands) != 2:
            raise ValueError(f"bands={self.bands} of a {self.role} layer must be two")
        return self

    def less(self, bands: Sequence[str]) -> Monthly:
        """An optical layer without these bands; any other as it is."""
        if self.role != "optical":
            return self
        kept = [i for i, band in enumerate(self.bands) if band not in bands]
        parts = {k: getattr(self, k) for k in ("bands", "mean", "std") if getattr(self, k) is not None}
        return self.model_copy(update={k: tuple(values[i] for i in kept) for k, values in parts.items()})

    def fit(self, raster: Raster, wanted: Input, name: str) -> Raster:
        """``raster`` as the contract has it, without observations that saw nothing, or a ContractError."""
        if raster.sensor.name in self.also:
            raster = replace(raster, sensor=replace(raster.sensor, name=wanted.sensor.name))
        if self.role == "weather":
            wanted = replace(wanted, gsd_m=raster.gsd_m)
        raster = wanted.fit(raster, name)
        raster = raster.obs(raster.valid.flatten(1).any(1))
        length = raster.time_s[:, 1] - raster.time_s[:, 0]
        if self.role != "terrain" and (length > LONG_S).any():
            raise ContractError(
                f"layer {name!r} has an observation of {float(length.max()) / DAY_S:.0f} days; the model reads months. Give composites "
                f"of at most {LONG_S / DAY_S:.0f} days, or leave the layer out with batch.without({name!r})"
            )
        return raster


def contract(mean: Mapping[Role, Sequence[float]], std: Mapping[Role, Sequence[float]], gsd_m: float) -> dict[str, Any]:
    """Descriptions of all :data:`LAYERS` with these statistics of each role."""
    return {
        name: {
            "role": role,
            "sensor": sensor,
            "bands": bands,
            "also": also,
            "gsd_m": gsd_m,
            "mean": tuple(mean[role]),
            "std": tuple(std[role]),
        }
        for name, (role, sensor, bands, also) in LAYERS.items()
    }


class MonthlyConfig(BaseModel):
    """Layers of a model that reads months, by name.

    Attributes:
        gsd_m: side of a pixel, metres.
        steps: months that a place may be observed over.
        without: optical bands that the data lack; groups that they belong to are left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modalities: dict[str, Monthly]
    gsd_m: float = 10.0
    steps: int = 24
    without: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _layers_fit(self) -> MonthlyConfig:
        if other := [n for n, m in self.modalities.items() if m.gsd_m != self.gsd_m and m.role != "weather"]:
            raise ValueError(f"gsd_m of modality {other[0]!r} must be that of the model, {self.gsd_m:g}")
        if unknown := [band for band in self.without if band not in OPTICAL]:
            raise ValueError(f"without={self.without}: {unknown[0]} is none of the optical bands {', '.join(OPTICAL)}")
        return self

    @property
    def layers(self) -> dict[str, Monthly]:
        """The layers with the bands that are read."""
        return {name: modality.less(self.without) for name, modality in self.modalities.items()}

    def inputs(self) -> dict[str, Input]:
        """Their band contracts."""
        return {name: modality.input(dated=modality.role != "terrain") for name, modality in self.layers.items()}


@dataclass(frozen=True)
class Months:
    """Steps of places, and what was observed in them, normalised; 0 where not valid.

    Attributes:
        row, step, month: int64 [step]: place, number among the steps of the place, month of the year from 0.
        begin_s: float64 [step], when it begins.
        series, valid: [step, 13, y, x], the bands :data:`SERIES`.
        weather, has_weather: [step, 2] and bool [step].
        terrain, has_terrain: [place, 2, y, x] and bool [place, y, x].
    """

    row: Tensor
    step: Tensor
    month: Tensor
    begin_s: Tensor
    series: Tensor
    valid: Tensor
    weather: Tensor
    has_weather: Tensor
    terrain: Tensor
    has_terrain: Tensor

    @property
    def time_s(self) -> Tensor:
        """Start and end of each step, float64 [step, 2]."""
        return torch.stack([self.begin_s, self.begin_s + STEP_S], 1)


def months(
    batch: Batch,
    modalities: Mapping[str, Monthly],
    inputs: Mapping[str, Input],
    grid: tuple[int, int],
    steps: int,
    rain: Literal["day", "month"],
) -> Months:
    """The layers of ``batch`` that are in the contract, on ``grid`` (rows, columns of pixels), in at most ``steps`` steps.

    ``rain``: what its mean and deviation are of, millimetres a day or in the calendar month.

    Raises:
        ContractError: a layer does not fit, or covers more than ``steps`` steps.
    """
    found = {n: m.fit(batch.raster(n), inputs[n], n) for n, m in modalities.items() if n in batch.layers}
    names: dict[str, list[str]] = {role: [] for role in ("radar", "optical", "weather", "terrain")}
    for name in found:
        names[modalities[name].role].append(name)
    pixels = [*names["radar"], *names["optical"]]
    device = batch.raster(next(iter(found))).values.device if found else None
    row, step, begin_s = _steps(
        [found[n] for n in pixels], [found[n] for n in names["weather"]], len(batch), steps, device
    )
    first = _first(row, begin_s, len(batch))
    key = row * steps + step
    series = _Mean((len(row), len(SERIES), *grid), device)
    for name in pixels:
        raster = found[name]
        slot = torch.searchsorted(key, raster.row * steps + _number(_begins(raster), first[raster.row]))
        series.add(slot, *_pixels(raster, inputs[name], modalities[name], grid), _channels(modalities[name]))
    weather, has_weather = _weather({n: found[n] for n in names["weather"]}, inputs, row, _month(begin_s), rain)
    terrain = _Mean((len(batch), 2, *grid), device)
    for name in names["terrain"]:
        terrain.add(found[name].row, *_placed(found[name], inputs[name], grid), [0, 1])
    height, seen = terrain.result()
    values, valid = series.result()
    return Months(row, step, _month(begin_s) % 12, begin_s, values, valid, weather, has_weather, height, seen.all(1))


class _Mean:
    """Mean over observations of images, channel by channel, of what is valid."""

    def __init__(self, shape: tuple[int, ...], device: Any) -> None:
        self.total, self.count = torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    def add(self, slot: Tensor, values: Tensor, valid: Tensor, channels: list[int]) -> None:
        for kept, new in ((self.total, torch.where(valid, values, 0.0)), (self.count, valid)):
            kept[:, channels] += torch.zeros_like(kept[:, channels]).index_add(0, slot, new.to(kept.dtype))

    def result(self) -> tuple[Tensor, Tensor]:
        return self.total / self.count.clamp(min=1.0), self.count > 0


def _channels(modality: Monthly) -> list[int]:
    """Numbers in :data:`SERIES` of what :func:`_pixels` gives."""
    names = list(modality.bands)
    return [SERIES.index(name) for name in (*names, *(("NDVI",) if {"B04", "B08"} <= set(names) else ()))]


def _pixels(raster: Raster, wanted: Input, modality: Monthly, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Normalised bands, and behind them the NDVI, which needs light in both of its bands."""
    values, valid = _placed(raster, wanted, grid)
    if "NDVI" not in [SERIES[channel] for channel in _channels(modality)]:
        return values, valid
    raw = raster._padded(*grid).values[..., : grid[0], : grid[1]]
    at = [modality.bands.index(name) for name in ("B04", "B08")]
    seen = valid[:, at].all(1, keepdim=True)
    red, near = torch.where(seen, raw[:, at], 0.0).unbind(1)
    light = red + near
    index = (near - red) / torch.where(light > 0, light, 1.0)
    return torch.cat([values, index[:, None]], 1), torch.cat([valid, seen & (light > 0)[:, None]], 1)


def _placed(raster: Raster, wanted: Input, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Normalised values and validity on the grid."""
    raster = raster._padded(*grid)
    inside = (..., slice(grid[0]), slice(grid[1]))
    return wanted.normalise(raster)[inside], raster.valid[inside]


def _weather(
    layers: Mapping[str, Raster], inputs: Mapping[str, Input], row: Tensor, month: Tensor, rain: str
) -> tuple[Tensor, Tensor]:
    """Weather [step, 2] of the month in which each step of a place begins, and where both of its parts are known."""
    span = int(month.max() - month.min()) + 1 if len(month) else 1
    start = int(month.min()) if len(month) else 0
    key = row * span + (month - start)
    distinct, slot = torch.unique(key, return_inverse=True)
    mean = _Mean((len(distinct), 2, 1, 1), row.device)
    for name, raster in layers.items():
        of = _month(raster.time_s[:, 0])
        keep = (of >= start) & (of < start + span)
        raster, of = raster.obs(keep), of[keep]
        own = raster.row * span + (of - start)
        position = torch.searchsorted(distinct, own).clamp(max=max(len(distinct) - 1, 0))
        there = distinct[position] == own if len(distinct) else torch.zeros_like(own, dtype=torch.bool)
        raster, of = raster.obs(there), of[there]
        days = ((raster.time_s[:, 1] - raster.time_s[:, 0]) / DAY_S).clamp(min=1.0)
        factor = torch.ones(len(of), 2, device=row.device)
        factor[:, 1] = (_days(of) if rain == "month" else 1.0) / days
        scaled = replace(raster, values=raster.values * factor[:, :, None, None].to(raster.values.dtype))
        count = raster.valid.sum((2, 3), keepdim=True)
        values = inputs[name].normalise(scaled).sum((2, 3), keepdim=True) / count.clamp(min=1)
        mean.add(position[there], values, count > 0, [0, 1])
    values, seen = mean.result()
    return values[slot, :, 0, 0], seen[slot].flatten(1).all(1)


def _steps(
    pixels: Sequence[Raster], weather: Sequence[Raster], places: int, steps: int, device: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Place, number and start of every step in which anything was seen, in order: from the images of a place, or, if it has none, from
    its weather."""
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    row = torch.cat([nothing, *(raster.row for raster in pixels)])
    begin_s = torch.cat([nothing.double(), *(_begins(raster) for raster in pixels)])
    pictured = torch.bincount(row, minlength=places) > 0
    for raster in weather:
        other = ~pictured[raster.row]
        row = torch.cat([row, raster.row[other]])
        begin_s = torch.cat([begin_s, _start(_month(raster.time_s[other, 0]))])
    number = _number(begin_s, _first(row, begin_s, places)[row])
    if len(number) and int(number.max()) >= steps:
        raise ContractError(
            f"place {int(row[number.argmax()])} was observed over {int(number.max()) + 1} months, the model takes {steps}. Read a shorter "
            "period, or cut it: raster.obs(raster.time_s[:, 0] < end)"
        )
    key, slot = torch.unique(row * steps + number, return_inverse=True)
    start = torch.full((len(key),), math.inf, dtype=torch.float64, device=device)
    return key // steps, key % steps, start.scatter_reduce(0, slot, begin_s, "amin")


def _first(row: Tensor, begin_s: Tensor, places: int) -> Tensor:
    """When the first step of each place begins; infinity if there is none."""
    return torch.full((places,), math.inf, dtype=torch.float64, device=row.device).scatter_reduce(
        0, row, begin_s, "amin"
    )


def _number(begin_s: Tensor, first_s: Tensor) -> Tensor:
    return ((begin_s - first_s) / STEP_S).round().long()


def _begins(raster: Raster) -> Tensor:
    """When each observation begins, or, if it is short, the calendar month that it begins in. float64 [obs], seconds since 1970."""
    start, end = raster.time_s.unbind(1)
    return torch.where(end - start < SHORT_S, _start(_month(start)), start)


def _month(time_s: Tensor) -> Tensor:
    """Months since January 1970 of times, int64."""
    stamps = time_s.cpu().floor().long().numpy().astype("datetime64[s]")
    return torch.from_numpy(stamps.astype("datetime64[M]").astype("int64")).to(time_s.device)


def _start(month: Tensor) -> Tensor:
    """When months since January 1970 begin, float64, seconds since 1970."""
    stamps = month.cpu().numpy().astype("datetime64[M]").astype("datetime64[s]")
    return torch.from_numpy(stamps.astype("int64")).double().to(month.device)


def _days(month: Tensor) -> Tensor:
    """Length of months since January 1970, in days."""
    return ((_start(month + 1) - _start(month)) / DAY_S).float()


def seasons(dim: int) -> Tensor:
    """Codes [12, dim] of months: the sine of its angle in the year in one half, the cosine in the other."""
    angle = torch.arange(12, dtype=torch.float64) * torch.pi / 6
    return torch.cat([wave[:, None].expand(-1, dim // 2) for wave in (angle.sin(), angle.cos())], 1).float()

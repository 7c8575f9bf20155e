"""A synthetic set of multi-modal places: no measurement, but structure that a model can be seen to learn.

Each place hides a map of land classes, made of a few nearest-point regions. Every modality sees that same map through its own
bands, pixel size and dates: a class has a spectrum in each band and, in series, a yearly course of its own; pixels at
boundaries mix; noise is added. So modalities agree about a place exactly where the map says so. Item i is a function of
(seed, i) alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from everysat.find import suggest
from everysat.nn.draws import generator
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Place, Raster

YEAR_S = 365.25 * 86400.0
START_S = 1577836800.0  # 2020-01-01


class Modality(BaseModel):
    """One synthetic sensor: pixel size, number of bands, and the range of the number of dates (0 for undated)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    gsd_m: float = Field(gt=0)
    bands: int = Field(ge=1)
    dates: tuple[int, int] = (0, 0)
    kind: str = "optical"

    def sensor(self, name: str) -> Sensor:
        unit, limits = ("dB", (-60.0, 40.0)) if self.kind == "sar" else ("reflectance", (-0.5, 2.0))
        bands = tuple(Band(f"{name}-{i + 1}", self.gsd_m, unit, range=limits) for i in range(self.bands))
        return Sensor(f"synthetic-{name}", self.kind, bands, source="synthetic", title=f"Synthetic {name}")


VARIANTS: dict[str, dict[str, Any]] = {
    "three": {
        "vhr": Modality(gsd_m=2.5, bands=3),
        "optical": Modality(gsd_m=10.0, bands=4, dates=(3, 6)),
        "radar": Modality(gsd_m=10.0, bands=2, dates=(2, 5), kind="sar"),
    },
    "images": {"fine": Modality(gsd_m=5.0, bands=3), "coarse": Modality(gsd_m=10.0, bands=4)},
}
"""Modalities by variant."""


@dataclass(frozen=True)
class Synthetic:
    """See :func:`build`."""

    modalities: Mapping[str, Modality]
    places: int
    size_m: float
    classes: int
    regions: int
    label: str
    label_gsd_m: float
    noise: float
    missing: float
    clouds: float
    seed: int

    def __len__(self) -> int:
        return self.places

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.places:
            raise IndexError(f"index {index} is outside a dataset of {self.places} places")
        g = generator(self.seed, "place", index)
        shares = {gsd: self._shares(generator(self.seed, "map", index), gsd) for gsd in self._pixels()}
        there = torch.rand(len(self.modalities), generator=g) >= self.missing
        if not there.any():
            there[int(torch.randint(len(there), (), generator=g))] = True
        layers = {}
        for (name, modality), present in zip(self.modalities.items(), there.tolist(), strict=True):
            own = generator(self.seed, "values", index, name)
            if present:
                layers[name] = self._seen(name, modality, shares[modality.gsd_m], own)
        layers[self.label] = self._labels(shares[self.label_gsd_m])
        return Batch((Place(self.size_m, self.size_m),), layers)

    def fingerprint(self) -> str:
        return f"synthetic:{self!r}"

    def _pixels(self) -> set[float]:
        return {self.label_gsd_m, *(m.gsd_m for m in self.modalities.values())}

    def _shares(self, g: torch.Generator, gsd_m: float) -> Tensor:
        """Share of each class in each pixel [class, y, x], from a grid of 4 x 4 points in each pixel."""
        points = torch.rand(self.regions, 2, generator=g) * self.size_m
        kinds = torch.randint(self.classes, (self.regions,), generator=g)
        side = round(self.size_m / gsd_m)
        at = (torch.arange(4 * side) + 0.5) * (gsd_m / 4)
        grid = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1)
        nearest = torch.cdist(grid.flatten(0, 1), points).argmin(1)
        one_hot = torch.nn.functional.one_hot(kinds[nearest], self.classes).float().T
        return torch.nn.functional.avg_pool2d(one_hot.view(1, self.classes, 4 * side, 4 * side), 4)[0]

    def _seen(self, name: str, modality: Modality, shares: Tensor, g: torch.Generator) -> Raster:
        low, high = modality.dates
        dated = high > 0
        count = int(torch.randint(low, high + 1, (), generator=g)) if dated else 1
        start = torch.rand(count, generator=g, dtype=torch.float64).sort().values * YEAR_S + START_S
        spectra = self._spectra(name, modality, (start - START_S) / YEAR_S if dated else torch.zeros(1))
        values = torch.einsum("tbc,cyx->tbyx", spectra.float(), shares)
        values = values + self.noise * torch.randn(values.shape, generator=g)
        if modality.kind == "sar":
            values = 20.0 * values - 20.0  # dB
        valid = torch.ones_like(values, dtype=torch.bool)
        if dated and self.clouds and modality.kind == "optical":
            valid &= ~self._cloud(shares.shape[1:], count, g)[:, None]
        time_s = torch.stack([start, start + 1.0], 1) if dated else None
        return Raster.of(modality.sensor(name), values, modality.gsd_m, valid=valid, time_s=time_s)

    def _spectra(self, name: str, modality: Modality, year: Tensor) -> Tensor:
        """Expected value [date, band, class]: a level, and a yearly course whose phase belongs to the class."""
        g = generator(self.seed, "spectra", name)
        level, swing = torch.rand(2, modality.bands, self.classes, generator=g)
        phase = torch.rand(self.classes, generator=g)
        course = torch.cos(2 * math.pi * (year[:, None, None] - phase))
        return 0.1 + 0.5 * level + (0.15 if modality.dates[1] else 0.0) * swing * course

    def _cloud(self, shape: Sequence[int], count: int, g: torch.Generator) -> Tensor:
        """A disc over each date with probability ``clouds``, bool [date, y, x]."""
        at = torch.stack(torch.meshgrid(*(torch.arange(n) / n for n in shape), indexing="ij"), -1)
        centre, radius = torch.rand(count, 1, 1, 2, generator=g), 0.2 + 0.4 * torch.rand(count, 1, 1, generator=g)
        over = torch.rand(count, 1, 1, generator=g) < self.clouds
        return over & ((at - centre).norm(dim=-1) < radius)

    def _labels(self, shares: Tensor) -> Raster:
        band = Band("class", self.label_gsd_m, "class", classes={c: f"class {c}" for c in range(self.classes)})
        sensor = Sensor("synthetic-label", "classes", (band,), source="synthetic")
        return Raster.of(sensor, shares.argmax(0)[None, None].float(), self.label_gsd_m)


def build(
    variant: str = "three",
    *,
    places: int = 64,
    size_m: float = 60.0,
    classes: int = 4,
    regions: int = 5,
    label: str = "label",
    label_gsd_m: float | None = None,
    modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    noise: float = 0.05,
    missing: float = 0.0,
    clouds: float = 0.0,
    seed: int = 0,
) -> Synthetic:
    """Synthetic places.

    Args:
        variant: modalities by name, one of :data:`VARIANTS`; ``modalities`` gives others, as fields of :class:`Modality`.
        places, size_m: how many, and their side in metres.
        classes, regions: of land, and patches of land in each place.
        label, label_gsd_m: name of the layer with the class map and its pixel (10 m); ``size_m`` for one class per place.
        noise: standard deviation, as a share of reflectance. missing: chance that a place lacks a modality (never all).
        clouds: chance that a date of an optical series has one; what it covers is not valid.
        seed: of everything. Datasets that differ in ``places`` alone share their first places.
    """
    variant = variant or "three"
    if modalities is None and variant not in VARIANTS:
        raise LookupError(f"synthetic has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    chosen = {n: Modality.model_validate(m) for n, m in (modalities or VARIANTS[variant]).items()}
    gsd_m = 10.0 if label_gsd_m is None else label_gsd_m
    for name, side in [(label, gsd_m), *((n, m.gsd_m) for n, m in chosen.items())]:
        if abs(size_m / side - round(size_m / side)) > 1e-6 or round(size_m / side) < 1:
            raise ValueError(f"size_m={size_m:g} is no multiple of the pixel of {name}, {side:g} m")
    if places < 1 or classes < 1 or regions < 1:
        raise ValueError(f"places={places}, classes={classes} and regions={regions} must be at least 1")
    for key, share in {"missing": missing, "clouds": clouds}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{key}={share} must be between 0 and 1")
    return Synthetic(chosen, places, size_m, classes, regions, label, gsd_m, noise, missing, clouds, seed)

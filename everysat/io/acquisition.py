"""From items of a catalogue to observations: which files hold the wanted bands, and which acquisitions are one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from odc.geo.geobox import GeoBox

from everysat.io import grid, labels, plan
from everysat.io.assign import SensorLike, Wanted, resolve
from everysat.io.catalogue import Box, Collection, Item
from everysat.io.labels import tokens
from everysat.sensors import Sensor
from everysat.types import Input, Place

PASS_S = 900.0
"""Acquisitions of one collection that start within this time of one another are one pass, and one observation: neighbouring
tiles are seconds apart, orbits more than an hour and a half."""


@dataclass(frozen=True)
class Want:
    """A layer to be made: from ``sensor``, by the contract ``input`` of the layer ``name`` where there is one."""

    sensor: Sensor
    bands: tuple[str, ...]
    name: str = ""
    input: Input | None = None

    @property
    def orbit(self) -> str | None:
        """``ascending`` or ``descending`` where the sensor's table or the layer's name asks for one."""
        told = {band.orbit for band in self.sensor.bands} - {None}
        words = {word.lower() for word in tokens(self.name)} | {str(orbit).lower() for orbit in told}
        if words & {"asc", "ascending"}:
            return "ascending"
        return "descending" if words & {"des", "desc", "descending"} else None


def wants(
    inputs: Mapping[str, Input] | None, sensor: Wanted | Sequence[SensorLike], bands: Sequence[str] | None
) -> list[Want]:
    """The layers that a call asks for.

    Raises:
        ValueError: it asks for none.
        LookupError: a sensor or band is unknown.
    """
    if inputs is not None:
        return [
            Want(plan.contract_sensors({name: each})[0], each.sensor.names, name, each) for name, each in inputs.items()
        ]
    if sensor is None or isinstance(sensor, Mapping):
        raise ValueError(
            "say what to read of a place: an encoder's inputs, or sensor='sentinel-2-l2a' (one, or a list)"
        )
    every = [resolve(each) for each in ([sensor] if isinstance(sensor, (str, Sensor)) else sensor)]
    for band in bands or ():
        if not any(band in each for each in every):
            every[0][band]  # raises, with a suggestion
    return [Want(each, tuple(each[b].name for b in bands or each.names if b in each)) for each in every]


def processing_baseline(facts: Mapping[str, Any]) -> str | None:
    """The Sentinel-2 baseline whose offset the pixels of an item still carry; ``00.00`` where it was taken off already."""
    if any(facts.get(f"{prefix}:boa_offset_applied") is True for prefix in ("earthsearch", "sentinel")):
        return "00.00"
    for key in ("s2:processing_baseline", "processing:baseline", "sentinel:processing_baseline"):
        if facts.get(key) is not None:
            return labels.normal_baseline(facts[key])
    return None


def choose(item: Item, want: Want, collection: Collection) -> list[tuple[str, tuple[str, ...]]]:
    """Files of an item with wanted bands, and the names of their bands in order; each band from one file."""
    told, by_key, by_band = [], [], []
    for key, (path, names) in item.assets.items():
        known = tuple(want.sensor[n].name if n in want.sensor else n for n in names)
        if key and key in collection.bands:
            told.append((path, collection.bands[key]))
        elif not key:
            by_key.append((path, known))
        elif key in want.sensor:
            by_key.append((path, (want.sensor[key].name,)))
        elif len(known) == 1:
            by_band.append((path, known))
    taken: set[str] = set()
    chosen = []
    for path, bands in (*told, *by_key, *by_band):
        mine = {want.sensor[b].name for b in bands if b in want.sensor} & set(want.bands) - taken
        if mine or not bands:
            taken |= mine
            chosen.append((path, tuple(want.sensor[b].name if b in want.sensor else b for b in bands)))
    return chosen


def passes(found: list[Item]) -> list[Item]:
    """The items with the time of their pass, and ranked within it: what was processed last lies on top."""
    images = sorted((i for i in found if not i.mask and i.time), key=lambda i: i.time or (0.0, 0.0))
    groups: list[list[Item]] = []
    for item in images:
        assert item.time is not None
        last = groups[-1][-1].time if groups else None
        if last is not None and item.time[0] - last[0] <= PASS_S:
            groups[-1].append(item)
        else:
            groups.append([item])
    done = [item for item in found if item.mask or item.time is None]
    for group in groups:
        time = min(i.time[0] for i in group if i.time), max(i.time[1] for i in group if i.time)
        ranked = sorted(group, key=_age)
        versions = [_age(item) for item in ranked]
        done += [replace(i, time=time, rank=versions.index(_age(i)) if i.facts else 0) for i in ranked]
    return done


def _age(item: Item) -> tuple[str, str, str]:
    if not item.facts:
        return "", "", ""
    baseline = next((str(v) for k, v in item.facts.items() if k.endswith("processing_baseline")), "")
    return baseline, str(item.facts.get("everysat:version", "")), item.name


def boxes(place: Place) -> list[Box]:
    """Bounds of a place in degrees: two where it crosses the antimeridian.

    Raises:
        ValueError: it has no geobox.
    """
    if place.geobox is None:
        raise ValueError("place has no geobox: it does not say where it lies. Make it with everysat.place(...)")
    return bounds_of(place.geobox)


@lru_cache(maxsize=4096)
def bounds_of(geobox: GeoBox) -> list[Box]:
    """Bounds of a grid in degrees, generous by a hundredth; two where it crosses the antimeridian, all around at a pole."""
    cols, rows = (np.linspace(-0.01, 1.01, 21) * n for n in (geobox.shape[1], geobox.shape[0]))
    lon, lat = grid.to_lonlat(geobox, *np.meshgrid(cols, rows))
    seen = np.isfinite(lon) & np.isfinite(lat)
    lon, lat = lon[seen], lat[seen]
    south, north = float(lat.min()), float(lat.max())
    if lon.max() - lon.min() <= 180 or grid.crs_of(geobox).geographic:
        return [(float(lon.min()), south, float(lon.max()), north)]
    west, east = float(lon[lon > 0].min()), float(lon[lon <= 0].max())
    if west - east < 180:
        pole = math.copysign(90, south)
        return [(-180.0, min(south, pole), 180.0, max(north, pole))]
    return [(west, south, 180.0, north), (-180.0, south, east, north)]


def hulls(some: Sequence[Box]) -> list[Box]:
    """Boxes around boxes that lie near one another, for few searches of many places."""
    found: list[Box] = []
    for box in sorted(some):
        if found and box[0] <= found[-1][2] + 1:
            last = found.pop()
            box = last[0], min(last[1], box[1]), max(last[2], box[2]), max(last[3], box[3])
        found.append(box)
    return found

"""Many places at a time: the fields of a layer, and what a source has of each, one after another."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from everysat.io import area
from everysat.io.assign import SensorLike, Wanted
from everysat.io.place import place
from everysat.io.scene import Clear
from everysat.io.vector import load_frame
from everysat.types import Batch, Input, Place

CELL_DEGREES = 0.5
"""Places in one square of this size share a search."""
_CELLS = 16
"""Squares whose search and opened files are remembered."""


def places(
    layer: Any, *, gsd_m: float | None = None, crs: str | int | None = None, size_m: float | None = None
) -> list[Place]:
    """A place for every feature of a layer, in its order.

    Args:
        layer: a GeoPackage, GeoJSON, GeoParquet, shapefile or whatever else OGR reads, or a geopandas frame.
        gsd_m: side of a pixel, metres; 10 unless given.
        crs: of the grids; the local UTM zone of each place by default.
        size_m: side of a square around the centre of each feature, instead of its bounds; points need it.

    Raises:
        ValueError: a feature has no geometry, or the layer has no CRS; the message says which.
    """
    frame = load_frame(layer)
    empty = frame.geometry.is_empty | frame.geometry.isna()
    if empty.any():
        raise ValueError(
            f"feature {int(empty.to_numpy().argmax())} of the layer has no geometry; {int(empty.sum())} have none. Drop them"
        )
    if size_m is None and (frame.geom_type == "Point").any():
        raise ValueError("the layer has points: give size_m, the side of the square around each, in metres")
    if size_m is not None:
        lonlat = frame.geometry.representative_point().to_crs("EPSG:4326")
        return [place((at.x, at.y), gsd_m=gsd_m, crs=crs, size_m=size_m) for at in lonlat]
    return [place(frame.iloc[i : i + 1], gsd_m=gsd_m, crs=crs) for i in range(len(frame))]


def read_each(
    places: Sequence[Place],
    period: Any,
    inputs: Mapping[str, Input] | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    max_cloud_percent: float = 100,
    sensor: Wanted | Sequence[SensorLike] = None,
    bands: Sequence[str] | None = None,
    gsd_m: float | None = None,
    resampling: str = "auto",
    names: Mapping[str, str] | None = None,
    valid: Mapping[str, Clear] | None = None,
    ahead: int = 2,
) -> Iterator[Batch]:
    """What :func:`everysat.read` gives for each place, in order, one after another.

    Neighbours share searches and opened files. ``ahead`` places are read while the caller works on one; no more are held. A
    place of which the source has nothing gives a batch without layers, and a warning at the end says how many did.

    Raises:
        LookupError: the source has nothing of any place.
        OSError, ValueError: as :func:`everysat.read`.
    """
    places = list(places)
    options: dict[str, Any] = {
        "source": source, "max_cloud_percent": max_cloud_percent, "sensor": sensor, "bands": bands, "gsd_m": gsd_m,
        "resampling": resampling, "names": names, "valid": valid,
    }  # fmt: skip
    if ahead < 1:
        raise ValueError(f"ahead={ahead} must be at least 1")
    return _each(places, lambda some: area.finder(some, period, inputs, **options), ahead)


def _each(places: list[Place], find: Callable[[list[Place]], area.Finder], ahead: int) -> Iterator[Batch]:
    shared = _Finders(places, find)
    missing: list[LookupError] = []
    todo = iter(places)
    with ThreadPoolExecutor(ahead) as pool:
        waiting = deque((each, pool.submit(shared.read, each)) for each in islice(todo, ahead))
        try:
            while waiting:
                each, future = waiting.popleft()
                try:
                    batch = future.result()
                except LookupError as error:
                    missing.append(error)
                    batch = Batch((each,))
                waiting.extend((more, pool.submit(shared.read, more)) for more in islice(todo, 1))
                if len(missing) == len(places):
                    raise missing[0]
                yield batch
        finally:
            for _, future in waiting:
                future.cancel()
    if missing:
        warnings.warn(f"{len(missing)} of {len(places)} places have no observation: {missing[0]}", stacklevel=2)


class _Finders:
    """One finder for the places of each square; the squares that were used last are kept."""

    def __init__(self, places: list[Place], find: Callable[[list[Place]], area.Finder]) -> None:
        self._find = find
        self._members: dict[tuple[int, int], list[Place]] = {}
        for each in places:
            self._members.setdefault(_cell(each), []).append(each)
        self._finders: OrderedDict[tuple[int, int], area.Finder] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, each: Place) -> Batch:
        with self._lock:  # a finder serves one place at a time; pixels are read side by side
            cell = _cell(each)
            if cell not in self._finders:
                self._finders[cell] = self._find(self._members[cell])
                if len(self._finders) > _CELLS:
                    self._finders.popitem(last=False)
            self._finders.move_to_end(cell)
            scene = self._finders[cell].scene(each)
        return area.observed(area.whole(scene))


def _cell(place: Place) -> tuple[int, int]:
    lon, lat = place.lonlat or (0.0, 0.0)
    return math.floor(lon / CELL_DEGREES), math.floor(lat / CELL_DEGREES)

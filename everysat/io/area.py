"""A place and a period, from a source: what there is of it, opened as a scene."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from everysat.find import suggest
from everysat.io import catalogue, dates, folder, grid, plan, remote, stac
from everysat.io.acquisition import Want, bounds_of, boxes, choose, hulls, passes, processing_baseline, wants
from everysat.io.assign import SensorLike, Wanted
from everysat.io.catalogue import Box, Catalogue, Collection, Item
from everysat.io.plane import Plane
from everysat.io.radar import ratios
from everysat.io.scene import Clear, LayerPlan, Scene
from everysat.io.sources import open_planes
from everysat.sensors import Sensor
from everysat.types import Batch, Input, Place, Raster

DEFAULT_SOURCE = "earth-search"
"""Where a place is read from unless told: open files, no account."""
_BYTES = 6
"""Memory for one number of a reading: the number, whether it is valid, and what is at work on it."""


def finder(
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
) -> Finder:
    """What ``source`` has around places; arguments as in :func:`everysat.read`."""
    if not 0 <= max_cloud_percent <= 100:
        raise ValueError(f"max_cloud_percent={max_cloud_percent} must be 0 to 100")
    options = plan.Options(
        None, bands, None, gsd_m, None, resampling, names or {}, {}, "auto", None, None, None, inputs
    )
    layers = wants(inputs, sensor, bands)
    return Finder(catalogue.load(source or DEFAULT_SOURCE), places, period, layers, options, valid, max_cloud_percent)


class Finder:
    """What a source has around some places in a period. Searches each collection once, and opens each file once.

    Args:
        source: see :func:`everysat.io.catalogue.load`.
        places: around which is searched.
        period: see :func:`everysat.io.dates.span`; None for what has no dates alone.
        layers: that are wanted.
        options: how they are read.
        valid: which codes of masks mean clear, by the name of the mask's table; those of :mod:`everysat.io.clouds` when None;
            no masks when empty.
        max_cloud_percent: scenes that their catalogue says are cloudier are left out.
    """

    def __init__(
        self,
        source: Catalogue,
        places: Sequence[Place],
        period: Any,
        layers: Sequence[Want],
        options: plan.Options,
        valid: Mapping[str, Clear] | None = None,
        max_cloud_percent: float = 100,
    ) -> None:
        self.source, self.options = source, options
        self.span = None if period is None else dates.span(period)
        self._boxes = hulls([box for place in places for box in boxes(place)])
        self._valid, self._cloud = valid, max_cloud_percent
        self._wants = layers
        self._check()
        self._items: dict[str, list[Item]] = {}
        self._planes: dict[str, list[Plane]] = {}
        self._bounds: dict[str, list[Box]] = {}
        self.cloudier = 0

    def scene(self, place: Place) -> Scene:
        """The place as a scene.

        Raises:
            LookupError: the source has nothing of it; the message says what was looked for.
        """
        plans: dict[str, LayerPlan] = {}
        for want in self._wants:
            for collection, sensor, platform in self._serving(want):
                found = self._near(collection, place, want, platform)
                if found and (some := self._plans(collection, replace(want, sensor=sensor), found, place)):
                    plans = {**some, **plans}
                    break
        try:
            kept = plan.over(plans, place.geobox) if plans else {}  # type: ignore[arg-type]
        except ValueError:
            kept = {}
        if not kept:
            raise LookupError(self._nothing(place))
        return Scene(place, kept)

    def _serving(self, want: Want) -> list[tuple[Collection, Sensor, str]]:
        """Collections that hold a sensor, and of which platform."""
        found = [
            (collection, sensor, platform)
            for collection in self._collections()
            for platform, some in collection.sensors.items()
            for sensor in some
            if sensor.name == want.sensor.name
        ]
        return [(c, want.sensor if want.input is not None else s, p) for c, s, p in found]

    def _collections(self) -> Sequence[Collection]:
        if self.source.listed:
            return self.source.collections
        here = stac.collection_names(self.source)
        return [collection for collection in self.source.collections if collection.name in here]

    def items(self, collection: Collection) -> list[Item]:
        """All of a collection around the places in the period."""
        if collection.name not in self._items:
            if collection.dated and self.span is None:
                raise ValueError(
                    f"period: collection {collection.name} has dates; say which are wanted, such as '2024-06'"
                )
            span = self.span if collection.dated else None
            if self.source.folder is not None:
                found = folder.items(self.source, collection, span)
            else:
                found = stac.items(self.source, collection, self._boxes, span)
            clear = [item for item in found if float(item.facts.get("eo:cloud_cover") or 0) <= self._cloud]
            self.cloudier += len(found) - len(clear)
            self._items[collection.name] = passes(clear) if collection.dated else [replace(i, time=None) for i in clear]
        return self._items[collection.name]

    def _near(self, collection: Collection, place: Place, want: Want, platform: str) -> list[Item]:
        around = boxes(place)
        near = [
            item
            for item in self.items(collection)
            if item.box is None or any(stac.touches(item.box, box) for box in around)
        ]
        if platform:
            near = [item for item in near if str(item.facts.get("platform", "")).lower() == platform]
        if want.orbit is not None:
            near = [item for item in near if item.facts.get("sat:orbit_state", want.orbit) == want.orbit]
        return near

    def _plans(self, collection: Collection, want: Want, found: list[Item], place: Place) -> dict[str, LayerPlan]:
        """Layers of one collection over what ``found`` covers; empty when no file has a wanted band."""
        chosen = [
            (item, path, bands) for item in found if not item.mask for path, bands in choose(item, want, collection)
        ]
        if not chosen:
            return {}
        masks, clear = self._masks(collection, found, chosen)
        self._open([path for _, path, _ in chosen] + [path for _, path in masks], collection.crs)
        chosen = [each for each in chosen if each[0].box is not None or self._reaches(each[1], place)]
        images = [self._dressed(item, path, bands, want, collection) for item, path, bands in chosen]
        every = [plane for planes in images for plane in planes]
        if not every:
            return {}
        if "ratio" in want.bands and not any(plane.label == "ratio" for plane in every):
            images += [[plane] for plane in ratios(every, want.sensor, collection.stored)]
        own = replace(
            self.options,
            sensor=None, bands=None if want.input else self.options.bands, order=None, stored=collection.stored,
            valid={} if clear is None else {"mask": clear}, inputs={want.name: want.input} if want.input else None,
            processing_baseline=collection.processing_baseline, names=self._names(want),
        )  # fmt: skip
        quality = [p for item, path in masks for p in self._quality(item, path, collection)]
        quality.sort(key=lambda plane: -plane.rank)
        return plan.layers(plan.find_bands([p for p in images if p], own), {"mask": quality} if masks else {}, own)

    def _check(self) -> None:
        masks = {each.mask.sensor.name for each in self.source.collections if each.mask is not None}
        for key in self._valid or {}:
            if key not in masks:
                raise ValueError(f"valid: {self.source.given} has no mask {key!r}. {suggest(key, masks)}")
        unknown = set(self.options.names) - {old for want in self._wants for old in self._names(want)}
        if unknown:
            raise ValueError(
                f"names: no layer is called {', '.join(sorted(unknown))}; they are called like sentinel-2-l2a-10m"
            )

    def _names(self, want: Want) -> dict[str, str]:
        """New names of the layers of one sensor."""
        return {old: new for old, new in self.options.names.items() if old.rsplit("-", 1)[0] == want.sensor.name}

    def _masks(
        self, collection: Collection, found: list[Item], chosen: list[tuple[Item, str, tuple[str, ...]]]
    ) -> tuple[list[tuple[Item, str]], Clear | None]:
        mask = collection.mask
        if mask is None or self._valid == {}:
            return [], None
        clear = (self._valid or {}).get(mask.sensor.name, mask.clear)
        if self.source.folder is not None:
            return [(item, item.assets[""][0]) for item in found if item.mask], clear
        used = {item.name: item for item, _, _ in chosen}
        lacking = [item for item in used.values() if not any(key in item.assets for key in mask.where)]
        if lacking:
            raise ValueError(
                f"{self.source.given}: {stac.names_of(lacking)} of collection {collection.name} lack the cloud mask "
                f"{' or '.join(mask.where)}. Give valid={{}} to read without masks"
            )
        return [(i, next(i.assets[key][0] for key in mask.where if key in i.assets)) for i in used.values()], clear

    def _open(self, paths: Iterable[str], crs: str | None) -> None:
        """Read the headers of files that are not open yet, many at a time."""
        missing = [path for path in dict.fromkeys(paths) if path not in self._planes]
        with ThreadPoolExecutor(min(remote.THREADS, max(1, len(missing)))) as pool:
            for path, planes in zip(missing, pool.map(lambda path: open_planes(path, crs), missing), strict=True):
                self._planes[path] = [replace(plane, source=remote.parts(plane.source)[0]) for plane in planes]

    def _reaches(self, path: str, place: Place) -> bool:
        """Whether a file whose catalogue does not say where it lies may touch a place; cheap, for there are many of both."""
        if path not in self._bounds:
            self._bounds[path] = bounds_of(self._planes[path][0].geobox)
        return any(stac.touches(one, other) for one in self._bounds[path] for other in boxes(place))

    def _dressed(
        self, item: Item, path: str, bands: tuple[str, ...], want: Want, collection: Collection
    ) -> list[Plane]:
        """The planes of a file, with what the catalogue knows of them."""
        planes = self._planes[path]
        if bands and len(planes) > len(bands):
            planes = [plane for plane in planes if not plane.alpha]
        if bands and len(planes) != len(bands):
            raise ValueError(
                f"{planes[0].source} has {len(planes)} bands, {len(bands)} were expected ({', '.join(bands)}). Correct "
                f"bands of collection {collection.name}"
            )
        names = bands or tuple(plane.label for plane in planes)
        made = [
            self._plane(plane, label, item, want.sensor, collection)
            for plane, label in zip(planes, names, strict=True)
            if not bands or label in want.bands
        ]
        return [plane for plane in made if folder.overlap(plane.time, self.span)]

    def _plane(self, plane: Plane, label: str, item: Item, sensor: Sensor, collection: Collection) -> Plane:
        time = item.time or plane.time
        if collection.dated and time is None:
            raise ValueError(
                f"{plane.source} of collection {collection.name} has no date: put {{date}} into files = ..., or say dated = false"
            )
        changed = replace(plane, label=label, sensor=sensor, time=time if collection.dated else None, rank=item.rank)
        if collection.nodata is not None:
            changed = replace(changed, nodata=float(collection.nodata))
        baseline = processing_baseline(item.facts)
        if sensor.baseline_offsets and baseline is not None:
            # The item says all there is to say. A scale and offset in the file would be the same offset once more.
            changed = replace(changed, tags={"processing_baseline": baseline}, scale=None, offset=None)
        return changed

    def _quality(self, item: Item, path: str, collection: Collection) -> list[Plane]:
        """The planes of a mask, which may be one band among others of its file."""
        assert collection.mask is not None
        sensor, planes = collection.mask.sensor, self._planes[path]
        named = [plane for plane in planes if plane.label and plane.label in sensor] or planes
        blank = sensor.bands[0].nodata
        return [
            replace(p, time=item.time or p.time, rank=item.rank, nodata=blank if p.nodata is None else p.nodata)
            for p in named
        ]

    def _nothing(self, place: Place) -> str:
        asked = sorted({c.name for want in self._wants for c, _, _ in self._serving(want)})
        wanted = ", ".join(dict.fromkeys(want.sensor.name for want in self._wants))
        where = grid.describe(place.geobox)  # type: ignore[arg-type]
        if not asked:
            have = ", ".join(sorted({s.name for c in self._collections() for some in c.sensors.values() for s in some}))
            return (
                f"source {self.source.given} has none of {wanted}; it has {have or 'no collection that is known here'}. Use another "
                "source, or a .toml that says which collection holds which sensor"
            )
        when = "any time" if self.span is None else dates.label(self.span)
        text = f"nothing of {wanted} was found in {self.source.given} (collections {', '.join(asked)}) for {when} at {where}. "
        if self.cloudier:
            return text + f"{self.cloudier} scenes are cloudier than {self._cloud:g} %: raise max_cloud_percent"
        return text + "Widen the period, check the place, or use another source"


def observed(batch: Batch) -> Batch:
    """The batch without observations that have no valid pixel, and without layers that have no observation."""
    seen = {}
    for name, layer in batch.layers.items():
        assert isinstance(layer, Raster)
        keep = layer.valid.flatten(1).any(1)
        if keep.any():
            seen[name] = layer if keep.all() else layer.obs(keep)
    return replace(batch, layers=seen)


def whole(scene: Scene) -> Batch:
    """All of a scene, unless it cannot fit into memory.

    Raises:
        MemoryError: it would not fit; the message says how large it is.
    """
    need = sum(
        len(layer.times) * len(layer.sensor.bands) * math.prod(grid.at_gsd(scene.geobox, layer.gsd_m).shape) * _BYTES
        for layer in scene.layers.values()
    )
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if need > held:
        raise MemoryError(
            f"this takes {need / 1e9:.1f} GB, and the machine has {held / 1e9:.1f}. Read a smaller place or a shorter period, set "
            "max_cloud_percent, or go through it in windows: everysat.io.read.open_scene(...).read((rows, columns))"
        )
    return scene.read()

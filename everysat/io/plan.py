"""From files to a scene: which plane goes into which layer, observation and band."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from odc.geo.geobox import GeoBox

from everysat import sensors
from everysat.io import dates, grid
from everysat.io.assign import Found, Wanted, assign
from everysat.io.calibration import calibration
from everysat.io.dates import DAY_S, Span
from everysat.io.labels import tokens
from everysat.io.place import on_ground
from everysat.io.plane import Plane
from everysat.io.scene import Clear, LayerPlan, Mask, Part
from everysat.io.sources import open_planes
from everysat.sensors import Band, Sensor
from everysat.types import ALWAYS, ContractError, Input


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`everysat.io.read.read` that planning needs."""

    sensor: Wanted
    bands: Sequence[str] | None
    order: Sequence[str] | None
    gsd_m: float | None
    times: Any
    resampling: str
    names: Mapping[str, str]
    valid: Mapping[str, Clear]
    stored: str
    processing_baseline: str | None
    crs: Any
    nodata: float | None
    inputs: Mapping[str, Input] | None


def open_all(files: Sequence[Any], options: Options) -> tuple[list[list[Plane]], dict[str, list[Plane]]]:
    """Planes of each file, dated; and the planes of each mask in ``options.valid``, taken out of them."""
    opened = [open_planes(file, options.crs) for file in files]
    if options.nodata is not None:
        opened = [[replace(plane, nodata=float(options.nodata)) for plane in planes] for planes in opened]
    if options.times is not None:
        opened = _dated(files, opened, options)
    masks: dict[str, list[Plane]] = {}
    for key in options.valid:
        hits = [plane for planes in opened for plane in planes if _is_mask(plane, key)]
        if not hits and Path(key).exists():
            hits = open_planes(key, options.crs)
        if not hits:
            raise ValueError(
                f"valid: no file or band is called {key!r}; give a word of a file's or band's name, or the path of a mask"
            )
        masks[key] = hits
        opened = [[plane for plane in planes if plane not in hits] for planes in opened]
    return [planes for planes in opened if planes], masks


def _is_mask(plane: Plane, key: str) -> bool:
    path = PurePath(plane.source)
    words = tokens(plane.label) + (tokens(path.stem) if plane.siblings == 1 else [])
    named = key.lower() in (plane.label.lower(), path.name.lower(), plane.source.lower())
    return named or key.lower() in {word.lower() for word in words}


def _dated(files: Sequence[Any], opened: list[list[Plane]], options: Options) -> list[list[Plane]]:
    times = options.times
    if isinstance(times, Mapping):
        found = [times.get(str(f), times.get(PurePath(str(f)).name)) for f in files]
        return [
            planes if time is None else _at(planes, dates.span(time))
            for planes, time in zip(opened, found, strict=True)
        ]
    if not isinstance(times, list):
        return [_at(planes, dates.span(times)) for planes in opened]
    spans = [dates.span(time) for time in times]
    if len(spans) == len(files):
        return [_at(planes, time) for planes, time in zip(opened, spans, strict=True)]
    if len(files) == 1:
        return [_series(opened[0], spans, options.order)]
    raise ValueError(f"times lists {len(spans)} dates for {len(files)} files; give one a file, in the same order")


def _at(planes: list[Plane], time: Span) -> list[Plane]:
    return [replace(plane, time=time) for plane in planes]


def _series(planes: list[Plane], spans: list[Span], order: Sequence[str] | None) -> list[Plane]:
    """Dates for a file that holds a series: its k-th plane of a band has the k-th date; a band that comes once has none."""
    keys = [str(i % len(order)) if order else plane.label for i, plane in enumerate(planes)]
    counts = {key: keys.count(key) for key in keys}
    if not set(counts.values()) <= {1, len(spans)} or len(spans) not in counts.values():
        raise ValueError(
            f"times lists {len(spans)} dates; {planes[0].source} has {', '.join(str(c) for c in sorted(set(counts.values())))} planes a band"
        )
    seen: dict[str, int] = defaultdict(int)
    out = []
    for key, plane in zip(keys, planes, strict=True):
        out.append(replace(plane, time=spans[seen[key]]) if counts[key] > 1 or len(spans) == 1 else plane)
        seen[key] += 1
    return out


def find_bands(opened: Iterable[Sequence[Plane]], options: Options) -> list[Found]:
    """Every plane that is a band of a wanted sensor."""
    among = contract_sensors(options.inputs or {})
    found = [f for planes in opened for f in assign(planes, options.sensor, among, options.order)]
    if options.bands is not None and options.inputs is None:
        found = _only_bands(found, options.bands)
    return found


def contract_sensors(inputs: Mapping[str, Input]) -> list[Sensor]:
    """The sensors that a contract takes, each with all its facts: those of its table, else those of all layers together."""
    bands: dict[str, dict[str, Band]] = defaultdict(dict)
    facts = {wanted.sensor.name: wanted.sensor for wanted in inputs.values()}
    for wanted in inputs.values():
        bands[wanted.sensor.name].update({band.name: band for band in wanted.sensor.bands})
    known = sensors.names()
    return [
        sensors.get(name) if name in known else replace(facts[name], bands=tuple(some.values()))
        for name, some in bands.items()
    ]


def _only_bands(found: list[Found], wanted: Sequence[str]) -> list[Found]:
    here = {f.sensor: f.sensor for f in found}
    for name in wanted:
        knowing = [sensor for sensor in here if name in sensor]
        if not knowing:
            next(iter(here))[name]  # raises, with a suggestion
        if not any(f.band.name == s[name].name for s in knowing for f in found if f.sensor is s or f.sensor == s):
            shown = ", ".join(dict.fromkeys(f.band.name for f in found))
            raise ContractError(
                f"bands: {name!r} is in none of the files, which hold {shown}. Add its file, or leave it out of bands"
            )
    keep = {(sensor.name, sensor[name].name) for sensor in here for name in wanted if name in sensor}
    return [f for f in found if (f.sensor.name, f.band.name) in keep]


def native_gsd(found: Found) -> float:
    """Ground sampling distance of a plane: that of the band's table when it is within 5 %, which grids in degrees never meet."""
    height, _ = grid.pixel_m(found.plane.geobox)
    measured = grid.gsd_m(found.plane.geobox) if grid.is_square(found.plane.geobox) else height
    return found.band.gsd_m if abs(measured / found.band.gsd_m - 1) < 0.05 else float(f"{measured:.6g}")


def layers(found: list[Found], masks: Mapping[str, list[Plane]], options: Options) -> dict[str, LayerPlan]:
    """The layers that the bands make: those of the contract, or one for each sensor and ground sampling distance."""
    if options.inputs is not None:
        return _contract_layers(found, masks, options, options.inputs)
    groups: dict[tuple[str, float], list[Found]] = defaultdict(list)
    for f in found:
        groups[f.sensor.name, options.gsd_m or native_gsd(f)].append(f)
    plans = {}
    for (sensor_name, gsd), members in sorted(groups.items(), key=lambda item: item[0]):
        default = f"{sensor_name}-{gsd:g}m"
        name = options.names.get(default, default)
        here = {f.band.name for f in members}
        order = [members[0].sensor[b].name for b in options.bands or members[0].sensor.names if b in members[0].sensor]
        sensor = members[0].sensor.select(band for band in order if band in here)
        plans[name] = _layer(name, sensor, gsd, members, masks, options)
    unknown = set(options.names) - {f"{s}-{g:g}m" for s, g in groups}
    if unknown:
        raise ValueError(f"names: there is no layer {', '.join(sorted(unknown))}; the files make {', '.join(plans)}")
    return plans


def _contract_layers(
    found: list[Found], masks: Mapping[str, list[Plane]], options: Options, inputs: Mapping[str, Input]
) -> dict[str, LayerPlan]:
    plans = {}
    for name, wanted in inputs.items():
        members = [f for f in found if f.sensor.name == wanted.sensor.name and f.band.name in wanted.sensor]
        if not members:
            continue
        missing = [band for band in wanted.sensor.names if band not in {f.band.name for f in members}]
        if missing:
            raise ContractError(
                f"layer {name!r}: the files lack {', '.join(missing)} of {wanted.sensor.name}; the model takes "
                f"{', '.join(wanted.sensor.names)}. Add their files, or leave out all files of this layer"
            )
        sensor = members[0].sensor.select(wanted.sensor.names)
        plans[name] = _layer(name, sensor, wanted.gsd_m, members, masks, options)
        if wanted.dated and ALWAYS in plans[name].times:
            raise ContractError(f"layer {name!r} is a series and its files have no dates; give times=[...], one a file")
    if not plans:
        takes = "; ".join(f"{n}: {i.sensor.name} {', '.join(i.sensor.names)}" for n, i in inputs.items())
        holds = ", ".join(dict.fromkeys(f.sensor.name for f in found))
        raise ContractError(
            f"the files hold {holds or 'nothing known'}, of which the model takes no layer. It takes {takes}"
        )
    return plans


def _layer(
    name: str, sensor: Sensor, gsd: float, members: list[Found], masks: Mapping[str, list[Plane]], options: Options
) -> LayerPlan:
    times = sorted({f.plane.time or ALWAYS for f in members})
    spots: dict[tuple[int, int], list[Found]] = defaultdict(list)
    for f in members:
        spots[times.index(f.plane.time or ALWAYS), sensor.names.index(f.band.name)].append(f)
    parts = {spot: _parts(found, gsd, options) for spot, found in sorted(spots.items())}
    seen_by = tuple(
        tuple(_mask_at(key, planes, time, options.valid[key]) for key, planes in masks.items()) for time in times
    )
    return LayerPlan(name, sensor, gsd, tuple(times), parts, seen_by, options.resampling)


def _parts(found: list[Found], gsd: float, options: Options) -> tuple[Part, ...]:
    """The planes of one band at one time, those of one resolution: neighbouring tiles, never the same ground twice."""
    sizes = sorted({native_gsd(f) for f in found})
    native = found[0].band.gsd_m
    best = next((s for s in sizes if abs(s / gsd - 1) < 1e-3), native if native in sizes else sizes[0])
    same = sorted((f for f in found if native_gsd(f) == best), key=lambda f: -f.plane.rank)
    grids: dict[tuple[GeoBox, int], Found] = {}
    for f in same:
        spot = f.plane.geobox, f.plane.rank
        if spot in grids:
            raise ValueError(_twice(grids[spot], f))
        grids[spot] = f
    return tuple(
        Part(f.plane, calibration(f.plane, f.sensor, f.band, options.stored, options.processing_baseline)) for f in same
    )


def _twice(first: Found, second: Found) -> str:
    where = first.plane.name if first.plane.name == second.plane.name else f"{first.plane.name} and {second.plane.name}"
    if first.plane.time is None:
        return (
            f"band {first.band.name} comes twice, from {where}, without a date. If it is a series, give times=[...], one date a file; "
            "if the bands' names are ambiguous, give order=[...]"
        )
    return f"band {first.band.name} at {dates.label(first.plane.time)} comes twice, from {where}; leave one of them out, or give order=[...]"


def _mask_at(key: str, planes: list[Plane], time: Span, clear: Clear) -> Mask:
    def day(span: Span | None) -> float | None:
        return None if span is None else span[0] // DAY_S

    rules: tuple[Callable[[Plane], bool], ...] = (
        lambda plane: plane.time == time,
        lambda plane: day(plane.time) == day(time),
        lambda plane: plane.time is None,
    )
    for rule in rules:
        hits = tuple(plane for plane in planes if rule(plane))
        if hits:
            return Mask(hits, clear)
    raise ValueError(f"valid: mask {key!r} has nothing for {dates.label(time)}; add its file, or leave that date out")


def base_grid(plans: Mapping[str, LayerPlan]) -> GeoBox:
    """The grid of a scene without a given place: that of its finest planes, in square pixels, around all of them."""
    planes = {id(p.plane): p.plane for plan in plans.values() for parts in plan.parts.values() for p in parts}
    boxes = list(dict.fromkeys(plane.geobox for plane in planes.values()))
    finest = min(grid.gsd_m(box) for box in boxes)
    fine = [box for box in boxes if grid.gsd_m(box) < 1.001 * finest]
    whole = fine[0] if len(fine) == 1 else _union(fine)
    if grid.is_true_to_scale(whole) and grid.axis_aligned(whole):
        return whole
    return on_ground(whole, min(plan.gsd_m for plan in plans.values()))


def _union(boxes: list[GeoBox]) -> GeoBox:
    try:
        return grid.union(boxes)
    except ValueError as error:
        raise ValueError(
            f"the files lie on different grids ({error}); give place=... to say which one to use"
        ) from error


def over(plans: Mapping[str, LayerPlan], geobox: GeoBox) -> dict[str, LayerPlan]:
    """The plans with the planes and observations that touch ``geobox``; layers with none are left out.

    Raises:
        ValueError: nothing touches it; the message says where both lie.
    """
    kept = {}
    for name, plan in plans.items():
        parts = {
            spot: tuple(p for p in parts if grid.window_on(p.plane.geobox, geobox, 0))
            for spot, parts in plan.parts.items()
        }
        seen = sorted({obs for (obs, _), some in parts.items() if some})
        if seen:
            renumbered = {(seen.index(obs), band): some for (obs, band), some in parts.items() if some}
            kept[name] = replace(
                plan,
                times=tuple(plan.times[i] for i in seen),
                masks=tuple(plan.masks[i] for i in seen),
                parts=renumbered,
            )
    if not kept:
        first = next(p.plane for plan in plans.values() for parts in plan.parts.values() for p in parts)
        raise ValueError(
            f"no file overlaps the place. The place: {grid.describe(geobox)}. {first.source}: {grid.describe(first.geobox)}"
        )
    return kept

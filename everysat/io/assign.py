"""Which band of which sensor each plane is, from names and descriptions; never a guess among several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import PurePath

from everysat import sensors
from everysat.find import suggest
from everysat.io import labels
from everysat.io.plane import Plane
from everysat.sensors import Band, Sensor

SensorLike = str | Sensor
Wanted = SensorLike | Mapping[str, SensorLike] | None


@dataclass(frozen=True)
class Found:
    """A plane that is known to be a band."""

    plane: Plane
    sensor: Sensor
    band: Band


def resolve(sensor: SensorLike) -> Sensor:
    return sensor if isinstance(sensor, Sensor) else sensors.get(sensor)


def assign(
    planes: Sequence[Plane], wanted: Wanted, among: Sequence[Sensor] = (), order: Sequence[str] | None = None
) -> list[Found]:
    """Bands of the planes of one file. Planes that are no band of the sensor are left out, but not all of them.

    Args:
        planes: of one file or xarray object.
        wanted: the sensor, or sensors by pattern of file name, or None to infer it.
        among: sensors to choose from when it is inferred; all known ones when empty.
        order: bands in file order, for files without band names.

    Raises:
        LookupError: the sensor is unknown or cannot be told.
        ValueError: band names are ambiguous or missing.
    """
    sensor = _named(planes[0], wanted)
    if sensor is not None:
        found = _bands(planes, sensor, order)
        if not found:
            raise ValueError(_no_band(planes, sensor))
        return found
    return _inferred(planes, among, order)


def _named(plane: Plane, wanted: Wanted) -> Sensor | None:
    if isinstance(wanted, Mapping):
        name = PurePath(plane.source).name
        hits = [s for pattern, s in wanted.items() if fnmatch(name, pattern) or fnmatch(plane.source, pattern)]
        if hits:
            return resolve(hits[0])
    elif wanted is not None:
        return resolve(wanted)
    return plane.sensor


def _bands(planes: Sequence[Plane], sensor: Sensor, order: Sequence[str] | None) -> list[Found]:
    planes = _without_alpha(planes, len(sensor.bands if order is None else order))
    if order is not None:
        return _ordered(planes, sensor, order)
    bands = [_band(plane, sensor) for plane in planes]
    if not any(bands):
        unnamed = len(planes) > 1 and len({plane.label for plane in planes}) < len(planes)
        if unnamed or len(sensor.bands) == 1 == len(planes):
            if len(planes) != len(sensor.bands):
                raise ValueError(
                    f"{planes[0].source} has {len(planes)} bands without names, sensor {sensor.name} lists {len(sensor.bands)}: which is which "
                    f"cannot be told. Give order=[...], the names of the file's bands one after another, out of {', '.join(sensor.names)}"
                )
            return [Found(plane, sensor, band) for plane, band in zip(planes, sensor.bands, strict=True)]
    return [Found(plane, sensor, band) for plane, band in zip(planes, bands, strict=True) if band is not None]


def _without_alpha(planes: Sequence[Plane], wanted: int) -> Sequence[Plane]:
    """The planes less the alpha band; where all are wanted it is a band like others that a writer marked by its position."""
    if not any(plane.alpha for plane in planes):
        return planes
    if len(planes) == wanted:
        return [replace(plane, alpha=False, pixels=replace(plane.pixels, masked=False)) for plane in planes]
    return [plane for plane in planes if not plane.alpha]


def _band(plane: Plane, sensor: Sensor) -> Band | None:
    named = labels.band_in(plane.label, sensor) if plane.label else None
    if named is None and plane.siblings == 1:
        named = labels.band_in(PurePath(plane.source).stem, sensor)
    return named


def _ordered(planes: Sequence[Plane], sensor: Sensor, order: Sequence[str]) -> list[Found]:
    if len(planes) % len(order):
        raise ValueError(f"order lists {len(order)} bands, {planes[0].source} has {len(planes)}")
    if len(set(order)) < len(order):
        raise ValueError(f"order={list(order)} names a band twice")
    return [Found(plane, sensor, sensor[order[i % len(order)]]) for i, plane in enumerate(planes)]


def _inferred(planes: Sequence[Plane], among: Sequence[Sensor], order: Sequence[str] | None) -> list[Found]:
    by_name = labels.by_product(planes[0].source)
    if by_name is not None and (not among or by_name.name in {s.name for s in among}):
        found = _bands(planes, by_name, order)
        if found:
            return found
    candidates = labels.candidates(among)
    if len(among) == 1:
        found = _bands(planes, among[0], order)
        if found:
            return found
    fits = {sensor.name: {i for i, plane in enumerate(planes) if _fits(plane, sensor)} for sensor in candidates}
    named = set().union(*fits.values())
    whole = [sensor for sensor in candidates if named and fits[sensor.name] == named]
    if len(whole) == 1:
        return _bands(planes, whole[0], order)
    if not whole and named:
        return [_only(planes[i], [s for s in candidates if i in fits[s.name]]) for i in sorted(named)]
    raise LookupError(_cannot_tell(planes, whole or candidates, bool(named)))


def _fits(plane: Plane, sensor: Sensor) -> bool:
    try:
        return _band(plane, sensor) is not None
    except ValueError:
        return False


def _only(plane: Plane, fitting: Sequence[Sensor]) -> Found:
    if len(fitting) != 1:
        raise LookupError(_cannot_tell([plane], fitting, True))
    return Found(plane, fitting[0], _band(plane, fitting[0]))  # type: ignore[arg-type]


def _cannot_tell(planes: Sequence[Plane], fitting: Sequence[Sensor], named: bool) -> str:
    shown = ", ".join(sorted(s.name for s in fitting)[:8]) + (", ..." if len(fitting) > 8 else "")
    why = f"its band names fit {shown}" if named else "neither its name nor its band descriptions say so"
    return f"which sensor {planes[0].name} comes from cannot be told: {why}. Give sensor='...' ({shown}), or a Sensor or TOML table of your own"


def _no_band(planes: Sequence[Plane], sensor: Sensor) -> str:
    seen = [plane.label for plane in planes if plane.label][:12]
    text = ", ".join(seen) or PurePath(planes[0].source).name
    hint = suggest(seen[0], sensor.names) if seen else f"Known: {', '.join(sensor.names)}."
    return f"{planes[0].source} names no band of {sensor.name}: {text}. {hint} Rename the bands, give order=[...], or another sensor"

"""What a file's names and tags say: which sensor, which band, which processing baseline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import PurePath
from typing import Any

from everysat import sensors
from everysat.sensors import Band, Sensor

SENSOR_TAG = "everysat_sensor"
"""Tag under which this package writes the facts of a sensor, so that its own files need no table to be read."""

# File names by the agencies' product conventions. A pattern whose sensor has no table is passed over.
_PRODUCTS = (
    (r"S2[A-D]_MSIL1C_", "sentinel-2-l1c"),
    (r"S2[A-D]_MSIL2A_", "sentinel-2-l2a"),
    (r"(?<![A-Z0-9])T\d{2}[A-Z]{3}_\d{8}T\d{6}_SCL_\d0m", "sentinel-2-scl"),
    (r"(?<![A-Z0-9])T\d{2}[A-Z]{3}_\d{8}T\d{6}_B\d[\dA]_\d0m", "sentinel-2-l2a"),
    (r"(?<![A-Z0-9])T\d{2}[A-Z]{3}_\d{8}T\d{6}_B\d[\dA](?!\w)", "sentinel-2-l1c"),
    (r"S1[A-D]_(IW|EW|SM)_GRD[FHM]_", "sentinel-1-grd"),
    (r"L[A-Z]0\d_L[12]\w+_QA_PIXEL", "landsat-qa-pixel"),
    (r"L[CO]0(?P<n>[89])_L1", "landsat-{n}-oli-l1"),
    (r"L[CO]0(?P<n>[89])_L2", "landsat-{n}-oli"),
    (r"LE07_L1", "landsat-7-etm-l1"),
    (r"LE07_L2", "landsat-7-etm"),
    (r"LT05_L2", "landsat-5-tm"),
    (r"HLS\.[LS]30\..*Fmask", "hls-fmask"),
    (r"HLS\.L30\.", "hls-l30"),
    (r"HLS\.S30\.", "hls-s30"),
    (r"Copernicus_DSM_(COG|30m)_", "copernicus-dem"),
    (r"ESA_WorldCover_10m_", "esa-worldcover"),
    (r"ENMAP\d\d[-_]+L2A", "enmap"),
)


def by_product(path: str) -> Sensor | None:
    """The sensor whose product naming convention, or whose own name, ``path`` follows; None when it says nothing clear."""
    known = sensors.names()
    for part in reversed(PurePath(path).parts):
        for pattern, name in _PRODUCTS:
            if (match := re.search(pattern, part)) and (found := name.format(**match.groupdict())) in known:
                return sensors.get(found)
    text = PurePath(path).name.lower().replace("_", "-")
    named = [name for name in known if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", text)]
    return sensors.get(max(named, key=len)) if named else None


def tokens(text: str) -> list[str]:
    """The words of a name: what stands between separators."""
    return [word for word in re.split(r"[^A-Za-z0-9]+", text) if word]


def band_in(text: str, sensor: Sensor) -> Band | None:
    """The band of ``sensor`` that ``text`` names, as a whole or by one of its words; None when it names none.

    Raises:
        ValueError: it names several, such as "blue" and "B04".
    """
    if text in sensor:
        return sensor[text]
    found = {sensor[word].name: word for word in tokens(text) if word in sensor}
    if len(found) > 1:
        raise ValueError(
            f"{text!r} names {' and '.join(sorted(found))} of {sensor.name}; rename it so that it names one band, or give order=[...]"
        )
    return sensor[next(iter(found))] if found else None


def baseline_in(path: str, tags: Mapping[str, Any]) -> str | None:
    """Sentinel-2 processing baseline, such as ``"04.00"``, from a product name (``_N0400_``) or tags."""
    for key, value in tags.items():
        if "processing" in key.lower() and "baseline" in key.lower():
            return normal_baseline(value)
    match = re.search(r"_N(\d{2})(\d{2})_", path)
    return f"{match[1]}.{match[2]}" if match else None


def normal_baseline(value: Any) -> str:
    """``"N0400"``, ``4``, ``"4.0"`` and ``"04.00"`` as ``"04.00"``."""
    if match := re.fullmatch(r"N(\d{2})(\d{2})", str(value).strip()):
        return f"{match[1]}.{match[2]}"
    try:
        return f"{float(value):05.2f}"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"processing_baseline={value!r} is none; expected something like '04.00' or 'N0400'"
        ) from error


def baseline_offset(sensor: Sensor, baseline: str) -> float:
    """The offset, in physical units, that holds from ``baseline`` on; 0 before the first listed one."""
    reached = [key for key in sorted(sensor.baseline_offsets) if key <= baseline]
    return sensor.baseline_offsets[reached[-1]] if reached else 0.0


def to_json(sensor: Sensor) -> str:
    """The facts of a sensor as text, to be stored in a file's tags."""
    bands = []
    for band in sensor.bands:
        facts = {key: value for key, value in asdict(band).items() if value not in (None, "", ())}
        facts["classes"] = {str(code): label for code, label in (band.classes or {}).items()} or None
        bands.append({key: value for key, value in facts.items() if value is not None})
    head = {"name": sensor.name, "kind": sensor.kind, "source": sensor.source, "title": sensor.title}
    return json.dumps({**head, "baseline_offsets": dict(sensor.baseline_offsets), "bands": bands})


def from_json(text: str) -> Sensor | None:
    """The sensor that :func:`to_json` wrote; None when the text is something else, which tags of strangers may be."""
    try:
        table = json.loads(text)
        bands = tuple(_band(facts) for facts in table["bands"])
        return Sensor(
            table["name"],
            table["kind"],
            bands,
            table["source"],
            table.get("title", ""),
            table.get("baseline_offsets", {}),
        )
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def _band(facts: Mapping[str, Any]) -> Band:
    known = {field.name for field in fields(Band)}
    values = {key: value for key, value in facts.items() if key in known}
    if "classes" in values:
        values["classes"] = {int(code): label for code, label in values["classes"].items()}
    for key in ("range", "aliases"):
        if key in values:
            values[key] = tuple(values[key])
    return Band(**values)


def candidates(given: Iterable[Sensor] = ()) -> list[Sensor]:
    """The sensors to guess among: the given ones, or all that have a table."""
    return list(given) or [sensors.get(name) for name in sensors.names()]

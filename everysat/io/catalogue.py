"""Where observations of any place come from: a STAC catalogue or a folder, and what its collections hold.

A source is described by a TOML table, of which two for public catalogues lie in ``everysat/io/catalogues``. Keys at the top:
``stac`` (address of an API or of a catalogue file) or ``folder`` (relative to the table); with ``stac`` also ``sign``
(``host``, ``token``; see :func:`everysat.io.remote.address`) and ``headers``, whose ``${NAME}`` stand for environment
variables. Each ``[collections.ID]`` says ``sensor`` (one, several that describe the same bands, or one for each platform) and, as far as needed:

- ``bands``: names in the order of a file's bands; with ``stac``, a table of these by asset, for assets whose key or band
  metadata say nothing that the sensor table knows;
- ``files``: with ``folder``, a path or several with ``*``, ``{band}`` and ``{date}`` (or ``{date:%Y_%j}``, as strptime has it);
- ``mask``: ``asset`` or ``files``, ``sensor``, and ``clear``, the codes that mean clear where :mod:`everysat.io.clouds` has none;
- ``stored``, ``processing_baseline``, ``nodata``, ``crs``: as in :func:`everysat.read`;
- ``dated = false``: what holds at all times, such as elevation.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everysat import sensors
from everysat.find import suggest
from everysat.io import clouds, remote
from everysat.io.calibration import STORED
from everysat.io.dates import Span
from everysat.io.scene import Clear
from everysat.sensors import Sensor

_FOLDER = Path(__file__).parent / "catalogues"
_KEYS = {"stac", "folder", "sign", "headers", "collections"}
_OF_ALL = {"sensor", "bands", "mask", "stored", "dated", "processing_baseline", "nodata", "crs"}
_OF_MASK = {"asset", "files", "sensor", "clear"}

Box = tuple[float, float, float, float]
"""West, south, east, north in degrees; west is never beyond east."""


@dataclass(frozen=True)
class Mask:
    """The quality layer of a collection: ``where`` is an asset or patterns of files."""

    where: tuple[str, ...]
    sensor: Sensor
    clear: Clear


@dataclass(frozen=True)
class Collection:
    """What a collection of a source holds. ``sensors`` is by platform, or has one key, ``""``, for all."""

    name: str
    sensors: Mapping[str, tuple[Sensor, ...]]
    bands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    mask: Mask | None = None
    stored: str = "auto"
    dated: bool = True
    processing_baseline: str | None = None
    nodata: float | None = None
    crs: str | None = None

    def sensor_named(self, name: str) -> Sensor | None:
        return next((s for some in self.sensors.values() for s in some if s.name == name), None)


@dataclass(frozen=True)
class Catalogue:
    """A source. ``given`` is what the user called it; without ``listed`` its collections are those whose names are known."""

    given: str
    collections: tuple[Collection, ...]
    stac: str = ""
    folder: Path | None = None
    sign: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    listed: bool = True


@dataclass(frozen=True)
class Item:
    """Files of one acquisition. ``assets`` gives paths, and the names of their bands as far as they are known, by key."""

    name: str
    assets: Mapping[str, tuple[str, tuple[str, ...]]]
    time: Span | None = None
    box: Box | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    mask: bool = False
    rank: int = 0


def names() -> tuple[str, ...]:
    """The sources that are described here."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


def load(source: str | os.PathLike[str]) -> Catalogue:
    """A source by name, by the path of its table, or by the address (or path) of a STAC catalogue.

    Raises:
        LookupError: no source is called so.
        ValueError: its table has an unknown or a wrong entry.
        OSError: its table cannot be read.
    """
    text = os.fspath(source)
    if text in names():
        return _of_table(_FOLDER / f"{text}.toml", text)
    if text.endswith(".toml"):
        return _of_table(Path(text), text)
    if remote.is_remote(text) or text.endswith(".json"):
        return Catalogue(text, tuple(_known().values()), stac=text, listed=False)
    raise LookupError(
        f"source={text!r} is no source. {suggest(text, names())} Or give the address of a STAC API, the path of a STAC catalogue "
        "(catalog.json), or a .toml that describes a catalogue or a folder"
    )


def _known() -> dict[str, Collection]:
    """Collections whose names say what they hold: those described here, and those that are called like a sensor."""
    tables = {name: sensors.get(name) for name in sensors.names()}
    found = {name: Collection(name, {"": (table,)}, dated=table.kind != "terrain") for name, table in tables.items()}
    for each in names():
        found.update({c.name: c for c in _of_table(_FOLDER / f"{each}.toml", each).collections})
    return found


def _of_table(path: Path, given: str) -> Catalogue:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML table: {error}") from error
    _refuse(table, _KEYS, str(path))
    if ("stac" in table) == ("folder" in table) or not table.get("collections"):
        raise ValueError(f"{path} needs either stac or folder, and at least one [collections.NAME]")
    folder = path.parent / table["folder"] if "folder" in table else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{path}: folder = {table['folder']!r} does not exist; it counts from {path.parent}")
    sign = table.get("sign", {})
    _refuse(sign, {"host", "token"}, f"{path}: sign")
    headers = {name: _filled(value, path) for name, value in table.get("headers", {}).items()}
    extra = {"files"} if folder else set()
    found = [_collection(name, entry, path, extra) for name, entry in table["collections"].items()]
    address = table.get("stac", "")
    if address and not remote.is_remote(address):
        address = str(path.parent / address)
    return Catalogue(given, tuple(found), address, folder, sign, headers)


def _collection(name: str, entry: Mapping[str, Any], path: Path, extra: set[str]) -> Collection:
    where = f"{path}: collections.{name}"
    _refuse(entry, _OF_ALL | extra, where)
    missing = [key for key in ("sensor", *extra) if key not in entry]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    told = entry["sensor"]
    by_platform = told if isinstance(told, Mapping) else {"": told}
    if entry.get("stored", "auto") not in STORED:
        raise ValueError(f"{where}: stored = {entry['stored']!r} is not one of {', '.join(STORED)}")
    bands = entry.get("bands", {})
    return Collection(
        name,
        {platform: tuple(_sensor(s, path) for s in _many(some)) for platform, some in by_platform.items()},
        {key: _many(some) for key, some in (bands if isinstance(bands, Mapping) else {"": bands}).items()},
        _many(entry.get("files", ())),
        _mask(entry["mask"], path, where) if "mask" in entry else None,
        **{key: entry[key] for key in ("stored", "dated", "processing_baseline", "nodata", "crs") if key in entry},
    )


def _mask(entry: Mapping[str, Any], path: Path, where: str) -> Mask:
    _refuse(entry, _OF_MASK, f"{where}.mask")
    if "sensor" not in entry or ("asset" in entry) == ("files" in entry):
        raise ValueError(f"{where}.mask needs sensor, and asset (of a STAC item) or files (of a folder)")
    sensor = _sensor(entry["sensor"], path)
    clear = entry.get("clear", clouds.CLEAR.get(sensor.name))
    if clear is None:
        raise ValueError(f"{where}.mask needs clear = [...], the codes of {sensor.name} that mean clear")
    return Mask(
        _many(entry.get("asset", entry.get("files"))), sensor, tuple(clear) if isinstance(clear, list) else clear
    )


def _sensor(name: str, path: Path) -> Sensor:
    return sensors.get(str(path.parent / name) if name.endswith(".toml") else name)


def _many(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _filled(text: str, path: Path) -> str:
    """``${NAME}`` replaced by the environment variable, so that no secret stands in the table."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"{path}: headers ask for the environment variable {match[1]}, which is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _refuse(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}. {suggest(key, known)}")

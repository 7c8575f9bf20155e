"""Sensors as facts: one TOML table a sensor, read with the standard library alone.

``get("sentinel-2-l2a")["B04"].wavelength_um`` is 0.6646. Values in files are digital numbers; physical value = number x
``scale`` + ``offset``, in ``unit``. To describe a sensor of your own, write a table like those beside this file and pass its
path to :func:`get` or :func:`load`, or build :class:`Sensor` in Python. A table may start from another one
(``like = "landsat-7-etm"``, a name or a path beside it): its ``defaults`` and ``bands`` then change what is inherited,
``without`` names bands that are left out, and new bands come last. Hyperspectral bands are listed as ``band_ranges``, one
entry for a run of bands that differ in name and wavelength alone (see ``enmap.toml``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from everysat.find import suggest

KINDS = ("optical", "sar", "thermal", "weather", "terrain", "classes")
UNITS = {
    "reflectance": "fraction of the incoming light that is reflected, 0-1 (bright targets exceed 1)",
    "radiance": "W m-2 sr-1 um-1",
    "dB": "radar backscatter, 10 log10 of the linear power ratio",
    "linear": "radar backscatter as a linear power ratio",
    "ratio": "quotient of two bands",
    "K": "kelvin",
    "degC": "degrees Celsius",
    "m": "metres",
    "mm": "millimetres (of water, over the period)",
    "m s-1": "metres per second",
    "Pa": "pascal",
    "J m-2": "joules per square metre over the period",
    "hPa": "hectopascal",
    "degree": "degrees of arc",
    "%": "per cent",
    "t ha-1": "tonnes per hectare (of dry biomass)",
    "class": "a code, see the band's classes",
    "bits": "bit flags; the band's classes name the bits, counted from the least significant, 0",
    "probability": "0-1",
    "DN": "digital number without a physical calibration (colour images)",
}

BASE_KEYS = {"title", "kind", "source", "baseline_offsets"}
TABLE_KEYS = BASE_KEYS | {"defaults", "bands", "band_ranges", "like", "without"}
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Band:
    """One channel. ``gsd_m`` is the native ground sampling distance in metres; ``range`` the plausible physical values,
    used to notice wrong units; ``nodata`` is a digital number."""

    name: str
    gsd_m: float
    unit: str
    wavelength_um: float | None = None
    width_um: float | None = None
    polarisation: str | None = None
    orbit: str | None = None
    classes: Mapping[int, str] | None = None
    scale: float = 1.0
    offset: float = 0.0
    nodata: float | None = None
    range: tuple[float, float] | None = None
    aliases: tuple[str, ...] = ()
    description: str = ""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"band {self.name}: unit={self.unit!r} is unknown. {suggest(self.unit, UNITS)}")
        if not self.gsd_m > 0:
            raise ValueError(f"band {self.name}: gsd_m={self.gsd_m} must be positive (metres)")
        if self.width_um is not None and not self.width_um > 0:
            raise ValueError(f"band {self.name}: width_um={self.width_um} must be positive (micrometres)")
        if self.range is not None and not (len(self.range) == 2 and self.range[0] < self.range[1]):
            raise ValueError(f"band {self.name}: range={self.range} must be (lowest, highest)")
        if self.scale == 0:
            raise ValueError(f"band {self.name}: scale=0 would make all values equal")
        if self.classes is not None and self.unit not in ("class", "bits"):
            raise ValueError(f"band {self.name}: classes need unit 'class' or 'bits', not {self.unit!r}")
        if self.wavelength_um is not None and not 0.1 <= self.wavelength_um <= 1e6:
            raise ValueError(f"band {self.name}: wavelength_um={self.wavelength_um} is not in micrometres")

    def __hash__(self) -> int:
        return hash((self.name, self.gsd_m, self.unit))


@dataclass(frozen=True)
class Sensor:
    """A sensor or product: its bands in the order of its files, and where these facts come from.

    ``baseline_offsets`` maps a processing baseline to the offset, in physical units, that holds from it on (Sentinel-2:
    04.00 adds 1000 digital numbers, so -0.1). It holds for the bands in reflectance.
    """

    name: str
    kind: str
    bands: tuple[Band, ...]
    source: str
    title: str = ""
    baseline_offsets: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"sensor {self.name}: kind={self.kind!r} is unknown. {suggest(self.kind, KINDS)}")
        seen: dict[str, Band] = {}
        for band in self.bands:
            for label in (band.name, *band.aliases):
                if (other := seen.setdefault(label.lower(), band)) is not band:
                    raise ValueError(f"sensor {self.name}: {label!r} names both {other.name} and {band.name}")

    def __hash__(self) -> int:
        return hash((self.name, self.kind, self.names))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(band.name for band in self.bands)

    def __getitem__(self, name: str) -> Band:
        """The band of that name or alias, in any letter case."""
        for band in self.bands:
            if name.lower() in (band.name.lower(), *(alias.lower() for alias in band.aliases)):
                return band
        raise LookupError(f"sensor {self.name} has no band {name!r}. {suggest(name, self.names)}")

    def __contains__(self, name: object) -> bool:
        return any(str(name).lower() in (b.name.lower(), *(a.lower() for a in b.aliases)) for b in self.bands)

    def select(self, bands: Iterable[str]) -> Sensor:
        """The same sensor with these bands alone, in this order."""
        chosen = tuple(self[name] for name in bands)
        return Sensor(self.name, self.kind, chosen, self.source, self.title, self.baseline_offsets)


def load(path: str | Path) -> Sensor:
    """A sensor from a TOML table. An unknown key is an error: a misspelt fact would silently be lost otherwise.

    Raises:
        ValueError: the table is no TOML, lacks something, has an unknown key or a value that cannot be; names the file.
        FileNotFoundError: there is no such file.
    """
    return _load(Path(path), ())


def _load(path: Path, seen: tuple[Path, ...]) -> Sensor:
    path = path.expanduser().resolve()
    try:
        if path in seen:
            raise ValueError("the table is like itself, through " + ", ".join(p.name for p in seen))
        with path.open("rb") as file:
            table = tomllib.load(file)
        _refuse_unknown(table, TABLE_KEYS, "sensor")
        base = _load(_beside(path, table["like"]), (*seen, path)) if "like" in table else None
        return _sensor(path.stem, table, base)
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: {error}") from error


def _beside(path: Path, like: str) -> Path:
    """Where the table that ``path`` builds on lies: a path relative to it, or a sensor described here."""
    if like.endswith(".toml"):
        return path.parent / like
    if like not in names():
        raise LookupError(f"like={like!r} is no sensor. {suggest(like, names())}")
    return _FOLDER / f"{like}.toml"


def _sensor(name: str, table: dict[str, Any], base: Sensor | None) -> Sensor:
    inherited = {key: getattr(base, key) for key in ("kind", "source", "title", "baseline_offsets")} if base else {}
    facts = {**inherited, **{key: table[key] for key in table if key in BASE_KEYS}}
    for key in ("kind", "source"):
        if not facts.get(key):
            raise ValueError(
                f"the table lacks {key!r}: " + {"kind": f"one of {', '.join(KINDS)}"}.get(key, "who says so")
            )
    defaults = table.get("defaults", {})
    entries = {b.name: {**vars(b), **defaults} for b in base.bands} if base else {}
    for gone in table.get("without", ()):
        if gone not in entries:
            raise ValueError(f"without: {gone!r} is no band of {table.get('like')!r}. {suggest(gone, entries)}")
        del entries[gone]
    listed = [*table.get("bands", ()), *(band for run in table.get("band_ranges", ()) for band in _run(run))]
    if len({entry.get("name") for entry in listed} - {None}) < len(listed):
        raise ValueError("every band needs a name of its own")
    for entry in listed:
        entries[entry["name"]] = {**entries.get(entry["name"], defaults), **entry}
    if not entries:
        raise ValueError("the table lists no bands")
    return Sensor(name=name, bands=tuple(_band(entry) for entry in entries.values()), **facts)


def _run(run: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The bands of one entry of ``band_ranges``: ``name`` holds a counter like ``{:03d}`` that starts at ``first``, and
    ``wavelength_um`` lists one centre per band; all else is the same for all of them."""
    name, waves = run.get("name", ""), run.get("wavelength_um")
    if "{" not in name or not isinstance(waves, list):
        raise ValueError(f"band_ranges {name!r}: name needs a counter such as 'B{{:03d}}', wavelength_um a list")
    shared = {key: value for key, value in run.items() if key != "first"}
    for number, wave in enumerate(waves, run.get("first", 1)):
        yield {**shared, "name": name.format(number), "wavelength_um": wave}


def _band(entry: dict[str, Any]) -> Band:
    _refuse_unknown(entry, {f.name for f in fields(Band)}, f"band {entry['name']}")
    for key in ("gsd_m", "unit"):
        if key not in entry:
            raise ValueError(f"band {entry['name']} lacks {key!r}")
    if entry.get("classes"):
        entry["classes"] = {int(code): label for code, label in entry["classes"].items()}
    for key in ("range", "aliases"):
        if entry.get(key) is not None:
            entry[key] = tuple(entry[key])
    return Band(**entry)


def _refuse_unknown(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}. {suggest(key, known)}")


def names() -> tuple[str, ...]:
    """Names of all sensors described here, sorted."""
    return tuple(sorted(f.stem for f in _FOLDER.glob("*.toml")))


def get(name: str) -> Sensor:
    """The sensor of that name, or the one that the TOML file at this path describes."""
    if name.endswith(".toml"):
        return load(name)
    return _described_here(name)


@cache
def _described_here(name: str) -> Sensor:
    if name not in names():
        raise LookupError(f"no sensor is called {name!r}. {suggest(name, names())} A path to a .toml table works too.")
    return load(_FOLDER / f"{name}.toml")


def from_table(name: str, table: Mapping[str, Any]) -> Sensor:
    """A sensor from the content of a TOML table, such as one kept in a model's settings."""
    _refuse_unknown(table, TABLE_KEYS, f"sensor {name}")
    base = get(table["like"]) if "like" in table else None
    return _sensor(name, dict(table), base)


def to_table(sensor: Sensor) -> dict[str, Any]:
    """The content of a TOML or JSON table, less the name, from which :func:`from_table` makes this sensor again."""
    table = {key: value for key, value in vars(sensor).items() if value and key not in ("name", "bands")}
    return {**table, "bands": [_entry(band) for band in sensor.bands]}


def _entry(band: Band) -> dict[str, Any]:
    entry = {f.name: getattr(band, f.name) for f in fields(Band) if getattr(band, f.name) != f.default}
    if band.classes is not None:
        entry["classes"] = {str(code): label for code, label in band.classes.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}

"""Sensors as facts: one TOML table a sensor, read with the standard library alone.

``get("sentinel-2-l2a")["B04"].wavelength_um`` is 0.6646. Values in files are digital numbers; physical value = number x
``scale`` + ``offset``, in ``unit``. To describe a sensor of your own, write a table like those beside this file and pass its
path to :func:`get` or :func:`load`, or build :class:`Sensor` in Python.
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
    "class": "a code, see the band's classes",
    "probability": "0-1",
    "DN": "digital number without a physical calibration (colour images)",
}


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
        if self.wavelength_um is not None and not 0.1 <= self.wavelength_um <= 1e6:
            raise ValueError(f"band {self.name}: wavelength_um={self.wavelength_um} is not in micrometres")

    def __hash__(self) -> int:
        return hash((self.name, self.gsd_m, self.unit))


@dataclass(frozen=True)
class Sensor:
    """A sensor or product: its bands in the order of its files, and where these facts come from.

    ``baseline_offsets`` maps a processing baseline to the offset, in physical units, that holds from it on (Sentinel-2:
    04.00 adds 1000 digital numbers, so -0.1).
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
        seen: dict[str, str] = {}
        for band in self.bands:
            for label in (band.name, *band.aliases):
                if seen.setdefault(label.lower(), band.name) != band.name:
                    raise ValueError(f"sensor {self.name}: {label!r} names both {seen[label.lower()]} and {band.name}")

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
    """A sensor from a TOML table. An unknown key is an error: a misspelt fact would silently be lost otherwise."""
    path = Path(path)
    with path.open("rb") as file:
        table = tomllib.load(file)
    try:
        return from_table(path.stem, table)
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: {error}") from error


def from_table(name: str, table: Mapping[str, Any]) -> Sensor:
    """A sensor from the content of a TOML table."""
    known = {"title", "kind", "source", "defaults", "bands", "baseline_offsets"}
    _refuse_unknown(table, known, "sensor")
    defaults = table.get("defaults", {})
    bands = []
    for entry in table.get("bands", []):
        merged = {**defaults, **entry}
        _refuse_unknown(merged, {f.name for f in fields(Band)}, f"band {merged.get('name', '?')}")
        if "classes" in merged:
            merged["classes"] = {int(code): label for code, label in merged["classes"].items()}
        for key in ("range", "aliases"):
            if key in merged:
                merged[key] = tuple(merged[key])
        bands.append(Band(**merged))
    if not bands:
        raise ValueError("the table lists no [[bands]]")
    return Sensor(
        name, table["kind"], tuple(bands), table["source"], table.get("title", ""), table.get("baseline_offsets", {})
    )


def _refuse_unknown(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}. {suggest(key, known)}")


def names() -> tuple[str, ...]:
    """Names of all sensors described here, sorted."""
    return tuple(sorted(f.stem for f in Path(__file__).parent.glob("*.toml")))


@cache
def get(name: str) -> Sensor:
    """The sensor of that name, or the one that the TOML file at this path describes."""
    if name.endswith(".toml"):
        return load(name)
    if name not in names():
        raise LookupError(f"no sensor is called {name!r}. {suggest(name, names())} A path to a .toml table works too.")
    return load(Path(__file__).parent / f"{name}.toml")

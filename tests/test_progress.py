"""Progress says what is done, how long it took and how long it will take; a resumed start does not spoil the estimate."""

from __future__ import annotations

import io

import pytest

from everysat import progress
from everysat.progress import Progress, clock, track


@pytest.fixture
def fake_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_without_a_terminal_name_pace_and_time_left(fake_clock):
    out = io.StringIO()
    with Progress("Embedding", 10, file=out) as bar:
        for _ in range(5):
            fake_clock[0] += 2
            bar.advance(note="row 1")
    lines = out.getvalue().splitlines()
    assert lines == [
        "Embedding: 3/10 (30 %), 0:06 elapsed, 0:14 left, row 1",
        "Embedding: 5/10 (50 %), 0:10 elapsed, done, row 1",
    ]


def test_estimate_counts_only_what_was_done_since_the_start(fake_clock):
    with Progress("x", 100, done=90, quiet=True) as bar:
        assert bar.seconds_left() is None
        fake_clock[0] += 30
        bar.advance(5)
        assert bar.seconds_left() == pytest.approx(30)


def test_an_error_inside_is_said_and_passes_through(fake_clock):
    out = io.StringIO()
    with pytest.raises(RuntimeError), Progress("x", 3, file=out):
        raise RuntimeError
    assert out.getvalue() == "x: 0/3 (0 %), 0:00 elapsed, stopped\n"


def test_a_terminal_gets_a_bar_and_no_plain_lines():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("Embedding", 2, file=out) as bar:
        bar.advance(2, note="all")
    assert "Embedding" in out.getvalue()
    assert "elapsed" not in out.getvalue()


def test_track_yields_everything_in_order(capsys):
    assert list(track(range(4), "Counting")) == [0, 1, 2, 3]
    assert "Counting: 4/4 (100 %)" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00"), (75, "1:15"), (3700, "1:01:40")])
def test_clock(seconds, said):
    assert clock(seconds) == said

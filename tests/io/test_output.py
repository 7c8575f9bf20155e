"""Output appears whole or not at all."""

from __future__ import annotations

import os

import pytest

from everysat.io.output import replacing


def fill(partial, kind, text):
    if kind == "file":
        partial.write_text(text)
    else:
        partial.mkdir()
        (partial / "inside").write_text(text)


def content(path):
    return (path if path.is_file() else path / "inside").read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_new_replaces_old_when_it_is_complete(tmp_path, kind):
    path = tmp_path / "out"
    for text in ("old", "new"):
        with replacing(path) as partial:
            fill(partial, kind, text)
            assert not path.exists() or content(path) == "old"
        assert content(path) == text
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_failure_keeps_old_and_leaves_nothing(tmp_path, kind):
    path = tmp_path / "out"

    def write(text, error=None):
        with replacing(path) as partial:
            fill(partial, kind, text)
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("new", KeyboardInterrupt())
    assert os.listdir(tmp_path) == []
    write("old")
    with pytest.raises(RuntimeError):
        write("new", RuntimeError())
    assert os.listdir(tmp_path) == ["out"]
    assert content(path) == "old"


def test_leftovers_of_a_killed_run_do_not_matter(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("x")
    with replacing(tmp_path / "out") as partial:
        partial.write_text("whole")
    assert os.listdir(tmp_path) == ["out"]

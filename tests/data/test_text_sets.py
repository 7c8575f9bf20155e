"""Images with sentences, and with questions and answers: what belongs to which image, and the classes that names tell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everysat.data import captions, rsvqa
from everysat.io import pictures
from everysat.types import Batch, Text


@pytest.fixture(scope="module", params=sorted(captions.VARIANTS))
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    captions.fake(folder, request.param)
    return request.param, folder


@pytest.fixture(scope="module", params=sorted(rsvqa.VARIANTS))
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    rsvqa.fake(folder, request.param)
    return request.param, folder


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Path, str, Callable[[Any], Any]], Path]:
    """A copy of a set with one JSON file changed."""

    def make(root: Path, name: str, change: Callable[[Any], Any]) -> Path:
        folder = Path(shutil.copytree(root, tmp_path / str(len(list(tmp_path.iterdir())))))
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
        return folder

    return make


def text(batch: Batch, name: str) -> Text:
    layer = batch.layers[name]
    assert isinstance(layer, Text)
    return layer


def test_each_image_has_its_own_sentences(told: tuple[str, Path]) -> None:
    variant, root = told
    rows = json.loads((root / captions.VARIANTS[variant].listing).read_text())["images"]
    for split in {row["split"] for row in rows}:
        data = captions.build(variant, root=root, split=split)
        own = [row for row in rows if row["split"] == split]
        assert [Path(file).name for file in data.files] == [row["filename"] for row in own]
        for i, row in enumerate(own):
            batch = data[i]
            assert text(batch, "captions").strings == tuple(s["raw"].strip() for s in row["sentences"])
            assert set(text(batch, "captions").role) == {"caption"}
            stored = pictures.picture(root / captions.VARIANTS[variant].folders[0] / row["filename"])
            assert batch.raster("rgb").values[0].numpy().tolist() == stored.tolist()
            few = captions.build(variant, root=root, split=split, distinct=True, modalities=["captions"])[i]
            assert len(text(few, "captions").strings) == len({s["raw"] for s in row["sentences"]})
            assert set(few.layers) == {"captions", "label"}


def test_classes_come_from_names(told: tuple[str, Path]) -> None:
    variant, root = told
    found = {}
    for split in ("train", "test"):
        data = captions.build(variant, root=root, split=split)
        for i, file in enumerate(data.files):
            label = data[i].raster("label")
            names = label.sensor.bands[0].classes
            found[Path(file).name] = names[int(label.values)] if label.valid.all() else None
    assert found == {
        "rsicd": {"airport_1.jpg": "airport", "pond_412.jpg": "pond", "port_7.jpg": "port", "airport_9.jpg": "airport"},
        "rsitmd": {n: n.split("_")[0] for n in ("boat_1.tif", "plane_22.tif", "boat_4.tif", "river_3.tif", "plane_5.tif", "river_9.tif")},
        "ucm": {"1.tif": "agricultural", "100.tif": "agricultural", "2100.tif": "tenniscourt", "101.tif": "airplane"},
    }[variant]  # fmt: skip
    gsd_m = captions.build(variant, root=root)[0].raster("rgb").gsd_m
    assert gsd_m == (0.3048 if variant == "ucm" else 1.0)


def test_lists_of_classes_go_before_names(tmp_path: Path) -> None:
    captions.fake(tmp_path)
    listing = tmp_path / "dataset_rsicd.json"
    listing.write_text(listing.read_text().replace("pond_412.jpg", "00412.jpg"))
    (tmp_path / "RSICD_images" / "pond_412.jpg").rename(tmp_path / "RSICD_images" / "00412.jpg")
    label = captions.build(root=tmp_path)[1].raster("label")
    assert not label.valid.any()  # neither tells
    for kind in captions.CLASSES["rsicd"]:
        path = tmp_path / "txtclasses_rsicd" / f"{kind.title()}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("00412.jpg\nairport_1.jpg\n" if kind == "desert" else "")
    data = captions.build(root=tmp_path)
    for i in range(2):
        label = data[i].raster("label")
        assert label.valid.all()
        assert label.sensor.bands[0].classes[int(label.values)] == "desert"
    path = tmp_path / "txtclasses_rsicd" / "Port.txt"
    path.unlink()
    with pytest.raises(FileNotFoundError, match="txtclasses_rsicd has no list of the class 'port'"):
        captions.build(root=tmp_path)


def test_a_split_that_is_not_there_is_said(tmp_path: Path) -> None:
    captions.fake(tmp_path, "rsitmd")
    with pytest.raises(ValueError, match=r"dataset_RSITMD\.json lists no image of split='val'; it has test, train"):
        captions.build("rsitmd", root=tmp_path, split="val")


def test_broken_lists_of_sentences_are_named(told: tuple[str, Path], changed: Any) -> None:
    variant, root = told
    name = captions.VARIANTS[variant].listing

    def silent(content: Any) -> None:
        content["images"][0]["sentences"] = [{"raw": " "}]

    for change, error in (
        (lambda c: c.pop("images"), 'holds no list "images"'),
        (lambda c: c["images"][1].pop("split"), "image 1 lacks 'split'"),
        (silent, "has no sentence"),
    ):
        with pytest.raises(ValueError, match=error):
            captions.build(variant, root=changed(root, name, change))
    if variant == "ucm":
        with pytest.raises(ValueError, match=r"'2101\.tif' is not one of 1\.tif to 2100\.tif"):
            captions.build(variant, root=changed(root, name, lambda c: c["images"][0].update(filename="2101.tif")))


def test_questions_answers_and_types_go_together(asked: tuple[str, Path]) -> None:
    variant, root = asked
    for part, split in enumerate(rsvqa.VARIANTS[variant].splits):
        data = rsvqa.build(variant, root=root, split=split)
        assert [image.number for image in data.images] == [2 * part, 2 * part + 1]
        for i in range(2):
            number, batch = 2 * part + i, data[i]
            assert text(batch, "types").strings == ("presence", "count", "comp")
            assert text(batch, "questions").strings[1] == f"What is the count in {number}?"
            assert text(batch, "answers").strings == ("yes", str(number), "no")
            assert {name: set(text(batch, name).role) for name in rsvqa.TEXTS} == {
                n: {r} for n, r in rsvqa.TEXTS.items()
            }
            stored = pictures.picture(root / rsvqa.VARIANTS[variant].folders[0] / f"{number}.tif")
            assert batch.raster("rgb").values[0].numpy().tolist() == stored.tolist()
    assert batch.raster("rgb").gsd_m == {"lr": 10.0, "hr": 0.15}[variant]


def test_questions_of_some_types(asked: tuple[str, Path]) -> None:
    variant, root = asked
    batch = rsvqa.build(variant, root=root, types=["count"], modalities=["questions", "answers"])[1]
    assert {name: text(batch, name).strings for name in batch.layers} == {
        "questions": ("What is the count in 1?",),
        "answers": ("1",),
    }
    with pytest.raises(LookupError, match="types='counts' is unknown"):
        rsvqa.build(variant, root=root, types=["counts"])


def test_only_the_fine_images_have_another_city(asked: tuple[str, Path]) -> None:
    variant, root = asked
    if variant == "hr":
        assert len(rsvqa.build(variant, root=root, split="test-phili")) == 2
    else:
        with pytest.raises(LookupError, match="split='test-phili' is unknown"):
            rsvqa.build(variant, root=root, split="test-phili")


def test_entries_are_found_by_number_not_by_place(asked: tuple[str, Path], changed: Any) -> None:
    variant, root = asked
    name = f"{rsvqa.VARIANTS[variant].prefix}_split_val_questions.json"
    turned = changed(root, name, lambda c: c["questions"].reverse())
    assert rsvqa.build(variant, root=turned, split="val").images == rsvqa.build(variant, root=root, split="val").images


def test_broken_lists_of_questions_are_named(asked: tuple[str, Path], changed: Any) -> None:
    variant, root = asked
    prefix = rsvqa.VARIANTS[variant].prefix
    for kind, change, error in (
        ("images", lambda c: c.pop("images"), "_images.json holds no list 'images'"),
        ("questions", lambda c: c["questions"][0].pop("type"), "_questions.json: the entry 0 lacks 'type'"),
        (
            "answers",
            lambda c: c["answers"][1].update(active=False),
            "_answers.json has no active entry 1, which question 1",
        ),
        ("images", lambda c: [i.update(active=False) for i in c["images"]], "lists no active image"),
    ):
        with pytest.raises(ValueError, match=error):
            rsvqa.build(variant, root=changed(root, f"{prefix}_split_train_{kind}.json", change))


def test_places_with_text_join(told: tuple[str, Path]) -> None:
    variant, root = told
    data = captions.build(variant, root=root)
    joined = Batch.cat([data[i] for i in range(len(data))])
    assert all(text(joined[i], "captions").strings == data.sentences[i] for i in range(len(data)))

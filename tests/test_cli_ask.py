"""everysat ask: which arguments are questions, what is printed, how it fails."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from everysat.cli import app
from everysat.cli.ask import table, told_apart
from everysat.find import find
from everysat.models import weights
from everysat.tasks import answer, classify
from everysat.tasks.answer import Reply
from everysat.types import Batch, Place, Raster, Text

YES_NO = {"presence": ["yes", "no"]}
QUESTIONS = ("Is there water?", "Is there a forest?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ask")


@pytest.fixture(scope="module")
def files(folder):
    """A GeoTIFF of the four 10 m bands of Sentinel-2, 600 m x 400 m near Berlin, brighter to the east; no data in its first column."""
    rasterio = pytest.importorskip("rasterio")
    path = folder / "s2.tif"
    values = np.broadcast_to(1000 + 50 * np.arange(60, dtype=np.uint16), (4, 40, 60)).copy()
    values[:, :, 0] = 0
    profile = {
        "driver": "GTiff",
        "width": 60,
        "height": 40,
        "count": 4,
        "dtype": "uint16",
        "crs": "EPSG:32633",
        "nodata": 0,
    }
    with rasterio.open(
        path, "w", transform=rasterio.transform.from_origin(390_000, 5_820_000, 10, 10), **profile
    ) as out:
        out.write(values)
        for number, name in enumerate(("B02", "B03", "B04", "B08"), 1):
            out.set_band_description(number, name)
    return [str(path)]


@pytest.fixture(scope="module")
def model(folder):
    """An OmniSat that learned one kind of question, from noise."""
    torch.manual_seed(0)
    layer = {
        "sensor": "sentinel-2-l2a",
        "bands": ["B02", "B03", "B04", "B08"],
        "gsd_m": 10,
        "projector": "texture",
        "mean": [0.2] * 4,
        "std": [0.1] * 4,
    }
    sizes = {"patch_m": 40, "grid": 4, "dim": 16, "depth": 1, "heads": 2}
    encoder = find("models", "omnisat/")[0].build("", **sizes, modalities={"s2": layer})
    task = answer.build(encoder=encoder, answers=YES_NO, words="letters", vector=26, width=8, heads=2)
    wanted = encoder.inputs["s2"]
    raster = Raster.of(wanted.sensor, torch.rand(1, 4, 16, 16), 10.0)
    rows = torch.zeros(2, dtype=torch.int64)
    columns = {"questions": QUESTIONS, "types": ("presence",) * 2, "answers": ("yes", "no")}
    said = {name: Text(some, ("question",) * 2, rows) for name, some in columns.items()}
    batch = Batch((Place(160.0, 160.0),), {"s2": raster, **said})
    adam = torch.optim.Adam(task.kind.parameters(), 0.05)
    for _ in range(60):
        adam.zero_grad()
        task.train()(encoder, batch, torch.Generator())["type"].backward()
        adam.step()
    return str(weights.save(folder / "model.safetensors", encoder, task))


def asked(*arguments: str):
    return CliRunner().invoke(app, ["ask", *arguments])


OF_FILES = ("--sensor", "sentinel-2-l2a", "--time", "2024-05-31", "--reading", "processing_baseline=N0300")


def told(result) -> dict:
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def test_files_and_questions_are_told_apart(tmp_path) -> None:
    odd = tmp_path / "what?.tif?"
    odd.write_text("")
    given = ["a.tif", "Is there water?", str(odd), "b.tif", "Is there water?"]
    assert told_apart(given, ["Count the lakes"]) == (
        ["a.tif", str(odd), "b.tif"],
        ["Is there water?", "Count the lakes"],
    )
    with pytest.raises(ValueError, match="no question: end it with"):
        told_apart(["a.tif"], [])
    with pytest.raises(ValueError, match="'is there water' is no file, and no question either"):
        told_apart(["a.tif", "is there water"], [])


def test_the_middle_of_the_files(model, files) -> None:
    found = told(asked(model, *files, *QUESTIONS, "--json", *OF_FILES))
    assert [reply["question"] for reply in found["replies"]] == list(QUESTIONS)
    assert (found["place"]["width_m"], found["place"]["height_m"]) == (160.0, 160.0)  # what it learned on
    for reply in found["replies"]:
        assert reply["observed"]
        assert reply["kind"] == "presence"
        assert reply["answer"] in ("yes", "no")
        assert 0.5 <= reply["probability"] <= 1
    alone = told(asked(model, *files, "-q", QUESTIONS[1], "--json", *OF_FILES))
    assert alone["replies"][0]["probability"] == pytest.approx(found["replies"][1]["probability"], rel=1e-5)


def test_a_place_is_where_one_says(model, files) -> None:
    middle = told(asked(model, *files, QUESTIONS[0], "--json", *OF_FILES))
    at = middle["place"]
    place = ("--place", f"{at['lon']},{at['lat']}")
    again = told(asked(model, *files, QUESTIONS[0], "--json", *place, *OF_FILES))
    assert again == middle
    smaller = told(asked(model, *files, QUESTIONS[0], "--json", *place, "--size-m", "80", *OF_FILES))
    assert smaller["place"]["width_m"] == 80
    assert smaller["place"]["lon"] == pytest.approx(at["lon"], abs=1e-3)
    larger = told(asked(model, *files, QUESTIONS[0], "--json", "--size-m", "9000", *OF_FILES))
    assert (larger["place"]["width_m"], larger["place"]["height_m"]) == (600.0, 400.0)


def test_nothing_observed_and_not_sure(model, files, folder) -> None:
    import rasterio

    empty = folder / "empty.tif"
    with rasterio.open(files[0]) as source, rasterio.open(empty, "w", **source.profile) as out:
        out.write(np.zeros_like(source.read()))
        for number, name in enumerate(source.descriptions, 1):
            out.set_band_description(number, name)
    (reply,) = told(asked(model, str(empty), QUESTIONS[0], "--json", *OF_FILES))["replies"]
    assert (reply["said"], reply["answer"], reply["observed"]) == ("nothing observed", "", False)
    (reply,) = told(asked(model, *files, QUESTIONS[0], "--json", "--sure", "1", *OF_FILES))["replies"]
    assert reply["said"] == "not sure"
    shown = asked(model, *files, QUESTIONS[0], "--sure", "1", *OF_FILES).stdout
    assert "not sure" in shown.replace("\n", " ")


def test_the_table() -> None:
    sure = Reply("Is there water?", "presence", "yes", 0.9, True, "no", 0.55, True)
    unsure = Reply("Is there sand?", "presence", "no", 0.52, False, "no", 0.5, True)
    shown = table([sure, unsure], Place(480.0, 480.0, lonlat=(13.0, 52.0)))
    assert shown.title == "480 x 480 m at 13.0, 52.0"
    assert shown.rows == (
        ("Is there water?", "presence", "yes", "90%", "", "no (55%)"),
        ("Is there sand?", "presence", "not sure", "52%", "no", "no (50%)"),
    )
    assert "would be" not in table([sure], Place(480.0, 480.0)).columns


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--place", "13.4"), r"--place '13.4' must be LON,LAT"),
        (("--place", "13.4,152"), "is no position on Earth"),
        (("--place", "2.3,48.8"), r"lies outside of the files, which reach from 13\."),
        (("--size-m", "0"), r"--size-m 0 must be positive"),
        (("--sure", "7"), "--sure 7 must lie between 0 and 1"),
        (("--period", "2024"), "give either files, or --period"),
        (("Zzzz zzz?",), "'Zzzz zzz.': no kind of question that this model learned. It learned presence"),
    ],
)
def test_mistakes(model, files, more, message) -> None:
    given = (QUESTIONS[0], *more)
    result = asked(model, *files, *given, *OF_FILES)
    with pytest.raises((ValueError, LookupError), match=message):
        raise result.exception


def test_a_model_that_answers_nothing(folder, files) -> None:
    encoder = find("models", "simplesat/nano")[0].build("nano")
    task = classify.build("place", encoder=encoder, classes=["a", "b"])
    other = weights.save(folder / "classes.safetensors", encoder, task)
    with pytest.raises(ValueError, match="answers no questions, its task is classify: train one that does"):
        raise asked(str(other), *files, QUESTIONS[0]).exception
    with pytest.raises(ValueError, match="no files to look at"):
        raise asked(str(folder / "model.safetensors"), QUESTIONS[0]).exception

"""The command classify: maps and tables from words, with examples and without, and mistakes in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
import torch
from command_line import everysat, fails

from everysat.cli.words import classes_of
from everysat.models import georeset, weights
from everysat.nn.gaussian import GaussianHead

WORDS = {"encoder": "letters", "vector": 26, "hidden": 24}
RGB = {
    "rgb": {
        "sensor": "rgb-image", "bands": ["red", "green", "blue"], "gsd_m": 10, "mean": [100.0] * 3, "std": [50.0] * 3
    }
}  # fmt: skip
WEST, NORTH, SIDE = 390_000, 5_820_000, 64
PROMPTS = "forest,water|a lake,houses"


def written(path: Path, image: np.ndarray, west: float = WEST) -> Path:
    options = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, west, 0, -10, NORTH), "nodata": 0}
    with rasterio.open(
        path, "w", driver="GTiff", height=image.shape[1], width=image.shape[2], count=3, dtype="uint8", **options
    ) as file:
        file.write(image)
        for band, name in enumerate(("red", "green", "blue"), 1):
            file.set_band_description(band, name)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of two kinds of ground, a third without data, polygons of both kinds and of a third, and a model that learned nothing."""
    folder, draw = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    ground = np.kron(draw.integers(0, 2, (4, 4)), np.ones((SIDE // 4, SIDE // 4)))
    image = (
        40 + 160 * ground[None] * np.array([1.0, 0.3, 0.1])[:, None, None] + draw.normal(0, 5, (3, SIDE, SIDE))
    ).clip(1, 255)
    written(folder / "scene.tif", image.astype(np.uint8))
    written(folder / "other.tif", image[:, ::-1].astype(np.uint8), WEST + 10 * SIDE)
    written(folder / "nothing.tif", np.zeros((3, SIDE, SIDE), np.uint8))
    part, squares, kinds = 10 * SIDE // 4, [], []
    for r, c in np.ndindex(4, 4):
        squares.append(shapely.box(WEST + c * part, NORTH - (r + 1) * part, WEST + (c + 1) * part, NORTH - r * part))
        kinds.append("water" if ground[r * SIDE // 4, c * SIDE // 4] else "forest")
    kinds[kinds.index("water")] = "swamp"
    geopandas.GeoDataFrame({"kind": kinds}, geometry=squares, crs="EPSG:32633").to_file(folder / "ponds.gpkg")
    torch.manual_seed(0)
    encoder = {"name": "resnet/small", "options": {"width": 4, "tile": 4}}
    model = georeset.build("", encoder=encoder, modalities=RGB, text=WORDS, dim=8).eval()
    for module in model.modules():
        if isinstance(module, GaussianHead):
            torch.nn.init.normal_(module.spread.weight, std=0.5)
    model.scale.fill_(20.0)
    weights.save(folder / "model.safetensors", model, provenance={"licence": "none"})
    return folder


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def test_classes_and_ways() -> None:
    assert classes_of("forest, water|a lake") == {"forest": ["forest"], "water": ["water", "a lake"]}
    said = classes_of("forest,water|a lake", ["{}", "an image of {}"])
    assert said["water"] == ["water", "a lake", "an image of water", "an image of a lake"]
    for prompts, message in (("forest,,water", "without words"), ("forest,forest", "'forest' twice")):
        with pytest.raises(ValueError, match=message):
            classes_of(prompts)
    with pytest.raises(ValueError, match=r"must hold \{\} once"):
        classes_of("forest,water", ["an image"])


def test_a_map_from_words_is_that_of_the_saved_task(folder: Path, tmp_path: Path) -> None:
    out, saved = tmp_path / "map.tif", tmp_path / "task.safetensors"
    options = ("--sensor", "rgb-image", "--quiet")
    said = everysat(
        "classify", folder / "model.safetensors", folder / "scene.tif", "--prompts", PROMPTS, "--reject", 0.5, "-o", out,
        "--save", saved, "--probabilities", *options,
    )  # fmt: skip
    assert f"weights: {saved}" in said
    with rasterio.open(out) as file:
        classes, side = file.read(1), file.res[0]
    assert classes.shape == (8, 8), "a pixel a token"
    assert side == 80
    assert set(np.unique(classes)) <= {0, 1, 2, 3}
    p = read(tmp_path / "map-probabilities.tif")
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-4)
    assert ((p[:3].max(0) < 0.5) == (classes == 3)).mean() > 0.99
    everysat("predict", saved, folder / "scene.tif", "-o", tmp_path / "again.tif", *options)
    assert np.array_equal(read(tmp_path / "again.tif")[0], classes)
    contract = json.loads(weights.contract_path(saved).read_text())
    assert contract["task"]["config"]["classes"]["water"] == ["water", "a lake"]
    assert contract["licence"] == "none"
    fine = tmp_path / "fine.tif"
    everysat(
        "classify",
        folder / "model.safetensors",
        folder / "scene.tif",
        "--prompts",
        PROMPTS,
        "--gsd-m",
        10,
        "-o",
        fine,
        *options,
    )
    assert read(fine).shape == (1, 64, 64)


def test_nothing_observed_has_no_class(folder: Path, tmp_path: Path) -> None:
    options = ("--prompts", PROMPTS, "--sensor", "rgb-image", "--quiet")
    everysat("classify", folder / "model.safetensors", folder / "nothing.tif", "-o", tmp_path / "map.tif", *options)
    assert (read(tmp_path / "map.tif") == 255).all()
    table = tmp_path / "table.csv"
    files = [folder / name for name in ("scene.tif", "nothing.tif", "other.tif")]
    everysat("classify", folder / "model.safetensors", *files, "--places", "--reject", 0.999, "-o", table, *options)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["place"] for row in rows] == ["scene.tif", "nothing.tif", "other.tif"]
    assert rows[1]["class"] == "nothing observed"
    assert rows[1]["probability"] == ""
    assert rows[0]["class"] in ("forest", "water", "houses")
    assert rows[0]["sure"] == "unsure"
    assert 1 / 3 <= float(rows[0]["probability"]) < 0.999


def test_tiles_in_a_table_are_tiles_of_a_map(folder: Path, tmp_path: Path) -> None:
    options = ("--prompts", PROMPTS, "--places", "--tile-m", 160, "--sensor", "rgb-image", "--quiet")
    both = (folder / "model.safetensors", folder / "scene.tif", folder / "other.tif")
    everysat("classify", *both, "-o", tmp_path / "tiles.tif", *options)
    everysat("classify", *both, "-o", tmp_path / "tiles.csv", *options)
    classes = read(tmp_path / "tiles.tif")[0]
    assert classes.shape == (4, 8)
    rows = list(csv.DictReader((tmp_path / "tiles.csv").read_text().splitlines()))
    names = ["forest", "water", "houses"]
    assert [names.index(row["class"]) for row in rows] == classes.ravel().tolist()
    assert {row["sure"] for row in rows} == {"yes"}
    assert "Classes of places" in everysat("classify", *both, *options)


def test_examples_move_a_class(folder: Path, tmp_path: Path) -> None:
    options = ("--prompts", PROMPTS, "--sensor", "rgb-image", "--probabilities")
    scene = (folder / "model.safetensors", folder / "scene.tif")
    everysat("classify", *scene, "-o", tmp_path / "plain.tif", "--quiet", *options)
    polygons = ("--examples", folder / "ponds.gpkg", "--column", "kind")
    everysat(
        "classify", *scene, "-o", tmp_path / "moved.tif", "--save", tmp_path / "task.safetensors", *polygons, *options
    )
    told = json.loads((tmp_path / "task.safetensors.json").read_text())["task"]["config"]["counts"]
    kinds = list(geopandas.read_file(folder / "ponds.gpkg")["kind"])
    assert told == {name: kinds.count(name) for name in ("forest", "water")}, "one example a polygon, none of the swamp"
    water = [read(tmp_path / f"{name}-probabilities.tif")[1] for name in ("plain", "moved")]
    ponds = read(folder / "scene.tif")[0].reshape(8, 8, 8, 8).mean((1, 3)) > 120
    contrast = [w[ponds].mean() - w[~ponds].mean() for w in water]
    assert contrast[1] > contrast[0]


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    model, scene = folder / "model.safetensors", folder / "scene.tif"

    def said(*arguments: Any) -> str:
        return fails(capsys, monkeypatch, "classify", *arguments)

    out = ("-o", tmp_path / "x.tif", "--sensor", "rgb-image")
    assert "--out is missing" in said(model, scene, "--prompts", PROMPTS)
    assert "at least two classes" in said(model, scene, "--prompts", "forest", *out)
    assert "go together" in said(model, scene, "--prompts", PROMPTS, "--examples", folder / "ponds.gpkg", *out)
    assert "--tile-m is the side of --places" in said(model, scene, "--prompts", PROMPTS, "--tile-m", 100, *out)
    polygons = ("--examples", folder / "ponds.gpkg", "--column")
    assert "which has forest, swamp, water" in said(model, scene, "--prompts", "mud,rock", *polygons, "kind", *out)
    assert "none of its attributes" in said(model, scene, "--prompts", PROMPTS, *polygons, "sort", *out)
    mute = weights.save(tmp_path / "mute.safetensors", georeset.build("nano", modalities=None))
    assert "reads no text" in said(mute, scene, "--prompts", PROMPTS, *out)
    assert "neither" not in said(model, tmp_path / "gone.tif", "--prompts", PROMPTS, *out)

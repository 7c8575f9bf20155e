"""everysat adapt: the shipped recipe on made-up data, from two domains to a file of the target alone that maps, is exported and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from everysat import exported, manifest, sensors
from everysat.cli import app
from everysat.data import so2sat
from everysat.models import domains, weights
from everysat.nn.mappers import Tasked
from everysat.polygons import task_mapper
from everysat.recipe import Recipe, RecipeError
from everysat.tasks import adapt
from everysat.types import Batch, Place, Raster


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Of the shipped recipe, for a made-up set of which few classes are in all parts."""
    root = tmp_path_factory.mktemp("so2sat")
    so2sat.fake(root, places=24)
    common = set.intersection(*(set(so2sat.build(root=root, split=split).codes) for split in so2sat.SPLITS))
    names = json.dumps([so2sat.CLASSES[code] for code in sorted(common)])
    return [
        *(f"data.0.options.{part}.options.root={root}" for part in ("source", "target")),
        *(f"validation.0.options.{part}.options.root={root}" for part in ("target", "test")),
        *(f"{at}.options.classes={names}" for at in ("data.0", "validation.0", "task")),
        "data.0.options.shots=1",
        "model.options.encoder.options.width=2",
        "steps=2",
        "batch_size=9",
        "validate_every=0",
        "accelerator=cpu",
        "workers=0",
    ]


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def adapted(settings: list[str], out: Path, *more: str):
    given = [x for entry in [*settings, f"out={out}", *more] for x in ("--set", entry)]
    return run("adapt", "adapt_so2sat", *given, "--quiet")


def test_the_target_alone_is_left(settings, tmp_path) -> None:
    found = adapted(settings, tmp_path / "a")
    assert found.exit_code == 0, found.output
    file = tmp_path / "a" / "target.safetensors"
    assert str(file) in found.output.replace("\n", "")
    encoder, task = weights.load_task(file)
    assert list(encoder.inputs) == ["s1"]
    contract = json.loads(weights.contract_path(file).read_text())
    assert (contract["unlabelled"], contract["domain"]) == ("inductive", "target")
    (scores,) = json.loads((tmp_path / "a" / "scores.json").read_text())["rows"]
    assert "inductive" in (scores.values() if isinstance(scores, dict) else scores)
    told = manifest.read(tmp_path / "a" / "run.json")
    assert told["recipe"]["data"][0]["options"]["protocol"] == "inductive"
    whole, _ = weights.load_task(tmp_path / "a" / "weights.safetensors")
    assert torch.equal(whole.one("target").backbone.conv.weight, encoder.backbone.conv.weight)
    assert adapted(settings, tmp_path / "a").exit_code == 0  # complete: it is loaded

    mapper = task_mapper(encoder, task)
    assert isinstance(mapper, Tasked)
    side_m = encoder.settings.chip_m
    assert side_m == 320.0
    sensor = sensors.get("sentinel-1-grd").select(("VV", "VH", "ratio"))
    values = torch.from_numpy(np.random.default_rng(0).normal(-10, 3, (1, 3, 64, 96)).astype(np.float32))
    scene = Batch((Place(640.0, 960.0),), {"s1": Raster.of(sensor, values, 10.0)})
    image = mapper(scene)
    assert image.shape[2:] == (2, 3)
    corner = Batch((Place(320.0, 320.0),), {"s1": Raster.of(sensor, values[..., :32, :32], 10.0)})
    torch.testing.assert_close(image[0, :, 0, 0], task.predict(task.features(encoder, corner)).values[0, :, 0, 0])


@pytest.mark.slow
def test_it_is_exported(tmp_path) -> None:
    encoder = domains.build("nano").one("target").eval()
    task = adapt.build(encoder=encoder, classes=["a", "b"]).eval()
    raster = Raster.of(encoder.inputs["s1"].sensor, torch.randn(1, 2, 32, 48), 10.0)
    scene = Batch((Place(320.0, 480.0),), {"s1": raster})
    graph = exported.load(exported.export((encoder, task), tmp_path / "t.pt2"))
    torch.testing.assert_close(graph(scene), task_mapper(encoder, task)(scene), rtol=1e-4, atol=1e-5)


def test_transductive_runs_say_so(settings, tmp_path) -> None:
    base = Recipe.load("adapt_so2sat", settings)
    test = json.dumps(base.validation[0].options["test"])
    found = adapted(settings, tmp_path / "t", "data.0.options.protocol=transductive", f"data.0.options.test={test}")
    assert found.exit_code == 0, found.output
    assert "not of new ones" in " ".join(found.output.split())
    file = tmp_path / "t" / "target.safetensors"
    assert json.loads(weights.contract_path(file).read_text())["unlabelled"] == "transductive"


@pytest.mark.parametrize("variant", ["target_only", "fixmatch", "source_target"])
def test_baselines_are_variants(settings, tmp_path, variant) -> None:
    shares = {"target_only": [0, 1, 0], "fixmatch": [0, 1, 1], "source_target": [1, 1, 0]}[variant]
    found = adapted(settings, tmp_path / "b", f"task.name=adapt/{variant}", f"data.0.options.shares={shares}")
    assert found.exit_code == 0, found.output
    assert variant in found.output


def test_other_recipes_are_refused() -> None:
    found = run("adapt", "omnisat_levir")
    assert isinstance(found.exception, RecipeError)
    assert "everysat finetune omnisat_levir" in str(found.exception)

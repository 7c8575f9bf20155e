"""`everysat distill`: a run, then one model for each modality that the other commands take."""

from __future__ import annotations

import json

import pytest
import rasterio
import torch
import yaml
from rasterio.transform import from_origin
from safetensors.torch import load_file
from typer.testing import CliRunner

from everysat.cli import distill, maps
from everysat.models import weights

ENCODER = {
    "name": "omnisat/",
    "options": {"patch_m": 20.0, "grid": 3, "dim": 16, "depth": 1, "heads": 4, "dropout": 0.0, "drop_path": 0.0},
}
CLASSES = [f"class {i}" for i in range(4)]
RECIPE = {
    "name": "small",
    "model": {"name": "students", "statistics": "data", "options": {"encoder": ENCODER, "modalities": "data", "dim": 8}},
    "data": [{"name": "synthetic/images", "options": {"places": 8, "size_m": 60.0}}],
    "validation": [{"name": "synthetic/images", "options": {"places": 4, "size_m": 60.0, "seed": 0}}],
    "task": {"name": "distill/contrast", "options": {"task": {"name": "classify/pixel", "options": {"classes": CLASSES, "gsd_m": 10.0}}}},
    "steps": 3,
    "batch_size": 4,
}  # fmt: skip


def run(app, *arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "out": str(folder / "run")}))
    result = run(distill.app, folder / "recipe.yaml", "--quiet", "--set", "lr=0.002")
    assert result.exit_code == 0, result.exception
    return folder, result.output


def test_each_modality_gets_a_file_and_a_score(done) -> None:
    folder, said = done
    for name in ("fine", "coarse"):
        encoder, task = weights.load_task(folder / "run" / f"{name}.safetensors")
        assert list(encoder.inputs) == [name]
        assert tuple(task.names) == tuple(CLASSES)
        contract = json.loads((folder / "run" / f"{name}.safetensors.json").read_text())
        assert contract["source"] == "distilled"
        assert contract["recipe"]["lr"] == 0.002
        assert f"{name}.safetensors" in "".join(said.split())
    assert "macro" in said


def test_again_it_trains_nothing_and_writes_the_same(done) -> None:
    folder, _ = done
    before = load_file(folder / "run" / "fine.safetensors")
    log = (folder / "run" / "log.jsonl").read_bytes()
    assert run(distill.app, folder / "recipe.yaml", "--quiet", "--set", "lr=0.002").exit_code == 0
    after = load_file(folder / "run" / "fine.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (folder / "run" / "log.jsonl").read_bytes() == log


def test_a_student_maps_as_any_model(done, tmp_path) -> None:
    folder, _ = done
    model = folder / "run" / "coarse.safetensors"
    encoder, task = weights.load_task(model)
    bands = encoder.inputs["coarse"].sensor.names
    values = torch.rand(4, 12, 12, generator=torch.Generator().manual_seed(0)).numpy()
    profile = {"driver": "GTiff", "width": 12, "height": 12, "count": 4, "dtype": "float32", "crs": "EPSG:32631"}
    with rasterio.open(tmp_path / "s.tif", "w", transform=from_origin(500000, 5000120, 10, 10), **profile) as file:
        file.write(values)
        for band, name in enumerate(bands, 1):
            file.set_band_description(band, name)
    table = tmp_path / "synthetic-coarse.toml"
    rows = ", ".join(f'{{ name = "{b}" }}' for b in bands)
    table.write_text(
        f'kind = "optical"\nsource = "synthetic"\ndefaults = {{ gsd_m = 10.0, unit = "reflectance", range = [-0.5, 2.0] }}\nbands = [{rows}]\n'
    )
    result = run(maps.app, "predict", model, tmp_path / "s.tif", "--sensor", table, "--reading", "stored=physical", "-o", tmp_path / "m.tif", "--quiet")  # fmt: skip
    assert result.exit_code == 0, result.exception
    with rasterio.open(tmp_path / "m.tif") as file:
        assert file.shape == (12, 12)
        assert set(file.read(1).ravel().tolist()) <= {0, 1, 2, 3}
    assert task.config["gsd_m"] == 10.0


@pytest.mark.slow
def test_a_student_is_exported_as_any_model(done, tmp_path) -> None:
    folder, _ = done
    model = folder / "run" / "coarse.safetensors"
    result = run(maps.app, "export", model, "-o", tmp_path / "m.pt2", "--chip-m", "60")
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "m.pt2").is_file()


def test_a_recipe_that_distils_nothing_is_refused(tmp_path) -> None:
    plain = {**RECIPE, "task": RECIPE["task"]["options"]["task"]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plain))
    result = run(distill.app, tmp_path / "r.yaml")
    assert "everysat finetune" in str(result.exception)

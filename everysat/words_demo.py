"""The demo of words: a query in words as a heat map, a land-cover map from words alone, and questions answered, on the embedded real scene.

It takes the weights that come with the package (:data:`SPACE`, :data:`ANSWERS`), which learned from half of the scene's ground and its OpenStreetMap polygons
(``everysat/recipes/georeset_berlin.yaml``, ``ask_berlin.yaml``); scores are of the ground that was held out from them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat import polygons
from everysat.data import berlin
from everysat.io.read import open_scene, read
from everysat.models import weights
from everysat.nn.scores import calibration_error
from everysat.predict import predict
from everysat.sensors import Band, Sensor
from everysat.store import open_store, words
from everysat.store.search import heat_map
from everysat.table import Table
from everysat.tasks import prompts
from everysat.types import Batch, Raster

SPACE, ANSWERS = "georeset/berlin", "ask/berlin"
QUERY = "a lake"
CLASSES = ("farmland", "forest", "grassland", "residential land", "scrub", "water", "wetland")
TRUE = {"farm": "farmland", "grass": "grassland", "meadow": "grassland", "residential": "residential land"}
"""Prompts of the classes of the polygons that are called otherwise."""
QUESTIONS = ("Is there water?", "How much of the area is forest?", "Is it a rural or an urban area?")
HELD_OUT: dict[str, Any] = {"block_m": 1440.0, "shares": {"train": 0.5, "val": 0.15, "test": 0.35}, "part": "test"}
ASKED_M, SQUARES = 480.0, 3
"""Side of the squares that are asked about, and their number."""
LICENCE = "Copernicus Sentinel data 2017; (c) OpenStreetMap contributors (ODbL)"


def run(
    out: Path, *, query: str = QUERY, classes: Sequence[str] = CLASSES, questions: Sequence[str] = QUESTIONS
) -> Path:
    """Everything that the module's text says; returns the path of the report.

    Raises:
        FileNotFoundError: the scene or the text encoder is not installed; the message says how.
    """
    out.mkdir(parents=True, exist_ok=True)
    began, files = time.monotonic(), berlin.files()
    encoder: Any = weights.load(SPACE)
    scene = open_scene(files, inputs=encoder.reads)
    facts = {
        "model": {
            "name": SPACE,
            "weights": weights.read_contract(weights.installed(SPACE), weights.FORMAT, "")["sha256"],
        }
    }
    store = out / "area.zarr"
    if not store.exists():
        predict(polygons.dense(encoder, polygons.token_m(encoder)), scene, store, quantiser="float32/1", facts=facts)
    opened = open_store(store)
    heat = heat_map(opened, words.vectors(opened, [query], weights.installed(SPACE))[0], out / "heat.tif", quiet=True)
    task = prompts.build("pixel", encoder=encoder, classes=list(classes))
    made = predict(polygons.task_mapper(encoder, task), scene, out / "map.tif", quiet=True)
    replies = answers(questions)
    (out / "answers.json").write_text(json.dumps(replies, indent=1), encoding="utf-8")
    return _report(out, query, list(classes), heat, made, replies, time.monotonic() - began)


def answers(questions: Sequence[str]) -> list[dict[str, Any]]:
    """To each question, of the :data:`SQUARES` squares of held-out ground whose polygons tell most, which stand beside."""
    encoder, task = weights.load_task(weights.installed(ANSWERS))
    tiles = berlin.build(labels=True, tile_m=ASKED_M, stride_m=ASKED_M, **HELD_OUT)
    known = [float(tiles[i].raster("label").valid.float().mean()) for i in range(len(tiles))]
    rows = []
    for index in np.argsort(known)[::-1][:SQUARES]:
        place = tiles[int(index)]
        at, label = place.places[0].lonlat, place.raster("label")
        assert at is not None
        names, code = label.sensor.bands[0].classes or {}, label.values[label.valid].long()
        shares = {names[int(c)]: float((code == c).sum()) / label.values.numel() for c in code.unique()}
        mapped = ", ".join(f"{share:.0%} {name}" for name, share in sorted(shares.items(), key=lambda pair: -pair[1]))
        for r in task.ask(encoder, place.without("label"), list(questions)):  # type: ignore[operator]
            rows.append({
                "place": f"{at[0]:.4f}, {at[1]:.4f}", "mapped there": mapped, "question": r.question,
                "answer": r.said if r.sure or not r.observed else f"{r.answer}, not sure", "probability": f"{r.probability:.0%}",
                "without image": f"{r.guess} ({r.guess_probability:.0%})",
            })  # fmt: skip
    return rows


def scores(classes: Sequence[str], found: np.ndarray, sure: np.ndarray) -> dict[str, float]:
    """Of a map of ``classes`` (codes [y, x], and probability) over the labelled pixels of held-out tiles."""
    tiles = berlin.build(labels=True, tile_m=180.0, stride_m=180.0, label_gsd_m=10.0, **HELD_OUT)
    whole, right, truth, chance = tiles.scene.geobox.affine, [], [], []
    names = (tiles[0].raster("label").sensor.bands[0].classes or {}).items()
    codes = {code: classes.index(TRUE.get(name, name)) for code, name in names if TRUE.get(name, name) in classes}
    for index in range(len(tiles)):
        place = tiles[index]
        box, label = place.places[0].geobox, place.raster("label")
        assert box is not None
        left, top = (round(v) for v in (~whole) * (box.affine.c, box.affine.f))
        step = round(label.gsd_m / whole.a)
        height, width = label.values.shape[2:]
        rows, cols = (slice(s, s + n * step, step) for s, n in ((top, height), (left, width)))
        code = label.values[0, 0].long().numpy()
        keep = label.valid[0, 0].numpy() & np.isin(code, list(codes)) & (found[rows, cols] >= 0)
        wanted = np.array([codes.get(int(c), -1) for c in code[keep]], dtype=int)
        right.append(found[rows, cols][keep] == wanted)
        truth.append(wanted)
        chance.append(sure[rows, cols][keep])
    ok, true, p = (np.concatenate(x) for x in (right, truth, chance))
    recall = [ok[true == c].mean() for c in np.unique(true)]
    error = calibration_error(torch.from_numpy(p), torch.from_numpy(ok), 15)
    return {
        "accuracy": float(ok.mean()),
        "balanced accuracy": float(np.mean(recall)),
        "pixels": len(ok),
        "calibration error": float(error),
    }


def _report(
    out: Path, query: str, classes: list[str], heat: Path, made: Any, replies: list[dict[str, Any]], seconds: float
) -> Path:
    from everysat.report import Report, maps_figure, stretched

    batch = berlin.build().scene.read()
    colour = stretched(batch.raster("s2-10m").select(["B04", "B03", "B02"]).values[0].numpy())
    shape = colour.shape[:2]
    found = np.where(np.isfinite(codes := _pixels(made["classes"], shape)), codes, -1).astype(int)
    sure, warm = _pixels(made["confidence"], shape) / 100, _pixels(heat, shape)
    low, high = np.nanquantile(warm, (0.5, 0.999))
    report = Report("A place in words", "EverySat demo: Sentinel-2, 16 February 2017, near Berlin")
    told = scores(classes, found, sure) if set(CLASSES) <= set(classes) else {}
    if told:
        report.add_numbers(
            {
                f"{name} of the map, {told['pixels']:,} held-out pixels": f"{told[name]:.2f}"
                for name in ("accuracy", "balanced accuracy")
            }
        )
    report.add_text(
        "A small model learned on half of this scene to bring its pixels, what OpenStreetMap has there, and sentences about that to one space. It has no "
        "classes and no classifier: the query and the land cover below are words. Questions are answered by a second small model, which learned from questions about the same half."
    )
    panels: list[tuple[str, Any, dict[str, Any]]] = [
        ("Scene (bands 4, 3, 2)", colour, {}),
        (f'"{query}"', np.clip((warm - low) / (high - low), 0, 1), {"kind": "confidence"}),
        ("Land cover from words", found, {}),
        ("Probability of that class", sure, {"kind": "confidence"}),
    ]
    figure = maps_figure(panels, classes)
    figure.savefig(out / "words.png", dpi=110)
    report.add_figure(figure, f"Scores of the query between their median and 99.9 %. Prompts: {', '.join(classes)}.")
    report.add_table(Table.of("Questions about three squares of 480 m that were held out", replies))
    if told:
        report.add_text(f"Calibration error of the map's probabilities: {told['calibration error']:.2f}.")
    report.add_facts({"weights": f"{SPACE}, {ANSWERS}", "this run took": f"{seconds:.0f} s", "data": LICENCE})
    return report.save(out / "report.html")


def _pixels(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A map with as many pixels as ``shape`` says, NaN where there is none."""
    sensor = Sensor("map", "terrain", (Band("map", 20.0, "ratio"),), "this demo")
    batch: Batch = read([str(path)], stored="physical", sensor=sensor)
    layer = next(iter(batch.layers.values()))
    assert isinstance(layer, Raster)
    image = torch.where(layer.valid, layer.values, torch.nan)[0, 0].numpy()
    step = round(shape[0] / image.shape[0])
    return image.repeat(step, 0).repeat(step, 1)[: shape[0], : shape[1]]

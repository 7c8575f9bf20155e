"""Land cover from words alone, on ground of the Berlin scene that was held out: which witnesses there are, inputs that are wrong, calibration, retrieval.

    python -m benchmarks.words_berlin runs/georeset_berlin/weights.safetensors [runs/confidence_berlin/weights.safetensors]

Classes are 7 prompts; the truth are OpenStreetMap polygons (grass and meadow are both grassland). The second file is the same kind of network trained
with labels of the same blocks (recipe ``confidence_berlin``), whose eight probabilities are summed to the seven. Scores count labelled pixels; intervals (95 %)
resample tiles of 180 m, of one training each. Writes benchmarks/results/words_berlin.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import everysat as es
from benchmarks import measuring
from benchmarks.words import hits, interval
from everysat.collect import witnesses
from everysat.data import berlin
from everysat.data.disturbed import Disturbed
from everysat.data.statistics import band_statistics
from everysat.evaluate import Samples, of_predictions
from everysat.models import weights
from everysat.nn.risk import auroc, risk_coverage
from everysat.table import Table
from everysat.tasks import prompts
from everysat.types import Batch
from everysat.words_demo import CLASSES, HELD_OUT, TRUE

TILES: dict[str, Any] = {"labels": True, "tile_m": 180.0, "stride_m": 180.0, **HELD_OUT}
SHOWN = {"10 m and 20 m bands": ("s2-10m", "s2-20m"), "10 m bands": ("s2-10m",), "20 m bands": ("s2-20m",)}
WRONG = {"30 % of inputs missing": "missing", "30 % of inputs full of noise": "noise"}
WAYS = ("{}", "landuse is {}", "an aerial view of {}")

Said = Callable[[Batch], tuple[Tensor, Tensor]]
"""Probabilities [1, class, y, x] of a place, NaN where there are none, and how much is known of it, nats."""


def by_words(model: Any) -> Said:
    ways = {name: [way.format(name) for way in WAYS] for name in CLASSES}
    task = prompts.build("pixel", encoder=model, classes=ways, gsd_m=10.0)

    def said(batch: Batch) -> tuple[Tensor, Tensor]:
        features = model.embed(batch)
        found = task.predict(features, batch)
        nats = -0.5 * features.var.log().mean() if len(features.coords) else torch.tensor(0.0)
        return found.values.masked_fill(~found.valid, torch.nan), nats

    return said


def by_labels(file: str) -> Said:
    encoder, task = weights.load_task(file)
    index = [CLASSES.index(TRUE.get(name, name)) for name in task.sensor.names]

    def said(batch: Batch) -> tuple[Tensor, Tensor]:
        found = task.predict(task.features(encoder, batch), batch)
        p = found.values.masked_fill(~found.valid, torch.nan)
        return p.new_zeros(1, len(CLASSES), *p.shape[2:]).index_add(1, torch.tensor(index), p), torch.tensor(torch.nan)

    return said


@torch.no_grad()
def tested(said: Said, tests: Any, shown: tuple[str, ...], clean: Any) -> dict[str, Any]:
    """Probabilities, labels and tile of all labelled pixels; information and whether it was disturbed of all tiles."""
    names = (clean[0].raster("label").sensor.bands[0].classes or {}).items()
    code = {c: CLASSES.index(TRUE.get(name, name)) for c, name in names}
    to = torch.tensor([code[c] for c in sorted(code)])
    parts, nats, hit = [], [], []
    for number in range(len(tests)):
        place, whole = tests[number], clean[number]
        label = whole.raster("label")
        p, known = said(place.only(*(n for n in shown if n in place.layers)))
        keep = label.valid[0, 0] & torch.isfinite(p[0]).all(0)
        truth = to[label.values[0, 0][keep].long()]
        parts.append((p[0, :, keep].T, truth, torch.full_like(truth, number)))
        nats.append(known)
        hit.append(
            any(n not in place.layers or not torch.equal(place.raster(n).values, whole.raster(n).values) for n in shown)
        )
    p, truth, tile = (torch.cat(x) for x in zip(*parts, strict=True))
    return {"p": p, "truth": truth, "tile": tile, "nats": torch.stack(nats), "hit": torch.tensor(hit)}


def row(found: dict[str, Any]) -> dict[str, Any]:
    p, truth, tile = found["p"], found["truth"], found["tile"]
    evaluation = of_predictions(Samples(torch.zeros(len(truth), 1), truth, tile, CLASSES), [p])
    scores = {name: evaluation.score(name) for name in ("accuracy", "balanced_accuracy", "macro_f1")}
    told: dict[str, Any] = {name: [round(x, 3) for x in (s.mean, s.low, s.high)] for name, s in scores.items()}
    wrong = (p.argmax(1) != truth).double()
    curve = risk_coverage(p.amax(1), wrong)
    told["calibration_error"] = round(float(evaluation.calibration()["error"]), 3)
    told["accuracy_of_the_surest_half"] = round(1 - float(curve.at(0.5)), 3)
    if found["hit"].any() and not found["hit"].all() and torch.isfinite(found["nats"]).all():
        told["disturbed_tiles_noticed_auroc"] = round(float(auroc(-found["nats"], found["hit"])), 3)
    return told


def retrieval(model: Any) -> dict[str, Any]:
    """Among held-out tiles that the map and captions tell of: what of a tile finds the tile by what else of it."""
    data = witnesses.build("berlin", base="berlin", modalities=["osm", "captions"], options=TILES)
    every = [data[i] for i in range(len(data))]
    batch = Batch.cat([b for b in every if {"osm", "captions"} <= set(b.layers)])
    of = {
        name: model.place(batch.only(*layers))
        for name, layers in {"image": ("s2-10m", "s2-20m"), "words": ("captions",), "shapes": ("osm",)}.items()
    }
    own, told = torch.eye(len(batch), dtype=torch.bool), {"tiles": len(batch)}
    for a, b in (("image", "words"), ("words", "image"), ("image", "shapes"), ("shapes", "image"), ("words", "shapes")):
        scores = model.match(of[a], of[b])
        told |= {f"{a} to {b} R@{k}, %": interval(hits(scores, own, k)) for k in (1, 5, 10)}
    return told


def main(file: str, supervised: str = "") -> None:
    model: Any = es.load(file)
    clean = berlin.build(**TILES)
    std = {n: s for n, (_, s) in band_statistics(clean, list(SHOWN["10 m and 20 m bands"])).items()}
    told: dict[str, Any] = {"tiles": len(clean)}
    for who, said in {"words": by_words(model), **({"labels": by_labels(supervised)} if supervised else {})}.items():
        whole = tested(said, clean, ("s2-10m", "s2-20m"), clean)
        told[f"{who}: all bands"] = row(whole)
        for name, shown in list(SHOWN.items())[1:]:
            told[f"{who}: {name} alone"] = row(tested(said, clean, shown, clean))
        for name, how in WRONG.items():
            wrong: Any = Disturbed(clean, std=std, how=how, share=0.3)
            told[f"{who}: {name}"] = row(tested(said, wrong, ("s2-10m", "s2-20m"), clean))
    share = torch.bincount(whole["truth"]).double() / len(whole["truth"])
    told["most frequent class"] = {
        "accuracy": [round(float(share.max()), 3)] * 3,
        "balanced_accuracy": [round(1 / len(share), 3)] * 3,
    }
    told["retrieval"] = retrieval(model)
    measuring.save("words_berlin", "Land cover from words, held-out ground of the Berlin scene", told)
    rows = [{"test": name, **{k: str(v) for k, v in one.items()}} for name, one in told.items() if ":" in name]
    print(Table.of("Land cover from words", rows).markdown())
    print(told["retrieval"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])

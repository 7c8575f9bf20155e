"""Sensors and resolutions that training did not have, on real data: what RAMEN and Atomizer keep, and what others can do at all.

    python -m benchmarks.any_sensor             # about 40 minutes on 2 cores; finished parts are kept and not done again
    python -m benchmarks.any_sensor pictures    # docs/resolution.png and docs/any_sensor_cost.png from the results

Models are trained without labels on some bands of a Sentinel-2 L1C scene near Berlin. A linear probe learns 8 land-use classes from
their features of these bands, on training blocks, and is tested on held-out blocks of 1.5 km whose features come from other bands,
which neither model nor probe has seen; only the bands' mean and deviation are taken from the image, without labels. Macro F1, mean and
standard deviation over 5 draws of blocks, all polygons, one pre-training. "nearest band" hands a probe on image statistics the band
nearest in wavelength. Writes benchmarks/results/any_sensor.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.anysat_learning import Study, coarser
from everysat import baselines, polygons
from everysat.data.statistics import band_statistics
from everysat.evaluate import Samples, evaluate
from everysat.io import statistics
from everysat.models import ramen, weights
from everysat.recipe import Recipe
from everysat.train import Run, train
from everysat.types import Batch, Encoder

OUT = Path(os.environ.get("EVERYSAT_ANY_SENSOR", "runs/any_sensor"))
RESULT = Path(__file__).parent / "results" / "any_sensor.json"
DRAWS, SHARE = 5, 0.15
TENS, TWENTIES = ("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A", "B11", "B12")
Bands = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Case:
    """Layers and bands that are trained on, and those that are tested on; ``factor`` times as large pixels when testing."""

    known: Bands
    held: Bands
    factor: int = 1


CASES = {
    "10 m bands, then 20 m bands": Case({"s2-10m": TENS}, {"s2-20m": TWENTIES}),
    "20 m bands, then 10 m bands": Case({"s2-20m": TWENTIES}, {"s2-10m": TENS}),
    "every other band, then the rest": Case(
        {"s2-10m": ("B02", "B04"), "s2-20m": ("B05", "B07", "B11")},
        {"s2-10m": ("B03", "B08"), "s2-20m": ("B06", "B8A", "B12")},
    ),
    "pixels of 10 m, then of 30 m": Case({"s2-10m": TENS}, {"s2-10m": TENS}, factor=3),
}
AS_PUBLISHED = ["model.options.wavelength_unit_nm=1", "model.options.spread=false", "model.options.skip=false"]
MODELS: dict[str, tuple[str, list[str]]] = {
    "RAMEN": ("ramen_berlin", ["steps=300"]),
    "RAMEN, wavelengths in 100 nm": ("ramen_berlin", ["steps=300", "model.options.wavelength_unit_nm=100"]),
    "RAMEN, as published": ("ramen_berlin", ["steps=300", *AS_PUBLISHED, "objective.options.band_ratio=0"]),
    "Atomizer": ("atomizer_berlin", ["steps=150"]),
    "AnySat": ("anysat_berlin", []),
}


# --- data --------------------------------------------------------------------------------------------------------------------


def of_bands(batch: Batch, bands: Bands, prefix: str = "") -> Batch:
    """These bands alone; with ``prefix``, under names that no model lists."""
    return Batch(batch.places, {prefix + name: batch.raster(name).select(chosen) for name, chosen in bands.items()})


def tested(batch: Batch, case: Case) -> Batch:
    if case.factor > 1:
        return coarser(of_bands(batch, case.held), case.factor)
    return of_bands(batch, case.held, "held-")


def with_moments(encoder: Encoder, batch: Batch) -> Encoder:
    """The encoder, also told mean and deviation of the layers of a batch that it does not list."""
    new = {name: layer for name, layer in batch.layers.items() if name not in encoder.inputs}
    if not new:
        return encoder
    found = band_statistics([Batch(batch.places, new)])  # type: ignore[arg-type]
    entries = {}
    for name, (mean, std) in found.items():
        raster = batch.raster(name)
        units = [band.unit for band in raster.sensor.bands]
        entries[name] = {
            "sensor": raster.sensor.name,
            "gsd_m": raster.gsd_m,
            "bands": list(raster.sensor.names),
            "unit": units,
        }
        entries[name] |= {"mean": list(mean), "std": list(std), "count": [1] * len(units)}
    return weights.normalised(encoder, {"format": statistics.FORMAT, "source": {}, "layers": entries})


# --- models ------------------------------------------------------------------------------------------------------------------


def trained(model: str, case: str) -> Run:
    recipe, changes = MODELS[model]
    kept = Recipe.load(recipe, []).model.options.get("modalities", {})
    modalities = {}
    for name, bands in CASES[case].known.items():
        entry = {"sensor": "sentinel-2-l1c", "gsd_m": 10 if name == "s2-10m" else 20, **kept.get(name, {})}
        modalities[name] = {**entry, "bands": list(bands)}
    folder = OUT / f"{model}, {case}".replace(",", "").replace(" ", "_")
    return train(Recipe.load(recipe, [f"out={folder}", f"model.options.modalities={json.dumps(modalities)}", *changes]))


def features(encoder: Any, **changes: Any) -> Any:
    """Of every 10 m pixel, bilinear between cells. AnySat gives its dense features."""
    if encoder.family == "anysat":
        changes = {"output": "dense", "dense": next(iter(encoder.inputs)), **changes}
    view = encoder.at(**changes)
    if encoder.family == "anysat":
        chip_m = view.settings.patch_m * 6
        return polygons.Dense(view, 10.0, view.settings.token_m, chip_m=chip_m, stride_m=chip_m)
    return polygons.dense(view, 10.0)


class NearestBand:
    """Image statistics over 90 m of standardised bands: of the known ones, or of those nearest to them in wavelength."""

    def __init__(self, known: Batch) -> None:
        self.wanted = [b.wavelength_um for layer in known.layers.values() for b in layer.sensor.bands]  # type: ignore[union-attr]

    def __call__(self, batch: Batch) -> Tensor:
        found = baselines.Statistics(10.0)(batch)
        bands = [b.wavelength_um for layer in batch.layers.values() for b in layer.sensor.bands]  # type: ignore[union-attr]
        nearest = [min(range(len(bands)), key=lambda i: abs(bands[i] - w)) for w in self.wanted]
        count = len(bands)
        picked = found[:, [*nearest, *(count + i for i in nearest), *(2 * count + i for i in nearest)]]
        level = picked.nanmean((2, 3), keepdim=True)
        std = torch.nan_to_num(picked - level).square().mean((2, 3), keepdim=True).sqrt()
        return (picked - level) / std.clamp(min=1e-6)


# --- evaluation --------------------------------------------------------------------------------------------------------------


def crossed(study: Study, ours: Samples, scale: Any, theirs: Samples) -> list[float]:
    """Macro F1 of a probe that learns from one kind of features and is tested on another, on the same pixels and draws."""
    shift = len(study.labels.of)
    both = Samples(
        torch.cat([ours.x, theirs.x]),
        torch.cat([ours.label, theirs.label]),
        torch.cat([ours.group, theirs.group + shift]),
        ours.classes,
    )
    draws = [
        (train, [polygon + shift for polygon in held])
        for train, held in polygons.draws(study.labels, 1.0, DRAWS, block_m=1500.0)
    ]
    parts = [evaluate(both, [draw], "probe", seed=i, scale=scale, **polygons.PROBE) for i, draw in enumerate(draws)]
    score = polygons.joined(parts).score()
    return [round(score.mean, 4), round(score.std, 4)]


def compared(study: Study, here: tuple[Any, Batch], there: tuple[Any, Batch]) -> dict[str, list[float]]:
    """Learned and tested on the known bands; learned there, tested on the others; learned and tested on the others."""
    with torch.no_grad():
        known, known_scale = polygons.sampled(*here, study.labels, share=SHARE)
        held, held_scale = polygons.sampled(*there, study.labels, share=SHARE)
    return {
        "known, known": crossed(study, known, known_scale, known),
        "known, held": crossed(study, known, known_scale, held),
        "held, held": crossed(study, held, held_scale, held),
    }


def unseen(study: Study) -> None:
    for title, case in CASES.items():
        known, held = of_bands(study.batch, case.known), tested(study.batch, case)
        nearest = NearestBand(known)
        study.part(
            f"{title}: image statistics, nearest band", partial(compared, study, (nearest, known), (nearest, held))
        )
        for model in MODELS:
            if case.factor > 1 and "," in model:
                continue
            if model == "AnySat" and case.factor == 1:
                continue  # it has no projector for bands that it was not trained on
            source = next(t for t, c in CASES.items() if c.known == case.known)  # the same training serves
            run = trained(model, source)
            study.part(f"{title}: {model}: training", lambda r=run: facts(r))
            encoder: Any = run.encoder
            there = features(with_moments(encoder, held)) if model != "AnySat" else wider(encoder, case.factor)
            study.part(f"{title}: {model}", partial(compared, study, (features(encoder), known), (there, held)))


def wider(encoder: Any, factor: int) -> Any:
    """AnySat on pixels ``factor`` times as large, in patches of as many pixels."""
    gsd_m = {name: wanted.gsd_m * factor for name, wanted in encoder.inputs.items()}
    return features(encoder, gsd_m=gsd_m, patch_m=encoder.settings.patch_m * factor)


def facts(run: Run) -> dict[str, float]:
    seconds = round(sum(row["seconds"] for row in run.log), 1)
    return {"parameters": sum(p.numel() for p in run.encoder.parameters()), "training_s": seconds}


def dial(study: Study) -> None:
    """One RAMEN, trained at cells of 30 to 120 m, asked for these sizes and others."""
    encoder: Any = train(Recipe.load("ramen_berlin", [f"out={OUT / 'all'}"])).encoder
    for gsd_m in (30.0, 40.0, 60.0, 90.0, 120.0, 180.0, 240.0):
        cells = min(18, round(360.0 / gsd_m))  # a chip is as large as the places of the training, or has as many cells
        view = encoder.at(gsd_m=gsd_m, cells=cells)

        def measure(view: Any = view) -> dict[str, Any]:
            extract = polygons.dense(view, 10.0)
            began = time.process_time()
            with torch.no_grad():
                extract(study.batch)
            return {"cpu_s": round(time.process_time() - began, 2), "scores": study.scores(extract)}

        study.part(f"dial: {gsd_m:g} m", measure)
    coarse = encoder.at(gsd_m=60.0, cells=6, antialias=False)
    study.part("dial: 60 m, not antialiased", lambda: study.scores(polygons.dense(coarse, 10.0)))
    torch.manual_seed(0)
    fresh = ramen.from_config(encoder.config).eval()
    for gsd_m in (30.0, 90.0):
        view = fresh.at(gsd_m=gsd_m, cells=round(360 / gsd_m))
        study.part(f"dial, untrained: {gsd_m:g} m", lambda v=view: study.scores(polygons.dense(v, 10.0)))
    for name, extract in polygons.extractors(10.0).items():
        study.part(f"dial, {name}", lambda e=extract: study.scores(e))


def pictures() -> None:
    """docs/resolution.png, score and cost of the dial, and docs/any_sensor_cost.png, what cost grows with."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    docs = Path(__file__).parent.parent / "docs"
    parts = json.loads(RESULT.read_text())["parts"]
    points = {float(n.split()[1]): p for n, p in parts.items() if n.startswith("dial: ") and n.endswith(" m")}
    sizes = sorted(points)
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for share, colour in (("10%", "#7f9fc4"), ("100%", "#1f4e8c")):
        mean, std = (torch.tensor([points[s]["scores"][share][i] for s in sizes]) for i in (0, 1))
        left.fill_between(sizes, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
        left.plot(sizes, mean, "o-", color=colour, label=f"{share} of polygons")
    best = parts["dial, image statistics (90 m)"]["100%"][0]
    left.axhline(best, color="0.5", linestyle=":", label="image statistics, 100%")
    right.plot(sizes, [points[s]["cpu_s"] for s in sizes], "o-", color="#b5541c")
    right.set_ylim(bottom=0)
    for axis, name in ((left, "macro F1"), (right, "CPU seconds for the scene")):
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{s:g}" for s in sizes])
        axis.set_xlabel("side of a cell, metres (trained at 30 to 120)")
        _plain(axis, name)
    left.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.94))
    fig.savefig(docs / "resolution.png", dpi=120)
    fig, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained", sharey=True)
    ramen_rows, atomizer_rows = (
        [
            v["rows"]
            for v in json.loads((RESULT.parent / f"{name}_scaling.json").read_text())["results"].values()
            if isinstance(v, dict)
        ]
        for name in ("ramen", "atomizer")
    )
    panels = {
        "RAMEN: pixels along the input": (ramen_rows[0], "px"),
        "RAMEN: dates": (ramen_rows[2], "dates"),
        "RAMEN: target size, m": (ramen_rows[3], "gsd_m"),
        "Atomizer: values": (atomizer_rows[0], "tokens"),
    }
    for axis, (title, (rows, size)) in zip(axes, panels.items(), strict=True):
        axis.plot([r[size] for r in rows], [r["cpu_seconds"] for r in rows], "o-", color="#1f4e8c")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks([r[size] for r in rows], [f"{r[size]:,.0f}" for r in rows], rotation=35, ha="right")
        _plain(axis, title)
    axes[0].set_ylabel("CPU seconds, one thread")
    fig.savefig(docs / "any_sensor_cost.png", dpi=120)


def _plain(axis: Any, title: str) -> None:
    axis.minorticks_off()
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    if sys.argv[1:] == ["pictures"]:
        pictures()
        return
    study = Study(OUT)
    wanted = sys.argv[1:] or ["dial", "unseen"]
    for name, part in {"dial": dial, "unseen": unseen}.items():
        if name in wanted:
            part(study)
    RESULT.write_text(json.dumps({"what": str(__doc__).split("\n")[0], "parts": study.parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()

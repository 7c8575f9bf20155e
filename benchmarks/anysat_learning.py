"""What a small AnySat learns on real data at hand, against baselines: few labels, unseen scales, another region, ablations.

    python -m benchmarks.anysat_learning            # about 40 minutes on 2 cores; finished parts are kept and not done again

Pre-training without labels on a Sentinel-2 L1C scene near Berlin (its 10, 20 and 60 m bands are three sensors), and jointly on
that scene, 23 Sentinel-2 L2A patches from around the world, and a cube of monthly Sentinel-1 and 2 over 1 km in Belgium. Scores
are those of a linear probe on frozen features of the Berlin scene: macro F1 of 8 land-use classes on held-out blocks of 1.5 km,
mean and standard deviation over 5 draws of blocks and labelled polygons, one pre-training. Needs ``EVERYSAT_DATA`` for the joint
training and the other region; without it, those parts are left out. Writes benchmarks/results/anysat_learning.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everysat import demo, polygons
from everysat.data import berlin
from everysat.models import anysat
from everysat.nn.grid import on_grid
from everysat.nn.mappers import Dense
from everysat.nn.probe import fit_linear
from everysat.recipe import Recipe
from everysat.sensors import get
from everysat.train import Run, train
from everysat.types import Batch, Place, Raster

OUT = Path(os.environ.get("EVERYSAT_LEARNING", "runs/anysat_learning"))
DATA = Path(os.environ.get("EVERYSAT_DATA", "../shared/data"))
RESULT = Path(__file__).parent / "results" / "anysat_learning.json"
FRACTIONS, DRAWS, SHARE = (0.02, 0.1, 1.0), 5, 0.15
DENSE: dict[str, Any] = {"output": "dense", "dense": "s2-10m"}


# --- data --------------------------------------------------------------------------------------------------------------------


def layer(bands: tuple[str, ...], values: Tensor, gsd_m: float) -> Raster:
    """A Level-1C layer whose ``values`` [1, band, y, x] lie at 10 m, averaged to ``gsd_m``."""
    fine = Raster.of(get("sentinel-2-l1c").select(bands), values, 10.0)
    if gsd_m == 10.0:
        return fine
    size = [int(n * 10 // gsd_m) for n in values.shape[2:]]
    found, valid = on_grid(fine, 1, gsd_m, *size)
    return replace(fine, values=found, valid=valid, gsd_m=gsd_m)


# --- training ----------------------------------------------------------------------------------------------------------------


def pretrained(name: str, *changes: str, recipe: str = "anysat_berlin") -> Run:
    """A run of a shipped recipe with some of its entries changed."""
    return train(Recipe.load(recipe, [f"name={name}", f"out={OUT / name}", *changes]))


def only(encoder: anysat.AnySat, name: str) -> str:
    """The change of a recipe that leaves this layer alone."""
    kept = {name: {k: v for k, v in encoder.config["modalities"][name].items() if k not in ("mean", "std")}}
    return f"model.options.modalities={json.dumps(kept)}"


# --- evaluation --------------------------------------------------------------------------------------------------------------


def extractor(encoder: anysat.AnySat, **changes: Any) -> Dense:
    view = encoder.at(**{**DENSE, **changes})
    chip_m = view.settings.patch_m * 6
    return Dense(view, 10.0, view.settings.token_m, chip_m=chip_m, stride_m=chip_m)


class Half:
    """The second half of dense features: those of the sub-patch, without those of its patch."""

    def __init__(self, features: Dense) -> None:
        self.features = features

    def at(self, batch: Batch, y: Tensor, x: Tensor) -> Tensor:
        found = self.features.at(batch, y, x)
        return found[:, found.shape[1] // 2 :]


class Study:
    """Parts of the study by name, kept in a file as they are finished."""

    def __init__(self, folder: Path = OUT) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "parts.json"
        self.parts: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.batch = berlin.build().scene.read()
        self.labels = polygons.burn(berlin.polygons(), self.batch.places[0], berlin.COLUMN, gsd_m=10.0)

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.parts:
            began = time.monotonic()
            self.parts[name] = make()
            beside = self.file.with_suffix(".partial")
            beside.write_text(json.dumps(self.parts, indent=1))
            beside.replace(self.file)
            print(f"{name}: {self.parts[name]}  ({time.monotonic() - began:.0f} s)", flush=True)
        return self.parts[name]

    def scores(self, extract: Any, batch: Batch | None = None) -> dict[str, list[float]]:
        """Macro F1 by share of labelled polygons: mean, standard deviation over draws."""
        with torch.no_grad():
            found = polygons.scores(
                extract, batch or self.batch, self.labels, FRACTIONS, DRAWS, block_m=1500.0, share=SHARE
            )
        return {f"{f:.0%}": [round(e.score().mean, 4), round(e.score().std, 4)] for f, e in found.items()}


def coarser(batch: Batch, factor: int) -> Batch:
    """The scene as a sensor with pixels ``factor`` times as large would see it, the 60 m bands left as they are."""
    layers = {}
    for name, raster in batch.layers.items():
        assert isinstance(raster, Raster)
        if name == "s2-60m":
            layers[name] = raster
            continue
        gsd_m = raster.gsd_m * factor
        size = [int(n * raster.gsd_m // gsd_m) for n in raster.values.shape[2:]]
        values, valid = on_grid(raster, 1, gsd_m, *size)
        layers[name] = replace(raster, values=values, valid=valid, gsd_m=gsd_m)
    return Batch(batch.places, layers)


def scales(study: Study, encoder: Any) -> None:
    """Patches and pixels of sizes that training did not have (it had patches of 60 and 120 m), and fusion in windows."""
    for patch_m in (60.0, 120.0, 180.0, 240.0):
        study.part(f"patch {patch_m:g} m", lambda p=patch_m: study.scores(extractor(encoder, patch_m=p)))
    for factor in (2, 3):
        blurred = coarser(study.batch, factor)
        options = {"patch_m": 60.0 * factor, "gsd_m": {"s2-10m": 10.0 * factor, "s2-20m": 20.0 * factor}}
        study.part(
            f"pixels {factor} times as large", lambda o=options, b=blurred: study.scores(extractor(encoder, **o), b)
        )
        bands = polygons.extractors(10.0)["bands"]
        study.part(f"bands, pixels {factor} times as large", lambda e=bands, b=blurred: study.scores(e, b))
    study.part("windows of 3 patches in place of 6", lambda: study.scores(extractor(encoder, window=3, halo=1)))


def scratch(run: Run, study: Study, draws: int = 2) -> dict[str, list[float]]:
    """The same network without pre-training, supervised by the labelled polygons alone (demo.SCRATCH says for how long)."""
    start = replace(run, encoder=run.encoder.at(**DENSE))  # type: ignore[arg-type]
    found = demo._from_scratch(start, study.batch, study.batch, study.labels, FRACTIONS, draws, OUT)
    return {f"{f:.0%}": [round(e.score().mean, 4), round(e.score().std, 4)] for f, e in found.items()}


def spain(inputs: Any) -> tuple[Batch, Tensor]:
    """A flood scene of Sentinel-2 L1C in Spain, 5 km, with its hand label (1 water, 0 land, -1 unknown) at 10 m."""
    import rasterio

    folder, side = DATA / "chips" / "sen1floods11_spain", 504
    with rasterio.open(next((folder / "S2").glob("*.tif"))) as source:
        stack = torch.from_numpy(source.read().astype("float32"))[None, :, :side, :side] / 1e4
    with rasterio.open(next((folder / "Labels").glob("*.tif"))) as source:
        water = torch.from_numpy(source.read(1)[:side, :side].astype("int64"))
    order = get("sentinel-2-l1c").names
    layers = {}
    for name, wanted in inputs.items():
        picked = stack[:, [order.index(band) for band in wanted.sensor.names]]
        layers[name] = layer(wanted.sensor.names, picked, wanted.gsd_m)
    return Batch((Place(side * 10.0, side * 10.0),), layers), water


def region(extract: Any, study: Study, inputs: Any) -> dict[str, float]:
    """Balanced accuracy of water on the east half of the Spanish scene: of a probe learned near Berlin, and of one learned on the
    west half. 200 pixels of each class are labelled, 5 draws."""
    other, water = spain(inputs)
    here = extract(study.batch)[0]
    there = extract(other)[0]
    classes, label = study.labels.classes, study.labels.label
    own = torch.where(label < 0, -1, (label == classes.index("water")).long())
    west = water.clone()
    west[:, 252:] = -1
    east = water.clone()
    east[:, :252] = -1

    def score(x: Tensor, truth: Tensor, seed: int) -> float:
        g = torch.Generator().manual_seed(seed)
        picked = []
        for value in (0, 1):
            at = torch.nonzero((truth == value) & torch.isfinite(x[0]))
            picked.append(at[torch.randperm(len(at), generator=g)[:200]])
        at = torch.cat(picked)
        known = torch.arange(2).repeat_interleave(torch.tensor([len(p) for p in picked]))
        probe = fit_linear(
            x[:, at[:, 0], at[:, 1]].T.float(), known, torch.arange(len(at)), classes=("land", "water"), seed=seed
        )
        test = torch.nonzero((east >= 0) & torch.isfinite(there[0]))[::7]
        said = probe.probabilities(there[:, test[:, 0], test[:, 1]].T.float()).argmax(1)
        real = east[test[:, 0], test[:, 1]]
        return float(torch.stack([(said[real == v] == v).float().mean() for v in (0, 1)]).mean())

    away = torch.tensor([score(here, own, s) for s in range(5)])
    home = torch.tensor([score(there, west, s) for s in range(5)])
    return {
        "learned near Berlin": round(float(away.mean()), 4),
        "std": round(float(away.std()), 4),
        "learned in Spain": round(float(home.mean()), 4),
        "kept": round(float(away.mean() / home.mean()), 4),
    }


def timed(extract: Any, batch: Batch) -> float:
    began = time.process_time()
    with torch.no_grad():
        extract(batch)
    return round(time.process_time() - began, 2)


def facts(run: Run, layers: tuple[str, ...], study: Study, dense: str) -> dict[str, Any]:
    """Size, time and score of an encoder on these layers."""
    part = study.batch.only(*layers)
    extract = extractor(run.encoder, dense=dense)  # type: ignore[arg-type]
    used = sum(
        p.numel()
        for n, p in run.encoder.named_parameters()
        if not n.startswith("projectors") or n.split(".")[1] in layers
    )
    return {
        "parameters": used,
        "training_s": round(sum(row["seconds"] for row in run.log), 1),
        "inference_cpu_s": timed(extract, part),
        "scores": study.scores(extract, part),
    }


def main() -> None:
    study, three = Study(), ("s2-10m", "s2-20m", "s2-60m")
    alone = pretrained("berlin")
    encoder: Any = alone.encoder
    for name, extract in polygons.extractors(10.0).items():
        study.part(name, lambda extract=extract: study.scores(extract))
    torch.manual_seed(0)
    fresh = anysat.from_config(encoder.config).eval()
    study.part("untrained", lambda: study.scores(extractor(fresh)))
    study.part("pre-trained on the scene", lambda: study.scores(extractor(encoder)))
    for name, e in {"untrained": fresh, "pre-trained on the scene": encoder}.items():
        study.part(f"{name}, sub-patch half alone", lambda e=e: study.scores(Half(extractor(e))))
    best = encoder
    if (DATA / "satclip_s2").is_dir():
        roots = [f"data.1.options.root={DATA / 'satclip_s2'}", f"data.2.options.root={DATA / 'worldcereal'}"]
        best = pretrained("joint", *roots, "steps=400", recipe="anysat_joint").encoder
        study.part("pre-trained jointly on three sources", lambda: study.scores(extractor(best)))
    study.part("from scratch (2 draws)", lambda: scratch(alone, study))
    scales(study, best)
    if (DATA / "chips").is_dir():
        inputs = {name: encoder.inputs[name] for name in three}
        rivals = {
            "pre-trained": extractor(best),
            "untrained": extractor(fresh),
            "bands": polygons.extractors(10.0)["bands"],
        }
        for name, extract in rivals.items():
            study.part(f"water in Spain, {name}", lambda e=extract: region(e, study, inputs))
    for each in three[:2]:
        run = pretrained(f"only_{each}", only(encoder, each))
        study.part(f"specialist: {each}", lambda r=run, e=each: facts(r, (e,), study, e))
        study.part(f"one model, given {each}", lambda e=each: facts(alone, (e,), study, e))
    study.part("one model, given all", lambda: facts(alone, three, study, "s2-10m"))
    for name, changes in {
        "positions in cells, not metres": ["model.options.metric=false"],
        "mean of sub-patches, no spatial encoder": ["model.options.spatial=false"],
        "tokens averaged, no fusion": ["model.options.fusion=false"],
        "no contrastive term": ["objective.options.contrastive=0"],
        "losses and fusion as published": [
            "objective.options.centred=false",
            "objective.options.targets=patch",
            "objective.options.fused=false",
            "model.options.locality=0",
        ],
    }.items():
        run = pretrained(name.split(",")[0].replace(" ", "_"), *changes)
        study.part(f"ablation: {name}", lambda r=run: study.scores(extractor(r.encoder)))
    RESULT.write_text(json.dumps({"what": __doc__.split("\n")[0], "parts": study.parts}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

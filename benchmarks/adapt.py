"""Does SHeDD beat training on the target's few labels alone? Real scenes and real crop masks, paired with baselines on the same networks.

    EVERYSAT_DATA=DIR OMP_NUM_THREADS=1 python -m benchmarks.adapt OUT      # writes OUT/adapt.md and OUT/adapt.json; some two hours of one core
    EVERYSAT_DATA=DIR python -m benchmarks.adapt OUT scenes/5               # cells whose name contains this
    EVERYSAT_DATA=DIR python -m benchmarks.adapt OUT400 scenes/25 400       # with so many steps, in a folder of their own

Every finished cell is kept in OUT/cells; the same command goes on. Small networks and few steps, the same for all methods, so that it runs on a CPU: scores are
not the best that can be had, only their order is asked for.

- ``scenes``: 10 kinds of RSICD's scenes. The source is red, green and blue at full resolution, the target red alone in pixels four times as large. Half of the 30
  training images a class are of the source, half of the target; each is cut into four pieces of 72 pixels. Tests are on ``val``, 22 images a class in four pieces;
  intervals resample whole images.
- ``crops``: crop or not, DEA crop mask; the source is one region, the target another, half of whose places are tested.

Labels are drawn anew for each seed; all methods of a seed have the same. Intervals are 95 %, of bootstrap replicates over test images or places.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat.data import dea_cropmask, domains, rsicd
from everysat.data.batches import Dataset, Subset, in_order
from everysat.evaluate import Evaluation, Samples, of_predictions
from everysat.recipe import Recipe
from everysat.table import Table
from everysat.train import train
from everysat.types import Batch, Place

KINDS = (
    "Beach",
    "BaseballField",
    "DenseResidential",
    "Desert",
    "Farmland",
    "Forest",
    "Industrial",
    "Parking",
    "River",
    "Viaduct",
)
PIECE_PX, TIMES = 72, 4
SHOTS, SEEDS = (5, 25, 100), (0, 1, 2)
TESTED = 1000
METHODS: dict[str, dict[str, Any]] = {
    "target only": {"variant": "target_only", "shares": (0, 1, 0)},
    "SHeDD, inductive": {"variant": "shedd", "shares": (1, 1, 1)},
    "SHeDD, transductive": {"variant": "shedd", "shares": (1, 1, 1), "protocol": "transductive"},
    "FixMatch, target alone": {"variant": "fixmatch", "shares": (0, 1, 1)},
    "source and target": {"variant": "source_target", "shares": (1, 1, 0)},
    "SHeDD, inductive, shared parts": {"variant": "shedd", "shares": (1, 1, 1), "shared": True},
}
EACH = 16
"""Places of each kind in a step."""
RESNET = {"name": "resnet/", "options": {"width": 8, "blocks": [1, 1, 1, 1]}}
OMNISAT = {
    "patch_m": 10,
    "grid": 1,
    "dim": 64,
    "depth": 1,
    "heads": 16,
    "dropout": 0.1,
    "drop_path": 0.0,
    "skip": True,
    "windows": True,
}
SETS: dict[str, dict[str, Any]] = {
    "scenes": {
        "model": {
            "encoders": {
                "source": {"name": "resnet/", "options": {"width": 8, "blocks": [1, 1, 1, 1], "stem": "large"}},
                "target": RESNET,
            }
        },
        "augment": {"flip": True, "turn": True},
        "steps": 1200,
        "shared": ["stages"],
        "score": "accuracy",
    },
    "crops": {
        "model": {"encoder": {"name": "omnisat/", "options": OMNISAT}, "split": "projected", "dim": 64},
        "augment": {"drop_dates": 0.1},
        "steps": 150,
        "shared": ["projectors", "cross", "blocks"],
        "score": "balanced_accuracy",
        "without": ["SHeDD, transductive"],
    },
}


class Pieces:
    """The four corners of each image as places of their own, kept in memory; ``codes`` are their classes."""

    def __init__(self, data: rsicd.Scenes) -> None:
        self.images = [data[i] for i in range(len(data))]
        self.codes = np.repeat(data.codes, 4)

    def __len__(self) -> int:
        return 4 * len(self.images)

    def __getitem__(self, index: int) -> Batch:
        image = self.images[index // 4]
        rgb = image.raster("rgb")
        y, x = ((n - PIECE_PX) * (index // 2**k % 2) for k, n in zip((1, 0), rgb.values.shape[2:], strict=True))
        part = (..., slice(y, y + PIECE_PX), slice(x, x + PIECE_PX))
        side_m = PIECE_PX * rgb.gsd_m
        piece = replace(rgb, values=rgb.values[part], valid=rgb.valid[part])
        return Batch((Place(side_m, side_m),), {"rgb": piece, "label": image.raster("label")})


class Kept:
    """A dataset in memory."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.codes = data, getattr(data, "codes", None)
        self.items: dict[int, Batch] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        if index not in self.items:
            self.items[index] = self.data[index]
        return self.items[index]


class Coded(Subset):
    """Some places of a dataset that knows its classes."""

    @property
    def codes(self) -> np.ndarray:
        return np.asarray(self.dataset.codes)[self.indices]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Setup:
    """``sets`` as :func:`everysat.data.domains.domains` gives them; ``group`` is the image or place of each test place."""

    sets: Mapping[str, domains.Domain]
    group: np.ndarray


@cache
def scenes(root: Path) -> Setup:
    known = rsicd.build(root=root / "rsicd")
    every = [np.flatnonzero(known.codes == rsicd.CLASSES.index(kind)) for kind in KINDS]
    of = {"source": np.concatenate([i[::2] for i in every]), "target": np.concatenate([i[1::2] for i in every])}
    pieces = {name: Pieces(_some(known, index)) for name, index in of.items()}
    held = rsicd.build(root=root / "rsicd", split="val")
    tests = np.flatnonzero(np.isin(held.codes, [rsicd.CLASSES.index(kind) for kind in KINDS]))
    pieces["test"] = Pieces(_some(held, tests))
    coarse = {"bands": {"rgb": ["red"]}, "coarsen": TIMES}
    found = domains.domains(pieces, KINDS, {"target": coarse, "test": coarse})
    return Setup(found, found["test"].index // 4)


def _some(data: rsicd.Scenes, index: np.ndarray) -> rsicd.Scenes:
    return replace(data, files=tuple(data.files[i] for i in index), labels=tuple(data.labels[i] for i in index))


@cache
def crops(root: Path) -> Setup:
    build = partial(dea_cropmask.build, root=root / "dea_cropmask", split="test")
    source, target = (Kept(build(held_out=name)) for name in ("eastern", "sahel"))
    orders = [np.random.default_rng(0).permutation(len(data)) for data in (source, target)]
    parts = {
        "source": Coded(source, orders[0][:2000]),
        "target": Coded(target, orders[1][TESTED : TESTED + 2000]),
        "test": Coded(target, orders[1][:TESTED]),
    }
    found = domains.domains(parts)
    return Setup(found, found["test"].index)


READ: dict[str, Callable[[Path], Setup]] = {"scenes": scenes, "crops": crops}


def cell(data: str, shots: int, method: str, seed: int, folder: Path, root: Path) -> dict[str, Any]:
    """Trains, and keeps the probabilities of all test places."""
    setup, told, chosen = READ[data](root), SETS[data], METHODS[method]
    protocol = chosen.get("protocol", "inductive")
    mixed = domains.adaptation(setup.sets, shots=shots, protocol=protocol, shares=chosen["shares"], seed=seed)
    test = setup.sets["test"]
    shared = {"shared": told["shared"]} if chosen.get("shared") else {}
    recipe = Recipe.parse(
        {
            "name": "adapt",
            "model": {
                "name": "domains/",
                "statistics": "data",
                "options": {**told["model"], "modalities": "data", **shared},
            },
            "data": [{"name": "domains", "options": {"protocol": protocol}}],
            "task": {
                "name": f"adapt/{chosen['variant']}",
                "options": {"classes": list((test.label.bands[0].classes or {}).values()), **told.get("task", {})},
            },
            "augment": told["augment"],
            "steps": told["steps"],
            "batch_size": EACH * sum(chosen["shares"]),
            "lr": 3e-3,
            "weight_decay": 0.05,
            "warmup_steps": 20,
            "clip": 1.0,
            "ema": 0.98,
            "seed": seed,
            "workers": 0,
            "checkpoint_every": 0,
            "accelerator": "cpu",
            "out": str(folder / f"run-{data}"),
        }
    )
    begun = time.process_time()
    run = train(recipe, data=[Kept(mixed)], restart=True, quiet=True)
    seconds = time.process_time() - begun
    with torch.no_grad():
        said = [
            run.objective.predict(run.objective.features(run.encoder, batch), batch).values.flatten(1)  # type: ignore[operator]
            for batch in in_order(test, 64)
        ]
    shutil.rmtree(folder / f"run-{data}")
    last = {
        name: float(np.mean([row[name] for row in run.log[-20:]]))
        for name in ("loss", "pseudo", "confident", "domain", "orthogonality")
    }
    labelled = sum(
        len(part) for part, kind in zip(mixed.parts, mixed.labelled, strict=True) if kind and part.name == "target"
    )
    return {"probabilities": torch.cat(said).numpy(), "seconds": seconds, "labelled": labelled, **last}


def main(out: Path, only: str = "") -> None:
    root = Path(os.environ["EVERYSAT_DATA"])
    (out / "cells").mkdir(parents=True, exist_ok=True)
    for shots in SHOTS:
        for seed in SEEDS:
            for data, method in product(SETS, METHODS):
                name = f"{data}/{shots}/{method}/{seed}"
                path = _path(out, data, shots, method, seed)
                if only in name and not path.exists() and method not in SETS[data].get("without", ()):
                    found = cell(data, shots, method, seed, out, root)
                    np.savez(out / "cells" / f".part-{data}.npz", **found)
                    (out / "cells" / f".part-{data}.npz").rename(path)
                    print(name, {k: round(float(v), 3) for k, v in found.items() if k != "probabilities"}, flush=True)
        report(out, root)


def report(out: Path, root: Path) -> None:
    """Tables of all finished cells."""
    texts, numbers = [], {}
    for data, told in SETS.items():
        found = {
            (shots, method): one
            for shots in SHOTS
            for method in METHODS
            if (one := _row(data, shots, method, out, root))
        }
        if found:
            what = "images" if data == "scenes" else "places"
            notes = [
                f"Seeds draw labels, order and weights; mean ± standard deviation over them; intervals and paired differences resample test {what}.",
                "sure: share of unlabelled places in recent steps whose class was sure enough to be a pseudo-label.",
            ]
            rows = [row for row, _ in found.values()]
            texts.append(Table.of(f"{data}: {told['score']} on the target's test places", rows, notes).markdown())
            numbers[data] = [{"method": method, **facts} for (_, method), (_, facts) in found.items()]
    (out / "adapt.md").write_text("\n".join(texts), encoding="utf-8")
    (out / "adapt.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def _row(data: str, shots: int, method: str, out: Path, root: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """As it is shown, and the numbers; None where no seed is finished."""
    seeds, others = ([s for s in SEEDS if _path(out, data, shots, m, s).exists()] for m in (method, "target only"))
    if not seeds:
        return None
    name = SETS[data]["score"]
    found, facts = _evaluated(data, shots, method, seeds, out, root)
    score, both = found.score(name), [s for s in seeds if s in others]
    facts |= {"mean": score.mean, "std": score.std, "low": score.low, "high": score.high}
    row = {"labels per class": facts["labels"], "method": method, "seeds": len(seeds)}
    row |= {name: f"{score.mean:.3f} ± {score.std:.3f}", "95 %": f"{score.low:.3f} – {score.high:.3f}"}
    if method != "target only" and both:
        mine, base = (_evaluated(data, shots, m, both, out, root)[0] for m in (method, "target only"))
        less = mine.less(base, name)
        facts["less target only"] = [less.mean, less.low, less.high]
        row["less target only"] = f"{less.mean:+.3f} ({less.low:+.3f} – {less.high:+.3f})"
    return {**row, "sure": f"{100 * facts['confident']:.0f} %", "seconds of CPU": round(facts["seconds"])}, facts


def _path(out: Path, data: str, shots: int, method: str, seed: int) -> Path:
    return out / "cells" / f"{data} {shots} {method} {seed}.npz"


def _evaluated(
    data: str, shots: int, method: str, seeds: list[int], out: Path, root: Path
) -> tuple[Evaluation, dict[str, Any]]:
    setup = READ[data](root)
    cells = [dict(np.load(_path(out, data, shots, method, seed))) for seed in seeds]
    test = setup.sets["test"]
    classes = tuple((test.label.bands[0].classes or {}).values())
    label, group = torch.as_tensor(test.code), torch.as_tensor(setup.group)
    samples = Samples(torch.zeros(len(label), 1), label.long(), group.long(), classes)
    found = of_predictions(samples, [torch.from_numpy(one["probabilities"]) for one in cells])
    mean = {
        name: float(np.mean([one[name] for one in cells]))
        for name in ("seconds", "labelled", "confident", "pseudo", "domain", "orthogonality")
    }
    return found, {**mean, "labels": round(mean["labelled"] / len(classes)), "seeds": len(cells)}


if __name__ == "__main__":
    for told in SETS.values() if len(sys.argv) > 3 else ():
        told["steps"] = int(sys.argv[3])
    main(Path(sys.argv[1]), *sys.argv[2:3])

"""What other modalities teach a student that sees one: against the same network trained on that modality alone, on real data.

    EVERYSAT_DATA=... python -m benchmarks.distill OUT                    # all; a cell that is done is kept
    EVERYSAT_DATA=... python -m benchmarks.distill OUT WorldCereal        # one dataset

A cell is one dataset, one way to train, one fold, one share of labels; it trains every modality's student at once and predicts the test places with each alone. All
ways have the same encoders (an OmniSat of each modality, ``pair: false``), steps, batches and seeds, and the last step counts: nothing is chosen on test
places. ``alone`` is the twin. ``teacher`` is an OmniSat of all layers, which also teaches ``logits`` and the ways that are called ``+ logits``. Of few
labels, all but the twin and the teacher also see the other training places, without their labels, in half of each batch.

Scores are over all test places of a fold, averaged over folds; intervals resample test places, the same for all ways, so that differences to the twin are paired.
``OUT`` gets ``distill.md`` and ``distill.json``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from everysat.bench import Kept, _predicted, _samples, _task
from everysat.data.batches import Joined, Subset
from everysat.evaluate import Evaluation, evaluate
from everysat.fold import Fold
from everysat.models import weights
from everysat.nn.draws import key
from everysat.nn.probe import fit_linear
from everysat.recipe import Recipe
from everysat.suite import Contender, Suite
from everysat.table import Table
from everysat.train import train
from everysat.types import Batch

POINTS = {
    "patch_m": 10,
    "grid": 1,
    "dim": 64,
    "depth": 1,
    "heads": 8,
    "dropout": 0.1,
    "drop_path": 0.0,
    "skip": True,
    "windows": True,
}
SCENE = {
    "patch_m": 60,
    "grid": 6,
    "dim": 64,
    "depth": 1,
    "heads": 8,
    "dropout": 0.0,
    "drop_path": 0.0,
    "absolute": False,
    "locality": 2.0,
    "skip": True,
}
TAUGHT = ("teacher", "alone", "logits", "contrast + logits")
SETS: dict[str, dict[str, Any]] = {
    "Fuel moisture": {"suite": "points", "title": "Fuel moisture", "options": POINTS, "score": "r2", "ways": {"10%": TAUGHT, "100%": TAUGHT}},
    "WorldCereal": {"suite": "points", "title": "WorldCereal", "options": POINTS, "score": "macro_f1", "ways": {"100%": (*TAUGHT, "DisCoM")}, "students": ["s2", "s1"]},
    "Land use": {"suite": "land_use", "title": "Land use near Berlin", "options": SCENE, "score": "macro_f1", "ways": {"100%": TAUGHT},
                 "recipe": {"steps": 60, "batch_size": 8, "lr": 1e-3, "augment": {"flip": True, "turn": True}}},
}  # fmt: skip
FOLDS = 3
RECIPE = {"steps": 200, "batch_size": 64, "lr": 2e-3, "warmup_steps": 20, "weight_decay": 0.05, "clip": 5.0, "checkpoint_every": 0}  # fmt: skip
LIGHT = {"auxiliary": 0.5, "modality": 0.05, "invariance": 0.1, "orthogonality": 0.1}
"""Weights of the terms; all 1, as published, the tasks themselves learn too slowly for so few steps. Seen on validation places of fuel moisture."""
WAYS: dict[str, dict[str, Any]] = {
    "teacher": {},
    "alone": {"variant": "alone"},
    "logits": {"variant": "logits", "taught": True, "options": {"temperature": 2.0}},
    "contrast + logits": {"variant": "contrast", "taught": True, "options": {"temperature": 2.0, "weights": LIGHT}},
    "DisCoM": {"variant": "discom", "options": {"weights": LIGHT}},
    "DisCoM, solved": {
        "variant": "discom",
        "options": {"adversary": "solved", "weights": {**LIGHT, "invariance": 1.0}},
    },
}
TWIN = "alone"


@dataclass(frozen=True)
class Bench:
    """One dataset with all its folds."""

    name: str
    out: Path

    @property
    def of(self) -> dict[str, Any]:
        return SETS[self.name]

    def prepare(self) -> None:
        suite = Suite.load(self.of["suite"])
        data = suite.datasets[self.of["title"]]
        data = data.model_copy(update={"folds": data.folds[:FOLDS]})
        folds = [Fold(data, number) for number in range(len(data.folds))]
        self.__dict__.update(data=data, folds=folds, samples=_samples(folds, None))
        self.__dict__["layers"] = sorted(
            {n for i in range(20) for n in folds[0].parts["train"].place(i).layers} - {data.target}
        )

    def cells(self) -> list[tuple[str, str, int]]:
        """Way, share of labels and fold of every cell, in the order in which they are computed."""
        ways = self.of["ways"]
        return [(w, labels, n) for w in WAYS for labels in ways if w in ways[labels] for n in range(len(self.folds))]

    def done(self, labels: str) -> list[str]:
        """Ways of which all folds are there."""
        there = [way for way in self.of["ways"][labels] if way in WAYS]
        return [
            w
            for w in there
            if all((self.cell(w, labels, n) / "predicted.safetensors").is_file() for n in range(len(self.folds)))
        ]

    def cell(self, way: str, labels: str, number: int) -> Path:
        settings = [self.of["options"], self.of.get("recipe"), self.of.get("students"), RECIPE, WAYS[way]]
        return (
            self.out
            / "cells"
            / f"{self.name}-{way}-{labels}-{number}-{key(repr(settings)) % 16**6:06x}".replace(" ", "_").replace(
                "%", ""
            )
        )

    def trained(self, way: str, labels: str, number: int) -> dict[str, Tensor]:
        """Predictions of the test samples of a fold by every student, [n, class] or [n]."""
        path = self.cell(way, labels, number)
        if not (path / "predicted.safetensors").is_file():
            self._train(way, labels, number, path)
        with safe_open(path / "predicted.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _train(self, way: str, labels: str, number: int, path: Path) -> None:
        fold, begun = self.folds[number], time.perf_counter()
        labelled = [g - fold.offset for g in fold.draw(labels, 0)[0]]
        mine = torch.isin(fold.labelled["train"].place, torch.tensor(labelled))
        task = _task(self.data, self.samples.kind, fold.labelled["train"], Contender(baseline="x"), mine)
        known = (
            self._known(labels, number) if way != "teacher" else None
        )  # statistics of the same places: computed once
        layers = {"modalities": known or "data"}
        model: dict[str, Any] = {
            "name": "omnisat/",
            "statistics": "model" if known else "data",
            "options": {**self.of["options"], **layers},
        }
        data: Any = Subset(Kept(fold.parts["train"]), labelled)
        if way != "teacher":
            told = WAYS[way]
            options = {"task": task, **told.get("options", {})}
            if told.get("taught"):
                options["teacher"] = str(self.cell("teacher", labels, number) / "weights.safetensors")
            task = {"name": f"distill/{told['variant']}", "options": options}
            encoder = {"name": "omnisat/", "options": self.of["options"]}
            students = {name: told for name, told in known.items() if name in self.of.get("students", known)}
            model |= {
                "name": "students",
                "options": {"encoder": encoder, "modalities": students, "dim": 64, "pair": False},
            }
            if told["variant"] != "alone" and len(labelled) < len(fold.parts["train"]):
                data = _half_labelled(fold, labelled, self.data.target)
        recipe = {
            **RECIPE, **self.of.get("recipe", {}), "name": "distill", "model": model, "data": [{"name": self.data.name}], "task": task,
            "seed": number, "out": str(path),
        }  # fmt: skip
        run = train(Recipe.parse(recipe), data=[data], quiet=True)
        seconds = time.perf_counter() - begun
        students = {"all": (run.encoder, run.objective)} if way == "teacher" else run.objective.students(run.encoder)
        found = {}
        for name, (encoder, own) in students.items():
            found[name] = _predicted(encoder, own, fold.parts["test"], fold.labelled["test"], self.samples.kind)
        facts = {"seconds": seconds, "log": run.log[-1], "parameters": sum(p.numel() for p in run.encoder.parameters())}
        if way != "teacher" and self.data.level == "place":
            facts["told"] = told_apart(run.encoder, fold)
        (path / "facts.json").write_text(json.dumps(facts))
        save_file({name: x.contiguous() for name, x in found.items()}, path / "predicted.safetensors")

    def _known(self, labels: str, number: int) -> dict[str, Any]:
        """The layers as the teacher of the fold takes them."""
        self.trained("teacher", labels, number)
        return weights.load(self.cell("teacher", labels, number) / "weights.safetensors").config["modalities"]

    def evaluation(self, way: str, labels: str, modality: str) -> Evaluation:
        draws = [fold.draw(labels, 0)[:2] for fold in self.folds]
        numbers = iter(range(len(draws)))
        return evaluate(self.samples, draws, lambda draw: self.trained(way, labels, next(numbers))[modality])

    def facts(self, way: str, labels: str) -> list[dict[str, Any]]:
        return [json.loads((self.cell(way, labels, n) / "facts.json").read_text()) for n in range(len(self.folds))]


def _half_labelled(fold: Fold, labelled: list[int], target: str) -> Any:
    """Labelled places, as often as the others, which have lost their labels."""
    every = Kept(fold.parts["train"])
    rest = sorted(set(range(len(every))) - set(labelled))
    times = max(1, round(len(rest) / len(labelled)))
    return Joined([Subset(every, labelled * times), _Unlabelled(Subset(every, rest), target)])


class _Unlabelled:
    def __init__(self, dataset: Any, target: str) -> None:
        self.dataset, self.target = dataset, target

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        return self.dataset[index].without(self.target)


@torch.no_grad()
def told_apart(encoder: Any, fold: Fold) -> dict[str, float]:
    """Share of test places whose modality a fresh logistic regression, fitted on training places, tells from each part; balanced over modalities."""
    found: dict[str, float] = {}
    said = {}
    for part in ("train", "test"):
        places = [fold.parts[part].place(i) for i in range(min(400, len(fold.parts[part])))]
        said[part] = encoder.embed(Batch.cat(places)).each
    names = list(said["train"])
    for which in ("invariant", "informative", "irrelevant"):
        xs, ys = {}, {}
        for part, each in said.items():
            x = [getattr(each[n].places, which)[each[n].observed] for n in names]
            xs[part], ys[part] = torch.cat(x), torch.cat([torch.full((len(one),), i) for i, one in enumerate(x)])
        probe = fit_linear(
            xs["train"], ys["train"], torch.arange(len(ys["train"])), classes=tuple(names), strengths=(1e-3,)
        )
        right = probe.probabilities(xs["test"]).argmax(1) == ys["test"]
        found[which] = float(torch.stack([right[ys["test"] == i].float().mean() for i in range(len(names))]).mean())
    return found


def tables(bench: Bench) -> tuple[list[Table], list[dict[str, Any]]]:
    score, rows, plain = bench.of["score"], [], []
    for labels in bench.of["ways"]:
        ways = bench.done(labels)
        if TWIN not in ways:
            continue
        teacher = bench.evaluation("teacher", labels, "all").score(score)
        rows.append(
            {
                "labels": labels,
                "sees": "all",
                "trained": "teacher",
                score: f"{teacher.mean:.3f}",
                "95 %": _span(teacher),
                "less the twin": "",
            }
        )
        for layer in bench.of.get("students", bench.layers):
            twin = bench.evaluation(TWIN, labels, layer)
            for way in (way for way in ways if way != "teacher"):
                one = bench.evaluation(way, labels, layer)
                own, less = one.score(score), one.less(twin, score)
                sure = "" if way == TWIN else " **+**" if less.low > 0 else " **-**" if less.high < 0 else ""
                rows.append({
                    "labels": labels, "sees": layer, "trained": way, score: f"{own.mean:.3f}", "95 %": _span(own),
                    "less the twin": "" if way == TWIN else f"{less.mean:+.3f} ({less.low:+.3f} to {less.high:+.3f}){sure}",
                })  # fmt: skip
                plain.append({"dataset": bench.name, "labels": labels, "sees": layer, "trained": way, "score": score, "mean": own.mean, "low": own.low, "high": own.high,
                              "less": less.mean, "less_low": less.low, "less_high": less.high, "folds": list(less.values)})  # fmt: skip
    return [Table.of(bench.name, rows)], plain


def _span(score: Any) -> str:
    return f"{score.low:.3f} to {score.high:.3f}"


def main(out: str, names: list[str]) -> None:
    folder = Path(out)
    text, plain = [], []
    for name in names or list(SETS):
        bench = Bench(name, folder)
        bench.prepare()
        for way, labels, number in bench.cells():
            start = time.perf_counter()
            bench.trained(way, labels, number)
            print(f"{name} / {way} / {labels} / fold {number}: {time.perf_counter() - start:.1f} s", flush=True)
        some, more = tables(bench)
        text += [t.markdown() for t in some]
        plain += more
    (folder / "distill.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    (folder / "distill.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2:])

"""Runs a suite: features once, every label fraction on the same draws for all models, cell by cell, and writes tables and a report.

Order of every score: a draw is a fold of the dataset with a random choice of its training labels; the score is computed over all test samples of a
draw, then averaged over draws. Intervals resample test places, alike for all models, so that differences are paired.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from everysat import baselines
from everysat.data.batches import Subset, in_order
from everysat.evaluate import Draw, Evaluation, Samples, evaluate
from everysat.features import Cache, Labelled, Part, at_once, at_time, extract, state_hash
from everysat.find import suggest
from everysat.fold import Fold
from everysat.manifest import environment
from everysat.models import weights
from everysat.nn.draws import key
from everysat.progress import Progress
from everysat.recipe import Recipe
from everysat.sensors import to_table
from everysat.suite import Cell, Contender, Data, Suite
from everysat.train import train
from everysat.trainee import build_encoder
from everysat.types import Batch, Encoder, Raster, Task

PLACE = {"statistics": baselines.PlaceStatistics, "series": baselines.Series}
PIXEL = {"bands": baselines.Bands, "statistics": baselines.Statistics, "convolutions": baselines.RandomConvolutions}
PROBE: dict[str, Any] = {"strengths": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
"""The linear classifier: penalties of which one is chosen on validation places, else on training places left out."""


@dataclass(frozen=True)
class Result:
    """One cell: an evaluation per label fraction, and what it took. ``seconds``: of features (or fine-tuning), and of fitting."""

    cell: Cell
    evaluations: Mapping[str, Evaluation]
    facts: Mapping[str, Any]


def run(suite: Suite, *, only: str = "", jobs: int = 1, restart: bool = False, quiet: bool = False) -> list[Result]:
    """All cells of a suite whose name contains ``only``. Cells that are done are read from ``suite.folder``; one that fails is written down with
    its error and does not stop the others.

    Args:
        jobs: processes that share the cells. restart: evaluate all cells anew; features, kept under a hash of what they depend on, and finished training runs stay.
    """
    every = [cell for cell in suite.cells() if only in str(cell)]
    if not every:
        raise LookupError(f"only={only!r} matches no cell. {suggest(only, [str(cell) for cell in suite.cells()])}")
    found: dict[Cell, Result] = {}
    with Progress(f"Suite {suite.name}", len(every), quiet=quiet) as bar:
        waiting = []
        for cell in every:
            done = None if restart else read(suite, cell)
            if done is None:
                waiting.append(cell)
            else:
                found[cell] = done
                bar.advance(note=f"{cell} (kept)")
        if jobs > 1:
            with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
                for cell, result in zip(waiting, pool.map(_one, [suite] * len(waiting), waiting), strict=True):
                    found[cell] = result
                    bar.advance(note=str(cell))
        else:
            folds: dict[str, list[Fold]] = {}
            for cell in waiting:
                found[cell] = _one(suite, cell, folds)
                bar.advance(note=str(cell))
    return [found[cell] for cell in every]


def finished(suite: Suite) -> list[Result]:
    """All cells that were computed with the present settings, in the suite's order."""
    return [done for cell in suite.cells() if (done := read(suite, cell)) is not None]


def _one(suite: Suite, cell: Cell, folds: dict[str, list[Fold]] | None = None) -> Result:
    data = suite.datasets[cell.dataset]
    folds = {} if folds is None else folds
    start = time.perf_counter()
    try:
        shown = [cell.modalities, suite.models[cell.model].trained_on or data.whole(cell.modalities)]
        if cell.dataset not in folds:
            folds[cell.dataset] = [Fold(data, i) for i in range(len(data.folds))]
        result = _computed(suite, cell, *([fold.showing(title) for fold in folds[cell.dataset]] for title in shown))
        result = replace(result, facts={**result.facts, "ground": folds[cell.dataset][0].ground})
    except Exception as error:  # a cell that cannot be is a result, and the message says why
        facts = {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - start}
        result = Result(cell, {}, facts)
    write(suite, result)
    return result


def _computed(suite: Suite, cell: Cell, folds: list[Fold], taught: list[Fold]) -> Result:
    """``folds`` show what the cell says, ``taught`` what the encoder is trained on."""
    data, row = suite.datasets[cell.dataset], suite.models[cell.model]
    trained, fitted = [0.0], [0.0]
    models = [_model(suite, cell, fold, number, trained) for number, fold in enumerate(taught)]
    if cell.how == "finetune":
        samples = _samples(folds, None)
    else:
        cache = Cache(suite.folder / "features")
        xs = [_features(data, row, cell, fold, model, cache) for fold, model in zip(folds, models, strict=True)]
        samples = _samples(folds, [x for fold, _ in xs for x in fold])
        trained[0] += sum(seconds for _, seconds in xs)
    evaluations = {}
    for labels in data.labels:
        draws = [fold.draw(labels, seed) for fold in folds for seed in range(suite.seeds)]
        start = time.perf_counter()
        if cell.how == "finetune":
            how = _finetuning(suite, cell, folds, taught, samples, draws)
            evaluations[labels] = evaluate(samples, [draw[:2] for draw in draws], how)
        else:
            options = PROBE if cell.how == "probe" else {}
            evaluations[labels] = evaluate(samples, draws, cell.how, **options)
        fitted[0] += time.perf_counter() - start
    encoder = models[0] if isinstance(models[0], Encoder) else None
    facts = {
        "parameters": sum(p.numel() for p in encoder.parameters()) if encoder else 0,
        "dim": samples.x.shape[1],
        "seconds_features": trained[0],
        "seconds_fitting": fitted[0],
        "samples": {name: sum(len(fold.labelled[name]) for fold in folds) for name in data.parts},
        "places": {name: sum(len(fold.parts[name]) for fold in folds) for name in data.parts},
    }
    return Result(cell, evaluations, facts)


# --- models and features ---------------------------------------------------------------------------------------------


def _model(suite: Suite, cell: Cell, fold: Fold, number: int, seconds: list[float]) -> Any:
    """The baseline or encoder of a row; one that is pre-trained has seen the training places of this fold, without their labels."""
    row, data = suite.models[cell.model], suite.datasets[cell.dataset]
    if row.baseline:
        return _baseline(row, data, fold)
    assert row.model is not None
    _refuse_missing(row.model.weights)
    seen = Apart(fold.parts["train"])
    recipe = {"name": "bench", "model": row.model.model_dump(), "data": [{"name": data.name}], "steps": 1}
    if row.pretrain is None:
        torch.manual_seed(key(number, "weights"))
        made = Recipe.parse({**recipe, "objective": {"name": "none"}}, where=f"models.{cell.model}")
        return build_encoder(made, [seen]).eval().at(**row.at)
    start = time.perf_counter()
    out = {"name": "pretrain", "out": str(_pretrained(suite, cell, number))}
    whole = Recipe.parse({**recipe, **row.pretrain, **out}, where=f"models.{cell.model}.pretrain")
    encoder = train(whole, data=[seen], quiet=True).encoder.eval().at(**row.at)
    seconds[0] += time.perf_counter() - start
    return encoder


def _pretrained(suite: Suite, cell: Cell, fold: int) -> Path:
    """The folder of the run that pre-trains on the training places of a fold."""
    row = suite.models[cell.model]
    data = suite.datasets[cell.dataset]
    asked = (
        key(repr((data.options, data.folds[fold], row.model, row.pretrain))) % 16**8
    )  # another recipe, another folder
    name = f"{cell.dataset}-{cell.model}-{row.trained_on or data.whole(cell.modalities)}-{fold}-{asked:08x}"
    return suite.folder / "pretrained" / name.replace(" ", "_").replace("/", "_")


def _refuse_missing(name: str | None) -> None:
    """Elsewhere a name without weights means a fresh model and a warning; in a table it would be a number under a false name."""
    if name and not Path(name).is_file() and not weights.installed(name).is_file():
        raise FileNotFoundError(
            f"weights={name!r} is no file, and none are installed under that name: everysat convert {name} FILE"
        )


class Shown:
    """The places of a part with the layers that a model may see."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Batch:
        return self.part.shown(self.part.place(index))

    def fingerprint(self) -> str:
        return f"{self.part.fingerprint()} {','.join(self.part.layers)}"


def _baseline(row: Contender, data: Data, fold: Fold) -> Callable[[Batch], Tensor]:
    """A callable for the level of the data; random convolutions are drawn from training places."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in row.options.items()}
    if data.level == "place" and row.baseline in PLACE:
        return PLACE[row.baseline](**options)
    if row.baseline not in PIXEL:
        raise LookupError(
            f"baseline={row.baseline!r} is unknown for {data.level}s. {suggest(row.baseline, {**PLACE, **PIXEL})}"
        )
    gsd_m = options.pop("gsd_m", None) or (_finest_m(fold) if data.level == "place" else fold.labelled["train"].gsd_m)
    made = PIXEL[row.baseline](gsd_m=gsd_m, **options)
    if isinstance(made, baselines.RandomConvolutions):
        shown = Apart(fold.parts["train"])
        some = [shown[i] for i in np.linspace(0, len(shown) - 1, min(64, len(shown))).astype(int)]
        made = made.fit(Batch.cat(some), torch.Generator().manual_seed(0))
    return baselines.Pooled(made) if data.level == "place" else made


def _finest_m(fold: Fold) -> float:
    return min(layer.gsd_m for layer in Shown(fold.parts["train"])[0].layers.values() if isinstance(layer, Raster))


def _features(
    data: Data, row: Contender, cell: Cell, fold: Fold, model: Any, cache: Cache
) -> tuple[list[Tensor], float]:
    """Of all parts of a fold; what was not observed has the mean of the training places."""
    says = (
        state_hash(model)
        if isinstance(model, Encoder)
        else [row.baseline, row.options, fold.parts["train"].fingerprint()]
    )
    found, seconds = [], 0.0
    for name in data.parts:
        part, labelled = fold.parts[name], fold.labelled[name]
        facts = [says, row.at, part.fingerprint(), part.layers, part.target, part.per_place, part.seed, data.level]
        facts += [each for each in (data.pairs, row.pool) if each not in ({}, "summary")]
        extracted = cache.get(facts, partial(extract, model, part, labelled, data.level, row.pool))
        found.append(extracted.x)
        seconds += extracted.seconds
    mean = found[0].double().nanmean(0).nan_to_num(0.0).float()
    return [torch.where(torch.isfinite(x), x, mean) for x in found], seconds


def _samples(folds: list[Fold], xs: list[Tensor] | None) -> Samples:
    each = [(fold.labelled[name], fold.group(name)) for fold in folds for name in fold.parts]
    label = torch.cat([labelled.label for labelled, _ in each])
    x = torch.zeros(len(label), 1) if xs is None else torch.cat(xs)
    return Samples(x, label, torch.cat([group for _, group in each]), each[0][0].classes)


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def _finetuning(
    suite: Suite, cell: Cell, folds: list[Fold], taught: list[Fold], samples: Samples, draws: list[Draw]
) -> Callable[[Draw], Tensor]:
    """Trains encoder and head on the places of a draw, and predicts its test samples. The last step counts: nothing is chosen on a test."""
    data, row = suite.datasets[cell.dataset], suite.models[cell.model]
    assert row.model is not None
    numbers = iter(range(len(draws)))
    called = replace(
        cell, model="", modalities=row.trained_on or data.whole(cell.modalities)
    ).file  # rows that train alike share it

    def how(draw: Draw) -> Tensor:
        number = next(numbers)
        fold = folds[number // suite.seeds]
        model = row.model.model_dump()  # type: ignore[union-attr]
        if row.pretrain is not None:  # the file has the sizes and the statistics that it was trained with
            file = _pretrained(suite, cell, number // suite.seeds) / "weights.safetensors"
            model = {"name": model["name"], "weights": str(file)}
        indices = [group - fold.offset for group in draw[0]]
        tree = {
            **suite.finetune,
            **row.finetune,
            "name": "finetune",
            "model": model,
            "data": [{"name": data.name}],
            "task": _task(
                data,
                samples.kind,
                fold.labelled["train"],
                row,
                torch.isin(fold.labelled["train"].place, torch.tensor(indices)),
            ),
            "seed": number % suite.seeds,
            "checkpoint_every": 0,
        }
        name = f"{called}-{len(indices)}-{number}-{key(json.dumps(tree, sort_keys=True, default=str)) % 16**8:08x}"
        tree["out"] = str(suite.folder / "runs" / name)
        run = train(
            Recipe.parse(tree, where=f"models.{cell.model}.finetune"),
            data=[Subset(Kept(taught[number // suite.seeds].parts["train"]), indices)],
            quiet=True,
        )
        assert isinstance(run.objective, Task)
        encoder = run.encoder.at(**row.at)
        return _predicted(encoder, run.objective, fold.parts["test"], fold.labelled["test"], samples.kind)

    return how


class Apart(Shown):
    """The same one time after the other, if the part has two: what a model is trained, and filters are drawn, on."""

    def __len__(self) -> int:
        return len(self.part) * (2 if self.part.pairs else 1)

    def __getitem__(self, index: int) -> Batch:
        if not self.part.pairs:
            return super().__getitem__(index)
        return at_time(super().__getitem__(index // 2), self.part.pairs, index % 2)


class Kept(Shown):
    """The same with their labels."""

    def __getitem__(self, index: int) -> Batch:
        place = self.part.place(index)
        return place.only(*self.part.layers, self.part.target) if self.part.layers else place


def _task(data: Data, kind: str, labelled: Labelled, row: Contender, train: Tensor) -> dict[str, Any]:
    """The task of a recipe; values are standardised by those that train, ``train`` bool [n]."""
    options: dict[str, Any] = {"target": data.target}
    what = "regress" if kind == "values" else "classify"
    if data.pairs:
        what = "change"
        options |= {"classes": _classes(labelled), "pairs": {name: list(both) for name, both in data.pairs.items()}}
    elif kind == "values":
        value = labelled.label[train]
        spread = max(float(value.std(correction=0)), 1e-6)
        options |= {
            "bands": list(labelled.sensor.names),
            "sensor": {"name": labelled.sensor.name, **to_table(labelled.sensor)},
        }
        options |= {"mean": [float(value.mean())], "std": [spread]}
    else:
        options |= {"classes": _classes(labelled), "multilabel": kind == "labels"}
    if data.level == "pixel":
        options |= {"gsd_m": labelled.gsd_m}
    more = row.finetune.get("task", {})
    if "name" not in more:
        return {"name": f"{what}/{data.level}", "options": {**options, **more.get("options", {})}}
    about = {"name": f"{what}/{data.level}", "options": options}  # a task about a task
    return {"name": more["name"], "options": {"task": about, **more.get("options", {})}}


def _classes(labelled: Labelled) -> Any:
    """Names by code of one class of several, names of bands of several at once."""
    bands = labelled.sensor.bands
    return (
        list(labelled.classes)
        if len(bands) > 1
        else {str(code): name for code, name in sorted((bands[0].classes or {}).items())}
    )


@torch.no_grad()
def _predicted(encoder: Encoder, task: Task, part: Part, labelled: Labelled, kind: str) -> Tensor:
    """Probabilities of labelled samples, in their order."""
    encoder, task = encoder.eval(), task.eval()
    found, numbers, first = [], [], 0
    for batch in in_order(Shown(part), min(16, at_once(part, labelled))):
        raster = task.predict(task.features(encoder, batch), batch)
        # Where nothing was seen, no class is likelier than another, and a value is that of the whole place.
        unseen = raster.values.mean() if kind == "values" else 1.0 / raster.values.shape[1]
        values = torch.where(raster.valid, raster.values, unseen)
        mine = ((labelled.place >= first) & (labelled.place < first + len(batch))).nonzero()[:, 0]
        y, x = labelled.at[mine].T
        found.append(values[labelled.place[mine] - first, :, y, x])
        numbers.append(mine)
        first += len(batch)
    said = torch.cat(found)[torch.cat(numbers).argsort()]
    return said[:, 0] if kind == "values" else said


# --- on disk ---------------------------------------------------------------------------------------------------------


def _asked(suite: Suite, cell: Cell) -> dict[str, Any]:
    """All that the result of a cell depends on."""
    row, data = suite.models[cell.model], suite.datasets[cell.dataset]
    unused = {"leaks", "disturbed"} | (set() if data.pairs else {"pairs"})  # what changes nothing does not part results
    plain = {name for name, usual in (("pool", "summary"), ("trained_on", "")) if getattr(row, name) == usual}
    asked: dict[str, Any] = {
        "cell": [cell.dataset, cell.model, cell.modalities, cell.how],
        "data": data.model_dump(mode="json", exclude={"published", "about", "score", "modalities"} | unused),
        "shown": list(data.shown(cell.modalities)),
        "row": row.model_dump(mode="json", exclude={"note", "how", "only", "datasets"} | plain),
        "seeds": suite.seeds,
    }
    wrong = data.disturbed.get(cell.modalities)
    asked |= {"disturbed": wrong.model_dump()} if wrong else {}
    return asked | ({"finetune": suite.finetune} if cell.how == "finetune" else {})


def write(suite: Suite, result: Result) -> None:
    """``cells/<cell>.json`` with scores, settings and machine, and the counts of each draw beside it."""
    folder = suite.folder / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    path, tensors = folder / result.cell.file, {}
    for labels, one in result.evaluations.items():
        for field in ("counts", "groups", "confidence", "correct"):
            for number, value in enumerate(getattr(one, field)):
                tensors[f"{labels} {field} {number}"] = value.clone()  # draws that are alike share theirs
    told = {
        "asked": _asked(suite, result.cell),
        "facts": dict(result.facts),
        "scores": {
            labels: {n: _plain(one.score(n)) for n in _scores(suite, result.cell, one)}
            for labels, one in result.evaluations.items()
        },
        "kind": next((one.kind for one in result.evaluations.values()), ""),
        "classes": next((list(one.classes) for one in result.evaluations.values()), []),
        "environment": environment(),
    }
    if tensors:
        save_file(tensors, path.with_name(f".{path.name}.part"))
        path.with_name(f".{path.name}.part").replace(f"{path}.safetensors")
    beside = path.with_name(f".{path.name}.json.part")
    beside.write_text(json.dumps(told, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    beside.replace(f"{path}.json")


def read(suite: Suite, cell: Cell) -> Result | None:
    """A cell that was computed before with the same settings; None where there is none, or where it failed."""
    path = suite.folder / "cells" / cell.file
    try:
        told = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    asked = json.loads(json.dumps(_asked(suite, cell), default=str))
    if not _same(told["asked"], asked) or "error" in told["facts"]:
        return None
    found: dict[str, Evaluation] = {}
    with safe_open(f"{path}.safetensors", framework="pt") as file:
        names = set(file.keys())
        for labels in told["scores"]:
            one = found.setdefault(labels, Evaluation(tuple(told["classes"]), told["kind"]))
            for field in ("counts", "groups", "confidence", "correct"):
                number = 0
                while f"{labels} {field} {number}" in names:
                    getattr(one, field).append(file.get_tensor(f"{labels} {field} {number}"))
                    number += 1
    return Result(cell, found, told["facts"])


def _same(before: Any, now: Any) -> bool:
    """Whether settings agree; one that results of before do not know must be unset."""
    if isinstance(before, dict) and isinstance(now, dict):
        known = all(name in now for name in before)
        return known and all(_same(before[name], one) if name in before else not one for name, one in now.items())
    return bool(before == now)


def _scores(suite: Suite, cell: Cell, one: Evaluation) -> list[str]:
    from everysat.nn.scores import KINDS

    return [name for name in suite.datasets[cell.dataset].score if name in KINDS[one.kind]]


def _plain(score: Any) -> dict[str, Any]:
    return {
        name: getattr(score, name) for name in ("mean", "std", "low", "high", "draws", "groups", "values", "definition")
    }

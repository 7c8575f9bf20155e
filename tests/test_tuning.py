"""What a recipe lets learn: the head, the projections, low-rank factors, or all; the rest stays to the bit, also through a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from everysat.data.synthetic import build as synthetic
from everysat.models.weights import load, load_task
from everysat.nn import lora
from everysat.recipe import Recipe, RecipeError
from everysat.train import train

OPTIONS = {"size_m": 40, "label_gsd_m": 40, "regions": 1, "noise": 0.02}
TREE = {
    "name": "tuned",
    "model": {"name": "third_party.strips", "options": {"dropout": 0.2}},
    "data": [{"name": "synthetic/images", "options": {**OPTIONS, "places": 12}}],
    "task": {"name": "classify/place", "options": {"classes": ["a", "b", "c", "d"]}},
    "steps": 6,
    "batch_size": 4,
    "lr": 0.02,
    "checkpoint_every": 2,
    "accelerator": "cpu",
}
LORA = {"how": "lora", "rank": 2, "alpha": 4, "targets": ["encoder.mix.*"]}
HOW = {
    "head": ("head", set()),
    "projector": ("projector", {"project"}),
    "projections by name": ({"how": "projector", "targets": ["encoder.project.fine"]}, {"project.fine"}),
    "lora": (LORA, {"mix.0.weight", "mix.3.weight"}),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights whose batch statistics are those of data."""
    folder = tmp_path_factory.mktemp("start")
    run = train(Recipe.parse(TREE, [f"out={folder}", "steps=3"]), quiet=True)
    return run.weights


def recipe(folder: Path, start: Path, how, *overrides: str) -> Recipe:
    return Recipe.parse({**TREE, "train": how}, [f"out={folder}", f"model.weights={start}", *overrides])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_only_what_is_to_learn_changes_by_a_bit(start, tmp_path, how, ema):
    asked, learning = HOW[how]
    run = train(recipe(tmp_path, start, asked, f"ema={ema}"), quiet=True)
    before, after = load(start).state_dict(), run.encoder.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {n for n in before if any(n == part or n.startswith(f"{part}.") for part in learning)}
    assert changed - {"seen"} == expected
    head = dict(run.objective.named_parameters())
    assert all(not torch.equal(p, dict(load_task(start)[1].named_parameters())[n]) for n, p in head.items())


def test_a_run_with_factors_ends_as_plain_weights_and_leaves_the_factors(start, tmp_path):
    run = train(recipe(tmp_path, start, LORA), quiet=True)
    encoder, task = load_task(run.weights)
    assert type(encoder) is type(load(start))
    assert set(encoder.state_dict()) == set(load(start).state_dict())
    batch = synthetic("images", places=3, size_m=40)[2]
    assert torch.equal(encoder.embed(batch).mean, run.encoder.embed(batch).mean)
    assert torch.equal(
        task.predict(encoder.embed(batch)).values, run.objective.predict(run.encoder.embed(batch)).values
    )
    twin = load(start)
    lora.load(twin, tmp_path / "lora.safetensors")
    assert torch.equal(twin.embed(batch).mean, encoder.embed(batch).mean)
    assert set(load_file(tmp_path / "lora.safetensors")) == {f"mix.{n}.{s}" for n in (0, 3) for s in "ab"}
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["trained_parameters"] == 2 * 2 * (8 + 8) + sum(p.numel() for p in task.parameters())
    again = train(run.recipe, quiet=True)
    assert torch.equal(again.encoder.embed(batch).mean, encoder.embed(batch).mean)


class Interrupting:
    """A dataset that fails once, after so many reads."""

    def __init__(self, dataset, after: int) -> None:
        self.dataset, self.left = dataset, after

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        self.left -= 1
        if self.left == 0:
            raise OSError("the disk is gone")
        return self.dataset[index]

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()


@pytest.mark.parametrize("how", ["lora", "head"])
def test_interrupted_and_resumed_it_ends_with_the_same_bits(start, tmp_path, how):
    asked = HOW[how][0]
    whole = train(recipe(tmp_path / "whole", start, asked, "ema=0.9"), quiet=True)
    mine = recipe(tmp_path / "cut", start, asked, "ema=0.9", "workers=0")
    with pytest.raises(OSError, match="the disk is gone"):
        train(mine, data=[Interrupting(mine.data[0].build("data"), 18)], quiet=True)
    assert not (tmp_path / "cut" / "weights.safetensors").exists()
    resumed = train(mine, quiet=True)
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["resumed_at_step"] == 4
    a, b = (load_file(run.weights) for run in (whole, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_pre_training_goes_on_with_factors_too(tmp_path):
    """An objective that keeps a teacher, a copy of the adapted encoder, hands out plain weights too."""
    modalities = {}
    for name, layer in synthetic("images", places=1)[0].without("label").layers.items():
        bands = [{"name": band.name, "gsd_m": band.gsd_m, "unit": band.unit} for band in layer.sensor.bands]
        table = {"name": layer.sensor.name, "kind": "optical", "source": "synthetic", "bands": bands}
        modalities[name] = {
            "sensor": table,
            "bands": list(layer.sensor.names),
            "gsd_m": layer.gsd_m,
            "projector": "image",
        }
        modalities[name]["pixels"] = round(10 / layer.gsd_m)
    sizes = {"grid": 6, "dim": 64, "depth": 1, "heads": 4, "patch_m": 10, "modalities": modalities}
    changes = {
        "model": {"name": "anysat/", "statistics": "data", "options": sizes},
        "data": [{"name": "synthetic/images", "options": {"places": 8}}],
        "objective": {"name": "jepa", "options": {"patch_m": [10], "depth": 1, "heads": 4}},
        "task": None,
        "steps": 2,
        "train": "lora",
    }
    mine = Recipe.parse({**TREE, **changes}, [f"out={tmp_path}"])
    run = train(mine, quiet=True)
    again = train(mine, quiet=True)
    batch = synthetic("images", places=9)[8]
    assert torch.equal(again.encoder.embed(batch).mean, run.encoder.embed(batch).mean)
    assert not lora.adapted(run.objective)
    for name, tensor in run.objective.state_dict().items():
        assert torch.equal(again.objective.state_dict()[name], tensor), name


def test_two_devices_are_not_needed_to_know_what_is_wrong(start, tmp_path):
    def fails(how, message):
        with pytest.raises(RecipeError, match=message):
            train(recipe(tmp_path, start, how), quiet=True)

    fails("lara", r"train\.how: Input should be 'all', 'head', 'projector' or 'lora'")
    fails({"how": "head", "rank": 4}, "rank do nothing with how=head")
    fails({"how": "lora", "ranks": 4}, r"train\.ranks: there is no such key\. Did you mean rank")
    fails({"how": "lora", "targets": ["encoder.mix.9"]}, "no linear layer is called 'mix.9'")
    fails({"how": "lora", "rank": 60, "targets": ["encoder.mix.*"]}, "rank=60 must be from 1 to 8")
    fails({"how": "projector", "targets": ["encoder.projct"]}, "Did you mean encoder.project")
    with pytest.raises(RecipeError, match=r"train=head leaves nothing to train"):
        train(recipe(tmp_path, start, "head", "freeze=[objective]"), quiet=True)


def test_one_word_is_the_setting_with_its_defaults(tmp_path):
    one, two = (Recipe.parse({**TREE, "train": how}) for how in ("lora", {"how": "lora", "rank": 8}))
    assert one == two
    one.dump(tmp_path / "a.yaml")
    assert Recipe.load(tmp_path / "a.yaml") == one
    assert one.changed(steps=9).train == one.train

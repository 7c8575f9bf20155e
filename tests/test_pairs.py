"""Suites of images of two times: features are what differs, fine-tuning is that of change."""

from __future__ import annotations

import pytest
import torch

from everysat import bench
from everysat.baselines import Bands, Pooled, RandomConvolutions
from everysat.data import change_pairs
from everysat.features import Part, at_time, extract
from everysat.models import omnisat
from everysat.suite import Suite
from everysat.types import Batch

PAIRS = {"rgb": ("before", "after")}
SIZES = {"patch_m": 4, "grid": 4, "dim": 16, "depth": 1, "heads": 2, "skip": True}
RGB = {"sensor": "rgb-image", "bands": ["red", "green", "blue"], "gsd_m": 0.5, "projector": "texture"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    change_pairs.fake(folder)
    return folder


@pytest.fixture(scope="module")
def places(root):
    return change_pairs.build(root=root, split="all")


def test_features_of_two_times_are_their_difference_and_its_size(places) -> None:
    there, back = (
        Part(places, per_place=20, pairs={"rgb": both}) for both in (("before", "after"), ("after", "before"))
    )
    labelled = there.labelled()
    x, y = (extract(Bands(0.5), part, labelled, "pixel").x for part in (there, back))
    before, after = (places[0].raster(name).values[0] for name in ("before", "after"))
    at = labelled.at[labelled.place == 0]
    assert torch.allclose(x[labelled.place == 0, :3], (after - before)[:, at[:, 0], at[:, 1]].T)
    assert torch.equal(x[:, :3], -y[:, :3])
    assert torch.equal(x[:, 3:], y[:, 3:])
    assert (x[:, 3:] >= 0).all()


def test_a_model_is_trained_on_each_time_apart(places) -> None:
    apart = bench.Apart(Part(places, pairs=PAIRS))
    assert len(apart) == 2 * len(places)
    for time, name in enumerate(PAIRS["rgb"]):
        assert set(apart[2 + time].layers) == {"rgb"}
        assert torch.equal(apart[2 + time].raster("rgb").values, places[1].raster(name).values)
    kept = at_time(places[0], PAIRS, 1)
    assert set(kept.layers) == {"rgb", "label"}


def test_probe_and_fine_tuning_of_changes(root, tmp_path) -> None:
    data = {
        "name": "change_pairs/levir", "options": {"root": str(root), "by": "scenes"}, "folds": [0], "level": "pixel", "pairs": PAIRS,
        "per_place": 50, "labels": ["100%"], "score": ["macro_f1"],
    }  # fmt: skip
    model = {"name": "omnisat/", "statistics": "data", "options": {**SIZES, "modalities": {"rgb": RGB}}}
    models = {
        "convolutions": {"baseline": "convolutions", "options": {"filters": 8, "pool_m": 2}},
        "omnisat": {"model": model, "how": ["probe", "finetune"]},
    }
    finetune = {"steps": 2, "batch_size": 2, "lr": 1e-3, "task": {"options": {"token_size_m": 4, "symmetric": True}}}
    tree = {"name": "pairs", "datasets": {"levir": data}, "models": models, "finetune": finetune, "seeds": 1}
    results = bench.run(Suite.parse({**tree, "out": str(tmp_path)}), quiet=True)
    assert [r.facts.get("error") for r in results] == [None] * 3
    assert results[0].facts["dim"] == 2 * 16
    assert results[1].facts["dim"] == 2 * 32
    told = next((tmp_path / "runs").glob("*/recipe.yaml")).read_text()
    assert "change/pixel" in told


def test_scenes_of_levir_lie_in_one_part_alone(root) -> None:
    parts = [
        {file[0].split("_0256")[0] for file in change_pairs.build(root=root, split=s, by="scenes", fold=1).files}
        for s in ("train", "val", "test")
    ]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 6
    assert parts[0] != {file[0].split("_0256")[0] for file in change_pairs.build(root=root).files}


def test_moments_are_mean_and_spread_of_tokens(places) -> None:
    encoder = omnisat.from_config(
        {**SIZES, "modalities": {"before": {**RGB, "mean": [110] * 3, "std": [50] * 3}}}
    ).eval()
    part = Part(places)
    labelled = part.labelled()
    x = extract(encoder, part, labelled, "place", "moments").x
    tokens = encoder.embed(places[2].only("before")).mean
    mine = x[labelled.place == 2][0]
    assert torch.allclose(mine[:32], tokens.mean(0), atol=1e-4)
    assert torch.allclose(mine[32:], tokens.std(0, correction=0), atol=1e-4)


def test_responses_pooled_over_places_are_those_of_pixels(places) -> None:
    batch = Batch.cat([places[i].only("before") for i in range(3)])
    filters = RandomConvolutions(0.5, filters=40, side=3, pool_m=0).fit(batch, torch.Generator().manual_seed(0))
    assert torch.allclose(Pooled(filters)(batch), filters(batch).flatten(2).mean(2), atol=1e-6)
    assert filters(batch).shape[1] == 80


def test_settings_that_came_later_do_not_part_results() -> None:
    before = {"row": {"model": {"name": "omnisat/", "options": {}}}}
    assert bench._same(before, {"row": {"model": {"name": "omnisat/", "options": {}, "probabilistic": False}}})
    for other in (
        {"name": "omnisat/", "options": {}, "probabilistic": True},
        {"name": "omnisat/"},
        {"name": "x", "options": {}},
    ):
        assert not bench._same(before, {"row": {"model": other}})

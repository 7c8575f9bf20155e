"""ProMM-RS: what it fuses, what it shares, how it is built, and its use in recipes; the laws of all models are in test_laws."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from layered_encoder import NAMES, LayeredEncoder, layered_batch
from test_laws import example

from everysat.find import find, names
from everysat.models import prommrs, weights
from everysat.nn.gaussian import FUSIONS, fuse, information
from everysat.recipe import Recipe, RecipeError
from everysat.train import train
from everysat.types import Batch, Place


@pytest.fixture
def encoder() -> prommrs.ProMM:
    torch.manual_seed(0)
    model = prommrs.wrap(LayeredEncoder(), dim=8).eval()
    for head in [*model.cell_heads.values(), *model.place_heads.values()]:  # confidences that differ from the beginning
        torch.nn.init.normal_(head.spread.weight, std=0.3)
    return model


def test_features_are_the_fused_gaussians_of_modalities_alone(encoder, generator) -> None:
    batch, _ = layered_batch(3, generator)
    said = {}
    for name in NAMES:
        alone = encoder.backbone.embed(batch.only(name))
        said[name] = [encoder.cell_heads[name](alone.mean), encoder.place_heads[name](alone.summary)]
    features = encoder.embed(batch)
    for level, (mean, var) in enumerate([(features.mean, features.var), (features.summary, features.summary_var)]):
        means, log_vars = (torch.stack([said[name][level][part] for name in NAMES], 1) for part in (0, 1))
        expected = fuse("product", means, log_vars, torch.ones(len(means), 3, dtype=torch.bool))
        torch.testing.assert_close(mean, expected.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var, expected.var, rtol=1e-4, atol=1e-5)


def test_dropping_tokens_of_a_modality_is_not_having_it(encoder, generator) -> None:
    batch, _ = layered_batch(3, generator)
    tokens = encoder.tokenize(batch)
    part = encoder(tokens[tokens.coords.group != 1])
    alone = encoder(encoder.tokenize(batch.without("b")))
    torch.testing.assert_close(part.mean, alone.mean)
    torch.testing.assert_close(part.summary_var, alone.summary_var)
    one_place = encoder(tokens[(tokens.coords.group != 1) | (tokens.coords.row > 0)])
    torch.testing.assert_close(one_place.summary[0], alone.summary[0])
    torch.testing.assert_close(one_place.summary[1], encoder(tokens).summary[1])


def test_modalities_only_add_information(encoder, generator) -> None:
    batch, _ = layered_batch(5, generator)
    known = [encoder.embed(batch.only(*NAMES[:n])) for n in (1, 2, 3)]
    for fewer, more in itertools.pairwise(known):
        assert (more.var < fewer.var).all()
        assert (more.summary_var < fewer.summary_var).all()


def test_nothing_observed_is_the_prior_and_says_so(encoder, generator) -> None:
    batch, _ = layered_batch(1, generator)
    features = encoder.embed(Batch.cat([Batch((Place(40.0, 40.0),)), batch]))
    assert (features.summary[0] == 0).all()
    assert (features.summary_var[0] == 1).all()
    assert information(features.summary_var)[0] == 0 < information(features.summary_var)[1]
    assert set(features.coords.row.tolist()) == {1}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusion_is_chosen_at_the_call_and_shares_weights(encoder, generator, fusion) -> None:
    batch, _ = layered_batch(2, generator)
    twin = encoder.at(fusion=fusion)
    assert twin.cell_heads["a"].mean.weight is encoder.cell_heads["a"].mean.weight
    assert encoder.fusion == "product"
    assert twin.config["fusion"] == fusion
    cells = encoder.witnesses(encoder.tokenize(batch))[1]
    torch.testing.assert_close(encoder.embed(batch, fusion=fusion).mean, cells.fused(fusion).mean)
    others = [f for f in FUSIONS if f != fusion]
    assert not any(torch.allclose(twin.embed(batch).var, encoder.embed(batch, fusion=f).var) for f in others)


def test_temper_by_modality(encoder, generator) -> None:
    batch, _ = layered_batch(2, generator)
    deaf = encoder.at(temper={"b": 1e-12}).embed(batch)
    torch.testing.assert_close(deaf.mean, encoder.embed(batch.without("b")).mean, rtol=1e-4, atol=1e-5)


def test_groups_are_one_modality(generator) -> None:
    batch, _ = layered_batch(2, generator)
    model = prommrs.wrap(LayeredEncoder(), dim=8, groups={"both": ["b", "c"]}).eval()
    assert model.tokenize(batch).groups == ("both", "a")
    assert list(model.cell_heads) == ["both", "a"]
    tokens = model.tokenize(batch.only("b"))
    assert tokens.groups == ("both",)
    torch.testing.assert_close(tokens.x, model.backbone.embed(batch.only("b")).mean)


def test_what_does_not_fit_is_refused(generator) -> None:
    with pytest.raises(ValueError, match="Did you mean max_conf"):
        prommrs.wrap(LayeredEncoder(), fusion="maxconf")
    with pytest.raises(ValueError, match="groups name the layer 'd'"):
        prommrs.wrap(LayeredEncoder(), groups={"x": ["d"]})
    with pytest.raises(ValueError, match="name a layer twice"):
        prommrs.wrap(LayeredEncoder(), groups={"x": ["a", "b"], "y": ["b"]})
    with pytest.raises(ValueError, match="temper names the modality 'd'"):
        prommrs.wrap(LayeredEncoder(), temper={"d": 0.5})
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        prommrs.wrap(LayeredEncoder(), temper=2.0)
    with pytest.raises(ValueError, match="lists no layers"):
        prommrs.wrap(LayeredEncoder(()), heads="each")
    with pytest.raises(ValueError, match="must say what to wrap"):
        prommrs.build("")
    with pytest.raises(LookupError, match="Did you mean nano"):
        prommrs.build("nan")


@pytest.mark.parametrize("name", [n for n in names("models") if n != "prommrs"])
def test_any_encoder_can_be_wrapped(name, generator) -> None:
    module, _ = find("models", name)
    smallest = next((v for v in ("nano", "tiny") if v in getattr(module, "VARIANTS", {})), None)
    if smallest is None:
        pytest.skip(f"{name} has no variant 'nano' or 'tiny'")
    backbone = module.build(smallest)
    if not backbone.inputs:
        with pytest.raises(ValueError, match="lists no layers"):
            prommrs.wrap(backbone, heads="each")
        return
    model = prommrs.wrap(backbone, dim=6).eval()
    assert list(model.cell_heads) == (["shared"] if backbone.any_sensor else list(backbone.inputs))
    batch = example(model, generator)
    features = model.embed(batch)
    assert features.grid().shape[1] == 6
    assert features.var.shape == features.mean.shape
    assert (features.summary_var <= model.embed(batch.only(next(iter(batch.layers)))).summary_var).all()


def test_weights_come_back(tmp_path, generator) -> None:
    model = prommrs.build("nano", fusion="max_conf", groups={"slow": ["s2", "s1"]}).eval()
    path = weights.save(tmp_path / "w.safetensors", model)
    again = weights.load(path)
    assert again.config == model.config == json.loads(json.dumps(model.config))
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert weights.load(path, fusion="mixture").fusion == "mixture"


RECIPE = {
    "name": "small",
    "model": {
        "name": "simplesat/nano",
        "options": {"modalities": "data", "token_m": 20.0},
        "statistics": "data",
        "probabilistic": {"dim": 8, "temper": 0.8},
    },
    "data": [{"name": "synthetic/images", "options": {"places": 8}}],
    "objective": {"name": "probabilistic", "options": {"cells": 4}},
    "steps": 2,
    "batch_size": 4,
}


def test_a_recipe_asks_for_it(tmp_path) -> None:
    run = train(Recipe.parse({**RECIPE, "out": str(tmp_path / "run")}), quiet=True)
    assert run.encoder.family == "prommrs"
    assert run.encoder.backbone.family == "simplesat"
    assert run.encoder.dim == 8
    loaded = weights.load(run.weights)
    assert loaded.config["temper"] == 0.8
    assert set(loaded.inputs) == set(loaded.config["modalities"])
    means = [wanted.mean for wanted in loaded.inputs.values()]
    assert any(any(m) for m in means)
    assert "cell_match" in run.log[0]
    more = {**RECIPE, "model": {"name": "prommrs", "weights": str(run.weights)}, "out": str(tmp_path / "more")}
    assert train(Recipe.parse(more), quiet=True).encoder.config == loaded.config


def test_a_recipe_says_what_is_wrong(tmp_path) -> None:
    wrong = {**RECIPE, "out": str(tmp_path / "run")}
    for options, words in (
        ({"fusin": "mean"}, "probabilistic: fusin: there is no such key. Did you mean fusion"),
        ({"fusion": "max"}, "Did you mean"),
        ({"groups": {"x": ["nowhere"]}}, "nowhere"),
    ):
        with pytest.raises(RecipeError, match=words):
            train(Recipe.parse({**wrong, "model": {**RECIPE["model"], "probabilistic": options}}), quiet=True)
    twice = {"name": "prommrs/nano", "probabilistic": True}
    with pytest.raises(RecipeError, match="probabilistic already"):
        train(Recipe.parse({**wrong, "model": twice}), quiet=True)

"""Classes that are words: laws of prompts and examples, rejection, and a task like any other."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from layered_encoder import NAMES, LayeredEncoder, layered_batch

from everysat.models import georeset, weights
from everysat.nn.gaussian import Gaussian, information
from everysat.nn.mappers import Tasked
from everysat.sensors import Band, Sensor
from everysat.tasks.prompts import UNSURE, Finer, Judged, build, exemplars, mixed
from everysat.types import ALWAYS, Batch, ContractError, Place, Raster

WORDS = {"encoder": "letters", "vector": 26, "hidden": 24}
CLASSES = ["forest", "water", "houses"]
SIZES = {"token_size_m": 20.0}


@pytest.fixture
def encoder() -> georeset.GeoReset:
    torch.manual_seed(0)
    own = georeset.Config.model_validate({"dim": 8, "text": WORDS, "backbone": {}, "heads": "each"})
    model = georeset.GeoReset(own, LayeredEncoder())
    for module in model.modules():
        if isinstance(module, georeset.GaussianHead):
            torch.nn.init.normal_(module.spread.weight, std=0.5)
    return model.eval()


def gaussian(mean: torch.Tensor, log_var: float = -2.0) -> Gaussian:
    return Gaussian(mean, torch.full_like(mean, log_var), torch.ones(len(mean), dtype=torch.bool))


@pytest.mark.parametrize("variant", ["pixel", "place"])
def test_probabilities_are_the_softmax_of_the_match(encoder, generator, variant) -> None:
    batch, _ = layered_batch(2, generator)
    features = encoder.embed(batch)
    found = build(variant, encoder=encoder, classes=CLASSES, **SIZES).predict(features)
    assert found.sensor.names == tuple(CLASSES)
    text = encoder.text(CLASSES)
    if variant == "place":
        expected = encoder.match(encoder.place(batch), text).softmax(1)[:, :, None, None]
    else:
        cells = Gaussian(features.mean, features.var.log(), torch.ones(len(features.mean), dtype=torch.bool))
        image = replace(features, mean=encoder.match(cells, text).softmax(1)).grid()
        expected = image
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
    assert found.valid.all()
    assert found.values.amax(1).max() > 0.4, "all prompts are alike: the test would see nothing"


def test_the_order_of_prompts_permutes_probabilities(encoder, generator) -> None:
    features = encoder.embed(layered_batch(2, generator)[0])
    one, other = (
        build(encoder=encoder, classes=c, reject=0.5, **SIZES).predict(features) for c in (CLASSES, CLASSES[::-1])
    )
    torch.testing.assert_close(one.values[:, [2, 1, 0, 3]], other.values)
    assert other.sensor.names == (*CLASSES[::-1], UNSURE)


def test_saying_it_twice_changes_nothing_saying_it_otherwise_does(encoder, generator) -> None:
    features = encoder.embed(layered_batch(2, generator)[0])

    def said(ways):
        return build(encoder=encoder, classes={"forest": ways, "water": ["water"]}, **SIZES).predict(features).values

    torch.testing.assert_close(said(["forest"]), said(["forest"] * 3))
    assert (said(["forest"]) - said(["forest", "many trees"])).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["pixel", "place"])
def test_two_in_a_batch_equal_one_by_one(encoder, generator, variant) -> None:
    batch, _ = layered_batch(3, generator)
    task = build(variant, encoder=encoder, classes=CLASSES, reject=0.4, **SIZES)
    together = task.predict(encoder.embed(batch)).values
    alone = torch.cat([task.predict(encoder.embed(batch[i])).values for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["pixel", "place"])
def test_where_nothing_was_observed_there_is_no_class(encoder, generator, variant) -> None:
    task = build(variant, encoder=encoder, classes=CLASSES, **SIZES)
    batch = Batch.cat([Batch((Place(40.0, 40.0),)), layered_batch(1, generator)[0]])
    assert task.predict(encoder.embed(batch)).valid.flatten(1).any(1).tolist() == [False, True]
    nothing = task.predict(encoder.embed(batch[0]))
    assert not nothing.valid.any()
    assert torch.isfinite(nothing.values).all()
    mapped = Tasked(encoder, build(encoder=encoder, classes=CLASSES, **SIZES), 20.0, 20.0, 0.0)(batch)
    assert torch.isnan(mapped[0]).all()
    assert torch.isfinite(mapped[1]).all()


@pytest.mark.parametrize("variant", ["pixel", "place"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_unsure_is_largest_exactly_where_no_class_reaches_the_threshold(encoder, generator, variant, share) -> None:
    features = encoder.embed(layered_batch(8, generator)[0])
    plain = build(variant, encoder=encoder, classes=CLASSES, **SIZES).predict(features).values
    reject = float(plain.amax(1).quantile(share))
    found = build(variant, encoder=encoder, classes=CLASSES, reject=reject, **SIZES).predict(features).values
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))
    unsure = plain.amax(1) < reject
    assert torch.equal(found.argmax(1) == 3, unsure)
    torch.testing.assert_close(found.movedim(1, -1)[~unsure][:, :3], plain.movedim(1, -1)[~unsure])
    assert torch.equal(found[:, :3].argmax(1), plain.argmax(1)), "the best class stays the best"
    assert 0 < unsure.float().mean() < 1


def test_what_little_is_known_of_is_unsure(encoder, generator) -> None:
    batch, _ = layered_batch(6, generator)
    features = encoder.embed(batch)
    known = information(features.summary_var)
    least = float(known.median())
    found = build("place", encoder=encoder, classes=CLASSES, least_nats=least).predict(features).values[:, :, 0, 0]
    assert torch.equal(found[:, 3], (known < least).float())
    assert 0 < (known < least).sum() < 6


def test_a_prompt_moves_towards_its_examples_with_their_number(generator) -> None:
    prompts = gaussian(torch.randn(3, 8, generator=generator))
    there = torch.randn(2, 8, generator=generator)

    def cosine(n: int) -> float:
        examples = {0: gaussian(there[:1].repeat(n, 1)), 1: gaussian(there[1:])}
        return float(torch.cosine_similarity(mixed(prompts, examples, 2.0).mean[0], there[0], dim=0))

    near = [cosine(n) for n in (1, 2, 4, 50)]
    assert near == sorted(near)
    assert near[0] < 0.99 < near[-1]
    assert mixed(prompts, {}, 2.0) is prompts


def test_a_class_with_examples_does_not_draw_everything_to_itself(generator) -> None:
    """Images lie far from words, by one step: the class without examples is moved by it too."""
    corner = torch.eye(8)
    words, step = corner[:2], 2 * corner[7]
    prompts, examples = gaussian(words), {0: gaussian((words[0] + step)[None].repeat(5, 1))}
    moved = torch.nn.functional.normalize(mixed(prompts, examples, 1.0).mean, dim=1)
    images = torch.nn.functional.normalize(words + step, dim=1)
    assert (images @ moved.T).argmax(1).tolist() == [0, 1]
    plain = torch.nn.functional.normalize(torch.stack([images[0], words[1]]), dim=1)
    assert (images @ plain.T).argmax(1).tolist() == [0, 0], "without the step, the other class is lost"


def test_a_polygon_is_one_example(generator) -> None:
    mean, log_var = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    group = torch.tensor([7, 2, 7, 7, 2])
    found = exemplars(mean, log_var, group)
    assert found.mean.shape == (2, 8)
    again = exemplars(mean.repeat(3, 1), log_var.repeat(3, 1), group.repeat(3))
    torch.testing.assert_close(again.mean, found.mean)
    torch.testing.assert_close(again.log_var, found.log_var)
    weight = (-log_var[group == 2]).exp()
    torch.testing.assert_close(found.mean[0], (mean[group == 2] * weight).sum(0) / weight.sum(0))


def test_saved_and_loaded_it_needs_no_text(tmp_path, generator, monkeypatch) -> None:
    torch.manual_seed(2)
    model = georeset.build("nano", text=WORDS, dim=8).eval()
    model.scale.fill_(13.0)
    examples = {"water": gaussian(torch.randn(4, 8, generator=generator))}
    task = build(
        "place",
        encoder=model,
        classes={"forest": ["forest", "trees"], "water": ["water"]},
        reject=0.6,
        examples=examples,
    )
    path = weights.save(tmp_path / "w.safetensors", model, task)
    monkeypatch.setattr(georeset, "text_encoder", lambda name: pytest.fail("text was read"))
    encoder, again = weights.load_task(path)
    assert again.config == task.config == json.loads(json.dumps(task.config))
    assert again.config["counts"] == {"water": 4}
    assert torch.equal(again.head.mean, task.head.mean)
    assert torch.equal(again.head.log_var, task.head.log_var)
    batch = Batch.cat([Batch((Place(40.0, 40.0, lonlat=at),)) for at in ((1.0, 2.0), (80.0, -40.0))])
    found = task.predict(task.features(model, batch))
    assert found.valid.all(), "position is a witness as well"
    assert torch.equal(again.predict(again.features(encoder, batch)).values, found.values)


def test_metrics_count_the_best_class_of_labels_by_their_codes(encoder, generator) -> None:
    batch, _ = layered_batch(3, generator)
    codes = {"forest": 5, "water": 9, "houses": 1}
    task = build("place", encoder=encoder, classes=CLASSES, codes=codes, reject=0.9)
    prediction = task.predict(task.features(encoder, batch))
    best = prediction.values[:, :3, 0, 0].argmax(1)
    truth = torch.tensor(list(codes.values()))[best]
    truth[0] = 77  # none of the classes
    always = torch.tensor([ALWAYS] * 3, dtype=torch.float64)
    sensor = Sensor("labels", "classes", (Band("label", 40, "class"),), "made")
    label = Raster(
        sensor, truth.float().view(3, 1, 1, 1), torch.ones(3, 1, 1, 1, dtype=torch.bool), always, torch.arange(3), 40.0
    )
    accuracy = task.metrics()["accuracy"]
    accuracy.update(*task.pairs(prediction, batch.adding(label=label)))
    assert float(accuracy.compute()) == 1.0
    loss = task(encoder, batch.adding(label=label), generator)
    assert loss["labelled"] == 2
    loss["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in encoder.backbone.parameters())


def test_finer_maps_hold_the_same_at_the_centres_of_tokens(encoder, generator) -> None:
    batch, _ = layered_batch(2, generator)
    task = build(encoder=encoder, classes=CLASSES, reject=0.4, **SIZES)
    options = {"embed": Judged(encoder, task.head), "dim": 4, "task": task}
    tokens = Finer(encoder, 20.0, 20.0, **options)
    assert tokens.names == (*CLASSES, UNSURE)
    torch.testing.assert_close(tokens(batch), task.predict(encoder.embed(batch)).values, rtol=1e-4, atol=1e-5)
    assert Finer(encoder, 10.0, 20.0, **options)(batch).shape == (2, 4, 4, 4)


def test_what_does_not_fit_is_refused(encoder) -> None:
    with pytest.raises(ContractError, match="reads text"):
        build("place", encoder=LayeredEncoder(), classes=CLASSES)
    with pytest.raises(ValueError, match="at least two classes, each once"):
        build("place", encoder=encoder, classes=["forest", "forest"])
    with pytest.raises(ValueError, match="none 'unsure'"):
        build("place", encoder=encoder, classes=["forest", UNSURE])
    with pytest.raises(TypeError, match="one string"):
        build("place", encoder=encoder, classes="forest,water")
    with pytest.raises(ValueError, match="'water' is said as 'water'"):
        build("place", encoder=encoder, classes={"forest": ["forest"], "water": "water"})
    with pytest.raises(ValueError, match="reject=1"):
        build("place", encoder=encoder, classes=CLASSES, reject=1.0)
    with pytest.raises(ValueError, match="token_size_m"):
        build("pixel", encoder=encoder, classes=CLASSES)
    with pytest.raises(ValueError, match="not a multiple"):
        build("pixel", encoder=encoder, classes=CLASSES, gsd_m=15.0, **SIZES)
    with pytest.raises(LookupError, match="no variant 'scene'"):
        build("scene", encoder=encoder, classes=CLASSES)
    with pytest.raises(ValueError, match="'mud', which is none of the classes"):
        build("place", encoder=encoder, classes=CLASSES, examples={"mud": gaussian(torch.ones(1, 8))})
    with pytest.raises(ValueError, match=r"have shape \[1, 7\]"):
        build("place", encoder=encoder, classes=CLASSES, examples={"water": gaussian(torch.ones(1, 7))})
    with pytest.raises(ContractError, match="is this the model"):
        build("place", encoder=encoder, classes=CLASSES, said={"mean": [[0.0]] * 3, "log_var": [[0.0]] * 3})
    with pytest.raises(ValueError, match="one code to each class"):
        build("place", encoder=encoder, classes=CLASSES, codes={"forest": 1})
    blind = replace(encoder.embed(Batch((Place(40.0, 40.0),))), var=None, summary_var=None)
    with pytest.raises(ValueError, match="no variance"):
        build("place", encoder=encoder, classes=CLASSES).predict(blind)
    assert math.isclose(build("place", encoder=encoder, classes=CLASSES).head.scale, float(encoder.scale))
    assert set(encoder.inputs) == set(NAMES)

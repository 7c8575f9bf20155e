"""Classification: what a head sees, what loss and metrics ignore, and that both heads learn."""

from __future__ import annotations

import json

import pytest
import torch
from simple_encoder import SquareEncoder, image_batch, label_raster

from everysat.find import find
from everysat.tasks.classify import DEFINITIONS, build
from everysat.types import Place

CLASSES = {10: "water", 20: "forest", 30: "city"}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SquareEncoder()


def batch_of(generator, rows=2, side=6, level="pixel"):
    """Pixels (or places) whose class can be read off the first band."""
    index = torch.randint(3, (rows, 1, side, side), generator=generator)
    if level == "place":
        index = index[:, :, :1, :1].expand(-1, -1, side, side)
    codes = 10 * (index + 1)
    values = torch.cat([index / 2.0, torch.rand(rows, 1, side, side, generator=generator)], 1)
    batch = image_batch(values)
    label = label_raster(codes, 10.0) if level == "pixel" else label_raster(codes[:, :, :1, :1], side * 10.0)
    return batch.adding(label=label)


def pixel_task(encoder, **options):
    return build("pixel", encoder=encoder, classes=CLASSES, gsd_m=10.0, token_size_m=20.0, **options)


def fit(task, encoder, batch, generator, steps=150):
    optimiser = torch.optim.AdamW([*task.parameters(), *encoder.parameters()], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = task(encoder, batch, generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("loss", ["ce", "ce+dice", "dice", "focal"])
def test_pixels_are_learnt_and_come_back_in_their_places(encoder, generator, loss):
    batch = batch_of(generator)
    task = pixel_task(encoder, loss=loss, head="linear")
    fit(task, encoder, batch, generator)
    prediction = task.predict(encoder.embed(batch))
    codes = 10 * (prediction.values.argmax(1, keepdim=True) + 1)
    assert (codes == batch.raster("label").values).float().mean() > 0.95
    torch.testing.assert_close(prediction.values.sum(1), torch.ones(2, 6, 6))
    assert prediction.sensor.names == ("water", "forest", "city")


def test_the_kth_pixel_of_a_token_is_the_kth_output(encoder, generator):
    """Row-major inside the token: moving one output's bias moves exactly that pixel."""
    task = pixel_task(encoder, head="linear")
    batch = batch_of(generator)
    before = task.head(encoder.embed(batch))[0]
    with torch.no_grad():
        task.head.head.bias[1 * 4 + 2] += 7.0  # class 1, sub-pixel (1, 0)
    moved = (task.head(encoder.embed(batch))[0] - before).detach()
    expected = torch.zeros(2, 3, 6, 6)
    expected[:, 1, 1::2, 0::2] = 7.0
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["linear", "norm", "mlp"])
def test_places_are_learnt(encoder, generator, head):
    batch = batch_of(generator, rows=12, level="place")
    task = build("place", encoder=encoder, classes=CLASSES, head=head)
    losses = fit(task, encoder, batch, generator)
    assert losses[-1] < 0.2 * losses[0]
    prediction = task.predict(encoder.embed(batch))
    assert prediction.values.shape == (12, 3, 1, 1)
    assert prediction.gsd_m == 60.0


def test_local_pixels_separate_what_the_token_does_not_tell(encoder, generator):
    """Tokens frozen at a constant: only the local pixels tell the classes apart."""
    with torch.no_grad():
        encoder.proj.weight.zero_()
    encoder.requires_grad_(False)
    batch = batch_of(generator)
    task = pixel_task(encoder, local=["image"])
    with torch.no_grad():
        task.head.local.weight.zero_()
    blind, seeing = pixel_task(encoder), task
    results = []
    for chosen in (blind, seeing):
        optimiser = torch.optim.AdamW(chosen.parameters(), lr=0.1)
        for _ in range(150):
            loss = chosen(encoder, batch, generator)["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        results.append(float(loss.detach()))
    assert results[1] < 0.3 < 0.8 < results[0]
    with pytest.raises(ValueError, match="give predict\\(\\) the batch too"):
        seeing.predict(encoder.embed(batch))
    assert seeing.predict(encoder.embed(batch), batch).values.shape == (2, 3, 6, 6)


def test_unlabelled_and_unlisted_codes_change_nothing(encoder, generator):
    batch = batch_of(generator)
    task = pixel_task(encoder)
    label = batch.raster("label")
    valid = torch.rand(label.valid.shape, generator=generator) > 0.4
    ignored = batch.adding(label=label_raster(torch.where(valid, label.values, 777), 10.0, valid))
    unlisted = batch.adding(label=label_raster(torch.where(valid, label.values, 777), 10.0))
    other = batch.adding(label=label_raster(torch.where(valid, label.values, 30), 10.0, valid))
    values = [float(task(encoder, b, generator)["loss"].detach()) for b in (ignored, unlisted, other)]
    assert values[0] == values[1] == values[2] != float(task(encoder, batch, generator)["loss"].detach())


def test_the_encoder_never_sees_the_target(encoder, generator):
    seen = []
    encoder.tokenize = lambda batch, real=encoder.tokenize: seen.extend(batch.layers) or real(batch)
    pixel_task(encoder)(encoder, batch_of(generator), generator)
    assert seen == ["image"]


def test_labels_finer_or_larger_than_the_tokens_are_compared_where_both_are(encoder, generator):
    batch = batch_of(generator)
    label = batch.raster("label")
    wide = label_raster(torch.nn.functional.pad(label.values, (0, 2, 0, 1), value=10), 10.0)
    task = pixel_task(encoder)
    same = [task(encoder, b, generator)["loss"] for b in (batch, batch.adding(label=wide))]
    torch.testing.assert_close(*same)


def test_unobserved_pixels_are_not_predicted(encoder, generator):
    values = torch.rand(1, 2, 6, 6, generator=generator)
    values[:, :, :2] = torch.nan
    prediction = pixel_task(encoder).predict(encoder.embed(image_batch(values)))
    assert not prediction.valid[:, :, :2].any()
    assert prediction.valid[:, :, 2:].all()
    assert torch.isfinite(prediction.values).all()


def test_several_classes_at_once(encoder, generator):
    batch = batch_of(generator, rows=16, level="place").without("label")
    truth = torch.stack([batch.raster("image").values[:, 0].mean((1, 2)) > c for c in (0.2, 0.7)], 1)[:, :, None, None]
    batch = batch.adding(label=label_raster(truth, 60.0, names=("wet", "green")))
    task = build("place", encoder=encoder, classes=("wet", "green"), multilabel=True)
    fit(task, encoder, batch, generator)
    metrics = task.metrics()
    assert {f"multilabel_{name}" for name in metrics} <= set(DEFINITIONS)
    for metric in metrics.values():
        metric.update(*task.pairs(task.predict(encoder.embed(batch)), batch))
        assert metric.compute() > 0.95


def test_metrics_by_hand_and_fresh_each_time(encoder):
    task = pixel_task(encoder)
    truth = torch.tensor([0, 0, 0, 1])
    p = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), 3).float()
    values = {}
    for name, metric in task.metrics().items():
        metric.update(p, truth)
        values[name] = float(metric.compute())
    assert values["accuracy"] == pytest.approx(3 / 4)
    assert values["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)  # the third class occurs nowhere
    assert values["weighted_f1"] == pytest.approx(3 / 4 * 4 / 5 + 1 / 4 * 2 / 3)
    assert values["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert set(values) <= set(DEFINITIONS)
    wrong = torch.nn.functional.one_hot(torch.tensor([1, 1, 1, 0]), 3).float()
    for metric in task.metrics().values():
        metric.update(wrong, truth)
        assert metric.compute() == 0, "metrics of an earlier call must not leak into fresh ones"
        metric.reset()
        metric.update(p, truth)
        assert metric.compute() > 0.5


def test_a_task_is_rebuilt_from_its_config(encoder, generator):
    task = pixel_task(encoder, loss="ce+dice", weight=[1, 2, 3], smoothing=0.1, local=["image"])
    again = build(encoder=encoder, **json.loads(json.dumps(task.config)))
    again.load_state_dict(task.state_dict())
    batch = batch_of(generator)
    losses = [t(encoder, batch, generator)["loss"] for t in (task, again)]
    torch.testing.assert_close(*losses)
    assert find("tasks", "classify/place")[0].build is build


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gsd_m": None}, "needs gsd_m"),
        ({"gsd_m": 15.0}, "not a multiple"),
        ({"local": ["radar"]}, "no input of the encoder"),
        ({"weight": [1.0]}, "1 values for 3 classes"),
        ({"loss": "bce"}, "does not fit multilabel=False"),
        ({"classes": ["one"]}, "at least 2"),
        ({"head": "nrm"}, "Did you mean norm"),
        ({"loss_options": {"gamma": 2.0}}, "takes no option 'gamma'"),
        ({"variant": "pixels"}, "Did you mean pixel"),
    ],
)
def test_options_that_do_not_fit_are_refused(encoder, options, message):
    given = {"variant": "pixel", "encoder": encoder, "classes": CLASSES, "gsd_m": 10.0, "token_size_m": 20.0}
    with pytest.raises((ValueError, LookupError, TypeError), match=message):
        build(**{**given, **options})


def test_tokens_of_another_size_are_refused(generator):
    task = pixel_task(SquareEncoder(20.0))
    with pytest.raises(ValueError, match="tokens are 30-30 m wide"):
        task.predict(SquareEncoder(30.0).embed(batch_of(generator)))


def test_a_place_without_observation_is_not_scored(encoder, generator):
    batch = batch_of(generator, rows=3, level="place")
    unseen = batch.adding(image=batch.raster("image").obs(torch.tensor([0, 2])))
    task = build("place", encoder=encoder, classes=CLASSES)
    p, truth = task.pairs(task.predict(encoder.embed(unseen)), unseen)
    assert len(p) == len(truth) == 2
    assert isinstance(unseen.places[1], Place)

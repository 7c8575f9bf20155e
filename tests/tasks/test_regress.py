"""Regression: physical units outside, standardised inside; metrics by their formulas."""

from __future__ import annotations

import json

import pytest
import torch
from simple_encoder import SquareEncoder, image_batch

from everysat.sensors import Band, Sensor
from everysat.tasks.regress import DEFINITIONS, build
from everysat.types import Raster

HEIGHT = Sensor("canopy", "terrain", (Band("height", 10, "m"), Band("biomass", 10, "mm")), "made for tests")


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SquareEncoder()


def batch_of(generator, valid=None):
    values = torch.rand(2, 2, 6, 6, generator=generator)
    truth = torch.stack([30 * values[:, 0] + 5, 1000 - 200 * values[:, 1]], 1)
    raster = Raster.of(HEIGHT, truth, 10.0, valid=valid)
    label = Raster(HEIGHT, raster.values, raster.valid, raster.time_s, torch.arange(2), 10.0)
    return image_batch(values).adding(label=label)


def test_learns_in_physical_units(encoder, generator):
    batch = batch_of(generator)
    task = build(
        encoder=encoder, bands=HEIGHT, mean=[20, 900], std=[9, 60], gsd_m=10.0, token_size_m=20.0, head="linear"
    )
    optimiser = torch.optim.AdamW([*task.parameters(), *encoder.parameters()], lr=0.05)
    for _ in range(400):
        loss = task(encoder, batch, generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    metrics = task.metrics()
    assert set(metrics) == set(DEFINITIONS)
    pairs = task.pairs(task.predict(encoder.embed(batch)), batch)
    for metric in metrics.values():
        metric.update(*pairs)
    assert metrics["r2"].compute() > 0.99
    error = pairs[0] - pairs[1]
    assert metrics["rmse"].compute() == pytest.approx(float((error**2).mean().sqrt()), rel=1e-4)
    assert metrics["mae"].compute() == pytest.approx(float(error.abs().mean()), rel=1e-4)


def test_a_band_labelled_alone_counts_alone(encoder, generator):
    valid = torch.zeros(2, 2, 6, 6, dtype=torch.bool)
    valid[:, 0] = True
    batch = batch_of(generator, valid)
    task = build(encoder=encoder, bands=HEIGHT, gsd_m=10.0, token_size_m=20.0)
    predicted, truth = task.pairs(task.predict(encoder.embed(batch)), batch)
    assert len(truth) == 72
    torch.testing.assert_close(truth, batch.raster("label").values[:, 0].flatten())
    wild = batch.adding(
        label=Raster(HEIGHT, torch.where(valid, batch.raster("label").values, 1e9), valid, *_rest(batch))
    )
    torch.testing.assert_close(task(encoder, wild, generator)["loss"], task(encoder, batch, generator)["loss"])
    assert len(predicted) == 72


def _rest(batch):
    label = batch.raster("label")
    return label.time_s, label.row, label.gsd_m


def test_places(encoder, generator):
    batch = batch_of(generator)
    whole = batch.raster("label").values.mean((2, 3), keepdim=True)
    label = Raster(HEIGHT, whole, torch.ones_like(whole, dtype=torch.bool), *_rest(batch)[:2], 60.0)
    task = build("place", encoder=encoder, bands=HEIGHT, loss="huber", loss_options={"delta": 2.0})
    assert torch.isfinite(task(encoder, batch.adding(label=label), generator)["loss"])
    assert task.predict(encoder.embed(batch)).values.shape == (2, 2, 1, 1)


def test_rebuilt_from_config_with_bands_of_a_known_sensor(encoder):
    task = build(
        encoder=encoder, bands=["B04"], sensor="sentinel-2-l1c", gsd_m=10.0, token_size_m=20.0, mean=[0.1], std=[0.2]
    )
    again = build(encoder=encoder, **json.loads(json.dumps(task.config)))
    again.load_state_dict(task.state_dict())
    assert again.sensor == task.sensor
    assert again.config == task.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [1.0]}, "1 values for 2 bands"),
        ({"std": [1.0, 0.0]}, "must be positive"),
        ({"loss": "ce"}, "none of mse, huber"),
        ({"bands": ["height"]}, "say of which sensor"),
    ],
)
def test_options_that_do_not_fit_are_refused(encoder, options, message):
    given = {"encoder": encoder, "bands": HEIGHT, "gsd_m": 10.0, "token_size_m": 20.0}
    with pytest.raises((ValueError, LookupError), match=message):
        build(**{**given, **options})

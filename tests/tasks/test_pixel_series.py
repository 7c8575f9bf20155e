"""Pixels classified by their time series: classes that differ in when, not in how much, on dates that differ from place to place."""

from __future__ import annotations

import math

import pytest
import torch
from simple_encoder import label_raster

from everysat.models import anysat, omnisat
from everysat.tasks.classify import build
from everysat.types import Batch, Place, Raster

START_S = 1577836800.0  # 2020-01-01
TABLE = {
    "name": "synthetic-two",
    "kind": "optical",
    "source": "synthetic",
    "bands": [{"name": name, "gsd_m": 10, "unit": "reflectance"} for name in ("one", "two")],
}
S2 = {
    "sensor": TABLE,
    "bands": ["one", "two"],
    "gsd_m": 10.0,
    "projector": "series",
    "mean": [0.5, 0.5],
    "std": [0.2, 0.2],
}
SIZES = {"grid": 4, "depth": 1, "heads": 4, "dropout": 0.0}
MODELS = {
    "omnisat, a token a pixel": lambda: omnisat.build(
        "", patch_m=10.0, dim=32, drop_path=0.0, skip=True, modalities={"series": S2}, **SIZES
    ),
    "anysat, sub-patches of a pixel": lambda: anysat.build(
        "", patch_m=20.0, dim=64, output="dense", dense="series", modalities={"series": {**S2, "pixels": 1}}, **SIZES
    ),
}


def place(encoder, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(2, (4, 4), generator=g)
    day = (365 * torch.rand(10, generator=g, dtype=torch.float64)).sort().values
    course = torch.cos(2 * math.pi * (day[:, None, None] / 365 - 0.5 * kind)).float()
    values = 0.5 + torch.stack([0.25 * course, 0.1 * course], 1) + 0.03 * torch.randn(10, 2, 4, 4, generator=g)
    time_s = START_S + 86400 * torch.stack([day, day + 1], 1)
    raster = Raster.of(encoder.inputs["series"].sensor, values, 10.0, time_s=time_s)
    return Batch((Place(40.0, 40.0),), {"series": raster, "label": label_raster(kind[None, None], 10.0)})


@pytest.mark.parametrize("name", MODELS)
def test_the_time_of_a_course_tells_the_class_of_a_pixel(name, generator):
    torch.manual_seed(0)
    encoder = MODELS[name]()
    task = build("pixel", encoder=encoder, classes=["winter", "summer"], gsd_m=10.0, token_size_m=10.0)
    places = [place(encoder, seed) for seed in range(24)]
    held = Batch.cat([place(encoder, seed) for seed in range(100, 108)])
    values = held.raster("series").values
    assert abs(float(values.mean()) - 0.5) < 0.05  # no class is brighter
    optimiser = torch.optim.AdamW([*task.parameters(), *encoder.parameters()], lr=3e-3)
    encoder.train()
    for _ in range(50):
        some = torch.randperm(24, generator=generator)[:6].tolist()
        loss = task(encoder, Batch.cat([places[i] for i in some]), generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    p, truth = task.pairs(task.predict(encoder.embed(held)), held)
    assert len(truth) == 8 * 16
    assert float((p.argmax(1) == truth).float().mean()) > 0.95
    still = held.adding(series=held.raster("series").obs(torch.arange(len(held.raster("series").row)).flip(0)))
    torch.testing.assert_close(task.predict(encoder.embed(still)).values, task.predict(encoder.embed(held)).values)

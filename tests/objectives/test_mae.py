"""Masked reconstruction: what is hidden, what counts, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import plain_ramen
from everysat import sensors
from everysat.models import ramen
from everysat.nn.draws import uniform
from everysat.nn.ragged import ordinal
from everysat.objectives import mae
from everysat.types import Batch, Place, Raster

DAY_S = 86400.0
OPTIONS = {"dim": 32, "depth": 1, "heads": 2}


@pytest.fixture
def encoder() -> ramen.Ramen:
    torch.manual_seed(0)
    return ramen.build("nano", gsd_m=40.0)


def batch(places: int = 2, dates: int = 3, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(places):
        days = (18000 + torch.randperm(300, generator=g)[:dates]).double() * DAY_S
        y = torch.linspace(0, 1, 32).view(1, 1, 32, 1).expand(dates, 3, 32, 32)
        level = torch.rand(1, 1, 1, 1, generator=g)
        s2 = Raster.of(
            sensors.get("sentinel-2-l2a").select(["B02", "B03", "B04"]),
            y * level + 0.1 * torch.randn(dates, 3, 32, 32, generator=g),
            10.0,
            time_s=torch.stack([days, days + DAY_S], 1),
        )
        s1 = Raster.of(
            sensors.get("sentinel-1-asc").select(["VV", "VH"]), torch.randn(1, 2, 16, 16, generator=g) * 5 - 15, 20.0
        )
        parts.append(Batch((Place(320.0, 320.0),), {"s2": s2, "s1": s1}))
    return Batch.cat(parts)


def test_a_quarter_is_shown_and_losses_are_finite(encoder) -> None:
    task = mae.build(encoder=encoder, subsets=False, **OPTIONS)
    view = encoder.at(skip=False, output="layer")
    tokens = view.tokenize(batch())
    keep = task.kept(tokens, torch.rand(len(tokens)))
    assert torch.bincount(tokens.coords.row[keep]).tolist() == [32, 32]  # of 64 + 64 cells of each place
    terms = task(encoder, batch(), torch.Generator().manual_seed(0))
    assert {"loss", "s2", "s1", "gsd_m"} == set(terms)
    assert all(torch.isfinite(v) for v in terms.values())
    torch.testing.assert_close(terms["loss"], terms["s2"] + terms["s1"])


def test_losses_in_reduced_precision_are_near(encoder) -> None:
    task = mae.build(encoder=encoder, subsets=False, **OPTIONS).eval()
    encoder.eval()
    exact = task(encoder, batch(), torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rough = task(encoder, batch(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(rough["loss"].float(), exact["loss"], rtol=0.05, atol=0.05)
    rough["loss"].backward()


def test_gradients_reach_every_parameter_of_the_decoder(encoder) -> None:
    dem = Raster.of(sensors.get("copernicus-dem"), torch.rand(1, 1, 8, 8), 40.0)
    task = mae.build(encoder=encoder, subsets=False, **OPTIONS)
    one = batch(1).adding(dem=dem)
    task(encoder, one, torch.Generator().manual_seed(0))["loss"].backward()
    assert not [n for n, p in task.named_parameters() if p.grad is None]


def test_invalid_values_and_blind_dates_change_nothing(encoder) -> None:
    task = mae.build(encoder=encoder, subsets=False, **OPTIONS).eval()
    encoder.eval()
    before = batch()
    s2 = before.raster("s2")
    valid = torch.rand(s2.values.shape[0], 1, 32, 32, generator=torch.Generator().manual_seed(5)) > 0.3
    s2 = replace(s2, valid=valid.expand_as(s2.values))
    blind = replace(s2, valid=torch.zeros_like(s2.valid)).obs(torch.arange(1))
    loss = task(encoder, before.adding(s2=s2), torch.Generator().manual_seed(1))["loss"]
    for changed in (replace(s2, values=torch.where(s2.valid, s2.values, 1e6)), Raster._cat([s2, blind], [0, 0])):
        torch.testing.assert_close(
            task(encoder, before.adding(s2=changed), torch.Generator().manual_seed(1))["loss"], loss
        )


def test_a_place_draws_the_same_whatever_batch_it_is_in(encoder) -> None:
    both = batch(2)
    tokens = encoder.at(skip=False, output="layer").tokenize(both)
    noise = uniform(torch.Generator().manual_seed(0), tokens.coords.row, ordinal(tokens.coords.row, 2))
    alone = encoder.at(skip=False, output="layer").tokenize(both[1])
    again = uniform(torch.Generator().manual_seed(0), alone.coords.row + 1, ordinal(alone.coords.row, 1))
    task = mae.build(encoder=encoder, **OPTIONS)
    assert torch.equal(task.kept(tokens, noise)[tokens.coords.row == 1], task.kept(alone, again))


def test_steps_draw_sizes_and_subsets(encoder) -> None:
    task = mae.build(encoder=encoder, gsd_m=[40.0, 80.0], **OPTIONS)
    drawn = [task(encoder, batch(1), torch.Generator().manual_seed(s)) for s in range(12)]
    assert {float(t["gsd_m"]) for t in drawn} == {40.0, 80.0}
    assert len({frozenset(set(t) & {"s1", "s2"}) for t in drawn}) == 3


def test_values_are_those_of_the_plain_formulation(encoder) -> None:
    task = mae.build(encoder=encoder, subsets=False, **OPTIONS).eval()
    view = encoder.at(skip=False, output="layer", antialias=False)
    tokens = view.tokenize(batch(1, dates=1).only("s1"))
    keep = torch.zeros(len(tokens), dtype=torch.bool)
    keep[:5] = True
    with torch.no_grad():
        z = task.decoder(view(tokens[keep]), tokens, keep)
        found, hidden = task.reconstructed(view, tokens, "s1", z, keep, torch.ones_like(keep))
        image = z.view(1, 8, 8, -1).permute(0, 3, 1, 2)
        sensor = tokens.memo["seen"]["s1"].raster.sensor
        expected = plain_ramen.values(task.decoder.bands, task.decoder.scale, sensor, image, 2.0, 16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert int(hidden[0, 0].sum()) == 59 * 4


def test_it_learns(encoder) -> None:
    task = mae.build(encoder=encoder, gsd_m=[40.0, 80.0], **OPTIONS)
    both = torch.nn.ModuleList([encoder, task]).train()
    optimiser = torch.optim.AdamW(both.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss = task(encoder, batch(4, seed=step % 5).only("s2"), torch.Generator().manual_seed(step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10]), losses


def test_bad_options_are_named(encoder) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio=1\.0"):
        mae.build(encoder=encoder, mask_ratio=1.0, **OPTIONS)
    with pytest.raises(ValueError, match="targets='both'"):
        mae.build(encoder=encoder, targets="both", **OPTIONS)
    task = mae.build(encoder=encoder, gsd_m={"a": [40.0]}, **OPTIONS)
    with pytest.raises(LookupError, match="gsd_m lists a, but a batch comes from 'b'"):
        task(encoder, replace(batch(1), source="b"), torch.Generator())
    dem = Raster.of(sensors.get("copernicus-dem"), torch.rand(1, 1, 8, 8), 40.0)
    one = mae.build(encoder=encoder, targets="pixel", **OPTIONS)
    with pytest.raises(ValueError, match="has one; use targets='band'"):
        one(encoder, Batch((Place(320.0, 320.0),), {"dem": dem}), torch.Generator())


def test_bands_that_are_not_shown_are_asked_for(encoder) -> None:
    task = mae.build(encoder=encoder, subsets=False, band_ratio=0.5, **OPTIONS).eval()
    encoder.eval()
    one = batch(1)
    s2 = one.raster("s2")
    changed = {}
    for band in range(3):
        values = s2.values.clone()
        values[:, band] += 10.0
        changed[band] = replace(s2, values=values)
    losses = [
        task(encoder, one.adding(s2=c).only("s2"), torch.Generator().manual_seed(2))["loss"].item()
        for c in changed.values()
    ]
    assert len({round(x, 4) for x in losses}) == 3  # every band counts, shown or not
    shown = task._fewer_bands(one, torch.Generator().manual_seed(2))
    assert len(shown.raster("s2").sensor.bands) == 2
    assert len(shown.raster("s1").sensor.bands) == 1

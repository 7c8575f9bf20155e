"""Pre-training on hidden values: what is hidden stays hidden, draws are by place, and values are learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everysat import sensors
from everysat.models import atomizer, omnisat
from everysat.objectives import values
from everysat.types import Batch, Place, Raster

DAY_S = 86400.0


def scene(generator, side_m=80.0) -> Batch:
    layers = {}
    for name, sensor, bands, gsd_m, dates in (
        ("s2", "sentinel-2-l2a", ("B02", "B03", "B04"), 10.0, 2),
        ("s1", "sentinel-1-asc", ("VV", "VH"), 20.0, 1),
    ):
        px = round(side_m / gsd_m)
        image = torch.randn(dates, len(bands), px, px, generator=generator)
        days = 18000 + 40 * torch.arange(dates)
        times = torch.stack([days, days + 1], 1).double() * DAY_S
        layers[name] = Raster.of(sensors.get(sensor).select(bands), image, gsd_m, time_s=times)
    return Batch((Place(side_m, side_m),), layers)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return atomizer.build("nano")


def draw(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gradients_reach_all_of_encoder_and_objective(encoder, generator) -> None:
    objective = values.build(encoder=encoder)
    terms = objective(encoder, Batch.cat([scene(generator), scene(generator)]), draw())
    terms["loss"].backward()
    silent = [n for part in (encoder, objective) for n, p in part.named_parameters() if p.grad is None]
    assert not silent
    assert set(terms) == {"loss", "explained"}


@pytest.mark.parametrize("unit", values.UNITS)
def test_what_is_hidden_together(encoder, generator, unit) -> None:
    batch = Batch.cat([scene(generator, 160.0) for _ in range(6)])
    tokens = encoder.tokenize(batch)
    objective = values.build(encoder=encoder, units=[unit], hide=0.5)
    hidden = objective.hidden(tokens, encoder, draw())
    assert 0.3 < hidden.float().mean() < 0.7
    coords = tokens.coords
    member = {
        "value": torch.arange(len(tokens))[:, None],
        "cell": torch.floor(coords.at_m / 20.0),
        "band": coords.group[:, None],
        "date": coords.time_s[:, :1],
    }[unit]
    key = torch.cat([coords.row[:, None], member], 1).double()
    _, number = torch.unique(key, dim=0, return_inverse=True)
    share = torch.zeros(int(number.max()) + 1).index_add(0, number, hidden.float()) / torch.bincount(number)
    assert ((share == 0) | (share == 1)).all()
    assert 0 < share.mean() < 1


def test_places_draw_by_their_number(encoder, generator) -> None:
    objective = values.build(encoder=encoder)
    places = [scene(generator) for _ in range(3)]
    both = objective.hidden(encoder.tokenize(Batch.cat(places)), encoder, draw())
    apart = [objective.hidden(encoder.tokenize(p), encoder, draw(), first) for first, p in enumerate(places)]
    assert torch.equal(both, torch.cat(apart))


def test_hidden_values_have_no_effect_on_what_is_said(encoder, generator) -> None:
    objective = values.build(encoder=encoder, units=["value"]).eval()
    tokens = encoder.tokenize(scene(generator))
    hidden = objective.hidden(tokens, encoder, draw())
    said = []
    for x in (tokens.x, torch.where(hidden[:, None], 100.0, tokens.x)):
        changed = replace(tokens, x=x)
        features, latents = encoder.encoded(changed, hidden=hidden)
        said.append(objective.predict(encoder, changed[hidden], features, latents))
    assert torch.equal(*said)


def test_the_encoder_reads_what_is_not_hidden(encoder, generator) -> None:
    read = []
    encoder.crosses[0].register_forward_pre_hook(lambda _, given: read.append(len(given[1])))
    batch, objective = scene(generator), values.build(encoder=encoder)
    objective(encoder, batch, draw(3))
    hidden = objective.hidden(encoder.tokenize(batch), encoder, draw(3))
    assert read == [int((~hidden).sum())]
    assert hidden.any()


def test_it_learns_values_that_follow_from_others(encoder, generator) -> None:
    """Bands that are equal: a hidden one is what the others of its pixel are."""
    torch.manual_seed(0)
    batch = scene(generator).only("s2")
    layer = batch.raster("s2")
    smooth = torch.nn.functional.interpolate(torch.randn(1, 1, 3, 3, generator=generator), 8, mode="bilinear")
    batch = batch.adding(s2=replace(layer, values=smooth.expand_as(layer.values).clone()))
    objective = values.build(encoder=encoder, units=["value"], hide=0.5)
    parameters = [*encoder.parameters(), *objective.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    found = []
    for step in range(80):
        terms = objective(encoder, batch, draw(step))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        found.append(float(terms["explained"]))
    assert sum(found[-10:]) / 10 > 0.6
    assert sum(found[:5]) / 5 < 0.3


def test_a_place_of_which_nothing_is_seen(encoder, generator) -> None:
    batch = Batch.cat([Batch((Place(80.0, 80.0),)), scene(generator)])
    objective = values.build(encoder=encoder)
    assert torch.isfinite(objective(encoder, batch, draw())["loss"])
    nothing = objective(encoder, Batch((Place(80.0, 80.0),)), draw())["loss"]
    assert nothing == 0


def test_a_model_without_read_out_learns_too(generator) -> None:
    encoder = atomizer.build("nano", dense=False, local=False)
    terms = values.build(encoder=encoder, queries=10)(encoder, scene(generator), draw())
    terms["loss"].backward()
    assert encoder.latents.grad is not None


def test_a_step_draws_the_side_of_the_cells(encoder, generator) -> None:
    objective = values.build(encoder=encoder, token_m=[20.0, 40.0])
    sides = set()
    encoder.read_out.register_forward_pre_hook(lambda _, given: sides.add(len(given[0])))
    for seed in range(8):
        objective(encoder, scene(generator), draw(seed))
    assert sides == {16, 4}


def test_bad_options_are_refused(encoder) -> None:
    with pytest.raises(ValueError, match=r"hide=1\.0 must be between"):
        values.build(encoder=encoder, hide=1.0)
    with pytest.raises(ValueError, match="units=\\['pixel'\\] must name"):
        values.build(encoder=encoder, units=["pixel"])
    with pytest.raises(ValueError, match="not 'omnisat'"):
        values.build(encoder=omnisat.build("tiny"))
    with pytest.raises(ValueError, match="token_m="):
        values.build(encoder=encoder, token_m=[0.0])
    with pytest.raises(LookupError, match="no variants"):
        values.build("x", encoder=encoder)

"""Baselines: what they say of a pixel, validity, and that nothing in them is learned."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import uniform_filter
from simple_encoder import SENSOR, SquareEncoder, image_batch

from everysat.baselines import Bands, PlaceStatistics, RandomConvolutions, Series, Statistics, reinitialised
from everysat.types import Batch, Place, Raster

MAKERS = {
    "bands": lambda batch: Bands(10.0),
    "statistics": lambda batch: Statistics(10.0, (30.0, 50.0)),
    "convolutions": lambda batch: RandomConvolutions(10.0, filters=8, side=3, pool_m=30.0).fit(
        batch, torch.Generator().manual_seed(0)
    ),
}


@pytest.fixture
def batch(generator):
    made = image_batch(torch.rand(2, 2, 12, 18, generator=generator))
    coarse = image_batch(torch.rand(2, 2, 2, 3, generator=generator), 60.0).raster("image")
    return made.adding(coarse=coarse)


def test_bands_of_all_layers_on_one_grid(batch):
    x = Bands(10.0)(batch)
    assert x.shape == (2, 4, 12, 18)
    assert torch.equal(x[:, :2], batch.raster("image").values)
    torch.testing.assert_close(x[:, 2:, ::6, ::6], batch.raster("coarse").values)
    assert torch.equal(Bands(10.0, ("image",))(batch), x[:, :2])


def test_statistics_equal_a_box_filter_inside(batch):
    x = Statistics(10.0, (30.0,), ("image",))(batch)
    band = batch.raster("image").values[1, 0].numpy().astype("float64")
    mean = uniform_filter(band, 3)
    std = (uniform_filter(band**2, 3) - mean**2) ** 0.5
    inside = (slice(1, -1), slice(1, -1))
    torch.testing.assert_close(x[1, 2][inside].double(), torch.tensor(mean[inside]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[1, 4][inside].double(), torch.tensor(std[inside]), atol=1e-4, rtol=0)


def test_statistics_do_not_lose_digits_of_large_values(batch):
    raster = batch.raster("image")
    far = Raster(SENSOR, raster.values + 3000, raster.valid, raster.time_s, raster.row, 10.0)
    near, moved = (Statistics(10.0, (50.0,), ("image",))(b)[:, 4:] for b in (batch, batch.adding(image=far)))
    torch.testing.assert_close(near, moved, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", [*MAKERS])
def test_invalid_pixels_have_no_effect_and_no_features(batch, name, generator):
    raster = batch.raster("image")
    valid = raster.valid.clone()
    valid[:, :, 4:7, :5] = False
    valid[0, 1, 9, 9] = False
    results = []
    for fill in (0.0, 1e4):
        values = torch.where(valid, raster.values, fill)
        spoilt = batch.only().adding(image=Raster(SENSOR, values, valid, raster.time_s, raster.row, 10.0))
        results.append(MAKERS[name](spoilt)(spoilt))
    assert torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))
    assert torch.isnan(results[0][:, :, 4:7, :5]).all()
    assert torch.isfinite(results[0][0, :, 9, 9]).all()


@pytest.mark.parametrize("name", ["bands", "statistics"])
def test_two_places_equal_one_by_one(batch, name):
    maker = MAKERS[name](batch)
    torch.testing.assert_close(maker(batch), torch.cat([maker(batch[0]), maker(batch[1])]))


def test_convolutions_depend_on_the_generator_alone(batch):
    one, same, other = (
        RandomConvolutions(10.0, filters=4, side=3).fit(batch, torch.Generator().manual_seed(s))(batch)
        for s in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (2, 8, 12, 18)
    assert (one >= 0).all()


def test_convolutions_tell_textures_apart_that_pixels_do_not(generator):
    """Horizontal and vertical stripes: single pixels say nothing, both classes have the same distribution."""
    stripes = (torch.arange(24) % 2).float()
    halves = torch.cat([stripes[:, None].expand(24, 24), stripes[None].expand(24, 24)], 1)
    batch = image_batch(torch.stack([halves, halves])[None])
    x = RandomConvolutions(10.0, filters=16, side=3, pool_m=50.0).fit(batch, generator)(batch)[0]
    left, right = x[:, 4:-4, 4:20].flatten(1), x[:, 4:-4, 28:44].flatten(1)
    gap = (left.mean(1) - right.mean(1)).abs() / (left.std(1) + right.std(1) + 1e-6)
    assert gap.max() > 3


def test_unfitted_or_even_sided_filters_are_refused(batch):
    with pytest.raises(ValueError, match=r"call fit\(batch, generator\) first"):
        RandomConvolutions(10.0)(batch)
    with pytest.raises(ValueError, match="side=4 odd"):
        RandomConvolutions(10.0, side=4)
    with pytest.raises(ValueError, match="no observed patch of 31 x 31"):
        RandomConvolutions(10.0, side=31).fit(batch, torch.Generator())


def test_a_reinitialised_twin_shares_nothing_but_the_architecture(generator):
    encoder = SquareEncoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (reinitialised(encoder, torch.Generator().manual_seed(s)) for s in (0, 0))
    other = reinitialised(encoder, torch.Generator().manual_seed(1))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert torch.equal(one.proj.weight, two.proj.weight)
    assert not torch.equal(one.proj.weight, encoder.proj.weight)
    assert not torch.equal(one.proj.weight, other.proj.weight)
    assert torch.equal(torch.get_rng_state(), state)


DAY_S = 86400.0


def _series(days: list[int], values: torch.Tensor, valid: torch.Tensor | None = None) -> Batch:
    time_s = torch.tensor([[day * DAY_S, (day + 1) * DAY_S] for day in days], dtype=torch.float64)
    valid = torch.ones(values.shape, dtype=torch.bool) if valid is None else valid
    layer = Raster(SENSOR, values, valid, time_s, torch.zeros(len(days), dtype=torch.int64), 10.0)
    return Batch((Place(10.0 * values.shape[2], 10.0 * values.shape[3]),), {"s2": layer})


def test_place_statistics_equal_numpy_on_what_was_seen(generator):
    values = torch.rand(6, 2, 3, 4, generator=generator)
    valid = torch.rand(values.shape, generator=generator) > 0.4
    found = PlaceStatistics()(_series([*range(6)], values, valid)).view(2, 5)
    for band in range(2):
        seen = values[:, band][valid[:, band]].double()
        expected = [seen.mean(), seen.std(correction=0), *(seen.quantile(q) for q in (0.1, 0.5, 0.9))]
        torch.testing.assert_close(found[band].double(), torch.stack(expected), atol=1e-6, rtol=0)


def test_a_table_of_a_series_has_the_mean_of_each_part_of_its_time(generator):
    values = torch.rand(4, 2, 1, 1, generator=generator)
    found = Series(steps=2)(_series([0, 10, 60, 99], values))
    means = torch.cat([values[:2].mean(0).flatten(), values[2:].mean(0).flatten()])
    torch.testing.assert_close(found[0, :4], means)
    angle = torch.tensor(50 / 365.25 * 2 * torch.pi)
    torch.testing.assert_close(found[0, 4:], torch.stack([angle.sin(), angle.cos()]))


@pytest.mark.parametrize("make", [PlaceStatistics(), Series(steps=3), Series(steps=3, position=True)])
def test_vectors_of_places_together_equal_each_alone(make, generator):
    places = [_series([*range(n)], torch.rand(n, 2, 2, 2, generator=generator)) for n in (5, 1, 3)]
    unseen = _series([0, 7], torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, 2, dtype=torch.bool))
    together = make(Batch.cat([*places, unseen]))
    alone = torch.cat([make(place) for place in [*places, unseen]])
    torch.testing.assert_close(together, alone, equal_nan=True)
    assert together[3, :6].isnan().all()

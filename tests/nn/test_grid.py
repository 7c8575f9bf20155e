"""Layers on another grid: values are repeated or averaged, never invented; invalid pixels have no effect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simple_encoder import SENSOR

from everysat.nn.grid import grid_shape, on_grid
from everysat.types import Place, Raster


def raster(values, gsd_m, valid=None, row=None):
    made = Raster.of(SENSOR, values, gsd_m, valid=valid)
    row = torch.zeros(len(values), dtype=torch.long) if row is None else row
    return Raster(SENSOR, made.values, made.valid, made.time_s, row, gsd_m)


def test_finer_repeats_and_coarser_averages_back(generator):
    values = torch.rand(1, 2, 3, 4, generator=generator)
    fine, seen = on_grid(raster(values, 60.0), 1, 10.0, 18, 24)
    torch.testing.assert_close(fine, values.repeat_interleave(6, 2).repeat_interleave(6, 3))
    assert seen.all()
    back, _ = on_grid(raster(fine, 10.0), 1, 60.0, 3, 4)
    torch.testing.assert_close(back, values)


@pytest.mark.parametrize("gsd_m", [10.0, 25.0, 30.0])
def test_dates_and_pixels_are_averaged_over_the_valid_ones_alone(generator, gsd_m):
    values = torch.rand(3, 2, 6, 6, generator=generator)
    valid = torch.rand(3, 2, 6, 6, generator=generator) > 0.3
    row = torch.tensor([0, 1, 0])
    results = [
        on_grid(raster(torch.where(valid, values, fill), 10.0, valid, row), 2, gsd_m, 2, 2) for fill in (0.0, 9.0)
    ]
    torch.testing.assert_close(*results)
    if gsd_m == 30.0:
        means = torch.where(valid, values, 0)[[0, 2]].sum(0) / valid[[0, 2]].sum(0).clamp(min=1)
        ever = valid[[0, 2]].any(0)
        expected = (means * ever)[:, :3, 3:].sum((1, 2)) / ever[:, :3, 3:].sum((1, 2))
        torch.testing.assert_close(results[0][0][0, :, 0, 1], expected)


@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([5.0, 10.0, 15.0, 20.0, 60.0]))
@settings(max_examples=25, deadline=None)
def test_a_constant_stays_constant_and_beyond_is_invalid(height, width, gsd_m):
    values, seen = on_grid(raster(torch.full((1, 2, height, width), 3.0), 10.0), 1, gsd_m, 20, 20)
    assert (values[seen] == 3).all()
    assert not seen[:, :, int(height * 10 / gsd_m) + 1 :].any()
    assert seen[:, :, 0, 0].all()


def test_grid_shape_holds_the_largest_place():
    assert grid_shape((Place(60, 61), Place(30, 20)), 10.0) == (6, 7)


def test_a_finer_pixel_takes_the_value_at_its_centre():
    ramp = torch.arange(3.0).view(1, 1, 1, 3).expand(1, 2, 3, 3)
    values, _ = on_grid(raster(ramp, 60.0), 1, 40.0, 4, 4)  # centres at 20, 60, 100 and 140 m
    assert values[0, 0, 0].tolist() == [0, 1, 1, 2]

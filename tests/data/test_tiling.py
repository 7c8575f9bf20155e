"""Tiles cover a grid without overlap, parts share no block, and what was not observed goes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pyproj import Geod

from everysat.data.synthetic import build
from everysat.data.tiling import corners, observed, on_earth_m, part_of, pixels


def test_tiles_cover_the_grid_once():
    seen = np.zeros((13, 10), int)
    for row, column in corners((13, 10), 3, 3):
        seen[row : row + 3, column : column + 3] += 1
    assert (seen[:12, :9] == 1).all()
    assert seen[12:].sum() == seen[:, 9:].sum() == 0
    assert len(corners((13, 10), 3, 1)) == 11 * 8
    with pytest.raises(ValueError, match="does not fit into 13 x 10"):
        corners((13, 10), 11, 1)


def test_sizes_are_whole_pixels():
    assert pixels(300, 30, "tile_m") == 10
    for wrong in (310, 0, 5):
        with pytest.raises(ValueError, match=f"tile_m={wrong} must be a multiple of 30 m"):
            pixels(wrong, 30, "tile_m")


def test_parts_make_up_everything():
    xy_m = np.random.default_rng(0).uniform(0, 1e6, (200, 2))
    parts = [part_of(xy_m, name, 1e5, seed=3) for name in ("train", "val", "test")]
    assert sorted(i for part in parts for i in part) == list(range(200))
    assert part_of(xy_m, "", 1e5) == list(range(200))
    assert part_of(xy_m, "train", 1e5, seed=4) != parts[0]
    assert len(part_of(xy_m, "a", 1e5, {"a": 0.1, "b": 0.9})) < 60
    with pytest.raises(ValueError, match="Did you mean train"):
        part_of(xy_m, "trian", 1e5)


@pytest.mark.parametrize("lat", [-70.0, 0.0, 60.0])
def test_blocks_have_the_area_that_they_have_on_the_ellipsoid(lat):
    (west, south), (east, north) = on_earth_m(np.array([[0.0, lat], [0.5, lat + 0.5]]))
    along = np.linspace(0, 0.5, 50)
    lon, lats = np.concatenate([along, along[::-1]]), np.repeat([lat, lat + 0.5], 50)
    area, _ = Geod(ellps="WGS84").polygon_area_perimeter(lon, lats)
    assert (east - west) * (north - south) == pytest.approx(abs(area), rel=1e-4)


def spoiled(batch, *empty):
    """A place whose optical series has nothing valid at the dates ``empty``."""
    raster = batch.raster("optical")
    valid = raster.valid.clone()
    valid[list(empty)] = False
    return batch.adding(optical=replace(raster, valid=valid))


def test_dates_without_a_valid_value_go_and_the_rest_stays_in_order():
    batch = build(places=1, modalities={"optical": {"gsd_m": 10, "bands": 2, "dates": (6, 6)}})[0]
    times = batch.raster("optical").time_s
    kept = observed(spoiled(batch, 1, 4))
    assert torch.equal(kept.raster("optical").time_s, times[[0, 2, 3, 5]])
    assert set(kept.layers) == {"optical", "label"}
    assert "optical" not in observed(spoiled(batch, *range(6))).layers
    assert observed(batch).raster("optical") is batch.raster("optical")


def test_at_most_so_many_dates_of_those_observed():
    batch = spoiled(build(places=1, modalities={"optical": {"gsd_m": 10, "bands": 2, "dates": (9, 9)}})[0], 0)
    times = batch.raster("optical").time_s
    assert torch.equal(observed(batch, 4).raster("optical").time_s, times[[1, 3, 5, 7]])
    draws = [observed(batch, 4, np.random.default_rng(s)).raster("optical").time_s for s in range(5)]
    assert all(len(d) == 4 and (d[:, 0].diff() > 0).all() and (d[:, 0] > times[0, 0]).all() for d in draws)
    assert len({tuple(d[:, 0].tolist()) for d in draws}) > 1

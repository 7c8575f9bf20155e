"""Places of one pixel, and parts that share no group."""

from __future__ import annotations

import math

import numpy as np
import pytest

from everysat import sensors
from everysat.data import points


@pytest.mark.parametrize(("lon", "lat", "zone"), [(-110.6, 43.7, 32612), (36.8, -1.3, 32737), (6.0, 61.0, 32632)])
def test_a_pixel_holds_its_point_and_lies_on_the_grid(lon, lat, zone):
    place = points.pixel(lon, lat, 10)
    assert str(place.geobox.crs) == f"EPSG:{zone}"
    assert (place.height_m, place.width_m) == (10, 10)
    assert place.geobox.affine.c % 10 == place.geobox.affine.f % 10 == 0
    assert place.lonlat == pytest.approx((lon, lat), abs=8 / 111_000 / math.cos(math.radians(lat)))


def test_groups_are_held_out_whole_and_every_place_is_tested_once():
    groups = np.random.default_rng(0).choice([f"site {i}" for i in range(23)], 300)
    tested = []
    for fold in range(4):
        parts = {split: points.held_out(groups, split, fold, 4) for split in points.SPLITS}
        assert sorted(np.concatenate(list(parts.values()))) == list(range(300))
        sets = [set(groups[index]) for index in parts.values()]
        assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
        assert parts["val"].tolist() == points.held_out(groups, "test", (fold + 1) % 4, 4).tolist()
        tested += parts["test"].tolist()
    assert sorted(tested) == list(range(300)) == points.held_out(groups, "all", 0, 4).tolist()
    assert points.held_out(groups, "test", 0, 4, seed=1).tolist() != points.held_out(groups, "test", 0, 4).tolist()
    order = np.random.default_rng(1).permutation(300)
    moved = points.held_out(groups[order], "test", 0, 4)
    assert set(order[moved]) == set(points.held_out(groups, "test", 0, 4)), "the order of the rows does not matter"


def test_folds_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"folds=5 must be at least 3 and at most 4"):
        points.held_out(list("abcd"), "train", 0, 5)
    with pytest.raises(ValueError, match=r"fold=3 must be from 0 to 2"):
        points.held_out(list("abcd"), "train", 3, 3)
    with pytest.raises(LookupError, match="split='trian'"):
        points.held_out(list("abcd"), "trian", 0, 3)


def test_a_label_that_is_not_known_is_not_valid():
    known, unknown = (points.value("height", v, "m", 30, "someone") for v in (2.5, math.nan))
    assert known.values.item() == 2.5
    assert known.valid.all()
    assert not unknown.valid.any()
    assert known.gsd_m == 30


def test_a_layer_is_one_pixel_of_each_observation():
    numbers = np.array([[0.1, 0.2], [0.3, np.nan]])
    raster = points.layer(
        sensors.get("naip").select(["red", "nir"]), numbers, 10, valid=np.array([[True, False], [True, True]])
    )
    assert raster.values.shape == (2, 2, 1, 1)
    assert raster.valid.flatten().tolist() == [True, False, True, False]


def test_the_state_of_files_changes_with_them_and_names_what_is_missing(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"1")
    before = points.state(path)
    path.write_bytes(b"22")
    assert points.state(path) != before
    with pytest.raises(FileNotFoundError, match=r"b\.npy is missing"):
        points.state(path, tmp_path / "b.npy")

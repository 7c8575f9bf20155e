"""Flips and turns form the group of the square, layers stay on top of each other, and labels are never left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from odc.geo.geobox import GeoBox
from shapely.geometry import Point

from everysat.data.augment import Augment, crop, flip, random_crop, turn
from everysat.data.synthetic import build
from everysat.nn.draws import generator
from everysat.types import Batch, Place, Raster, Vector


def place(index=0, **options) -> Batch:
    batch = build(places=4, size_m=40.0, **options)[index]
    label = batch.raster("label")
    cells = [(y, x) for y in range(4) for x in range(4)]
    points = Vector(
        tuple(Point(10 * x + 5, 10 * y + 5) for y, x in cells),
        tuple({"class": int(label.values[0, 0, y, x])} for y, x in cells),
        torch.zeros(16, 2, dtype=torch.float64),
        torch.zeros(16, dtype=torch.int64),
    )
    box_of = GeoBox.from_bbox((500000, 4000000, 500040, 4000040), "EPSG:32632", resolution=10)
    return Batch((Place(40.0, 40.0, box_of),), {**batch.layers, "points": points})


def same(a: Batch, b: Batch) -> bool:
    rasters = all(
        torch.equal(a.raster(n).values, b.raster(n).values) and torch.equal(a.raster(n).valid, b.raster(n).valid)
        for n in a.layers
        if n != "points"
    )
    return (
        set(a.layers) == set(b.layers)
        and rasters
        and all(
            g.equals_exact(h, 1e-9)
            for g, h in zip(a.layers["points"].geometry, b.layers["points"].geometry, strict=True)
        )
    )


def agree(batch: Batch) -> bool:
    """Every point lies on the pixel of its class."""
    label, points = batch.raster("label").values[0, 0], batch.layers["points"]
    return all(
        label[int(g.y // 10), int(g.x // 10)] == a["class"]
        for g, a in zip(points.geometry, points.attributes, strict=True)
    )


def test_twice_flipped_and_four_times_turned_is_nothing_and_they_do_not_commute():
    batch = place()
    assert same(flip(flip(batch)), batch)
    assert same(turn(batch, 4), batch)
    assert same(turn(turn(batch, 1), 2), turn(batch, 3))
    assert same(flip(turn(batch, 1)), turn(flip(batch), 3))
    assert not same(flip(turn(batch, 1)), turn(flip(batch), 1))


@pytest.mark.parametrize(
    "change", [flip, *(lambda b, k=k: turn(b, k) for k in (1, 2, 3)), lambda b: crop(b, 20, 10, 20, 30)]
)
def test_geometries_and_rasters_move_together(change):
    moved = change(place())
    assert agree(moved)
    assert not same(moved, place())


def test_turning_a_rectangle_swaps_its_sides():
    wide = crop(place(), 0, 0, 20, 40)
    turned = turn(wide, 1)
    assert (turned.places[0].height_m, turned.places[0].width_m) == (40, 20)
    assert turned.raster("vhr").values.shape[-2:] == (16, 8)
    assert turned.places[0].geobox is None
    assert agree(turned)


def test_a_crop_keeps_its_place_on_the_ground():
    part = crop(place(), 10, 20, 20, 20)
    whole = place().places[0].geobox
    assert part.places[0].geobox == whole[1:3, 2:4]
    assert torch.equal(part.raster("vhr").values, place().raster("vhr").values[..., 4:12, 8:16])
    assert len(part.layers["points"].geometry) == 4


def test_random_crops_begin_on_pixels_of_every_layer_and_reach_every_corner():
    batch = place()
    crops = [random_crop(batch, 20, generator("crop", i)) for i in range(60)]
    assert all(agree(c) and c.width_m == 20 for c in crops)
    corners = {(c.places[0].geobox.boundingbox.left, c.places[0].geobox.boundingbox.top) for c in crops}
    assert len(corners) == 9
    with pytest.raises(ValueError, match=r"crop_m=50 is larger than the place, 40 x 40 m"):
        random_crop(batch, 50, generator("crop"))
    with pytest.raises(ValueError, match="cuts through pixels of 10 m of layer"):
        random_crop(batch, 15, generator("crop"))


def test_a_class_per_place_survives_everything():
    batch = place(label_gsd_m=10.0).adding(
        whole=replace(
            place().raster("label").obs(torch.tensor([0])),
            gsd_m=40.0,
            values=torch.ones(1, 1, 1, 1),
            valid=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        )
    )
    assert turn(flip(crop(batch, 0, 0, 20, 20)), 1).raster("whole").values.item() == 1


def test_a_layer_that_does_not_fill_the_place_is_not_turned():
    batch = place().adding(odd=Raster.of(place().raster("label").sensor, torch.zeros(1, 1, 3, 3), 20.0))
    with pytest.raises(ValueError, match="layer 'odd' covers 60 x 60 m of a place of 40 x 40 m"):
        flip(batch)


def test_draws_come_from_the_generator_alone():
    augment = Augment(flip=True, turn=True, crop_m=20, drop_dates=0.3, drop_bands=0.3, drop_layers=0.3)
    a, b = (augment(place(1), generator("same"), ("label",)) for _ in range(2))
    assert same(a, b)
    others = [augment(place(1), generator("other", i), ("label",)) for i in range(10)]
    assert not all(set(o.layers) == set(a.layers) and same(a, o) for o in others)


def test_off_by_default():
    assert same(Augment()(place(), generator("x")), place())


def test_dropping_keeps_labels_order_and_at_least_one_of_each():
    augment = Augment(drop_dates=0.9, drop_bands=0.9, drop_layers=0.9)
    for i in range(30):
        out = augment(place(i % 4), generator("drop", i), keep=("label",))
        assert torch.equal(out.raster("label").valid, place(i % 4).raster("label").valid)
        assert "points" in out.layers
        inputs = [n for n in out.layers if n not in ("label", "points")]
        assert inputs
        for name in inputs:
            raster = out.raster(name)
            assert raster.values.shape[0] >= 1
            assert raster.valid.any((0, 2, 3)).any()
            assert (raster.time_s[:, 0].diff() >= 0).all() or not torch.isfinite(raster.time_s).all()


def test_at_most_so_many_dates():
    batch = place(2)
    dates = batch.raster("optical").time_s
    out = Augment(max_dates=2)(batch, generator("few")).raster("optical")
    assert out.values.shape[0] == min(2, len(dates))
    assert set(out.time_s[:, 0].tolist()) <= set(dates[:, 0].tolist())


def test_dropped_share_is_as_asked():
    augment, kept, total = Augment(drop_bands=0.5), 0, 0
    for i in range(200):
        valid = augment(place(), generator("share", i)).raster("optical").valid.any((0, 2, 3))
        kept, total = kept + int(valid.sum()), total + len(valid)
    assert 0.45 < kept / total < 0.6  # a little above one half: one band always stays


def test_places_are_augmented_one_by_one():
    with pytest.raises(ValueError, match="one by one"):
        Augment(flip=True)(Batch.cat([place(), place()]), generator("x"))

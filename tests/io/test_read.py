"""Reading: units, grids, layers, validity, dates, and every way in gives the same."""

from __future__ import annotations

from datetime import UTC, datetime

import netCDF4
import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer

import everysat as es
from everysat import sensors
from everysat.io import grid
from everysat.io.read import read
from everysat.sensors import Band, Sensor
from everysat.types import ALWAYS, ContractError, Input, Place

DAY = 86400.0
S2 = "sentinel-2-l1c"


def only(batch):
    (layer,) = batch.layers.values()
    return layer


def ramp(height, width):
    """Each pixel holds its position: 100 * row + column."""
    return (100.0 * np.arange(height)[:, None] + np.arange(width)).astype(np.float32)


HEIGHTS = Sensor("heights", "terrain", (Band("z", 10, "m"),), "made for a test")


def test_native_grid_is_untouched_and_scaled(make, numbers, optical):
    digital = numbers(2, 30, 40)
    digital[0, 3, 5] = 0
    path = make("x_20200503.tif", digital, labels=["red", "nir"])
    batch = read(path, sensor=optical)
    layer = batch.raster("synthetic-optical-10m")
    assert torch.equal(layer.values[0], torch.from_numpy(digital.astype(np.float32) * np.float32(1e-4)))
    assert not layer.valid[0, 0, 3, 5]
    assert layer.valid.sum() == digital.size - 1
    assert layer.time_s.tolist() == [[1588464000.0, 1588464000.0 + DAY]]
    place = batch.places[0]
    assert (place.height_m, place.width_m) == (300, 400)
    assert place.geobox.crs.to_epsg() == 32632
    lon, lat = Transformer.from_crs(32632, 4326, always_xy=True).transform(600_200, 5_399_850)
    assert place.lonlat == pytest.approx((lon, lat))


def test_band_order_of_the_file_does_not_matter(make, numbers, optical):
    digital = numbers(2, 8, 8)
    first = only(read(make("a.tif", digital, labels=["red", "nir"]), sensor=optical))
    second = only(read(make("b.tif", digital[::-1].copy(), labels=["nir", "red"]), sensor=optical))
    assert first.sensor.names == second.sensor.names == ("red", "nir")
    assert torch.equal(first.values, second.values)


def test_resolutions_become_layers_and_one_grid_on_request(make, numbers, optical):
    fine, coarse = numbers(2, 12, 16), numbers(6, 8, seed=1)
    files = [make("fine.tif", fine, labels=["red", "nir"]), make("scene_swir.tif", coarse, gsd=20)]
    native = read(files, sensor=optical)
    assert set(native.layers) == {"synthetic-optical-10m", "synthetic-optical-20m"}
    assert native.raster("synthetic-optical-20m").values.shape == (1, 1, 6, 8)
    joint = read(files, sensor=optical, gsd_m=20)
    layer = joint.raster("synthetic-optical-20m")
    assert layer.sensor.names == ("red", "nir", "swir")
    mean = F.avg_pool2d(native.raster("synthetic-optical-10m").values, 2)
    torch.testing.assert_close(layer.values[:, :2], mean)
    assert torch.equal(layer.values[:, 2:], native.raster("synthetic-optical-20m").values)
    refined = only(read(files, sensor=optical, gsd_m=10))
    assert torch.equal(refined.values[:, :2], native.raster("synthetic-optical-10m").values)
    assert refined.values.shape == (1, 3, 12, 16)


def test_means_take_valid_pixels_alone(make, optical):
    digital = np.full((4, 4), 1000, np.uint16)
    digital[0, 0] = 0
    digital[2:, 2:] = 0
    layer = only(read(make("red.tif", digital), sensor=optical, gsd_m=20))
    assert layer.valid[0, 0].tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(layer.values[0, 0], torch.tensor([[0.1, 0.1], [0.1, 0.0]]))


def test_radar_is_averaged_in_linear_power(make):
    radar = Sensor("radar", "sar", (Band("VV", 10, "dB", range=(-50, 30)),), "made for a test")
    decibel = np.array([[-10.0, -20.0], [-10.0, -20.0]], np.float32)
    layer = only(read(make("VV.tif", decibel), sensor=radar, gsd_m=20))
    assert layer.values.item() == pytest.approx(10 * np.log10((0.1 + 0.01) / 2), abs=1e-5)


def test_classes_are_never_mixed(make):
    cover = Sensor("cover", "classes", (Band("c", 10, "class", classes={1: "a", 9: "b"}),), "made for a test")
    codes = np.random.default_rng(0).choice([1, 9], (13, 17)).astype(np.uint8)
    place = es.place(GeoBox((9, 9), Affine(14, 0, 600_013, 0, -14, 5_399_991), "EPSG:32632"))
    for gsd in (None, 7.0, 20.0):
        layer = only(read(make("c.tif", codes), sensor=cover, place=place, gsd_m=gsd))
        assert set(layer.values[layer.valid].tolist()) <= {1.0, 9.0}


@pytest.mark.parametrize("shift", [0.0, 3.7])
def test_warp_to_another_zone_puts_values_where_they_belong(make, shift):
    height = width = 60
    path = make("z.tif", ramp(height, width))
    lon, lat = Transformer.from_crs(32632, 4326, always_xy=True).transform(600_300, 5_399_700)
    box = es.place((lon, lat), size_m=200, gsd_m=10, crs="EPSG:32633").geobox
    box = GeoBox(box.shape, box.affine * Affine.translation(shift, shift), box.crs)
    layer = only(read(path, sensor=HEIGHTS, place=grid.place_of(box)))
    cols, rows = np.meshgrid(np.arange(20) + 0.5, np.arange(20) + 0.5)
    x, y = grid.positions(box.affine, cols, rows)
    east, north = Transformer.from_crs(32633, 32632, always_xy=True).transform(x, y)
    expected = 100 * ((5_400_000 - north) / 10 - 0.5) + (east - 600_000) / 10 - 0.5
    assert layer.valid.all()
    np.testing.assert_allclose(layer.values[0, 0].numpy(), expected, atol=0.05)


def test_half_a_pixel_off_is_interpolated(make):
    path = make("z.tif", ramp(20, 20))
    box = GeoBox((10, 10), Affine(10, 0, 600_025, 0, -10, 5_399_975), "EPSG:32632")
    layer = only(read(path, sensor=HEIGHTS, place=grid.place_of(box)))
    np.testing.assert_allclose(layer.values[0, 0].numpy(), ramp(20, 20)[2:12, 2:12] + 50.5, rtol=1e-5)


def test_outside_the_files_is_invalid(make, numbers, optical):
    path = make("red.tif", numbers(10, 10))
    box = GeoBox((10, 10), Affine(10, 0, 600_050, 0, -10, 5_400_030), "EPSG:32632")
    layer = only(read(path, sensor=optical, place=grid.place_of(box)))
    expected = torch.zeros(10, 10, dtype=torch.bool)
    expected[3:, :5] = True
    assert torch.equal(layer.valid[0, 0], expected)
    assert (layer.values[~layer.valid] == 0).all()


def test_grids_in_degrees_become_square_pixels(make, numbers, optical):
    transform = Affine(8.983e-5, 0, 13.0, 0, -8.983e-5, 52.0)
    batch = read(make("red.tif", numbers(50, 60), transform=transform, crs="EPSG:4326"), sensor=optical)
    assert only(batch).gsd_m == 10
    assert batch.places[0].geobox.crs.to_epsg() == 32633
    assert only(batch).valid.float().mean() > 0.7


def test_south_up_equals_north_up(make, numbers, optical):
    digital = numbers(9, 11)
    flipped = make("red.tif", digital[::-1].copy(), transform=Affine(10, 0, 600_000, 0, 10, 5_400_000 - 90))
    expected = read(make("b_red.tif", digital), sensor=optical)
    assert torch.equal(only(read(flipped, sensor=optical)).values, only(expected).values)
    assert read(flipped, sensor=optical).places == expected.places


def test_neighbouring_tiles_are_one_observation(make, numbers, optical):
    digital = numbers(10, 30)
    left = make("l_red_20200101.tif", digital[:, :20])
    right = make("r_red_20200101.tif", digital[:, 15:], corner=(600_150.0, 5_400_000.0))
    layer = only(read([left, right], sensor=optical))
    assert torch.equal(layer.values, only(read(make("red.tif", digital), sensor=optical)).values)
    assert layer.values.shape[0] == 1


def test_dates_order_the_observations(make, numbers, optical):
    files = [make(f"red_2020{m:02d}01.tif", numbers(4, 4, seed=m)) for m in (7, 3, 5)]
    layer = only(read(files, sensor=optical))
    assert [datetime.fromtimestamp(s, UTC).month for s in layer.time_s[:, 0].tolist()] == [3, 5, 7]
    shuffled = only(read(files[::-1], sensor=optical))
    assert torch.equal(layer.values, shuffled.values)


def test_a_band_missing_at_one_date_is_invalid_there(make, numbers, optical):
    files = [
        make("red_20200101.tif", numbers(4, 4)),
        make("nir_20200101.tif", numbers(4, 4)),
        make("red_20200201.tif", numbers(4, 4)),
    ]
    layer = only(read(files, sensor=optical))
    assert layer.valid[:, :, 0, 0].tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    "times", [["2021-01-01", "2021-02-01"], {"a_red.tif": "2021-01-01", "b_red.tif": "2021-02-01"}]
)
def test_times_by_argument(make, numbers, optical, times):
    files = [make("a_red.tif", numbers(4, 4)), make("b_red.tif", numbers(4, 4, seed=1))]
    assert only(read(files, sensor=optical, times=times)).time_s[1, 0].item() == 1612137600.0


def test_times_of_a_series_in_one_file(make, numbers, optical):
    stack = numbers(4, 5, 5)
    path = make("s.tif", stack, labels=["red", "nir", "red", "nir"])
    layer = only(read(path, sensor=optical, times=["2021-01", "2021-02"]))
    assert layer.values.shape[:2] == (2, 2)
    np.testing.assert_allclose(layer.values[1, 0].numpy(), stack[2] * 1e-4, rtol=1e-6)
    unnamed = only(read(make("u.tif", stack), sensor=optical, order=["red", "nir"], times=["2021-01", "2021-02"]))
    assert torch.equal(unnamed.values, layer.values)


def test_one_time_for_all(make, numbers, optical):
    layer = only(read(make("red.tif", numbers(4, 4)), sensor=optical, times=("2020", "2021")))
    assert layer.time_s.tolist() == [[1577836800.0, 1640995200.0]]
    assert only(read(make("nir.tif", numbers(4, 4)), sensor=optical)).time_s.tolist() == [list(ALWAYS)]


def test_masks_make_observations_invalid(make, numbers, optical):
    clear = np.zeros((6, 6), np.uint8)
    clear[:2] = 4
    clear[2] = 1
    files = [make(f"red_2020010{d}.tif", numbers(6, 6)) for d in (1, 2)]
    masks = [make("fmask_20200101.tif", clear), make("fmask_20200102.tif", np.zeros((6, 6), np.uint8))]
    layer = only(read([*files, *masks], sensor=optical, valid={"fmask": (0, 1)}))
    assert layer.valid[0, 0, :, 0].tolist() == [False, False, True, True, True, True]
    assert layer.valid[1].all()
    bits = only(read([*files, *masks], sensor=optical, valid={"fmask": lambda code: code & 4 == 0}))
    assert torch.equal(bits.valid, layer.valid)
    apart = only(read(files[:1], sensor=optical, valid={str(masks[0]): (0, 1)}))
    assert torch.equal(apart.valid, layer.valid[:1])
    with pytest.raises(ValueError, match="2020-01-02"):
        read([*files, masks[0]], sensor=optical, valid={"fmask": (0, 1)})
    with pytest.raises(ValueError, match="cloudz"):
        read(files, sensor=optical, valid={"cloudz": (0,)})


def test_a_coarse_mask_covers_the_pixels_below_it(make, numbers, optical):
    mask = np.array([[0, 3], [0, 0]], np.uint8)
    layer = only(
        read([make("red.tif", numbers(4, 4)), make("scl.tif", mask, gsd=20)], sensor=optical, valid={"scl": (0,)})
    )
    assert layer.valid[0, 0].tolist() == [[True, True, False, False]] * 2 + [[True] * 4] * 2


@pytest.mark.parametrize(
    ("name", "given", "offset"),
    [
        ("T33UUU_20170216T102101_B04.tif", None, 0.0),
        ("S2A_MSIL1C_20230216T102101_N0509_R065_T33UUU_20230216T102101_B04.tif", None, -0.1),
        ("S2A_MSIL1C_20230216T102101_N0209_R065_T33UUU_20230216T102101_B04.tif", None, 0.0),
        ("T33UUU_20230216T102101_B04.tif", "04.00", -0.1),
        ("T33UUU_20230216T102101_B04.tif", "N0400", -0.1),
        ("T33UUU_20230216T102101_B04.tif", 3.01, 0.0),
        ("S2A_MSIL1C_20230216T102101_N0509_R065_T33UUU_20230216T102101_B04.tif", "00.00", 0.0),
    ],
)
def test_processing_baseline_of_sentinel_2(make, numbers, name, given, offset):
    digital = numbers(4, 4) + 1000
    layer = only(read(make(name, digital), processing_baseline=given))
    assert layer.sensor.name == S2
    np.testing.assert_allclose(layer.values[0, 0].numpy(), digital * 1e-4 + offset, atol=1e-6)


def test_baseline_from_tags(make, numbers):
    path = make("T33UUU_20230216T102101_B04.tif", numbers(4, 4) + 1000, tags={"PROCESSING_BASELINE": "05.09"})
    assert only(read(path)).values.max() < 0.4


def test_unknown_baseline_is_an_error_once_it_matters(make, numbers):
    with pytest.raises(ContractError, match="processing_baseline"):
        read(make("T33UUU_20230216T102101_B04.tif", numbers(4, 4)))
    with pytest.warns(UserWarning, match="baseline"):
        read(make("B04.tif", numbers(4, 4)), sensor=S2)


def test_scale_of_the_file_counts_before_the_table(make, numbers, optical):
    path = make("red.tif", numbers(4, 4))
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (2e-4,), (-0.05,)
    layer = only(read(path, sensor=optical))
    np.testing.assert_allclose(layer.values[0, 0].numpy(), numbers(4, 4) * 2e-4 - 0.05, atol=1e-6)


def test_bands_selects_and_orders(make, numbers, optical):
    path = make("a.tif", numbers(2, 4, 4), labels=["red", "nir"])
    layer = only(read(path, sensor=optical, bands=["nir", "red"]))
    assert layer.sensor.names == ("nir", "red")
    assert only(read(path, sensor=optical, bands=["nir"])).values.shape[1] == 1


def test_fourth_band_marked_as_alpha_is_a_band(make, numbers):
    colour = Sensor("four", "optical", tuple(Band(n, 10, "DN") for n in "abcd"), "made for a test")
    digital = (numbers(4, 6, 6) % 250).astype(np.uint8)
    digital[3] = 0
    layer = only(read(make("a.tif", digital), sensor=colour))
    assert layer.valid.all()
    assert torch.equal(layer.values[0], torch.from_numpy(digital).float())
    three = Sensor("three", "optical", colour.bands[:3], "made for a test")
    digital[3, 2:] = 255
    layer = only(read(make("b.tif", digital), sensor=three))
    assert layer.valid[0, 0, :, 0].tolist() == [False, False, True, True, True, True]


def test_names_of_layers(make, numbers, optical):
    path = make("red.tif", numbers(4, 4))
    assert set(read(path, sensor=optical, names={"synthetic-optical-10m": "sky"}).layers) == {"sky"}
    with pytest.raises(ValueError, match="synthetic-optical-10m"):
        read(path, sensor=optical, names={"wrong": "sky"})


def contract(optical, **more):
    return {
        "colour": Input(optical.select(["nir", "red"]), 10, (0.2, 0.1), (0.1, 0.1), **more),
        "heat": Input(optical.select(["swir"]), 20, (0.2,), (0.1,)),
    }


def test_a_contract_names_layers_bands_and_grids(make, numbers, optical):
    files = [
        make("a_20200101.tif", numbers(2, 12, 12), labels=["red", "nir"]),
        make("swir_20200101.tif", numbers(12, 12), gsd=10),
    ]
    batch = read(files, inputs=contract(optical, dated=True))
    assert set(batch.layers) == {"colour", "heat"}
    assert batch.raster("colour").sensor.names == ("nir", "red")
    assert batch.raster("heat").values.shape == (1, 1, 6, 6)
    for name, wanted in contract(optical, dated=True).items():
        assert wanted.fit(batch.raster(name), name) is batch.raster(name)
    assert set(read(files[:1], inputs=contract(optical)).layers) == {"colour"}


def test_a_contract_that_is_not_met(make, numbers, optical):
    with pytest.raises(ContractError, match="lack nir"):
        read(make("red.tif", numbers(4, 4)), inputs=contract(optical))
    with pytest.raises(ContractError, match="series"):
        read(make("a.tif", numbers(2, 4, 4), labels=["red", "nir"]), inputs=contract(optical, dated=True))
    with pytest.raises(ContractError, match="takes no layer"):
        read(make("z.tif", ramp(4, 4)), sensor=HEIGHTS, inputs=contract(optical))


# --- NetCDF, Zarr, xarray -------------------------------------------------------------------------------------------


def cube(digital, *, ascending=False):
    """A series [time, y, x] as xarray with CF coordinates and CRS."""
    y = 5_400_000 - 10 * (np.arange(digital.shape[1]) + 0.5)
    if ascending:
        digital, y = digital[:, ::-1], y[::-1]
    times = np.array(["2020-01-01", "2020-02-01"], "datetime64[ns]")
    crs = GeoBox((2, 2), Affine(10, 0, 0, 0, -10, 0), "EPSG:32632").crs.to_wkt()
    red = xr.DataArray(
        digital, dims=("time", "y", "x"), name="red", attrs={"grid_mapping": "spatial_ref"},
        coords={"time": times, "y": y, "x": 600_000 + 10 * (np.arange(digital.shape[2]) + 0.5)},
    )  # fmt: skip
    return xr.Dataset({"red": red}).assign_coords(spatial_ref=xr.DataArray(0, attrs={"crs_wkt": crs}))


def test_every_container_gives_the_same(make, numbers, optical, tmp_path):
    digital = numbers(2, 8, 10)
    files = [make(f"red_2020{m:02d}01.tif", digital[m - 1]) for m in (1, 2)]
    expected = read(files, sensor=optical)
    dataset = cube(digital)
    dataset.to_netcdf(tmp_path / "c.nc")
    dataset.to_zarr(tmp_path / "c3.zarr", zarr_format=3, consolidated=False)
    dataset.to_zarr(tmp_path / "c2.zarr", zarr_format=2)
    ways = [
        tmp_path / "c.nc",
        tmp_path / "c3.zarr",
        tmp_path / "c2.zarr",
        dataset,
        dataset["red"],
        cube(digital, ascending=True),
    ]
    for way in ways:
        batch = read(way, sensor=optical)
        assert batch.places == expected.places
        for field in ("values", "valid", "time_s", "row"):
            assert torch.equal(getattr(only(batch), field), getattr(only(expected), field)), (way, field)


def test_band_axis_and_scalar_time(numbers, optical):
    digital = numbers(2, 6, 6)
    array = (
        cube(digital)["red"].rename(time="band").assign_coords(band=["red", "nir"], time=np.datetime64("2020-03-04"))
    )
    layer = only(read(array, sensor=optical))
    assert layer.sensor.names == ("red", "nir")
    assert layer.time_s.tolist() == [[1583280000.0, 1583280000.0 + DAY]]


def test_cf_packing_and_fill_values(numbers, optical, tmp_path):
    dataset = cube(numbers(2, 6, 6))
    dataset["red"].attrs.update(scale_factor=2e-4, add_offset=0.01, _FillValue=np.uint16(777))
    dataset["red"][0, 0, 0] = 777
    stored = dataset.copy()
    stored.to_netcdf(tmp_path / "p.nc")
    layer = only(read(tmp_path / "p.nc", sensor=optical))
    assert not layer.valid[0, 0, 0, 0]
    np.testing.assert_allclose(layer.values[1, 0].numpy(), numbers(2, 6, 6)[1] * 2e-4 + 0.01, atol=1e-6)
    decoded = xr.open_dataset(tmp_path / "p.nc")
    decoded["red"].attrs["units"] = "1"
    again = only(read(decoded, sensor=optical))
    torch.testing.assert_close(again.values, layer.values)
    assert torch.equal(again.valid, layer.valid)
    decoded.close()


def test_unsigned_numbers_in_a_signed_type(tmp_path, optical):
    with netCDF4.Dataset(tmp_path / "u.nc", "w") as file:
        for name, values in (("y", [5.0, -5.0]), ("x", [5.0, 15.0])):
            file.createDimension(name, 2)
            file.createVariable(name, "f8", (name,))[:] = values
        red = file.createVariable("red", "i2", ("y", "x"))
        red._Unsigned = "true"
        red.set_auto_maskandscale(False)
        red[:] = np.array([[40000, 1000], [2000, 3000]], np.uint16).view(np.int16)
    wide = Sensor("w", "optical", (Band("red", 10, "reflectance", scale=1e-5, range=(0, 2)),), "made for a test")
    values = only(read(tmp_path / "u.nc", sensor=wide, crs="EPSG:32632")).values
    assert values.max().item() == pytest.approx(0.4)


def test_rain_in_metres_becomes_millimetres(numbers):
    weather = Sensor("w", "weather", (Band("tp", 10, "mm", scale=1000.0, range=(0, 2000)),), "made for a test")
    dataset = cube(np.full((2, 4, 4), 250, np.int16)).rename(red="tp")
    dataset["tp"].attrs.update(scale_factor=1e-4, units="m")
    assert only(read(dataset, sensor=weather)).values.unique().item() == pytest.approx(25.0)


# --- real files -----------------------------------------------------------------------------------------------------


def test_real_sentinel_2_scene(real_scene):
    files = sorted((real_scene / "s2l1c" / "IMG_DATA").glob("*.jp2"))
    batch = read(files)
    shapes = {name: tuple(layer.values.shape) for name, layer in batch.layers.items()}
    assert shapes == {f"{S2}-10m": (1, 4, 768, 1536), f"{S2}-20m": (1, 6, 384, 768), f"{S2}-60m": (1, 3, 128, 256)}
    layer = batch.raster(f"{S2}-10m")
    assert 0.05 < layer.values[layer.valid].median() < 0.3
    joint = only(read(files, gsd_m=20))
    assert joint.sensor.names == sensors.get(S2).names
    assert joint.values.shape == (1, 13, 384, 768)


def test_real_landsat_series_with_masks(real_scene):
    files = sorted((real_scene / "lsts").glob("*/*.tif"))
    bands = tuple(Band(f"b{i}", 30, "reflectance", scale=1e-4, range=(-0.2, 2.0)) for i in (3, 4, 5))
    landsat = Sensor("landsat-ledaps", "optical", bands, "USGS LEDAPS")
    layer = only(read(files, sensor=landsat, valid={"fmask": (0, 1)}))
    assert layer.values.shape == (105, 3, 61, 61)
    assert (layer.time_s[1:, 0] > layer.time_s[:-1, 0]).all()
    assert 0.3 < layer.valid.float().mean() < 0.8
    assert 0.0 < layer.values[layer.valid].median() < 0.4


def test_real_chips(data_dir):
    chips = data_dir / "chips"
    layer = only(read(chips / "s2_nz" / "20201002T221611_20201002T221610_T60HWB.tif", sensor=S2))
    assert layer.values.shape == (1, 13, 264, 264)
    radar = only(read(chips / "sen1floods11_spain" / "S1" / "Spain_7370579_S1Hand.tif", sensor="sentinel-1-grd"))
    assert radar.gsd_m == 10
    assert -15 < radar.values[:, 0][radar.valid[:, 0]].median() < -5
    aerial = only(read(next((chips / "treesatai_betula" / "aerial").glob("*.tif")), sensor="treesatai-aerial"))
    assert aerial.values.shape == (1, 4, 304, 304)
    assert aerial.valid.all()


def test_real_netcdf_with_many_sensors(data_dir):
    path = data_dir / "worldcereal" / "worldcereal_preprocessed_inputs.nc"
    layer = only(read(path, sensor="sentinel-2-l2a", nodata=65535))
    assert layer.values.shape == (12, 9, 100, 100)
    assert layer.valid.float().mean() == pytest.approx(10 / 12)
    with pytest.raises(ContractError, match="nodata=65535"):
        read(path, sensor="sentinel-2-l2a")


def test_plain_extent_is_no_place_to_read(make, numbers, optical):
    with pytest.raises(ValueError, match="geobox"):
        read(make("red.tif", numbers(4, 4)), sensor=optical, place=Place(100, 100))

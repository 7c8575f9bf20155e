"""What goes wrong when reading says what, where, and how to go on."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.errors import NotGeoreferencedWarning

from everysat.io import grid
from everysat.io.read import read
from everysat.sensors import Band, Sensor
from everysat.types import ContractError


def test_band_that_is_not_there(make, numbers, optical):
    with pytest.raises(ContractError, match=r"'nir' is in none of the files, which hold red"):
        read(make("red.tif", numbers(4, 4)), sensor=optical, bands=["red", "nir"])
    with pytest.raises(LookupError, match="swir"):
        read(make("red.tif", numbers(4, 4)), sensor=optical, bands=["swr"])


def test_digital_numbers_called_physical(make, numbers, optical):
    with pytest.raises(ContractError, match=r"red\.tif.*stored='digital'"):
        read(make("red.tif", numbers(4, 4)), sensor=optical, stored="physical")


def test_scale_applied_twice(make, numbers, optical):
    reflectance = (numbers(4, 4) * 1e-4).astype(np.float32)
    path = make("red.tif", reflectance)
    with pytest.raises(ContractError, match="stored='physical'"):
        read(path, sensor=optical)
    values = read(path, sensor=optical, stored="physical").raster("synthetic-optical-10m").values
    np.testing.assert_array_equal(values[0, 0].numpy(), reflectance)


def test_digital_numbers_as_floats_are_fine(make, numbers, optical):
    layer = read(make("red.tif", numbers(4, 4).astype(np.float32)), sensor=optical).raster("synthetic-optical-10m")
    np.testing.assert_allclose(layer.values[0, 0].numpy(), numbers(4, 4) * 1e-4, rtol=1e-6)


def test_kelvin_taken_for_celsius(make):
    heat = Sensor("heat", "thermal", (Band("t", 10, "degC", range=(-80, 70)),), "made for a test")
    with pytest.raises(ContractError, match=r"287.* degC, while -80 to 70 is plausible"):
        read(make("t.tif", np.full((4, 4), 287.0, np.float32)), sensor=heat)


def test_unit_in_the_file_differs(numbers):
    heat = Sensor("heat", "thermal", (Band("t", 10, "K", range=(150, 370)),), "made for a test")
    array = xr.DataArray(
        np.full((4, 4), 14.0),
        dims=("y", "x"),
        name="t",
        attrs={"units": "degC"},
        coords={"y": [35.0, 25, 15, 5], "x": [5.0, 15, 25, 35]},
    )
    with pytest.raises(ContractError, match="is in degC, sensor heat has t in K"):
        read(array, sensor=heat, crs="EPSG:32632")


def test_no_crs(make, numbers, optical):
    path = make("red.tif", numbers(4, 4), crs=None)
    with pytest.raises(ValueError, match=r"red\.tif has no CRS.*crs='EPSG"):
        read(path, sensor=optical)
    assert read(path, sensor=optical, crs="EPSG:32632").places[0].geobox.crs.to_epsg() == 32632
    array = xr.DataArray(numbers(4, 4), dims=("y", "x"), name="red", coords={"y": np.arange(4.0), "x": np.arange(4.0)})
    with pytest.raises(ValueError, match="has no CRS"):
        read(array, sensor=optical)


def test_no_grid(make, numbers, optical):
    with pytest.warns(NotGeoreferencedWarning):
        path = make("red.tif", numbers(4, 4), transform=Affine.identity())
    with pytest.raises(ValueError, match="no transform"):
        read(path, sensor=optical)
    array = xr.DataArray(numbers(4, 4), dims=("y", "x"), name="red", coords={"y": [0.0, 1, 2, 9], "x": np.arange(4.0)})
    with pytest.raises(ValueError, match="not evenly spaced"):
        read(array, sensor=optical, crs="EPSG:32632")


def test_no_overlap_says_where_both_lie(make, numbers, optical):
    elsewhere = grid.place_of(GeoBox((4, 4), Affine(10, 0, 700_000, 0, -10, 5_000_000), "EPSG:32632"))
    with pytest.raises(ValueError, match=r"no file overlaps the place.*longitude 11\..*red\.tif.*longitude 10\."):
        read(make("red.tif", numbers(4, 4)), sensor=optical, place=elsewhere)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_truncated_file_is_named(make, numbers, optical, share):
    path = make("red.tif", numbers(256, 256), compress="deflate")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(OSError, match=r"red\.tif cannot be read"):
        read(path, sensor=optical)


def test_truncated_jp2_is_named(real_scene, tmp_path):
    source = real_scene / "s2l1c" / "IMG_DATA" / "T33UUU_20170216T102101_B02.jp2"
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(OSError, match=r"B02\.jp2 cannot be read"):
        read(path)


@pytest.mark.parametrize("name", ["c.nc", "c.zarr", "c.tif"])
def test_no_such_file(tmp_path, optical, name):
    with pytest.raises(FileNotFoundError, match=name):
        read(tmp_path / name, sensor=optical)


def test_corrupt_netcdf_is_named(tmp_path, optical):
    (tmp_path / "c.nc").write_bytes(b"not a NetCDF file")
    with pytest.raises(OSError, match=r"c\.nc cannot be read"):
        read(tmp_path / "c.nc", sensor=optical)


def test_bands_without_names(make, numbers, optical):
    path = make("a.tif", numbers(2, 4, 4))
    with pytest.raises(ValueError, match=r"2 bands without names.*order="):
        read(path, sensor=optical)
    with pytest.raises(ValueError, match="twice"):
        read(path, sensor=optical, order=["red", "red"])
    with pytest.raises(ValueError, match="order lists 3"):
        read(path, sensor=optical, order=["red", "nir", "swir"])
    assert read(path, sensor=optical, order=["nir", "red"]).raster("synthetic-optical-10m").sensor.names == (
        "red",
        "nir",
    )


def test_ambiguous_band_names(make, numbers, optical):
    with pytest.raises(ValueError, match="names nir and red"):
        read(make("nir_and_red.tif", numbers(4, 4)), sensor=optical)
    with pytest.raises(ValueError, match=r"band red .*comes twice"):
        read(make("a_20200101.tif", numbers(2, 4, 4), labels=["red", "first red"]), sensor=optical)


def test_series_without_dates(make, numbers, optical):
    files = [make("a_red.tif", numbers(4, 4)), make("b_red.tif", numbers(4, 4))]
    with pytest.raises(ValueError, match=r"without a date.*times="):
        read(files, sensor=optical)
    with pytest.raises(ValueError, match="times lists 3 dates for 2 files"):
        read(files, sensor=optical, times=["2020", "2021", "2022"])


def test_sensor_that_is_unknown_or_cannot_be_told(make, numbers):
    path = make("B04.tif", numbers(4, 4))
    with pytest.raises(LookupError, match="sentinel-2-l1c"):
        read(path, sensor="sentinel-2-l1")
    with pytest.raises(LookupError, match=r"cannot be told.*sensor='"):
        read(path)
    with pytest.raises(LookupError, match="cannot be told"):
        read(make("stripes.tif", numbers(4, 4)))


def test_file_without_any_band_of_the_sensor(make, numbers, optical):
    with pytest.raises(ValueError, match=r"names no band of synthetic-optical.*green"):
        read(make("a.tif", numbers(2, 4, 4), labels=["green", "blue"]), sensor=optical)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resampling": "best"}, "resampling='best'"),
        ({"stored": "raw"}, "stored='raw'"),
        ({"gsd_m": 0}, "gsd_m=0"),
        ({"times": ["June"]}, "June"),
    ],
)
def test_arguments_that_do_not_exist(make, numbers, optical, options, words):
    with pytest.raises(ValueError, match=words):
        read(make("red.tif", numbers(4, 4)), sensor=optical, **options)


def test_nothing_to_read(tmp_path, optical):
    with pytest.raises(ValueError, match="files is empty"):
        read([], sensor=optical)
    with pytest.raises(ValueError, match="folder"):
        read(tmp_path, sensor=optical)


def test_different_zones_need_a_place(make, numbers, optical):
    files = [make("red_20200101.tif", numbers(4, 4)), make("red_20200102.tif", numbers(4, 4), crs="EPSG:32633")]
    with pytest.raises(ValueError, match="give place="):
        read(files, sensor=optical)

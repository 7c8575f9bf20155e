"""Single places: bands by name, periods by their days."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pytest
import rasterio
import torch

from everysat.data import chips, periods
from everysat.data.batches import Dataset
from everysat.data.chips import VARIANTS, build, made
from everysat.io import arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("chips")
    made(root)
    return root


def seconds(*day):
    return datetime(*day, tzinfo=UTC).timestamp()


def held(path):
    with rasterio.open(path) as file:
        return dict(zip(file.descriptions, file.read(), strict=True))


def test_bands_of_cropharvest_are_found_by_name_and_period(folder):
    place = build(root=folder)[0]
    truth = held(next((folder / "cropharvest_togo").glob("*.tif")))
    s2 = place.raster("s2")
    assert s2.values.shape == (12, 13, 5, 5)
    for band, name in (("B01", "B1_7"), ("B8A", "B8A_7"), ("B09", "B9_7"), ("B12", "B12_7")):
        np.testing.assert_allclose(s2.select([band]).values[7, 0], truth[name] * 1e-4, rtol=1e-5)
    np.testing.assert_allclose(place.raster("s1").values[3], [truth["VV_3"], truth["VH_3"]], rtol=1e-5)
    np.testing.assert_allclose(place.raster("srtm").values[0], [truth["elevation"], truth["slope"]], rtol=1e-5)
    assert s2.time_s[0].tolist() == [seconds(2019, 2, 6), seconds(2019, 3, 8)]
    assert s2.time_s[-1].tolist() == [seconds(2020, 1, 2), seconds(2020, 2, 1)]
    weather = place.raster("era5")
    assert weather.time_s[0].tolist() == [seconds(2019, 2, 1), seconds(2019, 3, 1)]
    rain = 28 * 1000 * truth["total_precipitation"].mean()
    assert weather.values[0, :, 0, 0].tolist() == pytest.approx([truth["temperature_2m"].mean(), rain], rel=1e-5)
    assert weather.gsd_m == place.places[0].width_m == 50


def test_weather_of_a_month_that_comes_twice_is_there_once():
    starts = [datetime(2018, *day, tzinfo=UTC) for day in ((4, 1), (5, 1), (5, 31))]
    raster = periods.weather(np.array([[280.0, 0.001], [285, 0.002], [285, 0.002]]), starts, 10)
    assert raster.time_s.tolist() == [
        [seconds(2018, 4, 1), seconds(2018, 5, 1)],
        [seconds(2018, 5, 1), seconds(2018, 6, 1)],
    ]
    assert raster.values[:, :, 0, 0].tolist() == [[280, 30], [285, 62]]


def test_the_others(folder):
    nz = build("s2_nz", root=folder)[0].raster("s2")
    numbers, _ = arrays.tiff(next((folder / "s2_nz").glob("*.tif")))
    np.testing.assert_allclose(nz.values[0], numbers * 1e-4, rtol=1e-6)
    assert nz.time_s.tolist() == [[seconds(2020, 10, 2), seconds(2020, 10, 3)]]
    assert nz.valid.equal(torch.from_numpy(numbers[None] > 0))
    ftw = build("ftw", root=folder)[0]
    numbers, _ = arrays.tiff(folder / "ftw_austria" / "inference-img.tif")
    for name, first in (("s2-first", 0), ("s2-second", 4)):
        np.testing.assert_allclose(ftw.raster(name).values[0], numbers[first : first + 4] * 1e-4, rtol=1e-6)
        assert ftw.raster(name).sensor.names == ("B04", "B03", "B02", "B08")
    assert set(build("ftw", root=folder, modalities=["s2-second"])[0].layers) == {"s2-second"}


@pytest.mark.parametrize("variant", ["cropharvest", "s2_nz", "ftw"])
def test_a_chip_is_one_place(folder, variant):
    data = build(variant, root=folder)
    assert isinstance(data, Dataset)
    assert len(data) == 1
    assert set(data[0].layers) == set(VARIANTS[variant])
    with pytest.raises(IndexError):
        data[1]
    with pytest.raises(LookupError, match="split='train' is unknown"):
        build(variant, root=folder, split="train")


def test_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cropharvest_togo/\*\.tif is missing"):
        build(root=tmp_path)
    with pytest.raises(FileNotFoundError, match="sen1floods11_spain is missing"):
        build("sen1floods11", root=tmp_path)
    made(tmp_path)
    path = next((tmp_path / "cropharvest_togo").glob("*.tif"))
    longer = path.rename(path.with_name("1-made_2019-02-06_2020-03-02.tif"))
    with pytest.raises(ValueError, match=r"03-02\.tif has no band 'B1_12', expected 13 periods"):
        build(root=tmp_path)[0]
    longer.rename(path.with_name("made.tif"))
    with pytest.raises(ValueError, match=r"made\.tif: the name does not tell the period"):
        build(root=tmp_path)[0]
    arrays.write_tiff(tmp_path / "ftw_austria" / "inference-img.tif", np.zeros((4, 3, 3), np.uint16))
    with pytest.raises(ValueError, match=r"inference-img\.tif has 4 bands"):
        build("ftw", root=tmp_path)[0]


@pytest.fixture(scope="module")
def real(data_dir):
    if not (data_dir / "chips").is_dir():
        pytest.skip("needs chips")
    return data_dir / "chips"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_real_chips_are_physical(real, variant):
    data = build(variant, root=real)
    assert len(data) == 1
    place = data[0]
    assert set(VARIANTS[variant]) <= set(place.layers)
    for name in place.layers:
        raster = place.raster(name)
        for k, band in enumerate(raster.sensor.bands):
            values = raster.values[:, k][raster.valid[:, k]]
            if band.range is not None:
                assert ((values >= band.range[0]) & (values <= band.range[1])).float().mean() > 0.99
        assert raster.values.shape[2] * raster.gsd_m == pytest.approx(place.places[0].height_m, rel=0.04)


def test_real_spectra_and_seasons(real):
    togo = build(root=real)[0]
    at = {
        b: v.item()
        for b, v in zip(togo.raster("s2").sensor.names, togo.raster("s2").values.mean((0, 2, 3)), strict=True)
    }
    assert at["B10"] < 0.02 < at["B09"] < at["B8A"]
    rain = togo.raster("era5").values[:, 1, 0, 0]
    assert rain[6:9].min() > 100 > 10 > rain[-1], "it rains from August to October, not in January"
    assert togo.places[0].lonlat == pytest.approx((1.42, 7.72), abs=0.01)
    nz = build("s2_nz", root=real)[0]
    assert nz.places[0].lonlat[1] == pytest.approx(-38.97, abs=0.1)
    spectrum = dict(zip(nz.raster("s2").sensor.names, nz.raster("s2").values.mean((0, 2, 3)).tolist(), strict=True))
    assert spectrum["B10"] < 0.01
    assert spectrum["B08"] > 3 * spectrum["B04"]
    ftw = build("ftw", root=real)[0]
    for name in ("s2-first", "s2-second"):
        red, green, blue, nir = ftw.raster(name).values.median(-1).values.median(-1).values[0].tolist()
        assert nir > 3 * red
        assert green > blue
    assert math.isclose(ftw.places[0].width_m, 5780)
    assert chips.SPLITS == ("all",)

"""A place from a STAC catalogue, on loopback: what is read is what the files hold, in the right units."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from datetime import UTC, datetime

import numpy as np
import pytest
import rasterio
import rasterio.warp
import torch
from affine import Affine
from stac_made import (
    CORNER,
    GRID,
    S2,
    SIZE,
    add,
    api,
    cog,
    collection,
    contract,
    expected,
    item,
    numbers,
    s2,
    square,
    static,
)

import everysat as es
from everysat import sensors
from everysat.io import catalogue, grid, remote, stac
from everysat.io.read import open_scene
from everysat.types import ALWAYS, ContractError, Place


def test_reading_a_place_gives_the_pixels_of_its_files(site):
    first = s2(site, "a", "2024-06-03T10:20:30.5Z")
    second = s2(site, "b", "2024-06-08T10:20:30Z", seed=7)
    s2(site, "late", "2024-07-01T00:00:00Z", seed=9)
    batch = es.read(square(), "2024-06", S2, source=api(site))
    layer = batch.raster("s2")
    assert layer.values.shape == (2, 2, 64, 64)
    assert layer.valid.all()
    for obs, made in enumerate((first, second)):
        for band, name in enumerate(("B04", "B08")):
            np.testing.assert_allclose(layer.values[obs, band], expected(made[name]), atol=1e-6)
    start = [datetime.fromtimestamp(t, UTC).isoformat()[:19] for t in layer.time_s[:, 0].tolist()]
    assert start == ["2024-06-03T10:20:30", "2024-06-08T10:20:30"]
    assert batch.places[0].geobox == square().geobox


def test_a_static_catalogue_gives_what_its_api_gives(site, tmp_path):
    s2(site, "a", "2024-06-03T10:20:30Z")
    s2(site, "b", "2025-06-03T10:20:30Z", seed=3)
    by_api = es.read(square(), "2024", S2, source=api(site))
    static(tmp_path, site.items)
    for source in (f"{site.url}/catalog.json", str(tmp_path / "catalog.json")):
        again = es.read(square(), "2024", S2, source=source)
        assert torch.equal(again.raster("s2").values, by_api.raster("s2").values)
        assert torch.equal(again.raster("s2").time_s, by_api.raster("s2").time_s)


def test_a_window_of_a_scene_is_a_crop_of_it(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    scene = open_scene(square(), "2024-06", S2, source=api(site))
    assert site.asked("B04.tif") <= 2, "metadata alone, which is in the first bytes"
    whole = scene.read().raster("s2")
    part = pickle.loads(pickle.dumps(scene)).read((slice(10, 40), slice(20, 64))).raster("s2")
    assert torch.equal(part.values, whole.values[..., 10:40, 20:64])


def test_the_real_scene_over_http_equals_its_files(site, real_scene):
    assets = {}
    for band in ("B02", "B04", "B08", "B05"):
        with rasterio.open(next(real_scene.glob(f"s2l1c/IMG_DATA/*_{band}.jp2"))) as file:
            assets[band] = cog(site.folder / f"{band}.tif", file.read(1), file.transform, file.crs)
    site.items.append(
        item(
            site.folder,
            site.url,
            "T33UUU",
            "sentinel-2-l1c",
            "2017-02-16T10:21:01Z",
            assets,
            **{"s2:processing_baseline": "02.04"},
        )
    )
    site.collections.append(collection("sentinel-2-l1c"))
    place = es.place((12.61, 52.49), size_m=1200)
    near = es.read(place, "2017-02-16", source=api(site), sensor="sentinel-2-l1c")
    files = sorted(real_scene.glob("s2l1c/IMG_DATA/*_B0[2458].jp2"))
    local = es.read(files, place=place, sensor="sentinel-2-l1c", processing_baseline="02.04")
    assert set(near.layers) == set(local.layers) == {"sentinel-2-l1c-10m", "sentinel-2-l1c-20m"}
    for name in near.layers:
        assert torch.equal(near.raster(name).values, local.raster(name).values)
        assert near.raster(name).valid.float().mean() > 0.99


def test_real_patches_over_http_equal_their_files(site, data_dir):
    path = sorted((data_dir / "satclip_s2").rglob("patch_445.tif"))[0]
    bands = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
    table = site.folder / "source.toml"
    table.write_text(
        f'stac = "{api(site)}"\n[collections.patches]\nsensor = "sentinel-2-l2a"\nprocessing_baseline = "00.00"\n'
        f"bands = {{ image = {bands} }}\n"
    )
    (site.folder / "patch.tif").write_bytes(path.read_bytes())
    site.items.append(
        item(site.folder, site.url, "p", "patches", "2020-05-01T00:00:00Z", {"image": site.folder / "patch.tif"})
    )
    site.collections.append(collection("patches"))
    got = es.read(es.place(path), "2020-05", source=table, sensor="sentinel-2-l2a", gsd_m=10).raster(
        "sentinel-2-l2a-10m"
    )
    with rasterio.open(path) as file:
        stored = file.read().astype(np.float32)
    assert got.sensor.names == tuple(bands)
    np.testing.assert_allclose(got.values[0].numpy()[stored > 0], (stored * np.float32(1e-4))[stored > 0], atol=1e-6)


@pytest.mark.parametrize("keys", [("red", "nir"), ("B04", "B08"), ("x", "y")])
def test_assets_are_found_by_key_by_common_name_or_by_band_name(site, keys):
    made = {key: numbers(SIZE, SIZE, seed=i) for i, key in enumerate(keys)}
    add(site, "a", "sentinel-2-l2a", "2024-06-03T10:20:30Z", {**made, "SCL": np.full((128, 128), 4, np.uint8)},
        **{"s2:processing_baseline": "05.09"})  # fmt: skip
    if keys[0] == "x":
        site.items[0]["assets"]["x"]["eo:bands"] = [{"name": "one", "common_name": "red"}]
        site.items[0]["assets"]["y"]["bands"] = [{"name": "B08"}]  # STAC 1.1
    layer = es.read(square(), "2024-06", S2, source=api(site)).raster("s2")
    np.testing.assert_allclose(layer.values[0, 0], expected(made[keys[0]]), atol=1e-6)
    np.testing.assert_allclose(layer.values[0, 1], expected(made[keys[1]]), atol=1e-6)


def test_pages_of_a_search_are_followed(site):
    site.page = 3
    for day in range(1, 11):
        s2(site, f"d{day}", f"2024-06-{day:02d}T10:00:00Z", bands=("B04",), seed=day)
    got = es.read(square(size=8), "2024-06", source=api(site), sensor="sentinel-2-l2a", bands=["B04"])
    assert len(got.raster("sentinel-2-l2a-10m").values) == 10


def test_what_is_not_there_is_not_asked_for(site):
    s2(site, "a", "2024-06-03T10:20:30Z", bands=("B02", "B04", "B08"))
    s2(site, "b", "2024-08-03T10:20:30Z")
    es.read(square(), "2024-06", S2, source=api(site))
    assert not site.asked("B02.tif")
    assert not site.asked("/b/")


def test_neighbouring_tiles_of_a_pass_are_one_observation(site):
    west = s2(site, "w", "2024-06-03T10:20:30Z", bands=("B04",))["B04"]
    east = numbers(SIZE, SIZE, seed=5)
    add(site, "e", "sentinel-2-l2a", "2024-06-03T10:20:44Z", {"B04": east, "SCL": np.full((128, 128), 4, np.uint8)},
        transform=GRID * Affine.translation(SIZE, 0), **{"s2:processing_baseline": "05.09"})  # fmt: skip
    place = square(x=330_000 + 10 * (SIZE - 32))
    layer = es.read(place, "2024-06", {"s2": contract("sentinel-2-l2a", "B04")}, source=api(site)).raster("s2")
    assert len(layer.values) == 1
    assert layer.valid.all()
    assert (layer.time_s[0, 1] - layer.time_s[0, 0]).item() == pytest.approx(15)
    both = np.concatenate([west[34:98, SIZE - 32 :], east[34:98, :32]], 1)
    np.testing.assert_allclose(layer.values[0, 0], both * 1e-4 - 0.1, atol=1e-6)


def test_later_processing_lies_on_top_and_gaps_are_filled_from_the_other(site):
    old = s2(site, "old", "2024-06-03T10:20:30Z", bands=("B04",), **{"s2:processing_baseline": "05.00"})["B04"]
    new = numbers(SIZE, SIZE, seed=4)
    new[:, :60] = 0
    scl = np.full((128, 128), 4, np.uint8)
    scl[:, :30] = 0
    add(
        site,
        "new",
        "sentinel-2-l2a",
        "2024-06-03T10:20:30Z",
        {"B04": new, "SCL": scl},
        **{"s2:processing_baseline": "05.10"},
    )
    layer = es.read(square(), "2024-06", {"s2": contract("sentinel-2-l2a", "B04")}, source=api(site)).raster("s2")
    assert len(layer.values) == 1
    assert layer.valid.all()
    np.testing.assert_allclose(layer.values[0, 0], expected(np.where(new > 0, new, old)), atol=1e-6)


def test_a_place_across_utm_zones_is_whole(site):
    """Two tiles in zones 33 and 34, made of longitude, that overlap by little; the place lies on the boundary at 18 degrees."""
    for zone in (33, 34):
        (x,), (y,) = rasterio.warp.transform("EPSG:4326", f"EPSG:326{zone}", [18.0], [50.0])
        transform = Affine(10, 0, round(x, -3) - (19_800 if zone == 33 else 200), 0, -10, round(y, -3) + 2000)
        cols, rows = np.meshgrid(np.arange(2000) + 0.5, np.arange(400) + 0.5)
        x, y = transform * (cols, rows)
        lon, _ = rasterio.warp.transform(f"EPSG:326{zone}", "EPSG:4326", x.ravel().tolist(), y.ravel().tolist())
        values = np.round((np.array(lon).reshape(x.shape) - 17.5) * 6000 + 1000).astype(np.uint16)
        add(site, f"z{zone}", "sentinel-2-l2a", f"2024-06-03T10:20:3{zone - 33}Z", {"B04": values, "SCL": np.full((400, 2000), 4, np.uint8)},
            transform=transform, crs=f"EPSG:326{zone}", **{"s2:processing_baseline": "05.09"})  # fmt: skip
    place = es.place((18.0, 50.0), size_m=1500)
    layer = es.read(place, "2024-06", {"s2": contract("sentinel-2-l2a", "B04")}, source=api(site)).raster("s2")
    assert layer.values.shape == (1, 1, 150, 150)
    assert layer.valid.all()
    lon, _ = grid.to_lonlat(place.geobox, np.arange(150) + 0.5, np.full(150, 75.5))
    np.testing.assert_allclose(layer.values[0, 0, 75], ((lon - 17.5) * 6000 + 1000) * 1e-4 - 0.1, atol=2e-4)


def test_a_place_across_the_antimeridian_is_whole(site):
    for name, west in (("e", 179.0), ("w", -180.0)):
        column = (np.arange(1000) + 0.5) / 1000
        values = np.broadcast_to((column if west > 0 else 1 + column).astype(np.float32), (1000, 1000)).copy()
        add(
            site,
            name,
            "copernicus-dem",
            None,
            {"dem": values},
            transform=Affine(1e-3, 0, west, 0, -1e-3, 1),
            crs="EPSG:4326",
        )
    place = es.place((179.99, 0.4, -179.99, 0.42), gsd_m=30)
    layer = es.read(place, None, source=api(site), sensor="copernicus-dem", gsd_m=30).raster("copernicus-dem-30m")
    assert layer.valid.all()
    row = layer.values[0, 0, 10].numpy()
    assert row.min() < 1 < row.max()
    assert (np.diff(row) > -1e-6).all(), "elevation made of longitude rises eastward, across the line"
    assert tuple(layer.time_s[0].tolist()) == ALWAYS


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ((179, 0, 181, 1), (-180, 0, -179.5, 1), True),
        ((179, 0, 181, 1), (179.5, 0, 180, 1), True),
        ((-180, 0, -179.9, 1), (179, 0, 180, 1), True),
        ((179, 0, 181, 1), (-178, 0, -177, 1), False),
        ((10, 0, 11, 1), (11.5, 0, 12, 1), False),
        ((10, 0, 11, 1), (10.5, 2, 12, 3), False),
    ],
)
def test_boxes_meet_across_the_antimeridian(one, other, meet):
    assert stac.touches(one, other) is stac.touches(other, one) is meet


def test_collections_without_dates_need_no_period_and_stand_beside_dated_ones(site):
    add(site, "dem", "cop-dem-glo-30", None, {"data": np.full((128, 128), 55.5, np.float32)},
        transform=Affine(30, 0, *[CORNER[0], 0, -30, CORNER[1]]))  # fmt: skip
    s2(site, "a", "2024-06-03T10:20:30Z")
    both = {**S2, "dem": contract("copernicus-dem", "elevation", gsd=30, dated=False)}
    batch = es.read(square(size=60), "2024-06", both, source=api(site))
    assert set(batch.layers) == {"s2", "dem"}
    assert (batch.raster("dem").values == 55.5).all()
    with pytest.raises(ValueError, match=r"period: collection sentinel-2-l2a has dates"):
        es.read(square(), None, S2, source=api(site))


@pytest.mark.parametrize(
    ("facts", "offset"),
    [
        ({"s2:processing_baseline": "05.09"}, -0.1),
        ({"s2:processing_baseline": "03.01"}, 0.0),
        ({"s2:processing_baseline": "04.00"}, -0.1),
        ({"s2:processing_baseline": None, "processing:baseline": "N0400"}, -0.1),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}, 0.0),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": False}, -0.1),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_the_offset_of_a_baseline_is_taken_off_once(site, facts, offset, in_file):
    """Also where the file itself, or the item's band metadata, name the same offset."""
    made = s2(site, "a", "2024-06-03T10:20:30Z", **facts)
    for key in ("B04", "B08"):
        site.items[0]["assets"][key]["raster:bands"] = [{"scale": 1e-4, "offset": -0.1, "nodata": 0}]
        if in_file:
            with rasterio.open(site.folder / "a" / f"{key}.tif", "r+", IGNORE_COG_LAYOUT_BREAK=True) as file:
                file.scales, file.offsets = (1e-4,), (-0.1,)
    layer = es.read(square(), "2024-06", S2, source=api(site)).raster("s2")
    np.testing.assert_allclose(layer.values[0, 0], expected(made["B04"], offset), atol=1e-6)


def test_an_unknown_baseline_of_late_is_an_error(site):
    s2(site, "a", "2024-06-03T10:20:30Z", **{"s2:processing_baseline": None})
    with pytest.raises(ContractError, match="processing baseline is unknown"):
        es.read(square(), "2024-06", S2, source=api(site))


@pytest.mark.parametrize(
    ("kind", "key", "dtype", "clear", "cloudy"),
    [
        ("sentinel-2-l2a", "SCL", np.uint8, (2, 4, 5, 6, 7, 11), (0, 1, 3, 8, 9, 10)),
        ("landsat-c2-l2", "qa_pixel", np.uint16, (21824, 21888, 1 << 6), (1, 22280, 21824 | 4, 21824 | 16, 21824 | 2)),
        ("hls2-s30", "Fmask", np.uint8, (0, 64, 192, 0b10000, 0b100000), (0b10, 0b100, 0b1000, 255)),
    ],
)
def test_clouds_are_not_valid(site, kind, key, dtype, clear, cloudy):
    codes = np.resize(np.array([*clear, *cloudy], dtype), (SIZE, SIZE))
    red = {"sentinel-2-l2a": "B04", "landsat-c2-l2": "red", "hls2-s30": "B04"}[kind]
    sensor, band = {
        "sentinel-2-l2a": ("sentinel-2-l2a", "B04"),
        "landsat-c2-l2": ("landsat-9-oli", "B4"),
        "hls2-s30": ("hls-s30", "B04"),
    }[kind]
    values = numbers(SIZE, SIZE) + np.uint16(7300 if kind == "landsat-c2-l2" else 0)
    values = values.astype(np.int16) if kind == "hls2-s30" else values
    gsd = sensors.get(sensor)[band].gsd_m
    add(site, "a", kind, "2024-06-03T10:20:30Z", {red: values, key: codes},
        transform=Affine(gsd, 0, CORNER[0], 0, -gsd, CORNER[1]), platform="landsat-9", **{"s2:processing_baseline": "05.09"})  # fmt: skip
    place = square(CORNER[0], CORNER[1], 64, gsd)
    asked = {"x": contract(sensor, band, gsd=gsd)}
    layer = es.read(place, "2024-06", asked, source=api(site)).raster("x")
    np.testing.assert_array_equal(layer.valid[0, 0].numpy(), np.isin(codes, clear)[:64, :64])
    assert es.read(place, "2024-06", asked, source=api(site), valid={}).raster("x").valid.all()
    table = {"SCL": "sentinel-2-scl", "qa_pixel": "landsat-qa-pixel", "Fmask": "hls-fmask"}[key]
    only = {table: (int(cloudy[1]),)}
    turned = es.read(place, "2024-06", asked, source=api(site), valid=only).raster("x").valid[0, 0].numpy()
    np.testing.assert_array_equal(turned, (codes == cloudy[1])[:64, :64])


def test_platforms_of_one_collection_are_different_sensors(site):
    for number, platform in enumerate(("landsat-8", "landsat-9")):
        bands = {
            "red": numbers(SIZE, SIZE, seed=number) + np.uint16(7300),
            "qa_pixel": np.full((SIZE, SIZE), 21824, np.uint16),
        }
        add(site, platform, "landsat-c2-l2", f"2024-06-0{number + 1}T10:00:00Z", bands,
            transform=Affine(30, 0, CORNER[0], 0, -30, CORNER[1]), platform=platform)  # fmt: skip
    place = square(CORNER[0], CORNER[1], 32, 30)
    batch = es.read(place, "2024-06", source=api(site), sensor=["landsat-8-oli", "landsat-9-oli"], bands=["B4"])
    assert {name: len(batch.raster(name).values) for name in batch.layers} == {
        "landsat-8-oli-30m": 1,
        "landsat-9-oli-30m": 1,
    }


def test_observations_without_a_clear_pixel_are_left_out(site):
    s2(site, "cloud", "2024-06-01T10:00:00Z", scl=9)
    s2(site, "clear", "2024-06-03T10:00:00Z", scl=4)
    assert len(es.read(square(), "2024-06", S2, source=api(site)).raster("s2").values) == 1


def test_radar_in_linear_power_becomes_decibel_and_orbits_are_told_apart(site):
    power = {}
    for number, orbit in enumerate(("ascending", "descending")):
        draw = np.random.default_rng(number)
        power[orbit] = {key: draw.uniform(0.01, 0.5, (SIZE, SIZE)).astype(np.float32) for key in ("vv", "vh")}
        power[orbit]["vv"][40, 40] = -32768  # no data
        power[orbit]["vv"][41, 41] = 0  # noise removal left nothing
        add(
            site,
            orbit,
            "sentinel-1-rtc",
            f"2024-06-0{number + 1}T05:00:00Z",
            power[orbit],
            nodata=-32768,
            **{"sat:orbit_state": orbit},
        )
    asked = {name: contract("sentinel-1-grd", "VV", "VH", "ratio") for name in ("s1", "s1-asc", "s1-des")}
    batch = es.read(square(), "2024-06", asked, source=api(site))
    assert [len(batch.raster(name).values) for name in asked] == [2, 1, 1]
    for name, orbit in (("s1-asc", "ascending"), ("s1-des", "descending")):
        layer = batch.raster(name)
        seen = power[orbit]["vv"][34:98, 30:94] > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            vv, vh = (10 * np.log10(power[orbit][key][34:98, 30:94]) for key in ("vv", "vh"))
        np.testing.assert_array_equal(layer.valid[0, 0].numpy(), seen)
        np.testing.assert_array_equal(layer.valid[0, 2].numpy(), seen)
        assert not seen.all()
        np.testing.assert_allclose(layer.values[0, 0].numpy()[seen], vv[seen], atol=1e-4)
        np.testing.assert_allclose(layer.values[0, 1].numpy(), vh, atol=1e-4)
        np.testing.assert_allclose(layer.values[0, 2].numpy()[seen], (vv / vh)[seen], rtol=1e-4)


def test_radar_is_averaged_in_power(site):
    power = np.random.default_rng(0).uniform(0.001, 1, (SIZE, SIZE)).astype(np.float32)
    add(site, "a", "sentinel-1-rtc", "2024-06-01T05:00:00Z", {"vv": power})
    place = square(*CORNER, 64, 20)
    layer = es.read(place, "2024-06", source=api(site), sensor="sentinel-1-grd", bands=["VV"], gsd_m=20).raster(
        "sentinel-1-grd-20m"
    )
    mean = power[:128, :128].reshape(64, 2, 64, 2).mean((1, 3))
    np.testing.assert_allclose(layer.values[0, 0], 10 * np.log10(mean), atol=1e-3)


@pytest.mark.parametrize("package", ["pystac_client", "requests"])
def test_missing_packages_are_named(site, monkeypatch, package):
    s2(site, "a", "2024-06-03T10:20:30Z")
    monkeypatch.setattr(remote, "_LOCAL", threading.local())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'everysat\[stac\]'"):
        es.read(square(), "2024-06", S2, source=api(site))


def test_what_is_no_catalogue_is_said(site):
    (site.folder / "page.json").write_text("<html>")
    (site.folder / "other.json").write_text('{"type": "Nothing"}')
    for name in ("page.json", "other.json"):
        with pytest.raises(OSError, match=r"does not answer as a STAC catalogue should"):
            es.read(square(), "2024-06", S2, source=f"{site.url}/{name}")
    with pytest.raises(FileNotFoundError):
        es.read(square(), "2024-06", S2, source=f"{site.url}/absent.json")


def test_nothing_found_says_what_was_looked_for(site):
    s2(site, "a", "2024-06-03T10:20:30Z", **{"eo:cloud_cover": 80.0})
    for period, place in (("2023-01", square()), ("2024-06", square(x=500_000))):
        with pytest.raises(
            LookupError,
            match=r"nothing of sentinel-2-l2a .*collections sentinel-2-l2a\) for .* at EPSG:32633, longitude.*Widen the period",
        ):
            es.read(place, period, S2, source=api(site))
    with pytest.raises(LookupError, match=r"1 scenes are cloudier than 30 %: raise max_cloud_percent"):
        es.read(square(), "2024-06", S2, source=api(site), max_cloud_percent=30)
    with pytest.raises(LookupError, match=r"has none of modis; it has sentinel-2-l2a"):
        es.read(square(), "2024-06", source=api(site), sensor="modis")


def test_wrong_arguments_are_named(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    for message, kind, more in (
        ("is no source", LookupError, {"source": "earth-serch"}),
        ("Did you mean earth-search", LookupError, {"source": "earth-serch"}),
        ("order=.* is for files", ValueError, {"order": ["B04"]}),
        ("max_cloud_percent=120", ValueError, {"max_cloud_percent": 120}),
        ("names: no layer is called x", ValueError, {"names": {"x": "y"}}),
        ("has no mask 'SCL'. Did you mean|has no mask 'SCL'", ValueError, {"valid": {"SCL": (4,)}}),
    ):
        with pytest.raises(kind, match=message):
            es.read(square(), "2024-06", S2, **{"source": api(site), **more})
    with pytest.raises(ValueError, match="say what to read of a place"):
        es.read(square(), "2024-06", source=api(site))
    with pytest.raises(ValueError, match="period='2024' is for a place"):
        es.read("x.tif", "2024")
    with pytest.raises(ValueError, match="has no geobox"):
        es.read(Place(10, 10), "2024", S2, source=api(site))


def test_an_item_without_its_cloud_mask_is_an_error(site):
    s2(site, "a", "2024-06-03T10:20:30Z", scl=None)
    with pytest.raises(
        ValueError, match=r"a of collection sentinel-2-l2a lack the cloud mask SCL or scl|lack the cloud mask SCL"
    ):
        es.read(square(), "2024-06", S2, source=api(site))
    assert es.read(square(), "2024-06", S2, source=api(site), valid={}).raster("s2").valid.all()


def test_a_lacking_band_is_an_error(site):
    s2(site, "a", "2024-06-03T10:20:30Z", bands=("B04",))
    with pytest.raises(ContractError, match="lack B08 of sentinel-2-l2a"):
        es.read(square(), "2024-06", S2, source=api(site))


@pytest.mark.parametrize("name", catalogue.names())
def test_described_sources_name_tables_and_bands_that_exist(name):
    source = catalogue.load(name)
    assert source.stac.startswith("https://")
    for each in source.collections:
        for some in each.sensors.values():
            for sensor in some:
                assert sensor.name in sensors.names()
                assert all(band in sensor for bands in each.bands.values() for band in bands)
    assert {"earth-search", "planetary-computer"} <= set(catalogue.names())


def test_memory_is_asked_for_before_it_is_taken(site, monkeypatch):
    s2(site, "a", "2024-06-03T10:20:30Z")
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2)
    with pytest.raises(MemoryError, match="Read a smaller place or a shorter period"):
        es.read(square(), "2024-06", S2, source=api(site))

"""A place from a STAC catalogue, on loopback: what is read is what the files hold, and what goes wrong is said."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import rasterio.warp
import shapely
import torch
from affine import Affine
from loopback import Loopback, serving
from odc.geo.geobox import GeoBox
from stac_made import cog, collection, item, static

import everysat as es
from everysat import sensors
from everysat.io import cache, catalogue, grid, remote, stac
from everysat.io.fields import places, read_each
from everysat.io.plane import HANDLES
from everysat.io.read import open_scene
from everysat.types import ALWAYS, ContractError, Input, Place

UTM = "EPSG:32633"
CORNER = (330_000.0, 5_822_040.0)
SIZE = 256
GRID = Affine(10, 0, CORNER[0], 0, -10, CORNER[1])


@pytest.fixture(autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and little patience."""
    monkeypatch.setenv("EVERYSAT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.3)
    remote._TOKENS.clear()
    stac._OPEN.clear()
    HANDLES.forget()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Loopback]:
    with serving(tmp_path) as made:
        yield made


def square(x: float = 330_300, y: float = 5_821_700, size: int = 64, gsd: float = 10, crs: str = UTM) -> Place:
    return grid.place_of(GeoBox((size, size), Affine(gsd, 0, x, 0, -gsd, y), crs))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1100, 4000, shape).astype(np.uint16)


def add(
    site: Loopback, name: str, kind: str, when, bands, *, transform=GRID, crs=UTM, nodata=None, **facts
) -> dict[str, np.ndarray]:
    """An item of ``bands`` {asset: values} on the server; returns the values."""
    assets = {}
    for key, values in bands.items():
        scale = SIZE // values.shape[-1] or 1
        assets[key] = cog(
            site.folder / name / f"{key}.tif", values, transform * Affine.scale(scale), crs, nodata=nodata
        )
    site.items.append(item(site.folder, site.url, name, kind, when, assets, **facts))
    if kind not in {c["id"] for c in site.collections}:
        site.collections.append(collection(kind))
    return dict(bands)


def s2(site: Loopback, name: str, when: str, *, seed: int = 0, bands=("B04", "B08"), scl: int | None = 4, **facts):
    made = {band: numbers(SIZE, SIZE, seed=seed + i) for i, band in enumerate(bands)}
    if scl is not None:
        made["SCL"] = np.full((SIZE // 2, SIZE // 2), scl, np.uint8)
    return add(site, name, "sentinel-2-l2a", when, made, **{"s2:processing_baseline": "05.09", **facts})


def expected(values: np.ndarray, offset: float = -0.1, rows=slice(34, 98), cols=slice(30, 94)) -> np.ndarray:
    return values[rows, cols] * 1e-4 + offset


def contract(sensor: str, *bands: str, gsd: float = 10, dated: bool = True) -> Input:
    chosen = sensors.get(sensor).select(bands)
    return Input(chosen, gsd, (0.0,) * len(bands), (1.0,) * len(bands), dated)


LAST = (slice(150, 214), slice(160, 224))
"""Rows and columns of :func:`last`, in the last tile of each file, which comes with no header."""


def last() -> Place:
    return square(331_600, 5_820_540)


S2 = {"s2": contract("sentinel-2-l2a", "B04", "B08")}


def api(site: Loopback) -> str:
    return f"{site.url}/api"


# What is read


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


# Passes, tiles, zones


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


# Units and masks


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


# Many places


def test_fields_of_a_layer_are_read_one_after_another(site, tmp_path):
    made = s2(site, "a", "2024-06-03T10:20:30Z")
    corners = [(330_060 + 60 * (i % 30), 5_821_980 - 60 * (i // 30)) for i in range(300)]
    frame = geopandas.GeoDataFrame(geometry=[shapely.box(x + 1, y - 59, x + 59, y - 1) for x, y in corners], crs=UTM)
    frame.to_file(tmp_path / "fields.gpkg", layer="fields")
    fields = places(tmp_path / "fields.gpkg", gsd_m=10)
    assert len(fields) == 300
    some = fields[:40]
    requests = []
    for at, (each, batch) in enumerate(zip(some, read_each(some, "2024-06", S2, source=api(site)), strict=True)):
        x, y = corners[at]
        row, col = round((CORNER[1] - y) / 10), round((x - CORNER[0]) / 10)
        got = batch.raster("s2").values[0, 0]
        assert batch.places == (each,)
        np.testing.assert_allclose(
            got, expected(made["B04"], -0.1, slice(row, row + 6), slice(col, col + 6)), atol=1e-6
        )
        requests.append(len(site.log))
    assert site.asked("/search") <= 2, "neighbours share a search"
    assert requests[-1] < 30, "and their files"


def test_fields_are_read_as_they_are_asked_for(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    far = [square(x=330_000 + 100 * i, size=10) for i in range(20)]
    read = read_each(far, "2024-06", S2, source=api(site), ahead=2)
    assert not site.log
    next(read)
    read.close()


def test_fields_without_observation_are_counted(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    some = [square(size=10), square(x=700_000, size=10), square(x=331_000, size=10)]
    with pytest.warns(UserWarning, match="1 of 3 places have no observation: nothing of sentinel-2-l2a was found"):
        batches = list(read_each(some, "2024-06", S2, source=api(site)))
    assert [sorted(b.layers) for b in batches] == [["s2"], [], ["s2"]]
    with pytest.raises(LookupError, match="nothing of sentinel-2-l2a"):
        list(read_each(some[1:2], "2024-06", S2, source=api(site)))


def test_points_of_a_layer_become_squares_in_their_own_zones(tmp_path):
    points = geopandas.GeoDataFrame(geometry=[shapely.Point(11.9, 50), shapely.Point(12.1, 50)], crs="EPSG:4326")
    points.to_file(tmp_path / "p.geojson")
    made = places(tmp_path / "p.geojson", size_m=500)
    assert [str(p.geobox.crs) for p in made] == ["EPSG:32632", "EPSG:32633"]
    assert [p.width_m for p in made] == [500, 500]
    with pytest.raises(ValueError, match="give size_m"):
        places(points)
    with pytest.raises(ValueError, match="feature 1 of the layer has no geometry"):
        places(geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1), None], crs=UTM))


# What goes wrong


@pytest.mark.parametrize("plan", [[500], [503, 502, 429], ["cut"], ["short"], ["slow"], ["cut", 500, "short"]])
@pytest.mark.parametrize("where", ["B04.tif", "/api/search", "/api"])
def test_what_passes_is_tried_again(site, plan, where):
    made = s2(site, "a", "2024-06-03T10:20:30Z")
    site.delay_s = 0.5
    site.plans[where] = [p for p in plan if p != "short" or where == "B04.tif"]
    layer = es.read(square(), "2024-06", S2, source=api(site)).raster("s2")
    np.testing.assert_allclose(layer.values[0, 0], expected(made["B04"]), atol=1e-6)
    assert not site.plans[where]


def test_a_transfer_that_breaks_among_the_pixels_is_tried_again(site):
    made = s2(site, "a", "2024-06-03T10:20:30Z")
    scene = open_scene(last(), "2024-06", S2, source=api(site))
    site.plans["B04.tif"] = ["cut", 500, "short"]
    np.testing.assert_allclose(scene.read().raster("s2").values[0, 0], expected(made["B04"], -0.1, *LAST), atol=1e-6)
    assert not site.plans["B04.tif"]


@pytest.mark.parametrize(
    ("plan", "kind", "says"),
    [
        (500, ConnectionError, r"B04.tif: the server answers 500 \(made to fail\) \(5 tries\). Try again later"),
        ("cut", ConnectionError, r"B04.tif could not be fetched whole .*\(5 tries\)"),
        ("short", ConnectionError, r"B04.tif was cut off after \d+ bytes \(5 tries\)"),
        ("slow", TimeoutError, r"B04.tif did not answer within 0.3 s \(5 tries\)"),
        (404, FileNotFoundError, "B04.tif: the server answers 404"),
        (403, PermissionError, "B04.tif: the server answers 403 .*expired; renew it"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_stays_wrong_is_said(site, plan, kind, says, late):
    s2(site, "a", "2024-06-03T10:20:30Z")
    site.delay_s = 0.4
    if not late:
        site.plans["B04.tif"] = [plan] * 5
        with pytest.raises(kind, match=says):
            open_scene(last(), "2024-06", S2, source=api(site))
        return
    scene = open_scene(last(), "2024-06", S2, source=api(site))
    site.plans["B04.tif"] = [plan] * 5
    with pytest.raises(kind, match=says):
        scene.read()


def test_a_search_that_fails_is_said(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    site.plans["/api/search"] = [500] * 5
    with pytest.raises(ConnectionError, match=r"/api/search: the server answers 500"):
        es.read(square(), "2024-06", S2, source=api(site))
    site.plans["/api/search"] = [401]
    with pytest.raises(PermissionError, match="token is missing, wrong or has expired"):
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


def test_a_file_that_is_no_raster_is_named(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    (site.folder / "a" / "B04.tif").write_bytes(b"<html>not found</html>")
    with pytest.raises(OSError, match=r"a/B04.tif is no raster that can be read"):
        es.read(square(), "2024-06", S2, source=api(site))
    content = (site.folder / "a" / "B08.tif").read_bytes()
    (site.folder / "a" / "B04.tif").write_bytes(content[:16] + b"\xff" * (len(content) - 16))
    HANDLES.forget()
    with pytest.raises(OSError, match=r"B04\.tif"):
        es.read(square(), "2024-06", S2, source=f"{api(site)}/")


# Tokens


def issue(site: Loopback, token: str, seconds: float) -> None:
    until = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")
    site.issued = lambda: {"token": f"sig={token}", "msft:expiry": until}


@pytest.fixture
def signed(site: Loopback) -> Path:
    table = site.folder / "source.toml"
    table.write_text(
        f'stac = "{api(site)}"\nsign = {{ host = "127.0.0.1", token = "{site.url}/sas/{{account}}/{{container}}" }}\n'
        '[collections.sentinel-2-l2a]\nsensor = "sentinel-2-l2a"\nmask = { asset = "SCL", sensor = "sentinel-2-scl" }\n'
    )
    site.token = "first"
    issue(site, "first", 3600)
    return table


def test_files_are_signed_with_one_token_a_container(site, signed):
    made = s2(site, "a", "2024-06-03T10:20:30Z")
    layer = es.read(square(), "2024-06", S2, source=signed).raster("s2")
    np.testing.assert_allclose(layer.values[0, 0], expected(made["B04"]), atol=1e-6)
    assert [path for path in site.log if path.startswith("/sas")] == ["/sas/127/a"]


def test_tokens_are_renewed_before_they_expire_and_after_they_did(site, signed):
    s2(site, "a", "2024-06-03T10:20:30Z")
    issue(site, "first", 30)  # less than a minute: not to be relied on for long
    scene = open_scene(square(), "2024-06", S2, source=signed)
    issue(site, "second", 3600)
    site.token = "second"
    assert scene.read().raster("s2").valid.all()
    site.token = "third"  # revoked, although it should still hold
    issue(site, "third", 3600)
    assert scene.read((slice(0, 64), slice(0, 64))).raster("s2").valid.all()
    whole = es.read(square(x=331_500), "2024-06", S2, source=signed)
    assert whole.raster("s2").valid.all()


def test_what_is_no_token_is_said(site, signed):
    s2(site, "a", "2024-06-03T10:20:30Z")
    site.issued = lambda: {"error": "no"}
    with pytest.raises(OSError, match=r"/sas/127/a was asked for a token and did not give one"):
        es.read(square(), "2024-06", S2, source=signed)


def test_a_token_that_is_refused_twice_is_said_and_not_shown(site, signed):
    s2(site, "a", "2024-06-03T10:20:30Z")
    site.token = "other"
    with pytest.raises(PermissionError, match=r"403.*expired") as caught:
        es.read(square(), "2024-06", S2, source=signed)
    assert "first" not in str(caught.value)


def test_headers_come_from_the_environment_and_go_to_the_catalogue_alone(site, monkeypatch, tmp_path):
    s2(site, "a", "2024-06-03T10:20:30Z")
    table = site.folder / "source.toml"
    with serving(tmp_path) as files:
        for asset in site.items[0]["assets"].values():
            asset["href"] = asset["href"].replace(site.url, files.url)
        table.write_text(
            f'stac = "{api(site)}"\nheaders = {{ Authorization = "Bearer ${{MY_TOKEN}}" }}\n'
            '[collections.sentinel-2-l2a]\nsensor = "sentinel-2-l2a"\n'
        )
        with pytest.raises(ValueError, match="environment variable MY_TOKEN, which is not set"):
            catalogue.load(table)
        monkeypatch.setenv("MY_TOKEN", "secret")
        assert es.read(square(), "2024-06", S2, source=table).raster("s2").valid.all()
        assert site.authorised == site.log
        assert files.log
        assert not files.authorised


# The cache


def test_what_was_read_is_not_asked_for_again(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    first = es.read(square(), "2024-06", S2, source=api(site))
    site.log.clear()
    HANDLES.forget()
    again = es.read(square(), "2024-06", S2, source=api(site))
    assert torch.equal(first.raster("s2").values, again.raster("s2").values)
    assert not site.asked(".tif")


def test_a_spoilt_block_is_fetched_again(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    first = es.read(square(), "2024-06", S2, source=api(site))
    HANDLES.forget()
    for path in cache.folder().glob("*.tif"):
        path.write_bytes(bytes(path.stat().st_size))
    again = es.read(square(), "2024-06", S2, source=api(site))
    assert torch.equal(first.raster("s2").values, again.raster("s2").values)


def test_the_cache_keeps_to_its_limit(site, monkeypatch):
    monkeypatch.setenv("EVERYSAT_CACHE_GB", "0.0005")
    made = [s2(site, f"d{day}", f"2024-06-{day:02d}T10:00:00Z", seed=day) for day in range(1, 9)]
    layer = es.read(square(size=200), "2024-06", S2, source=api(site)).raster("s2")
    for obs, values in enumerate(made):
        np.testing.assert_allclose(
            layer.values[obs, 1], expected(values["B08"], -0.1, slice(34, 234), slice(30, 230)), atol=1e-6
        )
    used = sum(os.stat(path).st_blocks * 512 for path in cache.folder().iterdir())
    assert used <= 0.0005e9 + 2 * 16 * cache.BLOCK
    for wrong in ("0", "many", "-1"):
        monkeypatch.setenv("EVERYSAT_CACHE_GB", wrong)
        with pytest.raises(ValueError, match="EVERYSAT_CACHE_GB"):
            cache.limit_bytes()


def test_a_file_that_changed_on_its_server_is_noticed(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    scene = open_scene(last(), "2024-06", S2, source=api(site))
    path = site.folder / "a" / "B04.tif"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(OSError, match="was replaced on its server"):
        scene.read()
    HANDLES.forget()
    assert es.read(last(), "2024-06", S2, source=api(site)).raster("s2").valid.all()


def test_a_forked_process_reads_too(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    scene = open_scene(last(), "2024-06", S2, source=api(site))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(_pixels, [scene] * 4)
    assert all(np.array_equal(each, scene.read().raster("s2").values.numpy()) for each in found)


def _pixels(scene):
    return scene.read().raster("s2").values.numpy()


def test_threads_share_one_download(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    scene = open_scene(square(), "2024-06", S2, source=api(site))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: scene.read().raster("s2").values, range(8)))
    assert all(torch.equal(found[0], each) for each in found)
    assert site.asked("B04.tif") <= 3


# Layouts of TIFF

LAYOUTS = {
    "strips": {},
    "tiles": {"tiled": True, "blockxsize": 64, "blockysize": 32},
    "bigtiff": {"tiled": True, "blockxsize": 64, "blockysize": 64, "BIGTIFF": "YES", "compress": "lzw", "predictor": 2},
    "big-endian": {"ENDIANNESS": "BIG", "tiled": True, "blockxsize": 64, "blockysize": 64},
    "one band after another": {
        "interleave": "band",
        "tiled": True,
        "blockxsize": 64,
        "blockysize": 64,
        "compress": "deflate",
    },
    "band by band in strips": {"interleave": "band"},
    "sparse": {"SPARSE_OK": True, "tiled": True, "blockxsize": 64, "blockysize": 64, "nodata": 0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_any_tiff_over_http_equals_the_file(site, layout, masked):
    values = np.random.default_rng(0).integers(1, 255, (3, 300, 417)).astype(np.uint16)
    values[:, :128, :128] = 0
    path = site.folder / "x.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(
        path, "w", driver="GTiff", count=3, height=300, width=417, dtype="uint16", crs=UTM, transform=GRID, **LAYOUTS[layout]
    ) as file:  # fmt: skip
        file.write(values)
        if masked:
            file.write_mask(np.arange(300 * 417).reshape(300, 417) % 7 > 0)
    far = remote.RemoteDataset(f"{site.url}/x.tif")
    with rasterio.open(path) as near:
        for rows, cols in (((0, 10), (0, 10)), ((120, 300), (100, 417)), ((299, 300), (416, 417))):
            window = rasterio.windows.Window.from_slices(rows, cols)
            for band in (1, 2, 3):
                np.testing.assert_array_equal(far.read(band, window=window), near.read(band, window=window))
                np.testing.assert_array_equal(far.read_masks(band, window=window), near.read_masks(band, window=window))


def test_other_formats_over_http_are_fetched_whole(site, real_scene):
    path = next(real_scene.glob("s2l1c/IMG_DATA/*_B01.jp2"))
    (site.folder / "b.jp2").write_bytes(path.read_bytes())
    far = remote.RemoteDataset(f"{site.url}/b.jp2")
    with rasterio.open(path) as near:
        window = rasterio.windows.Window(0, 0, near.width, near.height)
        np.testing.assert_array_equal(far.read(1, window=window), near.read(1))


def test_files_on_servers_are_read_like_files(site):
    made = s2(site, "S2A_MSIL2A_20240603T102030_N0509", "2024-06-03T10:20:30Z")
    url = f"{site.url}/S2A_MSIL2A_20240603T102030_N0509/B04.tif"
    layer = es.read(url, sensor="sentinel-2-l2a", processing_baseline="05.09").raster("sentinel-2-l2a-10m")
    np.testing.assert_allclose(layer.values[0, 0], made["B04"] * 1e-4 - 0.1, atol=1e-6)


def test_public_buckets_are_reached_by_their_web_address():
    assert remote.address("gs://bucket/b.tif") == "https://storage.googleapis.com/bucket/b.tif"
    assert remote.address("s3://bucket/a/b.tif") == "https://bucket.s3.amazonaws.com/a/b.tif"
    path = remote.address("https://x/y.tif", sign="https://t/{account}", version="2024")
    assert remote.parts(path) == ("https://x/y.tif", {"sign": "https://t/{account}", "version": "2024"})


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


def test_pauses_grow_and_a_server_may_ask_for_longer_ones(site, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(remote, "BACKOFF_S", 1.0)
    (site.folder / "x").write_bytes(b"x")
    site.plans["/x"] = [503] * 4
    assert remote.request(f"{site.url}/x")[0] == b"x"
    waits = [p for p in pauses if p >= 0.5]
    assert len(waits) == 4
    assert all(2**i * 0.5 <= wait <= 2**i * 1.5 for i, wait in enumerate(waits))
    assert math.isclose(remote.LONGEST_S, 30)

"""Servers on loopback that fail, break off, stay silent and refuse; the cache; and every layout of TIFF over ranges."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.warp
import torch
from loopback import Loopback, serving
from stac_made import (
    GRID,
    LAST,
    S2,
    UTM,
    api,
    expected,
    last,
    s2,
    square,
)

import everysat as es
from everysat.io import cache, catalogue, remote
from everysat.io.plane import HANDLES
from everysat.io.read import open_scene


@pytest.mark.parametrize("plan", [[500], [503, 502, 429], ["cut"], ["short"], ["slow"], ["cut", 500, "short"]])
@pytest.mark.parametrize("where", ["B04.tif", "/api/search", "/api"])
def test_what_passes_is_tried_again(site, plan, where, monkeypatch):
    made = s2(site, "a", "2024-06-03T10:20:30Z")
    if "slow" in plan:
        monkeypatch.setattr(remote, "TIMEOUT_S", 0.3)
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
def test_what_stays_wrong_is_said(site, plan, kind, says, late, monkeypatch):
    s2(site, "a", "2024-06-03T10:20:30Z")
    site.delay_s = 0.4
    patience = 0.3 if plan == "slow" else 10.0
    if not late:
        monkeypatch.setattr(remote, "TIMEOUT_S", patience)
        site.plans["B04.tif"] = [plan] * 5
        with pytest.raises(kind, match=says):
            open_scene(last(), "2024-06", S2, source=api(site))
        return
    scene = open_scene(last(), "2024-06", S2, source=api(site))
    monkeypatch.setattr(remote, "TIMEOUT_S", patience)
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
    assert site.asked("/sas") > 1
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

"""The Landsat series: sensors and dates from names, stored scale, clouds and gaps not valid."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from everysat.data import colorado
from everysat.data.colorado import build
from everysat.data.split import leaks

SIZE = 12
DATES = {"LT5": ["2008110", "2009142", "2010001"], "LE7": ["2008118", "2009150", "2009160", "2012366"]}


def numbers(scene: str) -> dict[str, np.ndarray]:
    """Bands and mask of a date. The west is cloudy, on the first Landsat 7 date all is gap; one pixel saturates, one has no data."""
    rng = np.random.default_rng(int(scene[9:16]))
    bands = {f"b{b}": (1000 * b + rng.integers(0, 500, (SIZE, SIZE))).astype("int16") for b in (3, 4, 5)}
    fmask = np.zeros((SIZE, SIZE), "uint8")
    fmask[:, :2] = 4
    fmask[0] = 1
    fmask[1] = 3
    if scene[9:16] == "2008118":
        fmask[:] = 255
    bands["b3"][11, 11], bands["b4"][11, 10] = 16000, -9999
    return {**bands, "fmask": fmask}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lsts")
    for letters, days in DATES.items():
        for day in days:
            scene = f"{letters}035032{day}EDC00"
            (root / scene).mkdir()
            for name, values in numbers(scene).items():
                profile = {"driver": "GTiff", "count": 1, "height": SIZE, "width": SIZE, "dtype": values.dtype}
                nodata = {} if name == "fmask" else {"nodata": -9999}
                place = {"crs": "EPSG:32613", "transform": from_origin(336375, 4462425, 30, 30)}
                with rasterio.open(root / scene / f"{scene}_{name}.tif", "w", **profile, **place, **nodata) as file:
                    file.write(values, 1)
    return root


def day(stamp: str) -> float:
    return datetime.strptime(stamp + "+0000", "%Y%j%z").replace(tzinfo=UTC).timestamp()


def test_two_sensors_in_reflectance_at_their_days(folder):
    tile = build(root=folder, tile_m=360)[0]
    assert {n: (r.sensor.name, r.sensor.names, r.gsd_m) for n, r in tile.layers.items()} == {
        "l5": ("landsat-5-tm", ("B3", "B4", "B5"), 30),
        "l7": ("landsat-7-etm", ("B3", "B4", "B5"), 30),
    }
    l5, l7 = tile.raster("l5"), tile.raster("l7")
    assert l5.time_s.tolist() == [[day(d), day(d) + 86400] for d in DATES["LT5"]]
    assert l7.time_s[:, 0].tolist() == [day(d) for d in DATES["LE7"][1:]]  # nothing is seen on the first
    raw = numbers("LT50350322009142EDC00")
    expected = np.stack([raw[b] for b in ("b3", "b4", "b5")]) * 1e-4
    np.testing.assert_allclose(l5.values[1][l5.valid[1]], expected[l5.valid[1].numpy()], rtol=1e-5)
    hidden = np.zeros((3, SIZE, SIZE), bool)
    hidden[:, 1:, :2] = hidden[:, 1] = True
    hidden[0, 11, 11] = hidden[1, 11, 10] = True
    np.testing.assert_array_equal(~l5.valid[1], hidden)


def test_what_counts_as_clear_can_be_chosen(folder):
    snow = build(root=folder, tile_m=360, clear=[0, 1, 3])[0].raster("l5")
    assert snow.valid[0, :, 1].all()
    water = build(root=folder, tile_m=360, clear=[1])[0].raster("l5")
    assert water.valid[0, :, 0].all()
    assert not water.valid[0, :, 1:].any()
    with pytest.raises(ValueError, match=r"clear=\[7\] must be some of the codes"):
        build(root=folder, clear=[7])


def test_dates_are_limited_evenly_or_at_random_by_tile(folder):
    every = build(root=folder, tile_m=120)
    even = build(root=folder, tile_m=120, max_dates=2)
    assert len(every) == 9
    assert {n: len(r.row) for n, r in even[4].layers.items()} == {"l5": 2, "l7": 2}
    assert torch.equal(even[4].raster("l7").time_s, every[4].raster("l7").time_s[:2])
    draws = build(root=folder, tile_m=120, max_dates=1, dates="random")
    chosen = [draws[i].raster("l7").time_s[0, 0].item() for i in range(9)]
    assert len(set(chosen)) > 1
    assert chosen == [draws[i].raster("l7").time_s[0, 0].item() for i in range(9)]
    again = build(root=folder, tile_m=120, max_dates=1, dates="random", seed=1)
    assert chosen != [again[i].raster("l7").time_s[0, 0].item() for i in range(9)]
    with pytest.raises(LookupError, match="dates='randm' is unknown"):
        build(root=folder, dates="randm")
    with pytest.raises(ValueError, match="max_dates=0"):
        build(root=folder, max_dates=0)


def test_parts_share_no_ground(folder):
    parts = {p: build(root=folder, tile_m=60, block_m=120, part=p) for p in ("train", "val", "test")}
    outlines = [shape for part in parts.values() for shape in part.footprints()]
    counts = np.cumsum([0, *map(len, parts.values())])
    assert counts[-1] == 36
    split = {n: np.arange(a, b) for n, a, b in zip(parts, counts, counts[1:], strict=False)}
    assert leaks(outlines, split) == []


def test_what_is_not_there_or_not_right_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"L\*/\*\.tif is missing"):
        build(root=tmp_path)
    with pytest.raises(ValueError, match="tile_m=100 must be a multiple of 30 m"):
        build(root=folder, tile_m=100)
    with pytest.raises(LookupError, match="no variants"):
        build("l5", root=folder)
    with pytest.raises(IndexError, match="outside a dataset of 1"):
        build(root=folder, tile_m=360)[1]


@pytest.fixture(scope="module")
def real():
    try:
        colorado.folder()
    except FileNotFoundError as error:
        pytest.skip(f"needs the series: {error}")
    return build(tile_m=1830)[0]


def test_the_real_series_is_green_in_summer_by_both_sensors(real):
    summer = {}
    for name in ("l5", "l7"):
        r = real.raster(name)
        assert len(r.row) > 30
        assert 0 < r.values[r.valid].min() < r.values[r.valid].max() < 1
        red, nir = r.values[:, 0], r.values[:, 1]
        seen = r.valid.all(1).flatten(1)
        ndvi = ((nir - red) / (nir + red)).flatten(1)
        month = [datetime.fromtimestamp(t, UTC).month for t in r.time_s[:, 0].tolist()]
        clear = [float(ndvi[i][seen[i]].median()) for i in range(len(month)) if month[i] in (7, 8) and seen[i].any()]
        bare = [float(ndvi[i][seen[i]].median()) for i in range(len(month)) if month[i] == 4 and seen[i].any()]
        summer[name] = float(np.median(clear))
        assert summer[name] > 0.65 > 0.5 > np.median(bare)
    assert abs(summer["l5"] - summer["l7"]) < 0.08


def test_no_date_of_landsat_7_is_without_gaps(real):
    l5, l7 = (real.raster(n).valid[:, 0] for n in ("l5", "l7"))
    best5, best7 = (v.flatten(1).float().mean(1).max() for v in (l5, l7))
    assert best5 == 1
    assert 0.6 < best7 < 0.95

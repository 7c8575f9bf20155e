"""Detection in a store: planted targets are found with their boxes, once each, in any chunks."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
from made_store import NORTH, WEST, box, made_store
from scipy import ndimage

from everysat.store.detect import detect

DIM = 8
TARGET = np.eye(DIM)[0]
PLANTED = {"large": (3, 4, 10, 16, 0.95), "small": (22, 30, 25, 32, 0.85), "faint": (30, 5, 34, 9, 0.6)}
"""Rows and columns, from and to (excluded), and score."""


def planted(shape: tuple[int, int] = (40, 44)) -> np.ndarray:
    """Scores [y, x] of about 0.1, and of rectangles with a middle that is a bit higher."""
    heat = 0.1 + 0.02 * np.random.default_rng(0).normal(size=shape)
    for top, left, bottom, right, score in PLANTED.values():
        heat[top:bottom, left:right] = score - 0.05
        heat[(top + bottom) // 2, (left + right) // 2] = score
    return heat


def with_scores(heat: np.ndarray) -> np.ndarray:
    """Unit vectors [y, x, dim] whose cosine to the target is the score; NaN stays."""
    side = np.sqrt(1 - heat**2)
    vectors = np.zeros((*heat.shape, DIM), np.float32)
    vectors[..., 0], vectors[..., 1] = heat, side
    vectors[np.isnan(heat)] = np.nan
    return vectors


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    return made_store(tmp_path_factory.mktemp("detect") / "area.zarr", with_scores(planted()), quantiser="float32/1")


def boxes_m(found) -> list[tuple[float, ...]]:
    """West, north, east, south of boxes, metres from the corner of the store."""
    bounds = found.frame().to_crs("EPSG:32631").geometry.bounds
    return [
        (round(r.minx - WEST), round(NORTH - r.maxy), round(r.maxx - WEST), round(NORTH - r.miny))
        for r in bounds.itertuples()
    ]


def test_planted_targets_are_found_with_their_boxes(store) -> None:
    found = detect(store, TARGET)
    expected = [tuple(10.0 * v for v in (left, top, right, bottom)) for top, left, bottom, right, _ in PLANTED.values()]
    assert boxes_m(found) == expected
    np.testing.assert_allclose(found.score, [p[-1] for p in PLANTED.values()], atol=1e-5)
    np.testing.assert_allclose(found.area_m2, [7 * 12 * 100, 3 * 2 * 100, 4 * 4 * 100], rtol=2e-3)
    np.testing.assert_allclose(found.width_m, [120, 20, 40], rtol=2e-3)
    assert (found.deviations > 3.5).all()
    assert found.threshold < 0.3
    inside = [
        shape.contains(p) for shape, p in zip(found.box, geopandas.points_from_xy(found.lon, found.lat), strict=True)
    ]
    assert all(inside)


def test_chunks_do_not_matter(tmp_path: Path, store) -> None:
    whole = made_store(tmp_path / "whole.zarr", with_scores(planted()), quantiser="float32/1", chunk=64, shard=64)
    a, b = (detect(s, TARGET, threshold=0.05, most=200, radius_m=0) for s in (store, whole))
    assert len(a) > 20
    assert a.frame().drop(columns="geometry").equals(b.frame().drop(columns="geometry"))


def test_peaks_are_local_maxima_apart_from_each_other(store) -> None:
    found = detect(store, TARGET, threshold=0.0, most=500, radius_m=60)
    at = geopandas.GeoSeries(geopandas.points_from_xy(found.lon, found.lat), crs=4326).to_crs(32631)
    x, y = at.x.to_numpy(), at.y.to_numpy()
    apart = np.hypot(x[:, None] - x, y[:, None] - y)[~np.eye(len(x), dtype=bool)]
    assert apart.min() >= 59.9
    heat = planted()
    best = heat == ndimage.maximum_filter(heat, 3)
    rows, cols = ((NORTH - y) // 10).astype(int), ((x - WEST) // 10).astype(int)
    assert best[rows, cols].all()
    assert (np.diff(found.score) <= 0).all()
    near = detect(store, TARGET, threshold=0.0, most=500, radius_m=0)
    assert len(near) > len(found)


def test_threshold_most_and_size_leave_out(store) -> None:
    assert len(detect(store, TARGET, threshold=0.8)) == 2
    assert len(detect(store, TARGET, most=1)) == 1
    assert boxes_m(detect(store, TARGET, least_m=50)) == [(40, 30, 160, 100)]
    nothing = detect(store, TARGET, threshold=0.99)
    assert len(nothing) == 0
    assert "0 found, scores of at least 0.990 (as given); the highest is 0.950" in str(nothing)
    assert nothing.table().rows == ()
    assert boxes_m(detect(store, TARGET, within=box(200, 150, 440, 400))) == [(300, 220, 320, 250)]


def test_a_better_peak_keeps_its_region_and_a_lesser_one_has_the_rest(tmp_path: Path) -> None:
    """Two bumps that touch: at half of its height, the lower one alone would reach over the higher one."""
    x = np.arange(60)
    ridge = 0.8 * np.exp(-(((x - 15) / 5) ** 2)) + 0.5 * np.exp(-(((x - 27) / 5) ** 2)) + 0.05
    heat = np.where(np.abs(np.arange(30) - 15)[:, None] < 3, ridge[None], 0.05)
    store = made_store(tmp_path / "ridge.zarr", with_scores(heat), quantiser="float32/1")
    first, second = boxes_m(detect(store, TARGET, threshold=0.3, share=0.5))
    assert first[2] <= second[0], "they share no ground"
    assert first[0] < 150 < first[2]
    assert second[0] < 270 < second[2]
    half = 10 * 5 * np.sqrt(np.log(2))  # where a Gaussian has half of its height
    assert abs((first[2] - first[0]) - 2 * half) < 21


def test_a_region_larger_than_the_first_look_is_whole(tmp_path: Path) -> None:
    heat = np.full((240, 320), 0.1)
    heat[10:140, 5:200] = 0.7
    heat[75, 100] = 0.8
    store = made_store(tmp_path / "lake.zarr", with_scores(heat), quantiser="float32/1", chunk=64, shard=64)
    assert boxes_m(detect(store, TARGET, threshold=0.5)) == [(50, 100, 2000, 1400)]


def test_no_data_is_nothing(tmp_path: Path) -> None:
    heat = planted()
    heat[3:10, 4:16] = np.nan
    store = made_store(tmp_path / "hole.zarr", with_scores(heat), quantiser="float32/1")
    assert [b[:2] for b in boxes_m(detect(store, TARGET))] == [(300, 220), (50, 300)]
    empty = made_store(tmp_path / "empty.zarr", with_scores(np.full((20, 20), np.nan)), quantiser="float32/1")
    assert len(detect(empty, TARGET)) == 0
    flat = made_store(tmp_path / "flat.zarr", with_scores(np.full((20, 20), 0.5)), quantiser="float32/1")
    assert len(detect(flat, TARGET)) == 0, "nothing stands out"


def test_what_is_saved(store, tmp_path: Path) -> None:
    found = detect(store, TARGET)
    read = json.loads(found.save(tmp_path / "boxes.geojson").read_text())
    assert [f["properties"]["rank"] for f in read["features"]] == [1, 2, 3]
    assert geopandas.read_parquet(found.save(tmp_path / "boxes.parquet")).crs == 4326
    assert found.save(tmp_path / "boxes.csv").read_text().startswith("rank,score,deviations,lon,lat")
    with pytest.raises(ValueError, match="must end with"):
        found.save(tmp_path / "boxes.shp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most": 0}, "most=0"),
        ({"share": 1.0}, "share=1"),
        ({"least_m": -1}, "least_m=-1"),
        ({"threshold": "high"}, "neither a number nor mad"),
        ({"threshold": float("nan")}, "threshold=nan"),
    ],
)
def test_options_out_of_range_are_refused(store, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        detect(store, TARGET, **options)


def test_a_query_of_another_length_is_refused(store) -> None:
    with pytest.raises(ValueError, match="holds vectors of 8"):
        detect(store, np.ones(5))

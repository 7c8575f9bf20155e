"""Search: the answer is that of brute force, whatever the engine, the windows and the filters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from made_store import NORTH, WEST, box, in_degrees, made_store, random_vectors, read_all

from everysat.store import Points, open_store, write_chips
from everysat.store.engines import Keep, scan
from everysat.store.index import build
from everysat.store.search import Hits, heat_map, query, search

WIDTH = 52


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made_store(tmp_path_factory.mktemp("search") / "area.zarr", random_vectors())


@pytest.fixture(scope="module")
def scores(store: Any) -> np.ndarray:
    """Cosine of every pixel to pixel 777; minus infinity without data."""
    x = read_all(store)
    return np.where(np.isfinite(x).all(1), x @ x[777], -np.inf)


@pytest.fixture(params=["scan", "exact"], scope="module")
def engine(request: pytest.FixtureRequest, store: Any) -> str:
    if request.param == "scan":
        return "scan"
    build(store, request.param, quiet=True)
    return "index"


def ranked(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")


def centre(index: np.ndarray) -> np.ndarray:
    """Metres east and south of the corner, [n, 2]."""
    return np.column_stack([index % WIDTH, index // WIDTH]) * 10.0 + 5


def test_search_is_brute_force(store: Any, scores: np.ndarray, engine: str) -> None:
    found = search(store, read_all(store)[777], top=50, engine=engine)
    assert found.index.tolist() == ranked(scores)[:50].tolist()
    np.testing.assert_allclose(found.score, scores[found.index], atol=1e-6)


def test_a_vector_finds_itself_first(store: Any, engine: str) -> None:
    x = read_all(store)
    for index in (0, 777, 1300, len(x) - 1):
        found = search(store, x[index], top=1, engine=engine)
        assert found.index.tolist() == [index]
        assert found.score[0] == pytest.approx(1, abs=1e-5)


def test_no_data_is_never_found(store: Any, scores: np.ndarray, engine: str) -> None:
    found = search(store, read_all(store)[777], top=10_000, engine=engine)
    assert len(found) == np.isfinite(scores).sum() < len(scores)
    assert np.isfinite(scores[found.index]).all()


def test_filters_by_place_come_before_ranking(store: Any, scores: np.ndarray, engine: str) -> None:
    at = centre(np.arange(len(scores)))
    inside = (at[:, 0] > 100) & (at[:, 0] < 200) & (at[:, 1] > 250) & (at[:, 1] < 350)
    found = search(store, read_all(store)[777], top=20, within=box(100, 250, 200, 350), engine=engine)
    assert inside[ranked(scores)[:20]].sum() < 5, "a filter of the best twenty would leave nearly nothing"
    assert found.index.tolist() == ranked(np.where(inside, scores, -np.inf))[:20].tolist()


def test_hits_lie_apart_and_the_best_of_each_neighbourhood_stays(
    store: Any, scores: np.ndarray, engine: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("everysat.store.search.POOL", 64)  # so that several rounds are needed
    wanted: list[int] = []
    for index in ranked(scores)[: np.isfinite(scores).sum()]:
        to_others = np.linalg.norm(centre(np.array(wanted, int)) - centre(np.array([index])), axis=1)
        if (to_others >= 45).all():
            wanted.append(int(index))
    found = search(store, read_all(store)[777], top=200, not_near_m=45, engine=engine)
    assert found.index.tolist() == wanted[:200]
    assert len(found) > 30


def test_not_near_the_example_either(store: Any) -> None:
    wanted = query(store, like=in_degrees(275, 155))
    assert search(store, wanted, top=1).index.tolist() == [15 * WIDTH + 27]
    found = search(store, wanted, top=10, not_near_m=80)
    assert (np.linalg.norm(centre(found.index) - (275, 155), axis=1) >= 80).all()


def test_polygons_as_examples_are_means_and_unlike_is_taken_off(store: Any, tmp_path: Path) -> None:
    x = read_all(store).reshape(*store.shape, -1)
    frame = geopandas.GeoDataFrame(geometry=[box(200, 200, 250, 250), box(400, 300, 430, 330)], crs="EPSG:4326")
    frame.to_file(tmp_path / "like.geojson")
    means = [x[20:25, 20:25].reshape(-1, 16).mean(0), x[30:33, 40:43].reshape(-1, 16).mean(0)]
    both = sum(m / np.linalg.norm(m) for m in means)
    np.testing.assert_allclose(query(store, [tmp_path / "like.geojson"]).vector, both / np.linalg.norm(both), atol=1e-5)
    away = both / 2 - x[0, 0]
    found = query(store, [tmp_path / "like.geojson"], unlike=in_degrees(5, 5)).vector
    np.testing.assert_allclose(found, away / np.linalg.norm(away), atol=1e-5)


def test_the_order_of_windows_is_irrelevant(store: Any) -> None:
    blocks = list(store.points())
    queries = read_all(store)[[777, 3]]
    a = scan(blocks, queries, 30, Keep())
    b = scan(blocks[::-1], queries, 30, Keep())
    assert [f.index.tolist() for f in a] == [f.index.tolist() for f in b]


@pytest.mark.parametrize(("quantiser", "engine"), [("float32/1", "scan"), ("int8-linear/1", "index")])
def test_equal_scores_are_ordered_by_place(quantiser: str, engine: str, tmp_path: Path) -> None:
    # Products of halves and of whole numbers are exact, so that equal vectors have equal scores.
    same = made_store(tmp_path / "same.zarr", np.full((40, 40, 4), 0.5, np.float32), quantiser=quantiser)
    build(same, "exact", quiet=True)
    assert search(same, np.ones(4), top=25, engine=engine).index.tolist() == list(range(25))


def test_the_heat_map_holds_the_scores(store: Any, scores: np.ndarray, tmp_path: Path) -> None:
    heat_map(store, read_all(store)[777], tmp_path / "heat.tif", quiet=True)
    with rasterio.open(tmp_path / "heat.tif") as file:
        shown = file.read(1).ravel()
        assert (file.crs.to_epsg(), file.transform.c, file.transform.f) == (32631, 500_000, 5_000_000)
    np.testing.assert_allclose(shown[np.isfinite(scores)], scores[np.isfinite(scores)], atol=1e-6)
    assert np.isnan(shown[~np.isfinite(scores)]).all()
    heat_map(store, read_all(store)[777], tmp_path / "part.tif", within=box(100, 250, 200, 350), quiet=True)
    with rasterio.open(tmp_path / "part.tif") as file:
        assert np.argwhere(np.isfinite(file.read(1))).tolist() == [[r, c] for r in range(25, 35) for c in range(10, 20)]


def test_several_stores_are_ranked_together_across_zones_and_years(tmp_path: Path) -> None:
    x = random_vectors(20, 20)
    first = made_store(tmp_path / "y23.zarr", x)
    second = made_store(tmp_path / "y24.zarr", random_vectors(20, 20, seed=1), period=("2024-01-01", "2025-01-01"))
    # The same ground in the neighbouring zone: 6 degrees of longitude are 473 km at 45 degrees north.
    third = made_store(tmp_path / "z32.zarr", x, crs="EPSG:32632", corner=(27_300.0, 5_015_000.0))
    wanted = read_all(first)[7]
    found = search([first, second, third], wanted, top=60)
    every = np.concatenate([np.nan_to_num(read_all(s) @ wanted, nan=-np.inf) for s in (first, second, third)])
    np.testing.assert_allclose(np.sort(found.score)[::-1], np.sort(every)[::-1][:60], atol=1e-6)
    assert set(found.store.tolist()) == {0, 1, 2}
    only = search([first, second, third], wanted, top=60, period="2024")
    assert [Path(s).name for s in only.stores] == ["y24.zarr"], "the year 2023 ends before 2024 begins"
    with pytest.raises(ValueError, match="no store is of that time"):
        search([first, second], wanted, period="2019")
    apart = search([first, second], wanted, top=100, not_near_m=60)
    at = np.column_stack([apart.index % 20, apart.index // 20]) * 10
    assert (np.linalg.norm(at[:, None] - at[None], axis=-1) + 1000 * np.eye(len(at)) >= 60).all(), "also between years"
    other = made_store(tmp_path / "other.zarr", x, model={"name": "another"})
    with pytest.raises(ValueError, match=r"y23.zarr.*made.*other.zarr.*another.*cannot be compared"):
        search([first, other], wanted)


def test_hits_apart_in_two_stores_are_those_of_brute_force(tmp_path: Path, monkeypatch: Any) -> None:
    """One store has many more near places than are ranked at once, the other few: none may be passed over."""
    monkeypatch.setattr("everysat.store.search.POOL", 16)
    rng, middle = np.random.default_rng(0), np.eye(8)[0]
    near, far = (middle + spread * rng.normal(size=(24, 24, 8)) for spread in (0.1, 0.6))
    stores = [
        made_store(
            tmp_path / name,
            (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32),
            corner=(WEST + east, NORTH),
        )
        for name, x, east in (("near.zarr", near, 0), ("far.zarr", far, 120))
    ]
    every = np.concatenate([read_all(store) @ middle for store in stores])
    at = np.concatenate([np.column_stack([np.arange(576) % 24 + east, np.arange(576) // 24]) * 10 for east in (0, 12)])
    wanted: list[int] = []
    for index in np.argsort(-every, kind="stable"):
        if all(np.hypot(*(at[index] - at[other])) >= 35 for other in wanted):
            wanted.append(int(index))
    found = search(stores, middle, top=4, not_near_m=35)
    more = search(stores, middle, top=len(wanted) + 5, not_near_m=35)
    assert (576 * found.store + found.index).tolist() == wanted[:4]
    assert (576 * more.store + more.index).tolist() == wanted


@pytest.mark.parametrize("quantiser", ["float32/1", "int8-linear/1", "int8-square/1"])
def test_every_quantiser_is_searched_exactly(quantiser: str, tmp_path: Path) -> None:
    store = made_store(tmp_path / "a.zarr", random_vectors(20, 20), quantiser=quantiser)
    x = read_all(store)
    facts = build(store, "exact", quiet=True)
    assert facts.dtype == ("int8" if "linear" in quantiser else "float32")
    found = search(store, x[333], top=40, engine="index")
    scores = np.where(np.isfinite(x).all(1), x @ x[333], -np.inf)
    np.testing.assert_allclose(found.score, np.sort(scores)[::-1][:40], atol=1e-6)


@pytest.mark.parametrize("engine", ["scan", "exact"])
def test_chips_are_found_with_their_footprints(engine: str, tmp_path: Path) -> None:
    x = random_vectors(10, 30, seed=5)
    x[np.isnan(x)] = 0.25
    row, col = (axis.ravel() for axis in np.mgrid[:10, :30])
    west, north = WEST + 320 * col, NORTH - 320 * row
    write_chips(
        tmp_path / "c.parquet", shapely.box(west, north - 320, west + 320, north), x.reshape(-1, 16), "EPSG:32631"
    )
    chips = open_store(tmp_path / "c.parquet")
    if engine == "exact":
        assert build(chips, "exact", quiet=True).count == 300
    lonlat = in_degrees(320 * 7 + 100, 320 * 4 + 10)
    found = search(chips, query(chips, like=lonlat), top=300, engine=engine.replace("exact", "index"))
    every = Points.cat(list(chips.points()), 16)
    unit = every.vectors / np.linalg.norm(every.vectors, axis=1, keepdims=True)
    mine = unit[int(found.index[0])]
    np.testing.assert_allclose(mine, chips.at(lonlat[0]) / np.linalg.norm(chips.at(lonlat[0])), atol=1e-6)
    np.testing.assert_allclose(found.score, np.sort(unit @ mine)[::-1], atol=1e-5)
    assert found.footprint[0].contains(shapely.Point(*lonlat[0]))
    assert geopandas.GeoSeries(found.footprint, crs="EPSG:4326").to_crs("EPSG:32631").area.max() == pytest.approx(
        320**2, rel=1e-3
    )
    with pytest.raises(ValueError, match="a heat map needs a store of pixels"):
        heat_map(chips, mine, tmp_path / "h.tif")


def test_hits_are_saved_with_places_that_lead_back(store: Any, tmp_path: Path) -> None:
    found = search(store, read_all(store)[777], top=7)
    for lon, lat, index in zip(found.lon, found.lat, found.index, strict=True):
        np.testing.assert_allclose(store.at((lon, lat)), store.read(slice(None), slice(None)).reshape(-1, 16)[index])
    for suffix in (".geojson", ".parquet"):
        path = found.save(tmp_path / f"hits{suffix}")
        frame = geopandas.read_parquet(path) if suffix == ".parquet" else geopandas.read_file(path)
        areas = frame.to_crs("EPSG:32631").geometry.area
        np.testing.assert_allclose(areas, 100, rtol=1e-3)
        assert frame["index"].tolist() == found.index.tolist()
    lines = found.save(tmp_path / "hits.csv").read_text().splitlines()
    assert lines[0] == "rank,score,lon,lat,index,store,period"
    assert float(lines[1].split(",")[1]) == found.score[0]
    assert (
        json.loads((tmp_path / "hits.geojson").read_text())["features"][0]["properties"]["period"]
        == "2023-01-01/2024-01-01"
    )
    with pytest.raises(ValueError, match=r"must end with \.csv"):
        found.save(tmp_path / "hits.xlsx")
    assert len(found.table().rows) == 7


def test_nothing_found_is_an_empty_answer(store: Any, tmp_path: Path) -> None:
    found = search(store, read_all(store)[777], within=box(9000, 9000, 9100, 9100))
    assert isinstance(found, Hits)
    assert len(found) == 0
    assert found.table().rows == ()
    assert len(geopandas.read_file(found.save(tmp_path / "none.geojson"))) == 0


def test_mistakes_are_named(store: Any) -> None:
    x = read_all(store)[777]
    with pytest.raises(ValueError, match="vectors of 16 finite numbers"):
        search(store, x[:5])
    with pytest.raises(ValueError, match="vectors of 16 finite numbers"):
        search(store, x * np.nan)
    with pytest.raises(ValueError, match="nothing to search for"):
        query(store)
    with pytest.raises(ValueError, match="cancel out"):
        query(store, like=in_degrees(275, 155), unlike=in_degrees(275, 155))
    with pytest.raises(ValueError, match="lies outside"):
        query(store, like=in_degrees(-500, 155))
    with pytest.raises(ValueError, match="no data"):
        query(store, like=in_degrees(55, 65))
    with pytest.raises(ValueError, match="top=0"):
        search(store, x, top=0)
    with pytest.raises(LookupError, match="is not one of auto"):
        search(store, x, engine="magic")

"""The commands index, search, label and change: from files to files, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from command_line import everysat, fails
from made_store import NORTH, WEST, in_degrees, made_store, random_vectors, read_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    made_store(folder / "y23.zarr", random_vectors())
    made_store(folder / "y24.zarr", random_vectors(seed=1), period=("2024-01-01", "2025-01-01"))
    return folder


def test_index_then_search(folder: Path, tmp_path: Path) -> None:
    store = made_store(tmp_path / "area.zarr", random_vectors())
    assert "exact, 2012 vectors of 16" in everysat("index", store.path, "--quiet")
    lon, lat = in_degrees(275, 155)[0]
    said = everysat("search", store.path, "--like", f"{lon},{lat}", "--top", 5, "-o", tmp_path / "hits.csv")
    assert "5 places (area.zarr: exact, 2012 vectors" in said
    rows = (tmp_path / "hits.csv").read_text().splitlines()
    assert rows[1].split(",")[4] == str(15 * 52 + 27), "the example itself is the nearest"
    shown = everysat("search", store.path, "--like", f"{lon},{lat}", "--top", 3)
    assert "Nearest places" in shown
    assert f"{lon:.6f}" in shown


def test_search_by_polygon_vector_filters_and_heat_map(folder: Path, tmp_path: Path) -> None:
    frame = geopandas.GeoDataFrame(
        geometry=[shapely.box(WEST + 100, NORTH - 300, WEST + 300, NORTH - 100)], crs="EPSG:32631"
    )
    frame.to_crs("EPSG:4326").to_file(tmp_path / "area.geojson")
    beside = frame.translate(210, 0)
    beside.to_crs("EPSG:4326").to_file(tmp_path / "beside.geojson")
    np.save(tmp_path / "vector.npy", np.eye(16)[2])
    out = tmp_path / "hits.geojson"
    both = [folder / "y23.zarr", folder / "y24.zarr"]
    everysat(
        "search", *both, "--like", tmp_path / "area.geojson", "--vector", tmp_path / "vector.npy", "--within", tmp_path / "beside.geojson",
        "--period", "2024-06", "--not-near-m", 30, "--unlike", ",".join(map(str, in_degrees(5, 5)[0])), "-o", out,
    )  # fmt: skip
    hits = geopandas.read_file(out).to_crs("EPSG:32631")
    assert set(hits["store"]) == {"y24.zarr"}
    assert len(hits) > 3
    assert hits.centroid.within(beside[0]).all()
    assert hits.distance(frame.geometry[0]).min() > 20
    everysat("search", both[0], "--vector", tmp_path / "vector.npy", "-o", tmp_path / "heat.tif", "--quiet")
    with rasterio.open(tmp_path / "heat.tif") as file:
        np.testing.assert_allclose(file.read(1)[20, 20], read_all(_open(both[0]))[20 * 52 + 20][2], atol=1e-6)


def _open(path: Path) -> Any:
    from everysat.store import open_store

    return open_store(path)


def test_label_writes_maps_and_says_what_they_are_worth(folder: Path, tmp_path: Path) -> None:
    at = [(30, 5), (45, 30), (20, 20), (10, 30), (40, 12), (2, 2)]
    points = shapely.points([(WEST + 10 * x + 5, NORTH - 10 * y - 5) for x, y in at])
    frame = geopandas.GeoDataFrame({"crop": ["a", "b"] * 3}, geometry=points, crs="EPSG:32631")
    frame.to_file(tmp_path / "points.gpkg")
    said = everysat(
        "label",
        folder / "y23.zarr",
        tmp_path / "points.gpkg",
        "--column",
        "crop",
        "-o",
        tmp_path / "map.tif",
        "--next",
        4,
        "--quiet",
    )
    assert "each predicted without its cluster: accuracy" in said
    assert {p.name for p in tmp_path.iterdir()} == {"points.gpkg", "map.tif", "map-confidence.tif", "map-next.geojson"}
    assert len(json.loads((tmp_path / "map-next.geojson").read_text())["features"]) == 4


def test_change_says_how_much(folder: Path, tmp_path: Path) -> None:
    said = everysat(
        "change", folder / "y23.zarr", folder / "y24.zarr", "-o", tmp_path / "c.tif", "--threshold", "otsu", "--quiet"
    )
    assert "% above" in said
    assert (tmp_path / "c-changed.tif").exists()


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    store = folder / "y23.zarr"
    assert "neither LON,LAT" in fails(capsys, monkeypatch, "search", store, "--like", "5;6")
    assert "nothing to search for" in fails(capsys, monkeypatch, "search", store)
    assert "lies outside" in fails(capsys, monkeypatch, "search", store, "--like", "-3.5,40")
    assert "Did you mean faiss" in fails(capsys, monkeypatch, "index", store, "--engine", "fais")
    assert "run: everysat index" in fails(
        capsys, monkeypatch, "search", folder / "y24.zarr", "--like", "3.001,45.15", "--engine", "index"
    )
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "no .npy file of numbers" in fails(
        capsys, monkeypatch, "search", store, "--vector", tmp_path / "objects.npy"
    )
    both = [store, folder / "y24.zarr"]
    assert "a heat map is of one store" in fails(
        capsys, monkeypatch, "search", *both, "--like", "3.001,45.15", "-o", tmp_path / "h.tif"
    )


def test_publish_writes_an_item_or_a_geotiff(folder: Path, tmp_path: Path) -> None:
    everysat("publish", folder / "y24.zarr", "-o", tmp_path / "item.json", "--href", "https://example.org/y24.zarr")
    item = json.loads((tmp_path / "item.json").read_text())
    assert item["assets"]["embeddings"]["href"] == "https://example.org/y24.zarr"
    everysat("publish", folder / "y24.zarr", "-o", tmp_path / "y24.tif", "--quantiser", "float32/1")
    with rasterio.open(tmp_path / "y24.tif") as file:
        assert file.count == 16
    with pytest.raises(ValueError, match=r"must end with \.json"):
        everysat("publish", folder / "y24.zarr", "-o", tmp_path / "y24.zip")

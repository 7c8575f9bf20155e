"""A map from a few labels: right where classes are separable, honest where they are not, and telling where to look next."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
import torch
from made_store import NORTH, WEST, made_store

from everysat.store import label as labelling
from everysat.store.active import APART_PX, Pool, to_label
from everysat.store.label import clusters, fit, label, read_labels

NAMES = np.array(["forest", "maize", "water"])


def scene(noise: float, seed: int = 0, size: int = 90, kinds: int = 3, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Classes [y, x] in blocks of 15 pixels, and vectors around the direction of each class."""
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.permuted(np.arange(36) % kinds).reshape(6, 6), np.ones((15, 15), int))[:size, :size]
    middles = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:kinds]
    x = middles[truth] + noise * rng.normal(size=(*truth.shape, dim))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    x[60:66, 60:70] = np.nan
    return truth, x.astype(np.float32)


def points_at(rows: Any, cols: Any, names: Any) -> geopandas.GeoDataFrame:
    geometry = shapely.points(WEST + 10 * np.asarray(cols) + 5, NORTH - 10 * np.asarray(rows) - 5)
    return geopandas.GeoDataFrame({"class": names}, geometry=geometry, crs="EPSG:32631")


def drawn(truth: np.ndarray, count: int, seed: int = 1) -> geopandas.GeoDataFrame:
    """So many random labelled pixels with data."""
    rng = np.random.default_rng(seed)
    y, x = rng.integers(0, len(truth), (2, 3 * count))
    data = ~((y >= 60) & (y < 66) & (x >= 60) & (x < 70))
    y, x = y[data][:count], x[data][:count]
    return points_at(y, x, NAMES[truth[y, x]])


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Any]:
    truth, x = scene(0.1)
    return truth, made_store(tmp_path_factory.mktemp("label") / "clear.zarr", x, chunk=32, shard=64)


@pytest.mark.parametrize("how", ["linear", "knn"])
@pytest.mark.parametrize("each", [1, 8])
def test_separable_classes_are_mapped_right(clear: Any, how: str, each: int, tmp_path: Path) -> None:
    truth, store = clear
    places = drawn(truth, 200).groupby("class").head(each)
    result = label(store, places, "class", tmp_path / "map.tif", how=how, quiet=True)
    codes, sure = read(result.paths["classes"]), read(result.paths["confidence"])
    data = np.ones(truth.shape, bool)
    data[60:66, 60:70] = False
    assert (codes[data] == truth[data]).mean() > 0.995
    assert (codes[~data] == 255).all()
    assert (sure[~data] == 255).all()
    assert sure[data].min() >= 33
    assert sure[data].max() <= 100
    with rasterio.open(result.paths["classes"]) as file:
        assert [file.tags(1)[f"class_{c}"] for c in range(3)] == NAMES.tolist()
        assert file.colormap(1)
    told = " ".join(result.fitted.notes)
    if each == 1:
        assert "not calibrated" in told
        assert result.fitted.scores == {}
    else:
        assert result.fitted.scores["accuracy"] > 0.95


def test_confidence_means_what_it_says_on_noisy_classes(tmp_path: Path) -> None:
    truth, x = scene(0.45)
    store = made_store(tmp_path / "noisy.zarr", x, chunk=32, shard=64)
    result = label(store, drawn(truth, 150), "class", tmp_path / "map.tif", quiet=True)
    codes, sure = read(result.paths["classes"]), read(result.paths["confidence"]) / 100
    data = codes != 255
    right = (codes == truth)[data]
    assert 0.6 < right.mean() < 0.97
    assert abs(sure[data].mean() - right.mean()) < 0.05
    for low, high in ((0.4, 0.6), (0.6, 0.8), (0.8, 1.01)):
        mine = (sure[data] >= low) & (sure[data] < high)
        assert abs(sure[data][mine].mean() - right[mine].mean()) < 0.1, (low, high)
    assert abs(result.fitted.scores["accuracy"] - right.mean()) < 0.1, "the left-out score is what the map is worth"


def test_left_out_scores_are_not_fooled_by_near_copies(tmp_path: Path) -> None:
    """Vectors that tell the cluster but not the class: copies of a cluster must not lie on both sides."""
    rng = np.random.default_rng(0)
    kind = np.kron(rng.integers(0, 2, (6, 6)), np.ones((15, 15), int))
    x = np.kron(rng.normal(size=(6, 6, 12)), np.ones((15, 15, 1))) + 0.05 * rng.normal(size=(90, 90, 12))
    store = made_store(tmp_path / "blocks.zarr", (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32))
    rows, cols = (np.repeat(15 * a.ravel() + 6, 4) + np.tile([0, 0, 2, 2], 36) for a in np.mgrid[:6, :6])
    labelled = read_labels(store, points_at(rows, cols, NAMES[kind[rows, cols]]), "class")
    cluster, gap_m = clusters(labelled, store)
    assert len(np.unique(cluster)) == 36
    assert gap_m < 130
    assert (np.bincount(cluster) == 4).all()
    for how in ("linear", "knn"):
        assert fit(store, labelled, how=how).scores["accuracy"] < 0.75


def test_polygons_label_the_pixels_inside_them(clear: Any) -> None:
    _, store = clear
    shapes = [
        shapely.box(WEST + 100, NORTH - 150, WEST + 130, NORTH - 120),
        shapely.box(WEST, NORTH - 900, WEST + 900, NORTH - 600),
    ]
    frame = geopandas.GeoDataFrame({"class": ["a", "b"]}, geometry=shapes, crs="EPSG:32631").to_crs("EPSG:4326")
    found = read_labels(store, frame, "class")
    assert sorted(found.index[found.label == 0].tolist()) == [r * 90 + c for r in (12, 13, 14) for c in (10, 11, 12)]
    assert int((found.label == 1).sum()) == labelling.PER_PLACE, "at most so many of a large one"
    assert (found.index[found.label == 1] >= 60 * 90).all()


def test_pixels_that_two_classes_claim_are_left_out(clear: Any) -> None:
    _, store = clear
    frame = points_at([3, 3, 50], [4, 4, 50], ["a", "b", "a"])
    frame = geopandas.GeoDataFrame(
        {"class": ["a", "b", "a", "b"]},
        geometry=[*frame.geometry, shapely.Point(WEST + 255, NORTH - 205)],
        crs="EPSG:32631",
    )
    found = read_labels(store, frame, "class")
    assert found.index.tolist() == [50 * 90 + 50, 20 * 90 + 25]
    assert "2 pixels that places of several classes claim" in found.notes[0]
    with pytest.raises(ValueError, match=r"1 classes are left without a pixel of their own \(b\)"):
        read_labels(store, frame[:3], "class")


def test_where_to_label_next_is_uncertain_and_diverse(tmp_path: Path) -> None:
    """Three classes, of which two are labelled, and a mixture: what is unlike all labels is asked for first."""
    truth, x = scene(0.15)
    store = made_store(tmp_path / "a.zarr", x, chunk=32, shard=64)
    places = drawn(truth, 60)
    result = label(store, places[places["class"] != "water"], "class", tmp_path / "map.tif", next_places=12, quiet=True)
    found = json.loads(result.paths["next"].read_text())["features"]
    index = np.array([f["properties"]["index"] for f in found])
    at = np.column_stack(np.divmod(index, 90))
    assert len(found) == 12
    assert (truth[at[:, 0], at[:, 1]] == 2).mean() > 0.7, "the class without labels is a third of the area"
    far = np.linalg.norm(at[:, None] - at[None], axis=-1) + 1000 * np.eye(12)
    assert far.min() >= APART_PX
    assert not set(index.tolist()) & set(result.labelled.index.tolist())
    for feature in found:
        here = store.at(tuple(feature["geometry"]["coordinates"]))
        row, col = divmod(feature["properties"]["index"], 90)
        np.testing.assert_array_equal(here, store.read(slice(row, row + 1), slice(col, col + 1))[0, 0])


def test_of_equally_uncertain_places_those_unlike_all_others_come_first(clear: Any) -> None:
    rng, kind = np.random.default_rng(0), np.repeat([0, 1, 2], [20, 275, 5])
    vectors = (np.eye(12)[kind] + 0.02 * rng.normal(size=(300, 12))).astype(np.float32)
    xy = np.column_stack([WEST + 500 * np.arange(300), np.full(300, NORTH)])
    labelled = SimpleNamespace(
        x=torch.from_numpy(vectors[kind == 0][:5]),
        index=np.array([0]),
        shapes=(shapely.Point(xy[0]),),
        classes=("a", "b"),
    )
    for seed in range(4):
        pool = Pool(300, seed)
        pool.offer(np.arange(300), np.full(300, 0.5), np.zeros((300, 2), int), vectors, xy)
        chosen = to_label(clear[1], labelled, pool, 2)["index"].to_numpy()
        assert sorted(kind[chosen]) == [1, 2], "kind 0 is labelled, and one of kind 1 is enough"


def test_the_map_does_not_depend_on_windows(tmp_path: Path) -> None:
    truth, x = scene(0.3)
    answers = []
    for chunk in (16, 32):
        store = made_store(tmp_path / f"c{chunk}.zarr", x, chunk=chunk, shard=64, quantiser="float32/1")
        labelled = read_labels(store, drawn(truth, 40), "class")
        fitted = fit(store, labelled)
        paths = {"classes": tmp_path / f"{chunk}.tif", "confidence": tmp_path / f"{chunk}-c.tif"}
        pool = Pool(100, 0)
        labelling._map(store, labelled, fitted, paths, pool, True)
        answers.append((read(paths["classes"]), sorted(pool.index.tolist())))
    assert (answers[0][0] == answers[1][0]).mean() > 0.999, "the sample that standardises is another one"
    assert len(set(answers[0][1]) & set(answers[1][1])) > 90


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.assign(**{"class": ["forest"] * len(f)}), "holds 1 class"),
        (lambda f: f.assign(**{"class": [None, *f["class"][1:]]}), "1 of 40 places have no class"),
        (lambda f: f.rename(columns={"class": "klass"}), "Did you mean klass"),
        (lambda f: f.assign(geometry=f.geometry.translate(100_000)), "40 of 40 labelled places lie outside"),
        (
            lambda f: f.assign(geometry=[f.geometry[0], shapely.Point(WEST + 655, NORTH - 625), *f.geometry[2:]]),
            "1 of 40 labelled places",
        ),
    ],
)
def test_mistakes_in_labels_say_how_many(clear: Any, change: Any, message: str, tmp_path: Path) -> None:
    truth, store = clear
    with pytest.raises(ValueError, match=message):
        label(store, change(drawn(truth, 40)), "class", tmp_path / "map.tif", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_places_outside_can_be_left_out_and_classes_demanded(clear: Any) -> None:
    truth, store = clear
    frame = drawn(truth, 40)
    frame.loc[3, "geometry"] = shapely.Point(WEST - 500, NORTH)
    found = read_labels(store, frame, "class", skip_outside=True)
    assert len(found.shapes) == 39
    assert "1 places without data" in found.notes[0]
    with pytest.raises(ValueError, match=r"1 of 4 classes have no labelled place with data: wheat"):
        read_labels(store, frame, "class", skip_outside=True, classes=[*NAMES, "wheat"])
    with pytest.raises(LookupError, match="how='tree'"):
        fit(store, found, how="tree")
    with pytest.raises(ValueError, match=r"must end with \.tif"):
        label(store, frame, "class", "map.png")

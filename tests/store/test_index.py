"""Indexes: what they miss is measured, filters hold exactly, and one that is stale is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from made_store import box, made_store, random_vectors, read_all

from everysat.store import engines, open_store
from everysat.store import index as indexing
from everysat.store.engines import Away, Keep
from everysat.store.index import build, choose, fingerprint, folder_of, open_index
from everysat.store.search import search


@pytest.fixture(params=["faiss", "lancedb"], scope="module")
def indexed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A store and what its approximate index, which has lists although it is small, says of itself."""
    pytest.importorskip(request.param)
    store = made_store(tmp_path_factory.mktemp(request.param) / "area.zarr", random_vectors())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "FLAT", 500)
        patch.setattr(indexing, "QUERIES", 40)
        yield store, build(store, request.param, quiet=True)


def nearest(x: np.ndarray, query: np.ndarray, n: int) -> list[int]:
    scores = np.where(np.isfinite(x).all(1), x @ query, -np.inf)
    return np.argsort(-scores, kind="stable")[:n].tolist()


@pytest.fixture
def store(tmp_path: Path) -> Any:
    return made_store(tmp_path / "area.zarr", random_vectors())


def test_the_stated_recall_is_that_of_other_queries_too(indexed: Any) -> None:
    store, facts = indexed
    assert facts.lists == 32, "nearest power of two to the root of 2011 vectors"
    assert 1 <= facts.probes < facts.lists
    assert facts.recall >= indexing.ENOUGH
    assert facts.sample == 40
    x = read_all(store)
    rng = np.random.default_rng(9)
    shares = []
    for row in rng.choice(np.flatnonzero(np.isfinite(x).all(1)), 40, replace=False):
        found = search(store, x[row], top=11, engine="index").index
        shares.append(len((set(found.tolist()) & set(nearest(x, x[row], 11))) - {int(row)}) / 10)
    assert np.mean(shares) >= facts.recall - 0.05


def test_filters_hold_exactly_in_approximate_indexes(indexed: Any) -> None:
    store, _ = indexed
    x, area = read_all(store), box(100, 250, 200, 350)
    inside = [r * 52 + c for r in range(25, 35) for c in range(10, 20)]
    for row in (0, 777, 1500):
        found = search(store, x[row], top=500, within=area, engine="index")
        assert sorted(found.index.tolist()) == inside, "all hundred, wherever their lists are"
        wanted = [i for i in nearest(x, x[row], 3000) if i in set(inside)][:20]
        assert len(set(found.index[:20].tolist()) & set(wanted)) >= 19, "8 bits may swap neighbours"


def test_a_filter_is_searched_without_exception(indexed: Any) -> None:
    store, facts = indexed
    x, area = read_all(store), box(100, 250, 200, 350)
    inside = {r * 52 + c for r in range(25, 35) for c in range(10, 20)}
    shares = []
    for row in range(0, 2000, 50):
        if np.isfinite(x[row]).all():
            wanted = [i for i in nearest(x, x[row], 3000) if i in inside][:10]
            found = search(store, x[row], top=10, within=area, engine="index").index.tolist()
            shares.append(len(set(wanted) & set(found)) / 10)
    assert np.mean(shares) > (0.999 if facts.engine == "lancedb" else 0.96), (
        "lists that are far from the query count too"
    )


def test_a_triangle_is_no_rectangle(indexed: Any) -> None:
    store, _ = indexed
    corners = shapely.get_coordinates(box(0, 100, 520, 400))
    far = shapely.Polygon([corners[0], corners[len(corners) // 4], corners[len(corners) // 2]])
    x = read_all(store)
    found = search(store, x[777], top=15, within=far, engine="index")
    exact = search(store, x[777], top=15, within=far, engine="scan")
    assert len(found) == 15
    assert len(set(found.index.tolist()) & set(exact.index.tolist())) >= 14


def test_more_hits_than_the_probed_lists_hold(indexed: Any) -> None:
    store, _ = indexed
    found = search(store, read_all(store)[777], top=5000, engine="index")
    assert len(found) == np.isfinite(read_all(store)).all(1).sum()


def test_a_stale_index_is_refused_with_what_to_do(store: Any) -> None:
    assert open_index(store) is None
    build(store, "exact", quiet=True)
    assert open_index(store) is not None
    assert folder_of(store).name == "area.zarr.index"
    file = next(p for p in Path(store.path).rglob("*") if p.is_file() and "embeddings" in str(p))
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match=r"is stale.*everysat index .*area\.zarr.*scan"):
        search(store, read_all(store)[777])
    assert len(search(store, read_all(store)[777], engine="scan")) == 20
    build(store, "exact", quiet=True)
    assert len(search(store, read_all(store)[777], engine="index")) == 20


def test_a_store_written_anew_makes_its_index_stale(store: Any) -> None:
    build(store, "exact", quiet=True)
    other = made_store(Path(store.path), random_vectors(seed=3))
    with pytest.raises(ValueError, match="is stale"):
        open_index(other)


def test_an_index_of_another_version_is_refused(store: Any) -> None:
    build(store, "exact", quiet=True)
    text = folder_of(store) / "index.json"
    text.write_text(text.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        open_index(store)
    text.write_text('{"engine": "magic"}')
    with pytest.raises(ValueError, match=r"no index that this version knows.*everysat index"):
        open_index(store)


def test_a_store_that_changes_meanwhile_leaves_the_old_index(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build(store, "exact", quiet=True)
    before = (folder_of(store) / "index.json").read_text()
    prints = iter(["one", "another"])
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "fingerprint", lambda path: next(prints))
        with pytest.raises(ValueError, match="changed while it was indexed"):
            build(store, "exact", quiet=True)
    assert (folder_of(store) / "index.json").read_text() == before
    assert [p.name for p in folder_of(store).parent.glob("*.partial")] == []


def test_no_vectors_no_index(tmp_path: Path) -> None:
    empty = made_store(tmp_path / "empty.zarr", np.full((20, 20, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match="holds no vectors"):
        build(empty, quiet=True)
    assert not folder_of(empty).exists()


def test_the_engine_is_chosen_by_size_and_says_why(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(store)[0] == "exact"
    monkeypatch.setattr(indexing, "INTERACTIVE", 1000)
    name, why = choose(store)
    assert name == "faiss"
    assert "GB" in why
    monkeypatch.setattr(indexing, "_memory", lambda: 10_000)
    assert choose(store)[0] == "lancedb"
    monkeypatch.setattr(indexing.importlib.util, "find_spec", lambda name: None)
    name, why = choose(store)
    assert name == "exact"
    assert "pip install everysat[search]" in why
    with pytest.raises(LookupError, match="Did you mean faiss"):
        choose(store, "fais")


def test_a_missing_library_is_an_error_that_says_how_to_get_it(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(engines.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"pip install everysat\[search\]"):
        build(store, "faiss", quiet=True)


def test_the_fingerprint_sees_names_sizes_and_times(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12")
    os.utime(tmp_path / "a", ns=(5, 5))
    first = fingerprint(tmp_path)
    assert first == fingerprint(tmp_path)
    seen = {first}
    (tmp_path / "a").write_bytes(b"123")
    os.utime(tmp_path / "a", ns=(5, 5))
    seen.add(fingerprint(tmp_path))
    (tmp_path / "b").write_bytes(b"")
    seen.add(fingerprint(tmp_path))
    (tmp_path / "b").rename(tmp_path / "c")
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 4


def test_a_group_of_a_store_has_an_index_outside_of_it(store: Any) -> None:
    before = fingerprint(store.path)
    zone = open_store(Path(store.path) / "utm31")
    build(zone, "exact", quiet=True)
    assert folder_of(zone).name == "area.zarr.utm31.index"
    assert fingerprint(store.path) == before


def test_away_is_the_distance_to_the_geometry() -> None:
    line = Away(shapely.LineString([(0, 0), (10, 0)]), (2.0, 3.0), 6.0)
    x, y = np.array([5.0, 5.0, -2.9, -3.1, 0.0]), np.array([1.9, 2.1, 0.0, 0.0, -2.0])
    assert line(x, y).tolist() == [False, True, False, True, True]
    everywhere = Keep()
    assert everywhere.everything
    assert everywhere(x, y).all()

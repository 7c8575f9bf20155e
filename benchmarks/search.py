"""Search of 1 million vectors of 128 numbers: time, memory and recall of every engine, as ratios to a product with float32 in memory.

    python -m benchmarks.search            # writes benchmarks/results/search.json; six minutes, on a machine at rest
    python -m benchmarks.search small      # 90,000 vectors, prints only

A made store of 1000 x 1000 pixels (2000 directions, variation along 24 others, noise; int8 with a scale of each pixel), in a
temporary folder. Engines run in turn, each in a process of its own:

- ``plain``: float32 in memory, one product with numpy and ``argpartition``: what the others are compared with.
- ``scan``: no index, the compressed store is read for each search.
- ``exact``, ``faiss``, ``lancedb``: indexes of :mod:`everysat.store.index`.

``seconds`` is the median of searches for the nearest 20 with files in the page cache and the index open (``first_seconds`` is a
process's first, which opens it). ``recall`` is the share of the ten nearest other vectors by the float32 numbers before int8 that is
found, over 200 random vectors. ``within_seconds`` searches in one per cent of the area; ``apart_seconds`` asks for hits 500 m from
each other.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from benchmarks import measuring
from everysat.store import create, open_store
from everysat.store.index import build
from everysat.store.search import DEGREES, moved, search

WAYS = ("plain", "scan", "exact", "faiss", "lancedb")
DIM, TOP, NEAREST, QUERIES, REPEATS = 128, 20, 10, 200, 15
CRS, WEST, NORTH = "EPSG:32631", 500_000.0, 5_000_000.0


def main(side: int = 1000, rounds: int = 3) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="everysat-search-") as folder:
        made(Path(folder), side)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in WAYS:
                case = {"folder": folder, "way": way, "side": side, "recall": number == 0}
                runs[way].append(measuring.apart("benchmarks.search", case))
    for way, some in runs.items():
        first = some[0]
        found[way] = {
            key: min(run[key] for run in some if key in run) for key in first if key not in ("recall", "facts")
        }
        found[way] |= {key: first[key] for key in ("recall", "facts") if key in first}
    for way in WAYS:
        found[way]["times_plain"] = found[way]["seconds"] / found["plain"]["seconds"]
        print(way, json.dumps(found[way]), flush=True)
    return {"vectors": side * side, "dim": DIM, "cores": os.cpu_count(), "rounds": rounds, "engines": found}


def made(folder: Path, side: int) -> None:
    """``area.zarr``, and the vectors that it was made of."""
    rng = np.random.default_rng(0)
    middles, along = (rng.normal(size=(n, DIM)).astype(np.float32) for n in (2000, 24))
    geobox = GeoBox((side, side), Affine(10, 0, WEST, 0, -10, NORTH), CRS)
    writer = create(folder / "area.zarr", geobox, DIM, chunk=256, shard=1024, model={"name": "made"})
    every = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (side, side, DIM))
    for rows, cols in writer.windows():
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        x = middles[rng.integers(0, len(middles), shape)] + 0.15 * rng.normal(size=(*shape, DIM))
        x += 0.15 * rng.normal(size=(*shape, len(along))) @ along
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        every[rows, cols] = x
        writer.write(rows, cols, x.transpose(2, 0, 1))
    writer.finish()


def one(case: dict[str, Any]) -> dict[str, Any]:
    """One engine, in this process."""
    folder, way, side = Path(case["folder"]), case["way"], case["side"]
    store = open_store(folder / "area.zarr")
    found: dict[str, Any] = {}
    every = np.load(folder / "vectors.npy", mmap_mode="r").reshape(-1, DIM)
    rows = np.random.default_rng(1).choice(len(every), QUERIES, replace=False)
    queries = every[rows].copy()
    answer: Callable[..., np.ndarray]
    if way == "plain":
        matrix = np.array(every)
        answer = lambda query, top, **_: plain(matrix, query, top)  # noqa: E731
    else:
        if way != "scan":
            start = time.perf_counter()
            facts = build(store, way, quiet=True)
            found |= {"build_seconds": time.perf_counter() - start, "facts": str(facts)}
            index = Path(f"{store.path}.index")
            found["index_mb"] = sum(p.stat().st_size for p in index.rglob("*") if p.is_file()) / 1e6
        engine = "scan" if way == "scan" else "index"
        answer = lambda query, top, **options: search(store, query, top=top, engine=engine, **options).index  # noqa: E731
    found["first_seconds"] = timed(lambda: answer(queries[0], TOP), 1)
    found["seconds"] = timed(lambda: answer(queries[0], TOP), REPEATS)
    if way != "plain":
        area = shapely.box(WEST, NORTH - side, WEST + side, NORTH)
        found["within_seconds"] = timed(lambda: answer(queries[0], TOP, within=moved(area, CRS, DEGREES)), REPEATS)
        found["apart_seconds"] = timed(lambda: answer(queries[0], TOP, not_near_m=500), REPEATS)
    if case["recall"] and way != "scan":
        found["recall"] = recall(answer, every, queries, rows)
    return found


def plain(matrix: np.ndarray, query: np.ndarray, top: int) -> np.ndarray:
    scores = matrix @ query
    best = np.argpartition(-scores, top)[:top]
    return best[np.argsort(-scores[best])]


def recall(answer: Callable[..., np.ndarray], every: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> float:
    """Mean share of the exact nearest others."""
    scores, shares = np.empty((QUERIES, len(every)), np.float32), []
    for start in range(0, len(every), 50_000):
        scores[:, start : start + 50_000] = queries @ every[start : start + 50_000].T
    for query, row, mine in zip(queries, rows, scores, strict=True):
        mine[row] = -math.inf
        wanted = np.argpartition(-mine, NEAREST)[:NEAREST]
        given = [i for i in answer(query, NEAREST + 1).tolist() if i != row][:NEAREST]
        shares.append(len(set(wanted.tolist()) & set(given)) / NEAREST)
    return float(np.mean(shares))


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(json.loads(sys.argv[2]))))
    elif sys.argv[1:2] == ["small"]:
        main(side=300, rounds=1)
    else:
        measuring.save("search", __doc__.split("\n")[0], main())

"""Engines that find the vectors of the highest cosine to a query: a look at all, lists of faiss, tables of LanceDB.

``exact`` keeps the vectors row by row, as int8 codes where the store has int8 codes with a scale of each row (on which no cosine
depends), else as float32 of unit length, and looks at all of them. ``faiss`` keeps them in memory with 8 bits a number, in lists
around centres (Jegou et al. 2011, "Product quantization for nearest neighbor search", its inverted file) of which it looks at the
nearest. ``lancedb`` keeps lists on disk and compares the best again with the float32 vectors. Filters hold exactly in all of them: whatever they
leave is searched without exception.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from threadpoolctl import threadpool_limits

from everysat.data.batches import prefetch
from everysat.io import grid
from everysat.store.read import Points, Window

FLAT = 50_000
"""Fewer vectors are not worth lists: looking at all takes milliseconds."""
ROWS = 8192
"""Vectors at a time: as float32 they stay in the cache of a core."""
READERS = min(4, os.cpu_count() or 1)
"""Threads that read and decode windows ahead; each holds one window in memory."""
SAMPLED = 64
"""Vectors per list from which the centres of lists are learned."""


@dataclass(frozen=True)
class Found:
    """Places of a store, the best first: cosine, number of the place, and its centre in the store's CRS, each [n]."""

    score: np.ndarray
    index: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class Away:
    """Places at least ``metres`` from ``geometry`` (in the store's CRS), where a unit of x and of y has so many metres."""

    geometry: Any
    per_unit: tuple[float, float]
    metres: float

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        kx, ky = self.per_unit
        west, south, east, north = self.geometry.bounds
        near = (x * kx > west * kx - self.metres) & (x * kx < east * kx + self.metres)
        near &= (y * ky > south * ky - self.metres) & (y * ky < north * ky + self.metres)
        if near.any():
            scaled = shapely.transform(self.geometry, lambda xy: xy * (kx, ky))
            at = np.flatnonzero(near)
            near[at] = shapely.distance(shapely.points(x[at] * kx, y[at] * ky), scaled) < self.metres
        return ~near


@dataclass(frozen=True)
class Keep:
    """A filter by place: centres inside or on ``within`` (None: anywhere) and away from others."""

    within: Any = None
    away: tuple[Away, ...] = ()

    @property
    def everything(self) -> bool:
        return self.within is None and not self.away

    @property
    def bounds(self) -> tuple[float, float, float, float] | None:
        return None if self.within is None else self.within.bounds

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        kept = np.ones(len(x), bool)
        if self.within is not None:
            west, south, east, north = self.within.bounds
            kept &= (x >= west) & (x <= east) & (y >= south) & (y <= north)
            at = np.flatnonzero(kept)
            shapely.prepare(self.within)
            kept[at] = shapely.intersects_xy(self.within, x[at], y[at])
        for away in self.away:
            at = np.flatnonzero(kept)
            kept[at] = away(x[at], y[at])
        return kept


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows over their length; rows of zeros stay."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


def top(score: np.ndarray, row: np.ndarray, n: int, place: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The ``n`` highest scores and their rows; of equal scores the lower number of the ``place`` of a row (else the lower row) comes
    first, so that no order of work matters."""
    if len(score) > n:
        some = score >= np.partition(score, len(score) - n)[len(score) - n]
        score, row = score[some], row[some]
    order = np.lexsort((row if place is None else place[row], -score))[:n]
    return score[order], row[order]


def blocks(store: Any, keep: Keep | None = None) -> Iterator[Points]:
    """All vectors of a store that are data, a window at a time, windows read ahead by several threads; without windows off the bounds of ``keep``."""
    if store.kind != "pixel":
        yield from store.points()
        return
    bounds = None if keep is None else keep.bounds

    def near(window: Window) -> bool:
        (y0, y1), (x0, x1) = ((span.start, span.stop) for span in window)
        x, y = grid.positions(store.geobox.affine, [x0, x1, x0, x1], [y0, y0, y1, y1])
        return bounds is None or not (
            x.max() < bounds[0] or y.max() < bounds[1] or x.min() > bounds[2] or y.min() > bounds[3]
        )

    def one(window: Window) -> Points:
        rows, cols = window
        flat = store.read(rows, cols).reshape(-1, store.dim)
        y, x = np.divmod(np.flatnonzero(np.isfinite(flat).all(1)), cols.stop - cols.start)
        vectors = flat if len(y) == len(flat) else flat[y * (cols.stop - cols.start) + x]
        east, north = grid.positions(store.geobox.affine, x + cols.start + 0.5, y + rows.start + 0.5)
        return Points(vectors, east, north, (y + rows.start).astype(np.int64) * store.shape[1] + x + cols.start)

    yield from prefetch(one, filter(near, store.windows()), workers=READERS)


def scan(points: Iterable[Points], queries: np.ndarray, n: int, keep: Keep) -> list[Found]:
    """For each of ``queries`` [m, dim] the exact ``n`` best of a stream of points, in the memory of one block and the answers."""
    best: list[Found] = [Found(*(np.empty(0, t) for t in (np.float32, np.int64, float, float))) for _ in queries]
    for block in points:
        kept = slice(None) if keep.everything else np.flatnonzero(keep(block.x, block.y))
        scores = unit(block.vectors[kept]) @ queries.T
        index, x, y = block.index[kept], block.x[kept], block.y[kept]
        for i, known in enumerate(best):
            mine = np.arange(len(scores))
            if len(known) == n:
                mine = np.flatnonzero(scores[:, i] >= known.score[-1])
            if len(mine):
                _, mine = top(scores[mine, i], mine, n) if len(mine) > n else (None, mine)
                best[i] = _merged(known, Found(scores[mine, i], index[mine], x[mine], y[mine]), n)
    return best


def _merged(a: Found, b: Found, n: int) -> Found:
    score, index = np.concatenate([a.score, b.score]), np.concatenate([a.index, b.index])
    order = np.lexsort((index, -score))[:n]
    return Found(score[order], index[order], np.concatenate([a.x, b.x])[order], np.concatenate([a.y, b.y])[order])


@dataclass(frozen=True)
class Facts:
    """What an index says of itself. ``recall`` is the share of the exact ten nearest that it finds, mean of ``sample`` stored vectors."""

    engine: str
    why: str
    store: str
    """Fingerprint of the store that it was made of."""
    count: int
    dim: int
    dtype: str = "float32"
    lists: int = 0
    probes: int = 0
    recall: float = 1.0
    sample: int = 0
    format: int = 1

    def __str__(self) -> str:
        lists = f" with {self.probes} of {self.lists} lists" if self.lists else ""
        measured = "exact" if self.engine == "exact" else f"recall@10 {self.recall:.3f}{lists}"
        return f"{self.engine}, {self.count} vectors of {self.dim}, {measured} ({self.why})"


def lists_for(count: int) -> int:
    """Number of lists, a power of two near the square root; 0 where they do not pay."""
    return 0 if count < FLAT else 2 ** round(math.log2(math.sqrt(count)))


class Places:
    """Number and centre of each row, written as it comes."""

    NAMES = (("index", np.int64), ("x", np.float64), ("y", np.float64))

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._files = [(name, dtype, open(folder / f"{name}.raw", "wb")) for name, dtype in self.NAMES]  # noqa: SIM115

    def add(self, block: Any) -> None:
        self.count += len(block.index)
        for name, dtype, file in self._files:
            np.ascontiguousarray(getattr(block, name), dtype).tofile(file)

    def close(self) -> None:
        for _, _, file in self._files:
            file.close()

    @classmethod
    def read(cls, folder: Path, count: int) -> list[np.ndarray]:
        """Mapped from disk: what a search does not touch is not read."""
        return [np.memmap(folder / f"{name}.raw", dtype, "r", shape=(count,)) for name, dtype in cls.NAMES]


class Scan:
    """No index: every search reads the store."""

    name = "scan"

    def __init__(self, store: Any) -> None:
        self.store = store

    def best(self, query: np.ndarray, n: int, keep: Keep) -> Found:
        """The ``n`` places of the highest cosine to ``query`` [dim], of unit length, among those that are kept."""
        return scan(blocks(self.store, keep), query[None], n, keep)[0]


class Exact:
    """Rows of int8 or float32, mapped from disk, all looked at by all cores.

    One int8 row costs a quarter of the memory traffic of float32, which is what bounds the time. It is widened to float32 a few thousand rows at a
    time, in the cache; integer products (``torch._int_mm``) took as long, and need the query rounded.
    """

    name = "exact"

    def __init__(self, folder: Path, facts: Facts) -> None:
        self.facts = facts
        self.rows = np.memmap(folder / "vectors.raw", facts.dtype, "r", shape=(facts.count, facts.dim))
        self.scale = None
        if facts.dtype == "int8":
            self.scale = np.fromfile(folder / "scale.raw", np.float32)
        self.index, self.x, self.y = Places.read(folder, facts.count)

    @staticmethod
    def sample_of(count: int) -> int:
        return 0

    class Writer:
        def __init__(self, folder: Path, store: Any, sample: np.ndarray, count: int) -> None:
            self._int8 = coded(store)
            self._rows = open(folder / "vectors.raw", "wb")  # noqa: SIM115
            self._scale = open(folder / "scale.raw", "wb") if self._int8 else None  # noqa: SIM115

        def add(self, block: Any) -> None:
            rows = block.vectors
            if self._scale is not None:
                # The largest number of a row has the code 127, so that dividing by it gives back the codes themselves.
                rows = np.rint(rows * (127 / np.maximum(np.abs(rows).max(1, keepdims=True), 1e-30))).astype(np.int8)
                length = np.linalg.norm(rows.astype(np.float32), axis=1)
                (1 / np.maximum(length, 1)).astype(np.float32).tofile(self._scale)
            np.ascontiguousarray(rows).tofile(self._rows)

        def finish(self) -> tuple[str, int]:
            """Type of the numbers and number of lists."""
            self._rows.close()
            if self._scale is not None:
                self._scale.close()
            return "int8" if self._int8 else "float32", 0

    def best(self, query: np.ndarray, n: int, keep: Keep) -> Found:
        step = ROWS * 16
        with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = pool.map(
                lambda start: self._part(query, n, keep, start, start + step), range(0, len(self.rows), step)
            )
            score, row = (np.concatenate(parts) for parts in zip(*jobs, strict=True))
        score, row = top(score, row, n, self.index)
        return Found(score, self.index[row], self.x[row], self.y[row])

    def _part(self, query: np.ndarray, n: int, keep: Keep, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        stop = min(stop, len(self.rows))
        at = np.arange(start, stop)
        if not keep.everything:
            at = at[keep(self.x[start:stop], self.y[start:stop])]
        if len(at) < (stop - start) // 4:
            score = self.rows[at].astype(np.float32) @ query
        else:
            score = np.empty(stop - start, np.float32)
            for a in range(start, stop, ROWS):
                b = min(a + ROWS, stop)
                np.dot(self.rows[a:b].astype(np.float32, copy=False), query, out=score[a - start : b - start])
            score = score[at - start]
        if self.scale is not None:
            score *= self.scale[at]
        return top(score, at, n, self.index)


class Faiss:
    """In memory, 8 bits a number; lists from 50,000 vectors on."""

    name = "faiss"

    def __init__(self, folder: Path, facts: Facts) -> None:
        faiss = optional("faiss")
        self.facts = facts
        self.faiss: Any = faiss.read_index(str(folder / "vectors.faiss"))
        self.index, self.x, self.y = Places.read(folder, facts.count)

    @staticmethod
    def sample_of(count: int) -> int:
        return min(count, max(10_000, SAMPLED * lists_for(count)))

    class Writer:
        def __init__(self, folder: Path, store: Any, sample: np.ndarray, count: int) -> None:
            faiss = optional("faiss")
            self._path, self._lists = folder / "vectors.faiss", lists_for(count)
            kind = f"IVF{self._lists},SQ8" if self._lists else "SQ8"
            self._index = faiss.index_factory(store.dim, kind, faiss.METRIC_INNER_PRODUCT)
            if self._lists:
                self._index.cp.seed = 0
            self._index.train(sample)

        def add(self, block: Any) -> None:
            self._index.add(np.ascontiguousarray(block.vectors))

        def finish(self) -> tuple[str, int]:
            optional("faiss").write_index(self._index, str(self._path))
            return "8 bits", self._lists

    def best(self, query: np.ndarray, n: int, keep: Keep) -> Found:
        faiss, lists, n = optional("faiss"), self.facts.lists, min(n, self.facts.count)
        options: dict[str, Any] = {}
        if not keep.everything:
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(keep(self.x, self.y), bitorder="little"))
        for probes in dict.fromkeys((lists if options else self.facts.probes, lists)):
            if lists:
                settings = faiss.SearchParametersIVF(nprobe=probes, **options)
            else:
                settings = faiss.SearchParameters(**options)
            score, row = self.faiss.search(query[None], n, params=settings)
            found = row[0] >= 0
            if found.all():
                break  # else the probed lists hold too few: all of them are looked at
        score, row = top(score[0][found], row[0][found], n, self.index)
        return Found(score, self.index[row], self.x[row], self.y[row])


class Lance:
    """On disk, for what does not fit in memory."""

    name = "lancedb"
    REFINE = 4
    """So many times as many as are wanted are compared again, in float32."""

    def __init__(self, folder: Path, facts: Facts) -> None:
        self.facts = facts
        self.table = optional("lancedb").connect(folder).open_table("places")

    @staticmethod
    def sample_of(count: int) -> int:
        return min(count, 10_000)

    class Writer:
        def __init__(self, folder: Path, store: Any, sample: np.ndarray, count: int) -> None:
            import pyarrow as pa

            self._lists = lists_for(count)
            vectors = pa.list_(pa.float32(), store.dim)
            fields = [("index", pa.int64()), ("x", pa.float64()), ("y", pa.float64()), ("vector", vectors)]
            self._schema = pa.schema(fields)
            self._table = optional("lancedb").connect(folder).create_table("places", schema=self._schema)
            self._waiting: list[Any] = []

        def add(self, block: Any) -> None:
            import pyarrow as pa

            flat = pa.array(np.ascontiguousarray(block.vectors).ravel())
            vectors = pa.FixedSizeListArray.from_arrays(flat, block.vectors.shape[1])
            columns = [pa.array(block.index), pa.array(block.x), pa.array(block.y), vectors]
            self._waiting.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
            if sum(map(len, self._waiting)) >= 2**18:
                self._flush()

        def _flush(self) -> None:
            """Each addition is a version with files of its own, hence few large ones."""
            if self._waiting:
                import pyarrow as pa

                self._table.add(pa.Table.from_batches(self._waiting))
                self._waiting = []

        def finish(self) -> tuple[str, int]:
            self._flush()
            if self._lists:
                rule = optional("lancedb.index").IvfSq("dot", self._lists)
                self._table.create_index("vector", config=rule)
            return "float32", self._lists

    def best(self, query: np.ndarray, n: int, keep: Keep) -> Found:
        wanted, lists = n, self.facts.lists > 0 and keep.everything
        while True:
            found = self._ask(query, wanted, keep, lists)
            kept = np.flatnonzero(keep(found.x, found.y))[:n]
            if len(kept) == n or (len(found) < wanted and not lists):
                return Found(*(values[kept] for values in (found.score, found.index, found.x, found.y)))
            # Either the filter is narrower than its bounds, or the probed lists hold too few: then all rows are looked at.
            wanted, lists = wanted if lists else 4 * wanted, False

    def _ask(self, query: np.ndarray, n: int, keep: Keep, lists: bool) -> Found:
        search = self.table.search(query, vector_column_name="vector").distance_type("dot").limit(n)
        if keep.bounds is not None:
            west, south, east, north = (repr(float(v)) for v in keep.bounds)
            search = search.where(f"x >= {west} AND x <= {east} AND y >= {south} AND y <= {north}", prefilter=True)
        search = search.nprobes(self.facts.probes).refine_factor(self.REFINE) if lists else search.bypass_vector_index()
        table = search.select(["index", "x", "y", "_distance"]).to_arrow()
        distance, index, x, y = (table[name].to_numpy() for name in ("_distance", "index", "x", "y"))
        order = np.lexsort((index, distance))
        return Found((1 - distance[order]).astype(np.float32), index[order], x[order], y[order])


KINDS: dict[str, Any] = {"exact": Exact, "faiss": Faiss, "lancedb": Lance}


def optional(name: str) -> Any:
    """faiss or lancedb, or an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"the engine {name.partition('.')[0]} is not installed: pip install everysat[search], or use engine='exact'"
        ) from error


def coded(store: Any) -> bool:
    """Whether the store's codes are its vectors up to a factor of each row, so that int8 loses nothing."""
    return str(store.quantiser.name).startswith(("int8-linear/", "prefix/"))

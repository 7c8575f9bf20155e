"""The index of a store: made, chosen by size, measured against the exact answer, and refused when the store has changed since.

It is a folder beside the store: ``area.zarr.index`` beside ``area.zarr``, with the engine's files and ``index.json``
(:class:`everysat.store.engines.Facts`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from everysat.find import suggest
from everysat.io.output import replacing
from everysat.progress import track
from everysat.store.engines import KINDS, Facts, Found, Keep, Places, blocks, coded, optional, scan, unit
from everysat.store.read import Points

ENGINES = ("auto", *KINDS)
FORMAT = 1
QUERIES, NEIGHBOURS = 100, 10
"""Stored vectors that recall is measured with, and of how many nearest others."""
ENOUGH = 0.95
"""More lists are looked at until the recall is this, if it can be."""
INTERACTIVE = 10_000_000
"""Vectors beyond which looking at all of them takes longer than about a second."""
SHARE = 0.25
"""Of the machine's memory, which an index may fill."""


def folder_of(store: Any) -> Path:
    """Where the index of a store lies: ``area.zarr.index`` beside ``area.zarr``, ``area.zarr.utm31.index`` for a group of it."""
    path = Path(store.path)
    if (path.parent / "zarr.json").is_file():
        return path.parent.with_name(f"{path.parent.name}.{path.name}.index")
    return path.with_name(path.name + ".index")


def fingerprint(path: str | Path) -> str:
    """Of the names, sizes and times of all files of a store: whatever is written changes it, and gigabytes need not be read."""
    path, found = Path(path), hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        facts = file.stat()
        found.update(f"{file.relative_to(path).as_posix()}|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
    return found.hexdigest()[:32]


def choose(store: Any, engine: str = "auto") -> tuple[str, str]:
    """The engine for a store and why."""
    if engine not in ENGINES:
        raise LookupError(f"engine={engine!r} is unknown. {suggest(engine, ENGINES)}")
    if engine != "auto":
        return engine, "as asked for"
    count, width = math.prod(store.shape), 1 if coded(store) else 4
    size, most = count * store.dim * width, SHARE * _memory()
    if count <= INTERACTIVE and size <= most:
        return "exact", f"at most {count} vectors, {size / 1e6:.0f} MB, are looked at in a second"
    wanted = "faiss" if count * (store.dim + 8) <= most else "lancedb"
    reason = f"up to {count} vectors take {size / 1e9:.1f} GB of {most / SHARE / 1e9:.1f} GB"
    if importlib.util.find_spec(wanted) is None:
        return "exact", f"{reason}; {wanted} would be faster, but is not installed: pip install everysat[search]"
    return wanted, reason


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def build(store: Any, engine: str = "auto", *, seed: int = 0, quiet: bool = False) -> Facts:
    """Make the index of a store, in bounded memory; one that was there is replaced when the new one is complete.

    Args:
        store: what :func:`everysat.store.open.open_store` returns.
        engine: ``exact``, ``faiss``, ``lancedb``, or ``auto``: by size and by the memory of the machine.

    Raises:
        ValueError: the store holds no vectors, or changed meanwhile. ImportError: faiss or lancedb is not installed.
    """
    name, why = choose(store, engine)
    before, kind = fingerprint(store.path), KINDS[name]
    if name != "exact":
        optional(name)
    sample = _sample(store, kind.sample_of(math.prod(store.shape)), seed, quiet)
    with replacing(folder_of(store)) as part:
        part.mkdir()
        facts, truth = _written(part, store, Facts(name, why, before, 0, store.dim), sample, quiet)
        if truth:
            facts = _tuned(part, facts, sample, truth)
        if fingerprint(store.path) != before:
            raise ValueError(f"{store.path} changed while it was indexed; run everysat index again when it is complete")
        (part / "index.json").write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
    return facts


def open_index(store: Any) -> Any | None:
    """The engine of a store's index; None when it has none.

    Raises:
        ValueError: the index is stale, or of a format that is not known here.
    """
    folder = folder_of(store)
    if not (folder / "index.json").is_file():
        return None
    again = f"run: everysat index {store.path}"
    try:
        facts = Facts(**json.loads((folder / "index.json").read_text(encoding="utf-8")))
        KINDS[facts.engine]
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{folder} is no index that this version knows ({error}); {again}") from error
    if facts.format != FORMAT:
        raise ValueError(f"{folder} has format {facts.format}, this version reads {FORMAT}; {again}")
    if facts.store != fingerprint(store.path) or facts.dim != store.dim:
        raise ValueError(
            f"the index {folder} is stale: {store.path} changed after it was made; {again}, or search with engine='scan'"
        )
    return _opened(folder, facts, (folder / "index.json").stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _opened(folder: Path, facts: Facts, written_ns: int) -> Any:
    """Opening takes longer than searching, hence the last few engines stay open."""
    return KINDS[facts.engine](folder, facts)


@dataclass(frozen=True)
class Sample:
    """Random vectors of a store, of unit length, and their places; ``count`` of all that hold data."""

    vectors: np.ndarray
    index: np.ndarray
    count: int


def _sample(store: Any, size: int, seed: int, quiet: bool) -> Sample:
    """Those with the smallest random keys, in the order of the keys; nothing is read for a sample of none."""
    rng, count = np.random.default_rng(seed), 0
    key, index, vectors = np.empty(0), np.empty(0, np.int64), np.empty((0, store.dim), np.float32)
    for block in track(blocks(store), "Sampling", quiet=quiet) if size else ():
        count += len(block.index)
        key = np.concatenate([key, rng.random(len(block.index))])
        order = np.argsort(key, kind="stable")[:size]
        new = order >= len(index)
        kept, fresh = vectors[order[~new]], unit(block.vectors[order[new] - len(index)])
        both = np.empty((len(order), store.dim), np.float32)
        both[~new], both[new] = kept, fresh
        key, index, vectors = key[order], np.concatenate([index, block.index])[order], both
    return Sample(vectors, index, count)


def _written(folder: Path, store: Any, facts: Facts, sample: Sample, quiet: bool) -> tuple[Facts, list[Found]]:
    """The engine's files, and for the first of the sample the exact answer, from one pass over the store."""
    places = Places(folder)
    writer = KINDS[facts.engine].Writer(folder, store, sample.vectors, sample.count)

    def passed() -> Iterator[Points]:
        for block in track(blocks(store), f"Indexing with {facts.engine}", quiet=quiet):
            ready = Points(unit(block.vectors), block.x, block.y, block.index)
            places.add(ready)
            writer.add(ready)
            yield ready

    try:
        truth = scan(passed(), sample.vectors[:QUERIES], NEIGHBOURS + 1, Keep())
    finally:
        places.close()
    dtype, lists = writer.finish()
    if places.count == 0:
        raise ValueError(f"{store.path} holds no vectors: all its places are without data")
    return replace(facts, count=places.count, dtype=dtype, lists=lists, probes=min(1, lists)), truth


def _tuned(folder: Path, facts: Facts, sample: Sample, truth: list[Found]) -> Facts:
    """The fewest probed lists, a power of two, with which the recall is enough; and that recall."""
    while True:
        facts = replace(facts, recall=_recall(folder, facts, sample, truth), sample=len(truth))
        if facts.recall >= ENOUGH or facts.probes >= facts.lists:
            return facts
        facts = replace(facts, probes=min(2 * facts.probes, facts.lists))


def _recall(folder: Path, facts: Facts, sample: Sample, truth: list[Found]) -> float:
    """The mean share of the exact nearest that the engine finds; a vector does not count as its own neighbour."""
    engine, shares = KINDS[facts.engine](folder, facts), []
    for query, own, exact in zip(sample.vectors, sample.index, truth, strict=False):
        found = engine.best(query, NEIGHBOURS + 1, Keep()).index
        wanted, given = (set([i for i in some.tolist() if i != own][:NEIGHBOURS]) for some in (exact.index, found))
        shares.append(len(wanted & given) / max(1, len(wanted)))
    return float(np.mean(shares))

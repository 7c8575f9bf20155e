"""Maps of places that are larger than memory: overlapping windows in, one map out.

A mapper turns a batch into an image [row, channel, y, x]: class probabilities or features. Its windows begin on multiples of
``align_m``, so that every window cuts tokens and chips where the whole place would, and are read with a halo of ``halo_m``;
with a halo as wide as the mapper's sight, the map by windows is the map in one piece. While windows are computed, the next ones
are read and the finished ones written. These are kept beside the output until it is complete: after an interruption of any
kind, the same call goes on with the windows that are missing. The result does not depend, to the bit, on the order in which
windows were finished, on how many were computed at once, by which worker, or on interruptions.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat import __version__
from everysat.mapping.outputs import FAILURES, Output, output
from everysat.mapping.outputs import NO_CLASS as NO_CLASS
from everysat.mapping.parts import Parts
from everysat.mapping.seams import seam
from everysat.mapping.source import Source, facts_of, open_source
from everysat.mapping.windows import Plan as Plan
from everysat.mapping.windows import Window
from everysat.mapping.windows import crop as crop
from everysat.mapping.workers import Finished, Work, local, on_ray
from everysat.nn.dense import dense_features as dense_features
from everysat.nn.mappers import Classified as Classified
from everysat.nn.mappers import Dense as Dense
from everysat.nn.mappers import Mapper as Mapper
from everysat.nn.mappers import Stacked as Stacked
from everysat.nn.mappers import Tasked as Tasked
from everysat.nn.mappers import common_multiple
from everysat.progress import Progress
from everysat.types import Batch

WINDOW_M = 3840.0
"""Side of a window, metres, where that fits :data:`WINDOW_BYTES`."""
WINDOW_BYTES = 64e6
"""Of the inputs and the image of a window, together: several windows are held at once."""


class Maps(dict[str, Path]):
    """Paths of a finished map by what they hold. ``seam``: see :func:`everysat.mapping.seams.seam`; ``seconds`` of this run, and
    the ``pixels`` that it computed."""

    seam: float | None = None
    seconds: float = 0.0
    pixels: int = 0


def predict(
    mapper: Mapper,
    scene: Batch | Any,
    out: str | Path,
    *,
    window_m: float | None = None,
    halo_m: float | None = None,
    align_m: float | None = None,
    blend: bool = False,
    min_valid: float = 0.0,
    probabilities: bool = False,
    quantiser: str | None = None,
    facts: Mapping[str, Any] | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> Maps:
    """Maps a whole scene.

    Args:
        mapper: :class:`Classified`, :class:`Tasked`, :class:`Dense`, or anything like them.
        scene: a batch of one place, or what :func:`everysat.io.read.open_scene` returns: ``geobox`` and ``read(geobox)``.
        out: what to write. ``.tif``: class probabilities give the code of the most probable class (its position in
            ``mapper.names``, 255 where nothing was observed) and, in ``<out>-confidence.tif``, the probability of that class in per
            cent, calibrated as the mapper's probabilities are; anything else gives one float band per channel. ``.zarr``, for
            features: a store of embeddings (:mod:`everysat.store`); ``.parquet``: the same with one row a pixel.
        window_m: side of a window, rounded up to multiples of ``align_m``, and to twice the halo when blending. By default
            3840 m, or less so that a window's inputs and image take no more than 64 MB.
        halo_m, align_m: instead of the mapper's own.
        blend: windows fade into each other over a halo on both sides of their edges, and read twice the halo; for mappers whose
            sight is wider than a halo can be, such as attention over the whole window.
        min_valid: windows of whose pixels a smaller share was observed are no data; by default those without any.
        probabilities: also write ``<out>-probabilities.tif``.
        quantiser: of a store, such as ``int8-linear/1`` (the default) or ``float32/1``.
        facts: what a store says of itself: ``period``, ``model``, ``source``, as :func:`everysat.store.create` takes them.
        workers: processes that compute windows, through Ray if more than 1; each uses one device, or one core.
        cluster: of Ray, ``ray://HOST:PORT``, ``HOST:PORT`` or ``auto``. Without ``workers``, all its devices are used.
        threads: windows that this process computes at the same time, when it works alone; by default its cores, at most 8.

    Returns:
        Paths by what they hold: ``classes`` and ``confidence`` (and ``probabilities``), or ``features``.

    Raises:
        InputChanged: a file changed or vanished meanwhile. OSError: a disk is full, or a folder cannot be written.
        ImportError: ``workers`` or ``cluster`` without Ray. What is finished stays, and the same call goes on.
    """
    os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB; a twentieth of the machine's memory otherwise
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out}: the folder {out.parent} does not exist; make it first")
    if not 0 <= min_valid <= 1:
        raise ValueError(f"min_valid={min_valid} must be a share, from 0 to 1")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    source = open_source(scene, mapper.gsd_m)
    work = Work(mapper, source, plan_of(mapper, source, window_m, halo_m, align_m, blend), min_valid)
    parts = Parts(out.with_name(out.name + ".parts"), work.plan, len(mapper.names), _facts(work), quiet=quiet)
    written = output(out, mapper, source.geobox, parts, probabilities, quantiser, facts or {})
    with parts:
        parts.require_space()
        missing = [window for window in work.plan.windows() if not parts.has(window)]
        if cluster is not None or (workers or 1) > 1:
            finished = on_ray(work, missing, workers=workers, address=cluster)
        else:
            finished = local(work, missing, threads)
        made = _made(finished, written, parts, missing, quiet)
        parts.remove()
    return made


def _made(finished: Iterator[Finished], written: Output, parts: Parts, missing: list[Window], quiet: bool) -> Maps:
    """Run: windows as they are finished go to the disk, and from there into the output."""
    total, began = math.prod(parts.plan.grid), time.monotonic()
    title = f"Mapping {next(iter(written.paths.values())).name}"
    made = Maps(written.paths)
    with Progress(title, total, done=total - len(missing), quiet=quiet) as bar, _Writer(written, parts) as writer:
        for window, image in finished:
            writer.put(window, image)
            made.pixels += (window.core[1] - window.core[0]) * (window.core[3] - window.core[2])
            bar.advance(note=_pace(made.pixels, time.monotonic() - began, parts.plan.gsd_m))
        writer.finish()
        made.seam, made.seconds = seam(parts), time.monotonic() - began
    return made


def _pace(pixels: int, seconds: float, gsd_m: float) -> str:
    each = pixels / max(seconds, 1e-3)
    return f"{each / 1e3:.3g} thousand pixels/s, {each * gsd_m**2 / 1e6:.3g} km²/s"


def plan_of(
    mapper: Mapper, source: Source, window_m: float | None, halo_m: float | None, align_m: float | None, blend: bool
) -> Plan:
    """How a source is cut for a mapper; arguments as for :func:`predict`. It depends on nothing else, so it is the same on every
    machine."""
    step_m = common_multiple([mapper.align_m if align_m is None else align_m, mapper.gsd_m, *source.steps_m])
    halo_m = mapper.halo_m if halo_m is None else halo_m
    halo_m = math.ceil(halo_m / step_m - 1e-6) * step_m
    if window_m is None:
        each = source.bytes_per_m2 + 4 * len(mapper.names) / mapper.gsd_m**2
        widest = min(WINDOW_M, math.sqrt(WINDOW_BYTES / each))
        # A halo is read for every window: narrow ones would be mostly that.
        window_m = max(math.floor(widest / step_m) * step_m, 2 * halo_m, step_m)
    window_m = math.ceil(window_m / step_m - 1e-6) * step_m
    if not window_m > 0:
        raise ValueError(f"window_m={window_m} must be positive (metres)")
    window, halo, step = (round(size / mapper.gsd_m) for size in (window_m, halo_m, step_m))
    if blend:
        return Plan(source.shape, mapper.gsd_m, max(window, 2 * halo), 2 * halo, halo, step)
    return Plan(source.shape, mapper.gsd_m, window, halo, 0, step)


def _facts(work: Work) -> dict[str, Any]:
    """What the windows come from, in the words in which a change is reported."""
    return {
        "input": work.source.facts(),
        "model": facts_of(work.mapper),
        "min_valid": work.min_valid,
        "version": [__version__, torch.__version__, np.__version__],
    }


class _Stopped(Exception):
    """The run ended early."""


class _Writer:
    """A thread that puts finished windows on the disk and writes each block of the output as soon as all windows that it needs are
    there. Errors of it are raised by :meth:`put` and :meth:`finish`."""

    def __init__(self, written: Output, parts: Parts) -> None:
        self.written, self.parts = written, parts
        self.queue: queue.Queue[Finished | None] = queue.Queue(maxsize=2)
        self.stopped = threading.Event()

    def __enter__(self) -> _Writer:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._future = self._pool.submit(self._write)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stopped.set()
        self._pool.shutdown()

    def put(self, window: Window, image: np.ndarray) -> None:
        self._put((window, image))

    def finish(self) -> None:
        """Wait until the output is complete."""
        self._put(None)
        self._future.result()

    def _put(self, item: Finished | None) -> None:
        while not self._future.done():
            try:
                return self.queue.put(item, timeout=0.2)
            except queue.Full:
                continue
        return self._future.result()

    def _items(self) -> Iterator[Finished]:
        """What is put, until the end; what was put before the run stopped is still given."""
        while True:
            try:
                item = self.queue.get(timeout=0.1)
            except queue.Empty:
                if self.stopped.is_set():
                    raise _Stopped from None
                continue
            if item is None:
                return
            yield item

    def _write(self) -> None:
        try:
            items = self._items()
            if self.written.late:
                for item in items:
                    self.parts.save(*item)
            self._assemble(items)
        except _Stopped:
            return
        except FAILURES as error:
            path = next(iter(self.written.paths.values()))
            if str(self.parts.folder) in str(error):
                raise
            raise OSError(
                f"cannot write {path} ({error}). Make room there, and run the same command again: the finished windows are kept in "
                f"{self.parts.folder}"
            ) from error

    def _assemble(self, items: Iterator[Finished]) -> None:
        with self.written as written:
            blocks = written.blocks()
            waiting = self._ready(written, next(blocks, None), blocks)
            for item in items:
                self.parts.save(*item)
                waiting = self._ready(written, waiting, blocks)
            if waiting is not None:
                raise _Stopped  # nothing of the output appears

    def _ready(self, written: Output, box: Any, blocks: Iterator[Any]) -> Any:
        """Write blocks until one lacks a window; that one, or None when all are written."""
        while box is not None and not self.stopped.is_set() and all(map(self.parts.has, self.parts.plan.reaching(box))):
            written.write(box, self.parts.read(box))
            box = next(blocks, None)
        return box

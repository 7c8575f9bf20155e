"""Who computes windows: threads of this process, or processes on this and other machines through Ray.

Both run the same :class:`Work` and give the same bits. A window is computed by one thread, alone: sums that several threads share,
and products of few rows, depend on how the work is split. Several windows are computed at once instead.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from everysat.mapping.source import Source, modules_of
from everysat.mapping.windows import Plan, Window, inside
from everysat.nn.grid import on_grid
from everysat.nn.mappers import Mapper
from everysat.types import Batch, Raster

THREADS = 8
"""Windows that one process computes at the same time, at most; each takes memory."""
RETRIES = 2
"""How often a window is tried again when reading or computing it failed for a reason that may pass."""
PASSING = (OSError, RuntimeError)
"""Errors after which a window is tried again: of files, servers and devices. What is wrong with the data stays wrong."""
NOTHING = np.zeros(0, np.float32)
"""The image of a window of which nothing is known."""

Finished = tuple[Window, np.ndarray]


@dataclass(frozen=True)
class Work:
    """A map to be made: reading a window, and computing its image. ``min_valid``: share of the pixels of a window that must have
    been observed, or else the window is no data."""

    mapper: Mapper
    source: Source
    plan: Plan
    min_valid: float = 0.0

    def read(self, window: Window) -> tuple[Batch, np.ndarray] | None:
        """What a window needs, and which of its pixels any layer observed; None if too few are."""
        batch = self.source.read(*window.read)
        shape = window.read[1] - window.read[0], window.read[3] - window.read[2]
        seen = observed(batch, self.plan.gsd_m, shape)
        share = seen[inside(window.core, window.read)].mean()
        kept = seen[inside(window.kept, window.read)]
        return (batch, seen) if kept.any() and share >= self.min_valid else None

    def compute(self, window: Window, given: tuple[Batch, np.ndarray] | None) -> np.ndarray:
        """The mapper's image of what a window keeps, float32 [channel, y, x]; NaN where no layer was observed."""
        if given is None:
            return NOTHING
        batch, seen = given
        with torch.inference_mode():
            image = self.mapper(batch)[0, :, : seen.shape[0], : seen.shape[1]].float().cpu().numpy()
        if image.shape[1:] != seen.shape:
            raise ValueError(
                f"the mapper made {image.shape[1:]} pixels of a window of {seen.shape} pixels of {self.plan.gsd_m:g} m"
            )
        part = inside(window.kept, window.read)
        return np.where(seen[part], image[:, *part], np.float32(np.nan))


def observed(batch: Batch, gsd_m: float, shape: tuple[int, int]) -> np.ndarray:
    """Where any layer of a batch of one place has a valid value on a grid of ``gsd_m``, bool [y, x]."""
    seen = torch.zeros(shape, dtype=torch.bool)
    for layer in batch.layers.values():
        if isinstance(layer, Raster) and len(layer.row):
            any_band = layer.valid.any(1).any(0)[None, None].cpu()
            sensor = layer.sensor.select(layer.sensor.names[:1])
            flat = replace(
                layer, sensor=sensor, values=any_band.float(), valid=any_band, time_s=layer.time_s[:1], row=torch.zeros(1).long(), var=None
            )  # fmt: skip
            seen |= on_grid(flat, 1, gsd_m, *shape)[1][0, 0]
    return seen.numpy()


@contextmanager
def ready(mapper: Mapper) -> Iterator[None]:
    """All networks of a mapper in eval mode and one thread for each computation, until the block ends."""
    modules = [module for network in modules_of(mapper) for module in network.modules()]
    before, threads = [module.training for module in modules], torch.get_num_threads()
    try:
        for module in modules:
            module.training = False
        torch.set_num_threads(1)
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
        torch.set_num_threads(threads)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local(work: Work, windows: Iterable[Window], threads: int | None = None) -> Iterator[Finished]:
    """Images as they are finished, in any order. Windows are read ahead while others are computed; how many are held at once
    depends on ``threads`` alone (default: cores, at most :data:`THREADS`; 1 where the mapper is on an accelerator)."""
    threads = threads or (1 if device_of(work.mapper) != "cpu" else min(cores(), THREADS))
    tries = _Tries()
    todo = deque(windows)
    with ready(work.mapper), ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(threads, initializer=_alone) as pool:
        running: dict[Future[np.ndarray], Window] = {}

        def start(window: Window) -> None:
            batch = readers.submit(work.read, window)
            running[pool.submit(lambda: work.compute(window, batch.result()))] = window

        try:
            while todo or running:
                while todo and len(running) < threads + 2:
                    start(todo.popleft())
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    window, error = running.pop(future), future.exception()
                    if error is None:
                        yield window, future.result()
                    elif tries.again(window, error):
                        todo.appendleft(window)
                    else:  # what is under way is finished and kept, the rest left
                        todo.clear()
                        for other in [other for other in running if other.cancel()]:
                            del running[other]
            tries.give_up()
        finally:
            for executor in (readers, pool):
                executor.shutdown(wait=False, cancel_futures=True)


def _alone() -> None:
    torch.set_num_threads(1)


def device_of(mapper: Mapper) -> str:
    """Kind of device that the networks of a mapper are on."""
    kinds = {p.device.type for network in modules_of(mapper) for p in network.parameters()}
    return next((kind for kind in sorted(kinds) if kind != "cpu"), "cpu")


class _Tries:
    """How often each window failed, and the first error that is final."""

    def __init__(self) -> None:
        self.failed: Counter[int] = Counter()
        self.error: BaseException | None = None

    def again(self, window: Window, error: BaseException) -> bool:
        """Whether the window shall be tried again; waits a little then."""
        if self.error is not None:
            return False
        self.failed[window.index] += 1
        count = self.failed[window.index]
        if not isinstance(error, PASSING) or count > RETRIES:
            if count > 1:
                error.add_note(f"window {window.index} failed {count} times")
            self.error = error
            return False
        print(f"window {window.index} failed ({error}); it is tried again", file=sys.stderr)
        time.sleep(0.2 * count)
        return True

    def give_up(self) -> None:
        """Raise the error that was final, if there was one."""
        if self.error is not None:
            raise self.error


# --- Ray --------------------------------------------------------------------------------------------------------------


class _Worker:
    """One process on one device. Ray calls it from two threads: one window is read while another is computed."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(1)
        for network in modules_of(work.mapper):
            network.eval()
        self.work, self.computing = work, threading.Lock()

    def run(self, window: Window) -> np.ndarray:
        torch.set_num_threads(1)
        given = self.work.read(window)
        with self.computing:
            return self.work.compute(window, given)

    def process(self) -> int:
        return os.getpid()


@contextmanager
def cluster(address: str | None, workers: int | None) -> Iterator[Any]:
    """The ``ray`` module, connected: to the cluster at ``address`` (``ray://HOST:PORT``, ``HOST:PORT``, ``auto``), or to one of
    ``workers`` processes that is started on this machine, reachable from it alone, and ended with the block.

    Raises:
        ImportError: Ray is not installed. ConnectionError: there is no such cluster.
    """
    alone = address in (None, "local")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if (
        alone
    ):  # read when Ray is imported, and by the servers it starts: these then listen on the loopback interface alone
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("several workers need one more package: pip install 'everysat[cluster]'") from error
    ours = not ray.is_initialized()
    if ours:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if alone:
            ray.init(
                num_cpus=workers or cores(), include_dashboard=False, _node_ip_address="127.0.0.1", **quiet
            )  # fmt: skip
        else:
            try:
                ray.init(address=address, **quiet)
            except ImportError as error:
                raise ImportError(f"cluster={address!r} needs more of Ray: pip install 'ray[client]'") from error
            except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
                raise ConnectionError(
                    f"cluster={address!r} does not answer ({error}). Is it running (ray status), and is the port that of its client server? If it asks "
                    "for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` says there"
                ) from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def on_ray(work: Work, windows: Iterable[Window], *, workers: int | None, address: str | None) -> Iterator[Finished]:
    """Images as they are finished, computed by actors that take windows from one queue. Those of an actor that dies go to the
    others, and another takes its place. Without ``workers``, there is one for each device of the cluster, also of those that
    join later. Files must have the same paths everywhere; images come back to this process."""
    with cluster(address, workers) as ray:
        yield from _Team(ray, work, workers).run(windows)


class _Team:
    def __init__(self, ray: Any, work: Work, workers: int | None) -> None:
        self.ray, self.workers = ray, workers
        self.kind = "CPU" if device_of(work.mapper) == "cpu" else "GPU"
        self.work = ray.put(work)
        self.actors: list[Any] = []
        self.pending: dict[Any, tuple[Any, Window]] = {}
        self.counted = -1e9

    def run(self, windows: Iterable[Window]) -> Iterator[Finished]:
        todo, tries = deque(windows), _Tries()
        try:
            while todo or self.pending:
                self._recruit(len(todo) + len(self.pending))
                self._hand_out(todo)
                done, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=5.0)
                for ref in done:
                    actor, window = self.pending.pop(ref)
                    try:
                        image = self.ray.get(ref)
                    except self.ray.exceptions.RayActorError as error:
                        self._dismiss(actor)
                        failure: BaseException = RuntimeError(f"its worker died: {_last_line(error)}")
                    except self.ray.exceptions.RayTaskError as error:
                        failure = _cause(error)
                    else:
                        yield window, image
                        continue
                    if tries.again(window, failure):
                        todo.appendleft(window)
                    else:
                        todo.clear()
            tries.give_up()
        finally:
            for actor in list(self.actors):
                self._dismiss(actor)

    def _recruit(self, useful: int) -> None:
        """As many actors as asked for, or as there are devices, but not more than windows."""
        wanted = self.workers
        if wanted is None:
            if time.monotonic() - self.counted > 30:
                self.counted, self.devices = time.monotonic(), int(self.ray.cluster_resources().get(self.kind, 1))
            wanted = self.devices
        while len(self.actors) < max(1, min(wanted, useful)):
            device = {"num_gpus": 1, "num_cpus": 0} if self.kind == "GPU" else {"num_cpus": 1}
            actor = self.ray.remote(_Worker).options(max_concurrency=2, max_restarts=0, **device).remote(self.work)
            self.actors.append(actor)

    def _hand_out(self, todo: deque[Window]) -> None:
        for depth in (1, 2):  # the first of each actor, before the second of any
            for actor in self.actors:
                busy = sum(other is actor for other, _ in self.pending.values())
                if todo and busy < depth:
                    window = todo.popleft()
                    self.pending[actor.run.remote(window)] = actor, window

    def _dismiss(self, actor: Any) -> None:
        if actor in self.actors:
            self.actors.remove(actor)
            self.ray.kill(actor)


def _cause(error: Any) -> BaseException:
    """The error that a window raised, as it would be here."""
    cause: BaseException = error.cause if isinstance(getattr(error, "cause", None), BaseException) else error
    return cause


def _last_line(error: BaseException) -> str:
    """Of a traceback as text, the error itself."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)

"""Which places make up the batch of a step, as a function of (seed, step) alone, and their preparation in the background."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from everysat.nn.draws import stream
from everysat.types import Batch

T = TypeVar("T")
U = TypeVar("U")
POOL = 64
"""Batches whose places are sorted by length together. More pad less, fewer are more random."""


@runtime_checkable
class Dataset(Protocol):
    """Places by number. An item is a :class:`Batch` of one place, the same each time it is asked for.

    Optional: ``fingerprint() -> str``, a hash of the content for the run manifest; ``observations()``, see :func:`observations`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


class Subset:
    """Some places of a dataset, in the given order."""

    def __init__(self, dataset: Dataset, indices: Sequence[int] | np.ndarray) -> None:
        self.dataset, self.indices = dataset, [int(i) for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        return self.dataset[self.indices[index]]


class Joined:
    """Several datasets one after another."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = list(datasets)

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __getitem__(self, index: int) -> Batch:
        for dataset in self.datasets:
            if 0 <= index < len(dataset):
                return dataset[index]
            index -= len(dataset)
        raise IndexError(f"index is outside {len(self)} places")


class Broken(OSError):
    """More places of a dataset cannot be read than the user allows."""


class Tolerant:
    """A dataset of which a few places may be broken. One that cannot be read is replaced by the next one that can, a warning says
    which and why, and :attr:`broken` has them all: nothing is silently made up, and batches keep their size.

    Args:
        most: share of the places that may be broken, above 0, at most 1; what fails beyond that is no accident.

    Only errors that files and readers make count (``OSError``, ``ValueError``, ``LookupError``), not those of the network: a server
    that is away would make all places broken.
    """

    def __init__(self, dataset: Dataset, *, most: float = 0.01) -> None:
        if not 0 < most <= 1:
            raise ValueError(f"most={most} is the share of places that may be broken: above 0, at most 1")
        self.dataset, self.most = dataset, math.ceil(most * len(dataset))
        self.broken: dict[int, str] = {}
        """What was wrong with each place that could not be read so far, by its number."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name not in ("fingerprint", "observations"):  # what a dataset may have; a copy has nothing yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside {len(self)} places")
        for step in range(len(self)):
            place = (index + step) % len(self)
            if place in self.broken:
                continue
            try:
                return self.dataset[place]
            except (ConnectionError, TimeoutError):
                raise
            except (OSError, ValueError, LookupError) as error:
                self._note(place, error)
        raise Broken(f"none of {len(self)} places can be read; the last error: {next(iter(self.broken.values()), '')}")

    def _note(self, place: int, error: Exception) -> None:
        text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
        if self.broken.setdefault(place, text) is not text:
            return  # another thread was first
        if len(self.broken) > self.most:
            raise Broken(f"more than {self.most} of {len(self)} places cannot be read. The last: {text}") from error
        warnings.warn(f"place {place} is skipped: {text}", stacklevel=3)


def observations(dataset: Dataset) -> np.ndarray:
    """Numbers of observations of each place, of all layers but ``label`` together, int64 [place]: the lengths by which batches are
    bucketed. A dataset that knows them (``observations()``) is asked; any other is read as a whole."""
    if isinstance(dataset, Subset):
        return observations(dataset.dataset)[dataset.indices]
    if isinstance(dataset, Joined):
        return np.concatenate([observations(part) for part in dataset.datasets])
    known = getattr(dataset, "observations", None)
    if known is not None:
        return np.asarray(known(), dtype=np.int64)
    every = (dataset[index] for index in range(len(dataset)))
    return np.array(
        [sum(len(layer.row) for layer in batch.without("label").layers.values()) for batch in every], np.int64
    )


class Plan:
    """Which places each step takes from which dataset.

    A step draws one dataset by weight, then ``accumulate`` batches of ``batch_size`` (one number, or one per dataset) of its places. The places of a dataset
    come in a new random order every epoch, without a repetition inside a batch: what is left of an epoch that does not fill
    a batch is skipped (another part each time). Only a dataset smaller than a batch repeats places inside a batch.

    ``lengths``, one array (or None) per dataset, such as :func:`observations`, puts places of similar length into a batch, so that
    little is padded: every epoch, :data:`POOL` batches of places at a time are sorted by length; batches, and places in a batch,
    then come in random order.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        batch_size: int | Sequence[int],
        accumulate: int,
        steps: int,
        seed: int,
        lengths: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes={list(sizes)}: every dataset needs at least one place")
        if len(weights) != len(sizes) or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights={list(weights)} must be one per dataset, none negative, not all zero")
        self.sizes, self.accumulate, self.seed = list(sizes), accumulate, seed
        self.batch_sizes = [batch_size] * len(sizes) if isinstance(batch_size, int) else list(batch_size)
        if len(self.batch_sizes) != len(sizes):
            raise ValueError(f"batch_size={self.batch_sizes} must be one number, or one per dataset")
        self.lengths = [None] * len(sizes) if lengths is None else list(lengths)
        if [len(given) if given is not None else size for given, size in zip(self.lengths, sizes, strict=False)] != [
            *sizes
        ]:
            raise ValueError("lengths must be one array per dataset (or None), with one number per place")
        bounds = np.cumsum(weights) / np.sum(weights)
        draws = stream(seed, "dataset").random(steps)
        self.datasets = np.minimum(np.searchsorted(bounds, draws, side="right"), len(sizes) - 1)
        """Number of the dataset of each step."""
        one_hot = self.datasets[:, None] == np.arange(len(sizes))
        self._before = (np.cumsum(one_hot, axis=0) - one_hot)[np.arange(steps), self.datasets]
        self._order = lru_cache(maxsize=2 * len(sizes))(self._epoch)

    def __len__(self) -> int:
        return len(self.datasets)

    def places(self, step: int) -> list[np.ndarray]:
        """Indices of the places of a step, one array for each accumulated batch."""
        dataset = int(self.datasets[step])
        first = int(self._before[step]) * self.accumulate
        return [self._batch(dataset, number) for number in range(first, first + self.accumulate)]

    def epochs(self, step: int) -> list[float]:
        """How often each dataset's places were seen before ``step``."""
        taken = np.bincount(self.datasets[:step], minlength=len(self.sizes)) * self.accumulate
        each = zip(taken, self.batch_sizes, self.sizes, strict=True)
        return [float(count * batch / size) for count, batch, size in each]

    def _batch(self, dataset: int, number: int) -> np.ndarray:
        size, batch = self.sizes[dataset], self.batch_sizes[dataset]
        if size < batch:
            epochs = range(math.ceil(batch / size))
            return np.concatenate([self._order(dataset, number * len(epochs) + e) for e in epochs])[:batch]
        epoch, place = divmod(number, size // batch)
        return self._order(dataset, epoch)[place * batch : (place + 1) * batch]

    def _epoch(self, dataset: int, epoch: int) -> np.ndarray:
        draws = stream(self.seed, "order", dataset, epoch)
        order = draws.permutation(self.sizes[dataset])
        lengths = self.lengths[dataset]
        return order if lengths is None else bucketed(order, lengths, self.batch_sizes[dataset], draws)


def bucketed(order: np.ndarray, lengths: np.ndarray, batch: int, draws: np.random.Generator) -> np.ndarray:
    """Places in the random ``order``, less what does not fill a batch, so rearranged that each ``batch`` of them that follow one
    another are of similar ``lengths`` [place]. Which places of equal length meet is as random as ``order``."""
    count = len(order) // batch
    batches = []
    for first in range(0, count, POOL):
        pool = order[first * batch : min(first + POOL, count) * batch]
        batches.append(pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, batch))
    if not batches:
        return order
    shuffled = np.concatenate(batches)[draws.permutation(count)]
    return draws.permuted(shuffled, axis=1).ravel()


def shard(items: Sequence[T], rank: int, world: int) -> Sequence[T]:
    """The contiguous part of a global batch that belongs to a process; parts differ by one item at most."""
    if len(items) < world:
        raise ValueError(f"a batch of {len(items)} places cannot be shared by {world} processes; raise batch_size")
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def in_order(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """All places in their order, in batches; the last may be smaller."""
    for start in range(0, len(dataset), batch_size):
        yield Batch.cat([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])


def prefetch(make: Callable[[U], T], work: Iterable[U], *, workers: int = 1, ahead: int = 2) -> Iterator[T]:
    """``make(item)`` for each item of ``work``, in order, prepared ``ahead`` of time by background threads.

    An error in ``make`` is raised where its result is asked for. ``workers=0`` prepares each item when it is asked for.
    """
    if workers < 1:
        yield from map(make, work)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    waiting: deque[Future[T]] = deque()
    try:
        for item in work:
            waiting.append(pool.submit(make, item))
            if len(waiting) > max(ahead, workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

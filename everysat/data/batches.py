"""Which places make up the batch of a step, as a function of (seed, step) alone, and their preparation in the background."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from everysat.nn.draws import stream
from everysat.types import Batch

T = TypeVar("T")
U = TypeVar("U")


@runtime_checkable
class Dataset(Protocol):
    """Places by number. An item is a :class:`Batch` of one place, the same each time it is asked for.

    Optional: ``fingerprint() -> str``, a hash of the content for the run manifest.
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


class Plan:
    """Which places each step takes from which dataset.

    A step draws one dataset by weight, then ``accumulate`` batches of ``batch_size`` (one number, or one per dataset) of its places. The places of a dataset
    come in a new random order every epoch, without a repetition inside a batch: what is left of an epoch that does not fill
    a batch is skipped (another part each time). Only a dataset smaller than a batch repeats places inside a batch.
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
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes={list(sizes)}: every dataset needs at least one place")
        if len(weights) != len(sizes) or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights={list(weights)} must be one per dataset, none negative, not all zero")
        self.sizes, self.accumulate, self.seed = list(sizes), accumulate, seed
        self.batch_sizes = [batch_size] * len(sizes) if isinstance(batch_size, int) else list(batch_size)
        if len(self.batch_sizes) != len(sizes):
            raise ValueError(f"batch_size={self.batch_sizes} must be one number, or one per dataset")
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
        return stream(self.seed, "order", dataset, epoch).permutation(self.sizes[dataset])


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

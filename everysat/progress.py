"""Progress of long work, on standard error: a bar with the time left on a terminal, plain lines elsewhere.

``for batch in track(batches, "Embedding"): ...`` or ``with Progress("Training", total=500) as bar: bar.advance(note="loss 0.31")``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import IO, Any, TypeVar

T = TypeVar("T")
PLAIN_EVERY_S = 5.0
"""Least seconds between two plain lines."""


class Progress:
    """One task: ``total`` steps (None when unknown), of which ``done`` were finished before, so that work that resumes does
    not spoil the estimate of the time left."""

    def __init__(
        self, title: str, total: int | None = None, *, done: int = 0, quiet: bool = False, file: IO[str] | None = None
    ) -> None:
        self.title, self.total, self.done, self.note = title, total, done, ""
        self._before = done
        self._file = file or sys.stderr
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._start = self._said = time.monotonic()
        if not self._quiet and self._file.isatty():
            self._bar = _bar(self._file)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._quiet:
            self._say("stopped" if kind else "done")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """``steps`` more are finished; ``note`` stands beside the bar until the next one."""
        self.done += steps
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note)
        elif not self._quiet and time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._say()

    def seconds_left(self) -> float | None:
        """Estimate from the mean pace since the start; None before the first step or without a total."""
        finished = self.done - self._before
        if self.total is None or finished <= 0:
            return None
        return (time.monotonic() - self._start) / finished * max(0, self.total - self.done)

    def _say(self, end: str = "") -> None:
        self._said = time.monotonic()
        of = f"/{self.total} ({100 * self.done / max(1, self.total):.0f} %)" if self.total is not None else ""
        left = self.seconds_left()
        eta = end or (f"{clock(left)} left" if left is not None else "")
        parts = [f"{self.title}: {self.done}{of}", f"{clock(self._said - self._start)} elapsed", eta, self.note]
        print(", ".join(part for part in parts if part), file=self._file, flush=True)


def track(items: Iterable[T], title: str, total: int | None = None, *, quiet: bool = False) -> Iterator[T]:
    """``items``, one after another, with progress."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, total, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.advance()


def clock(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3700`` -> ``1:01:40``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar(file: IO[str]) -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        progress.TextColumn("{task.fields[note]}"),
        console=Console(file=file),
    )

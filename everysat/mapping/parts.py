"""Finished windows on disk. Each appears when it is complete and stays until the map is; a note beside them says what they
are parts of, so that they are taken up by the same work and by no other."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from everysat.io.output import remove
from everysat.mapping.windows import Box, Plan, Window, inside, overlap

NOTE, LOCK = "plan.json", "lock"
_MARGIN = 1 << 20


class Parts:
    """Images [channel, y, x] of finished windows of ``plan`` in ``folder``; used in a ``with`` statement, which keeps others out.

    Args:
        folder: is made if needed. What lies there of other work is removed, and the reason is said on standard error.
        plan: how the map is cut.
        channels: of each image.
        facts: what the images come from, by a word that a person understands ("input", "model"), JSON-able or anything with
            a distinct text.

    Raises:
        OSError: the folder cannot be written, or another process writes it.
    """

    def __init__(
        self, folder: Path, plan: Plan, channels: int, facts: Mapping[str, Any], *, quiet: bool = False
    ) -> None:
        self.folder, self.plan, self.channels, self.quiet = folder, plan, channels, quiet
        cut = [plan.shape, plan.gsd_m, plan.window, plan.halo, plan.fade, channels]
        self.facts = {name: _hash(value) for name, value in {"cut into windows": cut, **facts}.items()}
        self._lock: IO[bytes] | None = None
        self._done: set[int] = set()

    def __enter__(self) -> Parts:
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = _locked(self.folder / LOCK)
            if (reason := self._other()) is not None:
                self._clear(reason)
                self._put(self.folder / NOTE, json.dumps(self.facts).encode())
        except OSError as error:
            self.__exit__()
            raise _explained(error, self.folder, "Choose an output in a folder that can be written") from error
        self._done = {window.index for window in self.plan.windows() if self._complete(window)}
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _other(self) -> str | None:
        """Why what lies in the folder is not part of this work; None if it is."""
        try:
            before = json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        if before == self.facts:
            return None
        if not isinstance(before, dict):
            return ""
        return " and ".join(name for name in {**self.facts, **before} if before.get(name) != self.facts.get(name))

    def _clear(self, reason: str) -> None:
        (self.folder / NOTE).unlink(missing_ok=True)  # first: without it, nothing of the rest counts
        lost = list(self.folder.glob("*.npy"))
        for path in [*lost, *self.folder.glob("*.partial")]:
            path.unlink()
        if lost and not self.quiet:
            why = f"changed since: {reason}" if reason else "their note is lost"
            print(f"{len(lost)} finished windows in {self.folder} are not used: {why}", file=sys.stderr)

    def _complete(self, window: Window) -> bool:
        try:
            return self.load(window).shape in ((0,), self._shape(window))
        except (OSError, ValueError, EOFError):
            return False

    def _shape(self, window: Window) -> tuple[int, int, int]:
        top, bottom, left, right = window.kept
        return self.channels, bottom - top, right - left

    def has(self, window: Window) -> bool:
        return window.index in self._done

    @property
    def missing(self) -> list[Window]:
        """Windows that are still to be done."""
        return [window for window in self.plan.windows() if not self.has(window)]

    def bytes_of(self, windows: list[Window]) -> int:
        """What these windows take on disk, at most."""
        return sum(4 * int(np.prod(self._shape(window))) for window in windows)

    def require_space(self) -> None:
        """An error now, if the windows that are missing cannot fit on the disk."""
        needed, free = self.bytes_of(self.missing) + _MARGIN, shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"the finished windows in {self.folder} will take {needed / 1e9:.3g} GB until the map is complete, the disk has "
                f"{free / 1e9:.3g} GB left: free some, or choose an output on another disk"
            )

    def save(self, window: Window, image: np.ndarray) -> None:
        """The image of what a window keeps; of shape (0,) if nothing is known there."""
        if image.shape not in ((0,), self._shape(window)):
            raise ValueError(f"window {window.index} has an image of {image.shape}, expected {self._shape(window)}")
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(image, np.float32))
        try:
            self._put(self._path(window), buffer.getbuffer())
        except OSError as error:
            left = self.bytes_of(self.missing)
            kept = f"{len(self._done)} finished windows are kept"
            advice = f"Free {left / 1e9:.3g} GB there and run the same command again: {kept}"
            raise _explained(error, self._path(window), advice) from error
        self._done.add(window.index)

    def load(self, window: Window) -> np.ndarray:
        return np.load(self._path(window), mmap_mode="r", allow_pickle=False)

    def read(self, box: Box, channels: slice = slice(None)) -> np.ndarray:
        """The map in a box, float32 [channel, y, x]: of each pixel what its window says, or the weighted mean of all windows
        that reach it; NaN where none does."""
        shape = (len(range(self.channels)[channels]), box[1] - box[0], box[3] - box[2])
        if not self.plan.fade:
            return self._pasted(box, shape, channels)
        total, count = np.zeros(shape, np.float32), np.zeros((1, *shape[1:]), np.float32)
        for window in self.plan.reaching(box):
            image, shared = self.load(window), overlap(box, window.kept)
            if shared is None or image.ndim == 1:
                continue
            part = np.asarray(image[channels, *inside(shared, window.kept)])
            weight = self.plan.weight(window)[inside(shared, window.kept)] * np.isfinite(part[:1])
            total[:, *inside(shared, box)] += np.nan_to_num(part) * weight
            count[:, *inside(shared, box)] += weight
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(count > 0, total / count, np.nan).astype(np.float32)

    def _pasted(self, box: Box, shape: tuple[int, int, int], channels: slice) -> np.ndarray:
        windows = self.plan.reaching(box)
        if len(windows) == 1 and windows[0].core == box and (image := self.load(windows[0])).ndim == 3:
            return np.asarray(image[channels])
        found = np.full(shape, np.nan, np.float32)
        for window in windows:
            image, shared = self.load(window), overlap(box, window.core)
            if shared is not None and image.ndim == 3:
                found[:, *inside(shared, box)] = image[channels, *inside(shared, window.core)]
        return found

    def remove(self) -> None:
        """Leave nothing: the map is complete."""
        (self.folder / NOTE).unlink(missing_ok=True)
        remove(self.folder)

    def _path(self, window: Window) -> Path:
        return self.folder / f"{window.index:06d}.npy"

    def _put(self, path: Path, content: bytes | memoryview) -> None:
        """The whole file or none, also after the power fails."""
        beside = path.with_suffix(".partial")
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()


def _explained(error: OSError, path: Path, advice: str) -> OSError:
    if isinstance(error, BlockingIOError):
        return BlockingIOError(
            f"another process is writing {path.with_suffix('')} (its windows lie in {path}); wait for it, or choose another output"
        )
    return type(error)(f"cannot write {path}: {error.strerror or error}. {advice}")


def _locked(path: Path) -> IO[bytes]:
    """A file that this process alone holds; the system lets go of it when the process ends, however that happens."""
    file = path.open("ab")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not on Windows
        pass
    except OSError:
        file.close()
        raise
    return file

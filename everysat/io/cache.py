"""Bytes of remote files kept on this machine, up to a limit: the least recently used files go first.

Each remote file has two local ones: its blocks where they lie in it (a sparse file), and a checksum for each block, so that
a block that was half written, or spoilt later, is fetched again instead of being believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import zlib
from functools import cache
from pathlib import Path

BLOCK = 1 << 15
"""Bytes that are kept or fetched together. The header of a Cloud-Optimized GeoTIFF takes one or two of them."""
LIMIT_GB = 10.0
"""Size of the cache unless ``EVERYSAT_CACHE_GB`` says otherwise."""
_HEAD = 1024
"""Bytes in front of the checksums, which hold size and version of the remote file."""


def folder() -> Path:
    """Where remote files are kept: ``EVERYSAT_CACHE``, or ``~/.cache/everysat``."""
    return Path(os.environ.get("EVERYSAT_CACHE") or Path.home() / ".cache" / "everysat")


def limit_bytes() -> int:
    """How much is kept, from ``EVERYSAT_CACHE_GB``.

    Raises:
        ValueError: it is no positive number.
    """
    text = os.environ.get("EVERYSAT_CACHE_GB", str(LIMIT_GB))
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ValueError(f"EVERYSAT_CACHE_GB={text!r} must be a positive number of gigabytes, such as 2")
    return int(limit)


class Entry:
    """The local part of one remote file: a sparse file of its size, in which some blocks are filled.

    The files stay open, so that what is read is what was written here also when the cache lets go of them meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.sums = path, path.with_suffix(".sums")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._blocks = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._sums = os.open(self.sums, os.O_RDWR | os.O_CREAT, 0o600)
        self._seen: set[int] = set()
        os.utime(self.sums)

    def __del__(self) -> None:
        for name in ("_blocks", "_sums"):
            if hasattr(self, name):
                os.close(getattr(self, name))

    def head(self) -> tuple[int, str] | None:
        """Size and version of the remote file, if they are known."""
        try:
            told = json.loads(os.pread(self._sums, _HEAD, 0).rstrip(b"\0"))
            return int(told["size"]), str(told["version"])
        except (ValueError, KeyError, TypeError):
            return None

    def begin(self, size: int, version: str) -> None:
        """The remote file has this size and version."""
        os.ftruncate(self._blocks, size)
        os.pwrite(self._sums, json.dumps({"size": size, "version": version}).encode()[:_HEAD].ljust(_HEAD, b"\0"), 0)

    def has(self, index: int, length: int) -> bool:
        """Whether block ``index``, of ``length`` bytes, is here unspoilt."""
        if index not in self._seen:
            stored = os.pread(self._sums, 4, _HEAD + 4 * index)
            if len(stored) < 4 or stored != _sum(os.pread(self._blocks, length, index * BLOCK)):
                return False
            self._seen.add(index)
        return True

    def put(self, index: int, content: bytes) -> None:
        """Keep a block; another thread or process may do the same at the same time."""
        os.pwrite(self._blocks, content, index * BLOCK)
        os.pwrite(self._sums, _sum(content), _HEAD + 4 * index)
        self._seen.add(index)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of blocks that are here."""
        return os.pread(self._blocks, stop - start, start)

    def is_at(self, path: Path) -> bool:
        """Whether the file at ``path`` still is this one."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._blocks))
        except OSError:
            return False

    def forget(self) -> None:
        """Delete it; whoever has it open still reads what is there."""
        self.path.unlink(missing_ok=True)
        self.sums.unlink(missing_ok=True)


def _sum(content: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(content) or 1)  # 0 stands for a block that is not here


class Cache:
    """Entries in a folder, which together stay below ``limit`` bytes."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self._lock = threading.Lock()
        path.mkdir(parents=True, exist_ok=True)
        self._used = sum(size for _, size, _ in self._listed())

    def entry(self, name: str) -> Entry:
        """The local part of the file called ``name``; it counts as used now."""
        return Entry(self.path / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.tif")

    def keep(self, entry: Entry, blocks: dict[int, bytes]) -> None:
        """Store blocks of ``entry``, and delete the entries that were not used for longest where that is too much."""
        for index, content in blocks.items():
            entry.put(index, content)
        with self._lock:
            self._used += sum(map(len, blocks.values()))
            if self._used > self.limit:
                self._shrink()

    def _shrink(self) -> None:
        """Down to nine tenths of the limit, so that this does not happen at every block."""
        listed = self._listed()
        self._used = sum(size for _, size, _ in listed)
        for _, size, sums in listed:
            if self._used <= 0.9 * self.limit:
                break
            sums.with_suffix(".tif").unlink(missing_ok=True)
            sums.unlink(missing_ok=True)
            self._used -= size

    def _listed(self) -> list[tuple[float, int, Path]]:
        """When each entry was used last, and what it takes on disk; the oldest first."""
        found = []
        for sums in self.path.glob("*.sums"):
            try:
                parts = [sums.stat(), sums.with_suffix(".tif").stat()]
            except OSError:  # another process is deleting it
                continue
            found.append((parts[0].st_mtime, sum(part.st_blocks * 512 for part in parts), sums))
        return sorted(found)


@cache
def _cache(path: Path, limit: int) -> Cache:
    return Cache(path, limit)


def here() -> Cache:
    """The cache of this process; the environment is asked every time.

    Raises:
        OSError: its folder cannot be made.
    """
    return _cache(folder(), limit_bytes())


def forget() -> None:
    """Start anew in a process that was forked, whose locks are its parent's."""
    _cache.cache_clear()

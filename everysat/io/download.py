"""Files from their hosts into a folder: in ranges, checked, and so that a second call goes on where the first one stopped.

A file is written beside its name, as ``.NAME.CHECKSUM.part``, and renamed when its checksum fits: what has its name is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from everysat.find import suggest
from everysat.io import remote
from everysat.io.hosts import File, Listing
from everysat.progress import Progress, track

CHUNK = 8_000_000
"""Bytes that one request asks for."""
THREADS = 4
"""Requests at a time; as many chunks, and one, are in memory."""
RECORD = ".everysat-download.json"
"""In the folder: which files were fetched or checked, with checksum and time of change, so that they are not read again."""
_EXTENT = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_GOES_ON = "What was fetched stays; the same command goes on from there"


@dataclass(frozen=True)
class Done:
    """What a call did: paths that were ``there`` before and those ``fetched``, and the bytes that came over the network."""

    there: tuple[Path, ...]
    fetched: tuple[Path, ...]
    fetched_bytes: int


def choose(files: Sequence[File], patterns: Iterable[str]) -> tuple[File, ...]:
    """Files whose path or name matches one of ``patterns`` (``*.zip``, ``DATA_S2/*``); all without patterns.

    Raises:
        LookupError: a pattern matches nothing.
    """
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(_matches(file, pattern) for file in files):
            raise LookupError(f"no file matches {pattern!r}. {suggest(pattern, [f.path for f in files][:1000])}")
    return tuple(f for f in files if not patterns or any(_matches(f, pattern) for pattern in patterns))


def _matches(file: File, pattern: str) -> bool:
    return fnmatchcase(file.path, pattern) or fnmatchcase(PurePosixPath(file.path).name, pattern)


def download(listing: Listing, to: str | Path, *, files: Iterable[str] = (), quiet: bool = False) -> Done:
    """The files of ``listing`` that match the patterns ``files`` (all by default), under the folder ``to``.

    Raises:
        LookupError: a pattern matches nothing. FileExistsError: a file is there with other content.
        OSError: the disk is too small, or content does not fit its checksum. PermissionError, ConnectionError, TimeoutError:
            the host refuses, or cannot be reached.
    """
    folder = Path(to).expanduser()
    wanted = choose(listing.files, files)
    paths = {file: _inside(folder, file.path, listing.page) for file in wanted}
    folder.mkdir(parents=True, exist_ok=True)
    record = _Record(folder)
    there = _there(paths, record, quiet)
    missing = [file for file in wanted if file not in there]
    parts = {file: _Part(file, paths[file]) for file in missing}
    _forget_others(folder, parts.values())
    before = sum(part.size for part in parts.values())
    remaining = sum(f.size for f in missing) - before
    enough(folder, remaining, f"{len(missing)} files of {listing.page}")
    if missing:
        with Progress("Download, MB", _mb(remaining + before), done=_mb(before), quiet=quiet) as bar:
            _fetch(parts.values(), listing.headers, record, bar)
    return Done(tuple(paths[f] for f in wanted if f in there), tuple(paths[f] for f in missing), remaining)


def enough(folder: Path, size: int, what: str) -> None:
    """Raises :class:`OSError` when ``size`` more bytes do not fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            errno.ENOSPC, f"{what} need {size / 1e9:.2f} GB, the disk of {folder} has {free / 1e9:.2f} GB free"
        )


def _inside(folder: Path, name: str, page: str) -> Path:
    """Where a file of that name goes; an error if that is not below ``folder``."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or any(part in ("..", "") or "\\" in part for part in path.parts):
        raise OSError(f"{page} lists a file {name!r}, whose name leads out of the folder; nothing was fetched")
    return folder.joinpath(*path.parts)


def _there(paths: Mapping[File, Path], record: _Record, quiet: bool) -> set[File]:
    """Files that are at their place whole; those that the record does not know are read and compared."""
    found = {file for file, path in paths.items() if record.knows(file, path)}
    unknown = [(file, path) for file, path in paths.items() if file not in found and path.exists()]
    for file, path in track(unknown, "Checking", quiet=quiet or not unknown):
        why = _unlike(file, path)
        if why:
            raise FileExistsError(f"{path} is there with other content: {why}. Move or delete it, then run this again")
        record.note(file, path)
        found.add(file)
    return found


def _unlike(file: File, path: Path) -> str:
    """How the content at ``path`` differs from what the host has; empty if it does not."""
    if not path.is_file():
        return "it is no file"
    if path.stat().st_size != file.size:
        return f"{path.stat().st_size} bytes, the host has {file.size}"
    digest = _Digest(file)
    digest.read(path)
    return digest.unlike()


class _Digest:
    """The running checksum of a file's content, of the kind that its host tells."""

    def __init__(self, file: File) -> None:
        self.kind, _, self.expected = file.checksum.partition(":")
        kind = {"git": "sha1", "": "md5"}.get(self.kind, self.kind)
        if kind not in hashlib.algorithms_available:
            raise OSError(f"{file.url} has a checksum of kind {self.kind!r}, which is unknown here. Fetch it by hand")
        self._hash = hashlib.new(kind, usedforsecurity=False)
        if self.kind == "git":
            self._hash.update(f"blob {file.size}\0".encode())

    def update(self, content: bytes) -> None:
        self._hash.update(content)

    def read(self, path: Path) -> None:
        with path.open("rb") as stream:
            while content := stream.read(1 << 20):
                self._hash.update(content)

    def unlike(self) -> str:
        """How it differs from what the host tells; empty if it does not, or nothing is told."""
        mine = self._hash.hexdigest()
        return "" if self.expected in ("", mine) else f"{self.kind} {mine}, the host has {self.expected}"


class _Part:
    """A file on its way: the first bytes of it, beside its place. Bytes of another version of the file are not used."""

    def __init__(self, file: File, path: Path) -> None:
        version = file.checksum.rpartition(":")[2][:12] or str(file.size)
        self.file, self.path = file, path
        self.beside = path.with_name(f".{path.name}.{version}.part")
        self.size = self.beside.stat().st_size if self.beside.is_file() else 0
        if self.size > file.size:
            self.beside.unlink()
            self.size = 0
        self.finished = False
        self._digest: _Digest | None = None

    def append(self, content: bytes) -> None:
        """The bytes that follow."""
        if self._digest is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._digest = _Digest(self.file)
            if self.size:
                self._digest.read(self.beside)
        try:
            with self.beside.open("ab") as stream:
                stream.write(content)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(errno.ENOSPC, f"the disk is full at {self.path}. Make room. {_GOES_ON}") from error
            raise
        self._digest.update(content)
        self.size += len(content)

    def finish(self) -> None:
        """Give it its name, if its content is what the host has."""
        self.append(b"")
        why = self._digest.unlike() if self._digest else ""
        if why:
            self.beside.unlink()
            raise OSError(
                f"{self.file.url} arrived damaged: {why}. It was deleted; run the same command to fetch it again"
            )
        self.beside.replace(self.path)
        self.finished = True


def _forget_others(folder: Path, parts: Iterable[_Part]) -> None:
    """Delete beginnings of other versions of these files."""
    mine = {part.beside: part.path for part in parts}
    places = set(mine.values())
    for path in folder.rglob(".*.part"):
        if path not in mine and path.with_name(path.name[1:].rsplit(".", 2)[0]) in places:
            path.unlink()


def _fetch(parts: Collection[_Part], headers: Mapping[str, str], record: _Record, bar: Progress) -> None:
    """Fetch what the parts lack. Chunks come in the order of the files, so that each file grows from its beginning."""
    total = sum(part.size for part in parts)
    for part, content in _ahead(parts, headers):
        if part.finished:
            continue  # a server without ranges sent it whole before
        part.append(content)
        total += len(content)
        bar.advance(_mb(total) - bar.done, note=part.file.path)
        if part.size == part.file.size:
            part.finish()
            record.note(part.file, part.path)


def _ahead(parts: Iterable[_Part], headers: Mapping[str, str]) -> Iterator[tuple[_Part, bytes]]:
    """Chunks in order, a few of them requested before they are asked for."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="download")
    waiting: deque[tuple[_Part, Future[bytes]]] = deque()
    work = ((part, start) for part in parts for start in _starts(part))
    try:
        for part, start in work:
            waiting.append((part, pool.submit(_chunk, part, start, headers)))
            if len(waiting) > THREADS:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except (ConnectionError, TimeoutError) as error:
        raise type(error)(f"{error}. {_GOES_ON}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _starts(part: _Part) -> range | list[int]:
    """Where the chunks that a part lacks begin; one that lacks nothing still has to be finished."""
    return range(part.size, part.file.size, CHUNK) if part.size < part.file.size else [part.file.size]


def _chunk(part: _Part, start: int, headers: Mapping[str, str]) -> bytes:
    """Bytes from ``start`` on: a chunk, or all that follows from a server that does not know ranges."""
    file, stop = part.file, min(start + CHUNK, part.file.size)
    if start >= stop or part.finished:
        return b""
    asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity", **headers}
    body, told = remote.request(file.url, headers=asked)
    extent = _EXTENT.fullmatch(told.get("Content-Range", ""))
    first, size = (int(extent[1]), int(extent[3])) if extent else (0, len(body))
    if size != file.size:
        raise OSError(f"{file.url} has {size} bytes, but is listed with {file.size}: it was replaced. Run this again")
    if extent is None:
        return body[start:]
    if first != start or len(body) != stop - start:
        raise OSError(f"{file.url}: the server sent {len(body)} bytes from {first} on, asked for {start} to {stop}")
    return body


class _Record:
    """Which files of a folder are known to be whole: a line for each, the last one counts."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        self._known: dict[str, Any] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a line that was being written when the process was killed
                    name, *facts = json.loads(line)
                    self._known[name] = facts

    def knows(self, file: File, path: Path) -> bool:
        """Whether the file at ``path`` is this one, and has not changed since it was checked."""
        try:
            state = path.stat()
        except OSError:
            return False
        return (
            self._known.get(file.path) == [file.size, file.checksum, state.st_mtime_ns] and state.st_size == file.size
        )

    def note(self, file: File, path: Path) -> None:
        facts = [file.size, file.checksum, path.stat().st_mtime_ns]
        self._known[file.path] = facts
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([file.path, *facts]) + "\n")


def _mb(size: int) -> int:
    return -(-size // 1_000_000)

"""Files on servers: fetched in ranges, again after a failure, signed where that is asked for, and kept in a local cache.

A path may carry more than the address, behind ``#``: see :func:`address`. Everything that opens files by path reads such
paths, in any thread and process, and nothing secret stands in them.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
import rasterio
from rasterio.errors import RasterioError

from everysat.io import cache as local
from everysat.io import tiff

TRIES = 5
"""How often a request is sent before its failure is an error."""
BACKOFF_S = 0.5
"""Pause before the second try; it doubles with each further one and varies by chance, so that clients do not come in step."""
LONGEST_S = 30.0
"""Longest pause, whatever the server asks for."""
TIMEOUT_S = 60.0
"""How long a server may stay silent."""
THREADS = 16
"""Requests at a time. Most of the time goes in waiting."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_MARK = "everysat"
_MOST_BLOCKS = 256
"""Blocks that one request asks for, 8 MB: what a thread holds in memory."""
_TOO_SMALL = (
    "a remote file was dropped from the cache while it was opened: the cache is too small. Raise EVERYSAT_CACHE_GB"
)
_OPENINGS = 8
"""Times that a file is opened again which was dropped from the cache meanwhile."""
_WHOLE = 1 << 28
"""Largest file that is taken whole from a server that does not know ranges."""


class Refused(PermissionError):
    """A server answers that this may not be read: a token is missing, wrong or has expired."""


def is_remote(path: str) -> bool:
    """Whether ``path`` is on a web server."""
    return path.startswith(("http://", "https://"))


def address(url: str, *, sign: str = "", version: str = "") -> str:
    """A path that opens ``url``.

    Args:
        url: http, https, or ``s3://bucket/key`` and ``gs://bucket/key`` of public buckets.
        sign: where tokens for it are issued, with ``{account}`` and ``{container}``: its host's first word and its first folder.
        version: what changes when the file does, so that old bytes in the cache are not taken for its.
    """
    if url.startswith("s3://"):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        url = f"https://{bucket}.s3.amazonaws.com/{key}"
    elif url.startswith("gs://"):
        url = f"https://storage.googleapis.com/{url.removeprefix('gs://')}"
    if not is_remote(url):
        return url.removeprefix("file://")
    more = {name: value for name, value in (("sign", sign), ("version", version)) if value}
    return f"{url}#{_MARK}:{urlencode(more)}" if more else url


def parts(path: str) -> tuple[str, dict[str, str]]:
    """The address that a path stands for, and what else :func:`address` put into it."""
    url, _, more = path.partition(f"#{_MARK}:")
    return url, dict(parse_qsl(more))


_LOCAL = threading.local()


def _session() -> Any:
    """Connections of this thread, which stay open between requests."""
    if not hasattr(_LOCAL, "session"):
        try:
            import requests
        except ImportError as error:
            raise ImportError("reading from servers needs more packages: pip install 'everysat[stac]'") from error
        _LOCAL.session = requests.Session()
    return _LOCAL.session


def request(
    url: str,
    method: str = "GET",
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    sign: str = "",
) -> tuple[bytes, Mapping[str, str]]:
    """The body of an answer, and its headers. Tries again after what passes: busy and failing servers, silence, broken transfers.

    A token (``sign``, see :func:`address`) that is refused is renewed once.

    Raises:
        FileNotFoundError: the server does not have it.
        Refused: the server wants a token, or another one.
        TimeoutError, ConnectionError: no whole answer after :data:`TRIES` tries.
        OSError: any other refusal.
    """
    refused = token = ""
    for attempt in range(TRIES):
        try:
            token = _token(url, sign, refused) if sign else ""
            signed = f"{url}{'&' if '?' in url else '?'}{token}" if token else url
            return _once(signed, url, method, headers, body)
        except Refused:
            if not token or refused:
                raise
            refused = token
        except (ConnectionError, TimeoutError) as error:
            if attempt == TRIES - 1:
                raise type(error)(f"{error} ({TRIES} tries). Try again later") from error
            pause = BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5)
            time.sleep(min(LONGEST_S, max(pause, getattr(error, "wait_s", 0.0))))
    raise ConnectionError(f"{url} could not be fetched in {TRIES} tries")


def _once(
    signed: str, url: str, method: str, headers: Mapping[str, str] | None, body: bytes | None
) -> tuple[bytes, Mapping[str, str]]:
    """One try. Messages name the address without its token."""
    session = _session()
    from requests import exceptions

    timeout = min(15.0, TIMEOUT_S), TIMEOUT_S
    try:
        with session.request(method, signed, headers=headers, data=body, timeout=timeout, stream=True) as answer:
            ranged = "Range" in (headers or {})
            if answer.status_code == 200 and ranged and int(answer.headers.get("Content-Length", 0)) > _WHOLE:
                raise OSError(f"{url}: the server sends whole files only, and this one is large. Download it first")
            content, status, told = answer.content, answer.status_code, answer.headers
    except exceptions.Timeout as error:
        raise TimeoutError(f"{url} did not answer within {TIMEOUT_S:g} s") from error
    except exceptions.RequestException as error:
        why = re.sub(r"\?\S*", "?...", str(error))[:200]  # what stands behind the question mark may be a token
        raise ConnectionError(f"{url} could not be fetched whole ({why})") from None
    if status not in (200, 206):
        raise _failure(url, status, content, told)
    extent = _RANGE.fullmatch(told.get("Content-Range", ""))
    if status == 206 and extent and int(extent[2]) - int(extent[1]) + 1 != len(content):
        raise ConnectionError(f"{url} was cut off after {len(content)} bytes")
    return content, told


def _failure(url: str, status: int, content: bytes, told: Mapping[str, str]) -> OSError:
    """The error that a status other than success is; the body's first words often say why."""
    said = re.sub(r"\s+", " ", content[:300].decode("utf-8", "replace")).strip()
    text = f"{url}: the server answers {status}{f' ({said})' if said else ''}"
    if status in (404, 410):
        return FileNotFoundError(f"{text}: what the catalogue names is not there")
    if status in (401, 403):
        return Refused(f"{text}. A token is missing, wrong or has expired; renew it where the source takes it from")
    if status in _PASSING:
        failed = ConnectionError(text)
        wait = told.get("Retry-After", "")
        failed.wait_s = float(wait) if wait.isdigit() else 0.0  # type: ignore[attr-defined]
        return failed
    return OSError(text)


_TOKENS: dict[str, tuple[str, float]] = {}
_TOKEN_LOCK = threading.Lock()


def _token(url: str, sign: str, refused: str) -> str:
    """A token for ``url``, the same for all files of a container; another one a minute before it expires, or when ``refused``."""
    split = urlsplit(url)
    account, container = (split.hostname or "").split(".")[0], split.path.strip("/").split("/")[0]
    where = sign.format(account=account, container=container)
    with _TOKEN_LOCK:
        token, until = _TOKENS.get(where, ("", 0.0))
        if token == refused or time.time() > until - 60:
            told = request(where)[0]
            try:
                entry = json.loads(told)
                token = str(entry["token"])
                until = datetime.fromisoformat(entry["msft:expiry"].replace("Z", "+00:00")).timestamp()
            except (ValueError, KeyError, TypeError) as error:
                raise OSError(
                    f"{where} was asked for a token and did not give one with its expiry ({error!r})"
                ) from error
            _TOKENS[where] = token, until
    return token


def forget() -> None:
    """Start anew in a process that was forked: connections and locks are its parent's."""
    global _LOCAL, _TOKEN_LOCK
    _LOCAL, _TOKEN_LOCK = threading.local(), threading.Lock()
    local.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)


class RemoteFile:
    """A file on a server whose bytes are fetched into a local sparse file before they are read there."""

    def __init__(self, path: str) -> None:
        self.url, more = parts(path)
        self._sign = more.get("sign", "")
        self._lock = threading.Lock()
        self._cache = local.here()
        self.entry = self._cache.entry(f"{self.url} {more.get('version', '')}")
        head = self.entry.head()
        self.size, self._version = head or (-1, "")
        if head is None:
            self._fetch(0, 0)

    def bytes(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``, or to the end of the file."""
        stop = min(stop, self.size)
        self.ensure([(start, stop)])
        return self.entry.read(start, stop)

    def ensure(self, spans: list[tuple[int, int]]) -> None:
        """Have the bytes of all spans here.

        Raises:
            OSError: they cannot be fetched.
        """
        wanted = {
            i for a, b in spans if b > a for i in range(a // local.BLOCK, (min(b, self.size) - 1) // local.BLOCK + 1)
        }
        with self._lock:
            for run in _runs(sorted(i for i in wanted if not self.entry.has(i, self._length(i)))):
                self._fetch(run[0], run[-1])

    def _length(self, index: int) -> int:
        return min(local.BLOCK, self.size - index * local.BLOCK)

    def _fetch(self, first: int, last: int) -> None:
        """Blocks ``first`` to ``last`` from the server."""
        known = self.size >= 0
        start, stop = first * local.BLOCK, (last + 1) * local.BLOCK
        stop = min(stop, self.size) if known else stop
        head = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        body, told = request(self.url, headers=head, sign=self._sign)
        size, start = _extent(self.url, told, body, start)
        version = (told.get("ETag") or told.get("Last-Modified") or "")[:512]
        if known and (size, version) != (self.size, self._version):
            self.entry.forget()
            raise OSError(f"{self.url} was replaced on its server while it was read. Read it again")
        if start + len(body) < min(stop, size):
            raise OSError(f"{self.url}: the server sent {len(body)} bytes where {stop - start} were asked for")
        if not known:
            self.size, self._version = size, version
            self.entry.begin(size, version)
        at = range(start // local.BLOCK, -(-(start + len(body)) // local.BLOCK))
        blocks = {index: body[index * local.BLOCK - start : (index + 1) * local.BLOCK - start] for index in at}
        self._cache.keep(self.entry, blocks)


def _runs(numbers: list[int]) -> list[list[int]]:
    """Neighbours together, but no more than are fetched at a time."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1 and len(runs[-1]) < _MOST_BLOCKS:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _extent(url: str, told: Mapping[str, str], body: bytes, start: int) -> tuple[int, int]:
    """Size of the whole file, and where ``body`` starts in it: at 0 where a server does not know ranges."""
    extent = _RANGE.fullmatch(told.get("Content-Range", ""))
    if extent is None:
        return len(body), 0
    if int(extent[1]) != start:
        raise OSError(f"{url}: the server sent bytes from {extent[1]} on where {start} was asked for")
    return int(extent[3]), start


class RemoteDataset:
    """A rasterio dataset of a file on a server. Of a TIFF it fetches what a window needs, of other formats the whole file.

    GDAL decodes the local sparse file. It could fetch by itself, but would neither say what went wrong nor renew a token,
    and its calls back into Python (rasterio's openers) do not work from several threads.
    """

    def __init__(self, path: str) -> None:
        for _ in range(_OPENINGS):
            self._file = RemoteFile(path)
            if self._opened():
                return
        raise OSError(_TOO_SMALL)

    def _opened(self) -> bool:
        """Whether GDAL has opened this very file: others, here or in another process, may have pushed it out of the cache meanwhile."""
        try:
            self._images = tiff.images(self._file.bytes)
        except OSError as error:
            raise OSError(f"{self._file.url} cannot be read: {error}") from error
        if not self._images:
            self._file.ensure([(0, self._file.size)])
        path = self._file.entry.path
        try:
            with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_NUM_THREADS="1"):
                self._dataset = rasterio.open(path)
        except RasterioError as error:
            if self._file.entry.is_at(path):
                raise OSError(f"{self._file.url} is no raster that can be read ({error})") from error
            return False
        return self._file.entry.is_at(path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def read(self, index: int, *, window: Any, out_shape: tuple[int, int] | None = None, **_: Any) -> np.ndarray:
        """Band ``index`` in a window, decimated to ``out_shape`` by picking pixels."""
        return self._window(self._dataset.read, index, window, out_shape)

    def read_masks(self, index: int, *, window: Any, out_shape: tuple[int, int] | None = None, **_: Any) -> np.ndarray:
        """Like :meth:`read`, of the mask of the band."""
        return self._window(self._dataset.read_masks, index, window, out_shape)

    def _window(self, read: Any, index: int, window: Any, out_shape: tuple[int, int] | None) -> np.ndarray:
        rows, cols = window.toslices()
        self._file.ensure([span for image in self._images for span in image.ranges(rows, cols, index)])
        values = read(index, window=window)
        if out_shape is None:
            return values
        picks = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(out_shape, values.shape, strict=True)]
        return values[np.ix_(*picks)]

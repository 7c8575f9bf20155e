"""Asking public servers politely: one request after another, never faster than agreed, as late as they say, and never twice for the same.

Answers are kept on disk under a hash of what was asked, so that an interrupted collection goes on from there without asking again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import everysat
from everysat.io.output import replacing

PASSING = {408, 425, 429, 500, 502, 503, 504}
BACKOFF_S = 2.0
"""Pause before the second try, where the server asks for none; it doubles with each further one and varies by chance."""
_GOES_ON = "What was collected stays; the same command goes on from there"


class Busy(ConnectionError):
    """The server asks to come back later: also by an answer of status 200 that says so."""


class TooMuch(ValueError):
    """The server will not answer this question whole: ask for less."""


class Server:
    """One public interface.

    Args:
        url: of the interface.
        cache: folder that keeps the answers.
        contact: an address where whoever runs the server reaches you; it is sent as part of the name of the program, as they ask for.
        pause_s: least time from one request to the next.
        tries: how often a request is sent before its failure is an error.
        longest_s: longest pause; a server that asks for a longer one is not asked again.
        timeout_s: how long the server may stay silent.
        suffix: of the files in the cache, before ``.gz``.
    """

    def __init__(
        self,
        url: str,
        cache: str | Path,
        *,
        contact: str,
        pause_s: float = 1.0,
        tries: int = 6,
        longest_s: float = 600.0,
        timeout_s: float = 240.0,
        suffix: str = ".json",
    ) -> None:
        if not re.search(r"@|://", contact):
            raise ValueError(
                f"contact={contact!r} is no address. Who runs {url} asks for one to write to if something goes wrong: give an e-mail "
                "address or a web page, or set EVERYSAT_CONTACT"
            )
        self.url, self.cache, self.contact = url, Path(cache).expanduser(), contact
        self.pause_s, self.tries, self.longest_s, self.timeout_s, self.suffix = (
            pause_s,
            tries,
            longest_s,
            timeout_s,
            suffix,
        )
        self.asked = 0
        """Requests sent so far."""
        self._free_at = 0.0
        self._session: Any = None

    def path(self, question: Mapping[str, str]) -> Path:
        """Where the answer to ``question`` is, or will be, kept."""
        key = hashlib.sha256(json.dumps([self.url, sorted(question.items())]).encode()).hexdigest()
        return self.cache / key[:2] / f"{key[:32]}{self.suffix}.gz"

    def ask(
        self, question: Mapping[str, str], judge: Callable[[bytes], None] = lambda body: None, *, method: str = "GET"
    ) -> bytes:
        """The answer to ``question``, from the cache if it was asked before.

        ``judge`` looks at an answer before it is kept and raises :class:`Busy` (it is asked again later) or another error.

        Raises:
            ConnectionError, TimeoutError: no answer after all tries. PermissionError, FileNotFoundError, OSError: the server refuses.
        """
        path = self.path(question)
        if path.is_file():
            return gzip.decompress(path.read_bytes())
        body = self._persistently(question, judge, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(gzip.compress(body, mtime=0))
        return body

    def _persistently(self, question: Mapping[str, str], judge: Callable[[bytes], None], method: str) -> bytes:
        for attempt in range(self.tries):
            try:
                return self._once(question, judge, method)
            except (ConnectionError, TimeoutError) as error:
                told = getattr(error, "wait_s", None)
                if attempt == self.tries - 1 or (told or 0) > self.longest_s:
                    later = f"; it asks to wait {told:.0f} s" if told else ""
                    raise type(error)(f"{error} ({attempt + 1} tries{later}). {_GOES_ON}") from error
                pause = max(BACKOFF_S, self.pause_s) * 2**attempt * random.uniform(0.75, 1.25)
                self._free_at = time.monotonic() + min(self.longest_s, max(pause, told or 0.0))
        raise ValueError(f"tries={self.tries} must be at least 1")

    def _once(self, question: Mapping[str, str], judge: Callable[[bytes], None], method: str) -> bytes:
        requests, session = self._connected()
        time.sleep(max(0.0, self._free_at - time.monotonic()))
        sent = {"params" if method == "GET" else "data": dict(question)}
        self.asked += 1
        try:
            answer = session.request(method, self.url, timeout=(15.0, self.timeout_s), **sent)
        except requests.exceptions.Timeout as error:
            raise TimeoutError(f"{self.url} did not answer within {self.timeout_s:g} s") from error
        except requests.exceptions.RequestException as error:
            raise ConnectionError(f"{self.url} could not be reached, or broke off ({str(error)[:200]})") from error
        finally:
            self._free_at = time.monotonic() + self.pause_s
        try:
            if answer.status_code != 200:
                raise _refusal(self.url, answer.status_code, answer.content)
            judge(answer.content)
        except Busy as error:
            error.wait_s = seconds(answer.headers.get("Retry-After", ""))  # type: ignore[attr-defined]
            raise
        return answer.content

    def _connected(self) -> tuple[Any, Any]:
        try:
            import requests
        except ImportError as error:
            raise ImportError("asking servers needs more packages: pip install 'everysat[collect]'") from error
        if self._session is None:
            self._session = requests.Session()
            self._session.headers["User-Agent"] = (
                f"everysat/{everysat.__version__} ({self.contact}) requests/{requests.__version__}"
            )
        return requests, self._session


def seconds(retry_after: str) -> float | None:
    """What a header ``Retry-After`` asks for, in seconds from now: a number or a date (RFC 9110, 10.2.3); None if it says nothing."""
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _refusal(url: str, status: int, content: bytes) -> OSError:
    """The error that a status other than 200 is, with the first words of the answer."""
    words = re.sub(r"<[^>]*>", " ", content[:2000].decode("utf-8", "replace"))
    said = re.sub(r"\s+", " ", words).strip()[:300]
    text = f"{url}: the server answers {status}{f' ({said})' if said else ''}"
    if status in PASSING:
        return Busy(text)
    if status in (401, 403):
        return PermissionError(f"{text}. It refuses this program or this network; read its terms of use")
    return FileNotFoundError(f"{text}. Check the address") if status in (404, 410) else OSError(text)

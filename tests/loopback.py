"""A file server on loopback: ranges, tokens, a STAC search, and every way in which a transfer goes wrong."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Loopback:
    """``folder`` at :attr:`url`, and the STAC API of its ``items`` at ``/api``.

    ``plans`` maps a part of a path to what happens to the next requests for it, one after another: a status such as 500,
    ``"cut"`` (the connection breaks after half of the body), ``"short"`` (half of the body, which claims to be all of it),
    ``"slow"`` (an answer after :attr:`delay_s`). ``log`` lists the paths asked for, ``authorised`` those that
    came with a header ``Authorization``. ``token``, when set, is what URLs have to
    carry as ``?sig=``; ``/sas/...`` hands out ``issued``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.items: list[dict[str, Any]] = []
        self.collections: list[dict[str, Any]] = []
        self.plans: dict[str, list[Any]] = defaultdict(list)
        self.log: list[str] = []
        self.authorised: list[str] = []
        self.delay_s = 2.0
        self.token: str | None = None
        self.issued: Callable[[], dict[str, Any]] = dict
        self.page = 100
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def next_plan(self, path: str) -> Any:
        with self._lock:
            self.log.append(path)
            for part, plan in self.plans.items():
                if part in path and plan:
                    return plan.pop(0)
        return None

    def asked(self, part: str) -> int:
        """How many requests named ``part`` so far."""
        return sum(part in path for path in self.log)

    def search(self, body: dict[str, Any]) -> dict[str, Any]:
        hits = [item for item in self.items if _matches(item, body)]
        start = int(body.get("token") or 0)
        page = min(int(body.get("limit") or self.page), self.page)
        links = []
        if start + page < len(hits):
            link = {"rel": "next", "href": f"{self.url}/api/search", "method": "POST"}
            links.append({**link, "body": {**body, "token": str(start + page)}})
        return {"type": "FeatureCollection", "features": hits[start : start + page], "links": links}

    def landing(self) -> dict[str, Any]:
        conforms = ["core", "item-search", "collections"]
        links = [("search", "search"), ("data", "collections"), ("self", ""), ("root", "")]
        return {
            "type": "Catalog", "id": "loopback", "stac_version": "1.0.0", "description": "made for a test",
            "conformsTo": [f"https://api.stacspec.org/v1.0.0/{part}" for part in conforms],
            "links": [{"rel": rel, "href": f"{self.url}/api/{path}"} for rel, path in links],
        }  # fmt: skip


def _matches(item: dict[str, Any], body: dict[str, Any]) -> bool:
    if body.get("collections") and item["collection"] not in body["collections"]:
        return False
    west, south, east, north = body.get("bbox") or (-180, -90, 180, 90)
    w, s, e, n = item["bbox"]
    if e < west or w > east or n < south or s > north:
        return False
    if body.get("datetime"):
        start, end = body["datetime"].split("/")
        when = item["properties"].get("datetime") or item["properties"]["start_datetime"]
        if not start <= when <= end:
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    site: Loopback
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # clients that lost patience
            super().handle()

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        posted = json.loads(self.rfile.read(length)) if length else None
        plan = self.site.next_plan(self.path)
        if self.headers.get("Authorization"):
            self.site.authorised.append(self.path)
        if isinstance(plan, int):
            return self._send(plan, b"made to fail")
        if plan == "slow":
            time.sleep(self.site.delay_s)
        parts = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(parts.query).items()}
        if parts.path.startswith("/sas/"):
            return self._json(self.site.issued())
        if parts.path.startswith("/api"):
            return self._api(parts.path.removeprefix("/api").strip("/"), posted or query, plan)
        if self.site.token is not None and query.get("sig") != self.site.token:
            return self._send(403, b"Signature not valid: expired")
        file = self.site.folder / parts.path.lstrip("/")
        if not file.is_file():
            return self._send(404, b"no such file")
        return self._file(file.read_bytes(), plan)

    do_POST = do_GET

    def _api(self, path: str, body: dict[str, Any], plan: Any) -> None:
        if path == "":
            self._json(self.site.landing(), plan)
        elif path == "search":
            self._json(self.site.search(body), plan)
        elif path == "collections":
            self._json({"collections": self.site.collections, "links": []}, plan)
        else:
            found = [c for c in self.site.collections if path == f"collections/{c['id']}"]
            self._json(found[0], plan) if found else self._send(404, b"no such thing")

    def _json(self, value: Any, plan: Any = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, plan)

    def _file(self, body: bytes, plan: Any) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return self._send(200, body, {"Accept-Ranges": "bytes"}, plan)
        start, stop = int(match[1]), min(int(match[2] or len(body)), len(body) - 1) + 1
        if start >= len(body):
            return self._send(416, b"")
        head = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
        return self._send(206, body[start:stop], head, plan)

    def _send(self, status: int, body: bytes, head: dict[str, str] | None = None, plan: Any = None) -> None:
        half = body[: len(body) // 2]
        self.send_response(status)
        for key, value in (head or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(half if plan == "short" else body)))
        self.end_headers()
        self.wfile.write(half if plan in ("cut", "short") else body)
        if plan == "cut":
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[Loopback]:
    """The server, in a thread of its own, as long as the block lasts."""
    site = Loopback(folder)
    thread = threading.Thread(target=site._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site._server.shutdown()
        site._server.server_close()
        thread.join()

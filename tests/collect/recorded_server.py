"""A server on loopback that answers as a test says, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, dict[str, str], bytes]


class Recorded:
    """``answer`` gets the parameters of a request, of its address or its body; ``first`` holds answers that come before it is asked."""

    def __init__(self, answer: Callable[[dict[str, str]], Answer]) -> None:
        self.answer = answer
        self.first: list[Answer] = []
        self.asked: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.methods: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}/api"


class _Handler(BaseHTTPRequestHandler):
    site: Recorded
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        fields = {key: value[0] for key, value in parse_qs(body or urlsplit(self.path).query).items()}
        self.site.asked.append(fields)
        self.site.headers.append(dict(self.headers))
        self.site.methods.append(self.command)
        status, head, content = self.site.first.pop(0) if self.site.first else self.site.answer(fields)
        self.send_response(status)
        claimed = head.pop("Content-Length", str(len(content)))
        for key, value in head.items():
            self.send_header(key, value)
        self.send_header("Content-Length", claimed)
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(content)
        self.close_connection = claimed != str(len(content))

    do_POST = do_GET


@contextmanager
def recorded(answer: Callable[[dict[str, str]], Answer]) -> Iterator[Recorded]:
    """The server, in a thread of its own, as long as the block lasts."""
    site = Recorded(answer)
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.server.shutdown()
        site.server.server_close()
        thread.join()

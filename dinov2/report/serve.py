"""A page that follows its runs, on this machine alone."""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

logger = logging.getLogger("dinov2.report")

HOST = "127.0.0.1"


def state_of(folders: Iterable[Path]) -> str:
    """A word for what a page of runs depends on: name, size and time of the files that it reads."""
    found: list[tuple[Any, ...]] = []
    for folder in folders:
        wanted = [folder / "metrics.jsonl", folder / "config.yaml", folder / "attempts.jsonl"]
        wanted += [folder / "logs/rank_0.log", folder / "eval/probes.csv"]
        for path in [*wanted, *sorted(folder.glob("eval/training_*/teacher_checkpoint.pth"))]:
            try:
                status = os.stat(path)
            except OSError:
                continue
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


class PageServer(ThreadingHTTPServer):
    """Serves ``/``, made anew where the state has changed since, and ``/state``.

    Args:
        port: of 127.0.0.1; 0 takes a free one, see ``server_port``. OSError if it is taken.
        make: the page of a state.
        state: word for what the page depends on, see `state_of`.
    """

    daemon_threads = True

    def __init__(self, port: int, make: Callable[[str], str], state: Callable[[], str]) -> None:
        self.state, self._make, self._lock = state, make, threading.Lock()
        self._page = ("", b"")
        super().__init__((HOST, port), _Handler)

    def page(self) -> bytes:
        """The page as of now."""
        with self._lock:  # of several browsers one makes it
            state = self.state()
            if self._page[0] != state:
                self._page = state, self._make(state).encode()
            return self._page[1]


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        """Answer."""
        # A page of another host whose name leads here is not to read this one. Ports differ behind a tunnel.
        name, path = self.headers.get("Host", "").rpartition(":")[0], self.path.partition("?")[0]
        if name not in (HOST, "localhost"):
            self.send_error(403)
        elif path == "/":
            self._answer(self.server.page(), "text/html; charset=utf-8")
        elif path == "/state":
            self._answer(self.server.state().encode(), "text/plain; charset=utf-8")
        elif path == "/favicon.ico":
            self._answer(b"", "image/x-icon")
        else:
            self.send_error(404)

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are told at level DEBUG."""
        logger.debug(format, *args)

"""Ranges of local and remote files against slices of the whole."""

import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.slides.ranges import SlideBytes, merge
from dinov2.data.storage.retry import RemoteError, Retries

WHOLE = np.random.default_rng(0).bytes(300_000)
RANGES = [(10, 5), (299_000, 1000), (0, 10), (0, 10), (15, 0), (12, 100_000), (50, 60), (200_000, 1)]
EXPECTED = [WHOLE[start : start + length] for start, length in RANGES]


class Server(ThreadingHTTPServer):
    """A web server with one file; `faults` answers the next requests, in their order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/slide.svs"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        start, end = map(int, self.headers["Range"].partition("=")[2].split("-"))
        self.server.asked.append(f"{start}-{end}")
        fault = self.server.faults.pop(0) if self.server.faults else ""
        body = WHOLE if fault == "all" else WHOLE[start : end + 1 - (fault == "short")]
        self.send_response({"busy": 503, "gone": 404, "all": 200}.get(fault, 206))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def quick(tmp_path: Path) -> Retries:
    return Retries(0.5, 0.01, 0.02, connect_s=5.0, read_s=5.0, pause_folder=str(tmp_path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "slide.svs"
    path.write_bytes(WHOLE)
    return path


def test_local_ranges_come_in_the_order_asked(file: Path) -> None:
    assert SlideBytes(file).read(RANGES) == EXPECTED
    assert SlideBytes(file).read([]) == [] and SlideBytes(str(file)).read([(5, 0)]) == [b""]


def test_end_of_a_local_file_is_an_error(file: Path) -> None:
    with pytest.raises(OSError, match="ends within bytes 299999 to 300000, after 1 of them"):
        SlideBytes(file).read([(0, 3), (299_999, 2)])
    with pytest.raises(FileNotFoundError):
        SlideBytes(file.with_name("none.svs")).read([(0, 3)])


def test_merging_joins_neighbours_within_the_gap() -> None:
    assert merge([(30, 40), (0, 10), (10, 20), (5, 8)], 0) == [(0, 20), (30, 40)]
    assert merge([(30, 40), (0, 10), (10, 20)], 9) == [(0, 20), (30, 40)]
    assert merge([(30, 40), (0, 10), (10, 20)], 10) == [(0, 40)]


def test_server_is_asked_once_for_what_lies_together(server: Server, quick: Retries) -> None:
    assert SlideBytes(server.url, quick).read(RANGES) == EXPECTED
    assert sorted(server.asked) == ["0-100011", "200000-200000", "299000-299999"]


def test_only_what_failed_is_asked_for_again(server: Server, quick: Retries) -> None:
    server.faults = ["busy", "short"]
    assert SlideBytes(server.url, quick).read(RANGES) == EXPECTED
    assert len(server.asked) == 5 and len(set(server.asked)) == 3


def test_lasting_faults_of_a_server_are_named(server: Server, quick: Retries) -> None:
    server.faults = ["busy"] * 10_000
    with pytest.raises(RemoteError, match="HTTP 503"):
        SlideBytes(server.url, quick).read([(0, 10)])
    server.asked.clear()
    server.faults = ["gone"]
    with pytest.raises(OSError):
        SlideBytes(server.url, quick).read([(0, 10)])
    server.faults = ["all"]
    with pytest.raises(RemoteError, match="asked for 10 bytes and gave 300000; use a server that supports ranges"):
        SlideBytes(server.url + "?token=secret", quick).read([(0, 10)])
    assert len(server.asked) == 2


def _send(data: SlideBytes, queue: multiprocessing.Queue) -> None:
    queue.put(data.read(RANGES) == EXPECTED)


def test_forked_and_copied_readers_work(server: Server, quick: Retries, file: Path) -> None:
    context = multiprocessing.get_context("fork")
    for data in (SlideBytes(file), SlideBytes(server.url, quick)):
        assert data.read(RANGES) == EXPECTED
        queue = context.Queue()
        child = context.Process(target=partial(_send, data, queue))
        child.start()
        assert queue.get(timeout=30) is True
        child.join()
        assert data.read(RANGES) == EXPECTED
        assert pickle.loads(pickle.dumps(SlideBytes(file))).read(RANGES) == EXPECTED

"""The server of a page that follows its run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from dinov2.report.serve import PageServer, state_of


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    (tmp_path / "metrics.jsonl").write_text("one\n")

    def make(state: str) -> str:
        return f"{state} {(tmp_path / 'metrics.jsonl').read_text()}"

    with PageServer(0, make, lambda: state_of([tmp_path])) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: PageServer, path: str, host: str = "localhost:1") -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_follows_the_run_and_says_so(server: PageServer, tmp_path: Path):
    _, state = get(server, "/state")
    assert get(server, "/") == (200, f"{state} one\n")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("two\n")
    _, later = get(server, "/state")
    assert later != state
    assert get(server, "/?again") == (200, f"{later} one\ntwo\n")


def test_only_this_machine_is_answered_and_only_its_page(server: PageServer):
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/", host="elsewhere.example:80")[0] == 403
    assert get(server, "/../metrics.jsonl")[0] == 404

"""A server of the GDC's kind, and what talks to it."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from prepatching_scripts.download_tcga import main
from prepatching_scripts.gdc.download import Downloads
from prepatching_scripts.gdc.manifest import GdcFile
from prepatching_scripts.gdc.query import Gdc
from tests.helpers.gdc_server import GdcServer, Stored

HEADER = "id\tfilename\tmd5\tsize\tstate\n"
CONTENT = np.random.default_rng(0).bytes(200_001)
HALF = 100_000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GdcServer]:
    """An empty server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with GdcServer() as gdc:
        yield gdc


@pytest.fixture
def slide(server: GdcServer) -> Stored:
    """A file of 200 kB on it."""
    return server.add("TCGA-AA-0001-01Z-00-DX1.svs", CONTENT)


@pytest.fixture
def make_gdc(server: GdcServer) -> Callable[..., Gdc]:
    """Make a client of it with three attempts, almost without waits."""

    def make(token: str = "", attempts: int = 3) -> Gdc:
        return Gdc(server.url, token, attempts, wait_s=0.001, read_s=0.3)

    return make


@pytest.fixture
def fetch(make_gdc: Callable[..., Gdc], tmp_path: Path) -> Callable[..., bool]:
    """Fetch one file to `<tmp_path>/a.svs`; its `progress` is the sum of all progress."""

    def run(stored: Stored, token: str = "", **options: float | bool) -> bool:
        gained: list[int] = []
        downloads = Downloads(make_gdc(token), threading.Event(), gained.append, **options)
        try:
            return downloads.fetch(GdcFile(*stored), tmp_path / "a.svs")
        finally:
            run.progress = sum(gained)

    return run


@pytest.fixture
def cli(server: GdcServer, tmp_path: Path) -> Callable[..., int]:
    """Run the command line with folder and endpoint given, and one attempt."""

    def run(*argv: str) -> int:
        return main(["--output", str(tmp_path / "out"), "--endpoint", server.url, "--attempts", "1", *argv])

    return run


def write_manifest(path: Path, stored: list[Stored]) -> Path:
    """Write a manifest."""
    path.write_text(HEADER + "".join(file.line() for file in stored))
    return path


def failures(tmp_path: Path) -> list[dict[str, str]]:
    """What failures.jsonl holds."""
    return [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]


def add_collection(server: GdcServer) -> dict[str, Stored]:
    """Diagnostic slides of two projects besides what the filter must leave out."""
    names = [f"TCGA-{project}-{i}.svs" for project in ("LUAD", "BRCA") for i in range(4)]
    wanted = {name: server.add(name, name.encode() * 100, f"TCGA-{name[5:9]}") for name in names}
    server.add("other.svs", b"1", "CPTAC-3")
    server.add("frozen.svs", b"2", experimental_strategy="Tissue Slide")
    server.add("closed.svs", b"3", access="controlled")
    server.add("reads.bam", b"4", data_format="BAM")
    return wanted


def size_of(path: Path) -> int:
    """Size of a file, -1 if there is none."""
    return path.stat().st_size if path.exists() else -1

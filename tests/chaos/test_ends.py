"""Two processes that end on a busy machine: none crashes in a collective or at the interpreter's end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launches import LAUNCHED, command, finish, start


@pytest.fixture(scope="module")
def load() -> Iterator[None]:
    """Three processes that only compute."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    yield
    for process in busy:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("load")
@pytest.mark.parametrize("number", range(100))
def test_a_short_run(data: Path, tmp_path: Path, number: int):
    line = command(tmp_path / "out", data, 2, *LAUNCHED, "optim.early_stop=0.5")
    status, said = finish(start(line, PYTHONFAULTHANDLER="1"))
    assert status == 0 and "Fatal" not in said, said

"""Data of all launches, and the runs that nothing disturbed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.launches import LAUNCHED, command, finish, start
from tests.helpers.runs import write_tissue_shards


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Uninterrupted runs by number of processes."""

    @functools.cache
    def run(processes: int) -> Path:
        output_dir = tmp_path_factory.mktemp("whole") / "out"
        status, said = finish(start(command(output_dir, data, processes, *LAUNCHED)))
        assert status == 0, said
        return output_dir

    return run

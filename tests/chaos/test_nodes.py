"""Two launchers, as of two nodes, on one machine: a killed rank brings both back to the last checkpoint."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.launches import LAUNCHED, assert_equal_runs, command, finish, ranks, start, wait_for_step


def node(line: list[str], rank: int, port: int) -> list[str]:
    """The command of two processes as that of one node of two, with one process."""
    launcher = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=3"]
    launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=x"]
    given = [item for item in line if item not in ("--standalone", "--nproc_per_node=2")]
    return [*given[:2], *launcher, *given[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_restarted_with_the_others(
    data: Path, whole: Callable[[int], Path], tmp_path: Path, killed: int
):
    output_dir = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = command(output_dir, data, 2, *LAUNCHED)
    launchers = [start(node(line, rank, port)) for rank in range(2)]
    wait_for_step(output_dir, 7, launchers[0])
    (rank,) = ranks(launchers[killed].pid, output_dir)
    os.kill(rank, signal.SIGKILL)
    for launcher in launchers:
        status, said = finish(launcher)
        assert status == 0 and "Traceback" not in said, said
    assert "Resumed from" in (output_dir / "logs/rank_0.log").read_text()
    assert_equal_runs(whole(2), output_dir)

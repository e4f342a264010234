"""Workers and ranks that hang or are killed: the job ends, says in sentences who and what, and loses no sample."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.launches import children, command, finish, kill_all, processes_of, ranks, start, wait_for_step

LONG = ("optim.epochs=500", "train.num_workers=1", "train.checkpoint_period_iterations=5", "train.hang_timeout=20")


def disturb(data: Path, output_dir: Path, whom: str, number: signal.Signals) -> tuple[int, str]:
    """Signal a rank or its worker, of two ranks, after the first checkpoint; exit status, and what was said."""
    process = start(command(output_dir, data, 2, *LONG))
    wait_for_step(output_dir, 7, process)
    rank = ranks(process.pid, output_dir)[1]
    os.kill(rank if whom == "rank" else children(rank)[0], number)
    status, said = finish(process)
    assert not processes_of(output_dir) or kill_all(output_dir) is None
    assert list((output_dir / "checkpoints").glob("step_0000005"))
    assert "Traceback" not in said, said
    return status, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number", "status", "sentence"),
    [
        ("worker", signal.SIGSTOP, 76, "Rank 1 has been waiting for a batch"),
        ("worker", signal.SIGKILL, 2, "A decode worker of rank 1 has ended"),
        ("rank", signal.SIGSTOP, 76, "Behind are rank 1 (no sign for"),
        ("rank", signal.SIGKILL, 76, "was ended by SIGKILL"),
    ],
)
def test_of_two_ranks(data: Path, tmp_path: Path, whom: str, number: signal.Signals, status: int, sentence: str):
    found, said = disturb(data, tmp_path / "out", whom, number)
    assert (found, sentence in said) == (status, True), said

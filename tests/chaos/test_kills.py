"""`kill -9` of launcher, ranks and workers at random moments: no step is lost, repeated or changed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest
import torch

from dinov2.hub import load_teacher
from tests.helpers.launches import LAUNCHED, STEPS, assert_resumes_as, command, finish, kill_all, start

KILLS = 5  # of one run, one after the other
EXPORTS = "evaluation.eval_period_iterations=4"
MOMENTS = {
    "starting": ("", 8.0),
    "at any moment": ("", 25.0),
    "while a checkpoint is written": ("checkpoints/*.incomplete", 0.2),
    "while a teacher is exported": ("eval/training_*", 0.2),
}
"""A file that must be there, and the most seconds after it, or after the launch."""


def wait_for(moment: str, output_dir: Path, process: Popen[str], draw: random.Random) -> None:
    """Return at the moment, or when the run has ended."""
    pattern, seconds = MOMENTS[moment]
    before = set(output_dir.glob(pattern)) if pattern else set()
    while pattern and not set(output_dir.glob(pattern)) - before and process.poll() is None:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, seconds))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_of_one_run(data: Path, whole: Callable[[int], Path], tmp_path: Path, processes: int, seed: int):
    draw, output_dir = random.Random(seed), tmp_path / "out"
    for _ in range(KILLS):
        process = start(command(output_dir, data, processes, *LAUNCHED, EXPORTS))
        wait_for(draw.choice(list(MOMENTS)), output_dir, process, draw)
        kill_all(output_dir)
        assert "Traceback" not in finish(process)[1]
    assert_resumes_as(whole(processes), output_dir, data, processes, EXPORTS)
    for step in range(4, STEPS + 1, 4):
        exported = load_teacher(output_dir / f"eval/training_{step}/teacher_checkpoint.pth")
        assert all(torch.isfinite(tensor).all() for tensor in exported.state_dict().values())
    remains = [path.name for path in output_dir.rglob("*") if path.suffix in (".incomplete", ".part", ".corrupt")]
    assert remains == []

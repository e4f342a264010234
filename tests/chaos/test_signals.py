"""Runs that are asked to stop: they save what they have, say so, and end as if nothing had happened once resumed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.launches import (
    LAUNCHED,
    STEPS,
    assert_resumes_as,
    command,
    finish,
    kill_all,
    processes_of,
    start,
    wait_for_step,
)

SELDOM = "train.checkpoint_period_iterations=1000"
LONG = (*LAUNCHED, SELDOM)
STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 75, signal.SIGINT: 130, signal.SIGHUP: 129}


def steps_saved(output_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (output_dir / "checkpoints").glob("step_???????"))


# Of all processes, as Slurm signals them; and of the launcher alone, as a user does.
@pytest.mark.parametrize(
    ("processes", "everyone", "number"),
    [(2, True, signal.SIGTERM), pytest.param(1, False, signal.SIGUSR1, marks=pytest.mark.slow)],
)
def test_a_signalled_run_saves_and_resumes_as_if_nothing_had_been(
    data: Path, whole: Callable[[int], Path], tmp_path: Path, processes: int, everyone: bool, number: signal.Signals
):
    output_dir = tmp_path / "out"
    process = start(command(output_dir, data, processes, *LONG))
    wait_for_step(output_dir, 3, process)
    if everyone:
        kill_all(output_dir, number)
    else:
        process.send_signal(number)
    status, said = finish(process)
    (saved,) = steps_saved(output_dir)
    assert (status, 3 <= saved < STEPS) == (STATUS[number], True), said
    assert str(output_dir / f"checkpoints/step_{saved:07d}") in said and "Traceback" not in said
    assert_resumes_as(whole(processes), output_dir, data, processes, SELDOM)


@pytest.mark.slow
def test_ranks_save_and_end_when_their_launcher_is_killed(data: Path, whole: Callable[[int], Path], tmp_path: Path):
    output_dir = tmp_path / "out"
    process = start(command(output_dir, data, 2, *LONG))
    wait_for_step(output_dir, 3, process)
    process.kill()
    finish(process)  # the pipe is closed when the last rank has ended
    (saved,) = steps_saved(output_dir)
    assert 3 <= saved < STEPS and not processes_of(output_dir)
    assert_resumes_as(whole(2), output_dir, data, 2, SELDOM)


def test_a_run_ends_before_slurm_does(data: Path, tmp_path: Path):
    output_dir = tmp_path / "out"
    # Slurm's end has passed: a launch makes one step, so that none is in vain, and ends with "run again".
    status, said = finish(start(command(output_dir, data, 2, *LONG), SLURM_JOB_END_TIME="1000000000"))
    assert (status, steps_saved(output_dir)) == (75, [1]), said


@pytest.mark.slow
def test_a_second_request_ends_at_once_and_says_what_is_lost(data: Path, tmp_path: Path):
    output_dir = tmp_path / "out"
    process = start(command(output_dir, data, 1, *LONG))
    wait_for_step(output_dir, 3, process)
    for pid in processes_of(output_dir):
        if pid != process.pid:
            os.kill(pid, signal.SIGSTOP)  # the worker hangs: no next step
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert (status, steps_saved(output_dir)) == (143, []), said
    assert "no checkpoint was saved" in said
    kill_all(output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_at_random_moments(data: Path, whole: Callable[[int], Path], tmp_path: Path, seed: int):
    draw = random.Random(seed)
    processes, number, output_dir = draw.choice((1, 2)), draw.choice(list(STATUS)), tmp_path / "out"
    process = start(command(output_dir, data, processes, *LONG))
    time.sleep(draw.uniform(0, 20))
    process.send_signal(number)
    status, said = finish(process)
    assert status in (0, STATUS[number], 128 + number, -number), said  # before Python has begun it ends as any process
    assert "Traceback" not in said, said
    assert_resumes_as(whole(processes), output_dir, data, processes, SELDOM)

"""A main thread that hangs, in a process of its own; signs of life of other ranks."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2.train.state import TrainState
from dinov2.train.watchdog import Watchdog

HANGING = """
import logging, sys, time
from pathlib import Path
from dinov2.train import watchdog
from dinov2.train.state import TrainState
logging.basicConfig(level=logging.INFO, format="%(message)s")
watchdog._SAY_S, watchdog._LOOK_S, watchdog._BEAT_S = 0.5, 0.05, 0.1
watchdog.get_global_size = lambda: 4
state = TrainState(7, 56)
with watchdog.Watchdog(Path(sys.argv[1]), state, hang_s=2, start_s=1000) as watch:
    with watch.phase("in a step"):
        pass
    state.step, state.samples = 8, 64
    with watch.phase("waiting for a batch", {extra}):
        __import__("ctypes").CDLL(None).sleep(60)
"""


def run(folder: Path, extra: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "logs").mkdir()
    stale = {"rank": 3, "step": 8, "samples": 64, "phase": "in a step", "since": 0.0, "time": time.time() - 90}
    for rank, text in ((1, "[1]"), (2, '{"time": null}'), (3, json.dumps(stale)), (4, json.dumps(stale))):
        (folder / f"logs/heartbeat.rank{rank}.json").write_text(text)  # rank 4 is of an earlier launch
    line = [sys.executable, "-c", HANGING.format(extra=extra), str(folder)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_a_rank_that_hangs_says_what_it_waits_for_and_ends(tmp_path: Path):
    result = run(tmp_path)
    assert result.returncode == 76
    *warnings, error = result.stderr.splitlines()
    assert len(warnings) == 3  # after half a second, one and one and a half
    for part in ("Rank 0", "waiting for a batch", "step 8", "64 samples", "rank 3 (no sign for"):
        assert part in error and part in warnings[0]
    assert "rank 4" not in error
    beat = json.loads((tmp_path / "logs/heartbeat.rank0.json").read_text())  # what a monitor sees of the dead
    assert (beat["step"], beat["samples"], beat["phase"]) == (8, 64, "waiting for a batch")
    assert beat["since"] <= beat["time"] < time.time()


def test_around_the_phases_of_a_step_another_one_is_watched(tmp_path: Path):
    """What comes before the first step and after the last: probes of starting weights, say, or the end of a logger."""
    step = 'with watch.phase("in a step"):\n            pass\n        '
    code = HANGING.format(extra="").replace("waiting for a batch", "about to end")
    code = code.replace("__import__", step + "__import__")
    (tmp_path / "logs").mkdir()
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert result.returncode == 76 and "about to end" in result.stderr.splitlines()[-1]


def test_one_that_waits_for_others_lets_them_speak_first(tmp_path: Path):
    begun = time.monotonic()
    assert run(tmp_path, "with_others=True").returncode == 76
    assert time.monotonic() - begun > 2.5


def test_time_in_which_the_whole_process_is_suspended_is_no_waiting(tmp_path: Path):
    code = HANGING.format(extra="").replace('__import__("ctypes").CDLL(None).sleep(60)', "time.sleep(2)")
    code = code.replace("hang_s=2", "hang_s=6").replace("state.step,", "print(flush=True); state.step,")
    (tmp_path / "logs").mkdir()
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        time.sleep(8)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=120) == 0


def test_nothing_is_left_of_a_run_that_ended_and_without_a_limit_none_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr("dinov2.train.watchdog._LOOK_S", 0.01)
    with Watchdog(tmp_path, TrainState(), hang_s=0, start_s=0) as watch, watch.phase("in a step"):
        time.sleep(0.1)
        assert (tmp_path / "logs/heartbeat.rank0.json").exists()
    assert not list((tmp_path / "logs").iterdir())

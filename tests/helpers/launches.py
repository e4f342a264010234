"""Training as a user launches it, in processes of its own that can be disturbed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import dinov2
from tests.helpers.runs import TINY, checkpoint_tensors, read_metrics

ROOT = Path(dinov2.__file__).parents[1]
BATCH, STEPS = 8, 24
PATIENCE_S = 600.0  # only guards against hanging, on the busiest machine
LAUNCHED = ("optim.epochs=6", "train.num_workers=1")  # a run of so many steps


def command(output_dir: Path, data: Path | str, processes: int, *overrides: str) -> list[str]:
    """A tiny run of a batch of eight over so many processes, as the launchers start it."""
    launcher = [str(ROOT / "scripts/_torchrun.py"), "--standalone", f"--nproc_per_node={processes}"]
    script = [str(ROOT / "dinov2/train/train.py"), "--output-dir", str(output_dir)]
    batch = f"train.batch_size_per_gpu={BATCH // processes}"
    return [
        sys.executable,
        *(launcher if processes > 1 else ()),
        *script,
        *TINY,
        batch,
        f"data.path={data}",
        *overrides,
    ]


def start(line: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start it in a session of its own, on the CPU, all that it says in one pipe."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | variables
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=environment, start_new_session=True, **pipe)


def wait_for_step(output_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Return once a step has been recorded; AssertionError if the run ends before."""
    deadline, metrics = time.monotonic() + PATIENCE_S, output_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no step {step} in time"
        time.sleep(0.02)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status, and all that was said."""
    said = process.communicate(timeout=PATIENCE_S)[0]
    return process.returncode, said


def assert_equal_runs(one: Path, other: Path) -> None:
    """Losses of every step and tensors of the last checkpoint are equal to the bit."""
    curves = [{record["step"]: record["total_loss"] for record in read_metrics(run)} for run in (one, other)]
    assert curves[0] == curves[1] and curves[0].keys() == set(range(1, STEPS + 1))
    tensors = [checkpoint_tensors(run, STEPS) for run in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def assert_resumes_as(whole: Path, output_dir: Path, data: Path | str, processes: int, *overrides: str) -> None:
    """Go on with a run; it ends as the uninterrupted one, to the bit."""
    status, said = finish(start(command(output_dir, data, processes, *LAUNCHED, *overrides)))
    assert status == 0, said
    assert_equal_runs(whole, output_dir)


def processes_of(output_dir: Path) -> list[int]:
    """Those whose command line names the folder, workers included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(output_dir).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def kill_all(output_dir: Path, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal every process of a run, launcher and workers too."""
    for pid in processes_of(output_dir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Child processes, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks(launcher: int, output_dir: Path) -> list[int]:
    """The ranks that a launcher has started, in order."""
    return [pid for pid in children(launcher) if pid in processes_of(output_dir)]

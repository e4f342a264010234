"""Two processes are killed outright; one goes on from their checkpoint with the next unseen samples."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import dinov2
from tests.helpers.runs import TINY, read_metrics, write_tissue_shards

TRAIN = Path(dinov2.__file__).parent / "train" / "train.py"
# Drop path draws per rank, so without it the loss curve does not depend on the number of processes.
SAME_CURVE = ("student.drop_path_rate=0", "dino.kde_gather=true", "dino.koleo_gather=true", "optim.epochs=5",
              "train.checkpoint_period_iterations=4")  # fmt: skip


def command(output_dir: Path, shards: Path, processes: int) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    # The batch is fixed at the first launch; eight images, whatever the number of processes.
    return [*launch, str(TRAIN), "--output-dir", str(output_dir), *TINY, *SAME_CURVE,
            f"train.batch_size_per_gpu={8 // processes}", f"train.streaming_dataset_path={shards}"]  # fmt: skip


def environment() -> dict[str, str]:
    root = str(TRAIN.parents[2])
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}


def kill_outright(argument: str) -> None:
    """SIGKILL every process with this argument: torchrun gives each worker a session of its own."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in cmdline.read_bytes().split(b"\0"):
                os.kill(int(cmdline.parent.name), signal.SIGKILL)


def test_sigkill_on_two_processes_resumes_on_one(tmp_path: Path):
    shards = write_tissue_shards(tmp_path / "shards")
    whole = tmp_path / "whole"
    subprocess.run(command(whole, shards, 1), env=environment(), check=True, timeout=120)

    output_dir = tmp_path / "out"
    process = subprocess.Popen(command(output_dir, shards, 2), env=environment())
    deadline = time.monotonic() + 120
    while not (output_dir / "last_checkpoint").exists():
        assert process.poll() is None, "the two processes ended before their first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.02)
    kill_outright(str(output_dir))
    process.wait()

    newest = max((output_dir / "checkpoints").glob("step_???????/state.json"))
    state = json.loads(newest.read_text())
    assert state["samples"] == 8 * state["step"] < 8 * 20
    resumed = subprocess.run(
        command(output_dir, shards, 1),
        env=environment(),
        timeout=120,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"Resumed from {newest.parent}" in resumed.stderr
    # The last record of a step is the valid one; all of them together are the uninterrupted run's curve, which
    # is only so if not one sample was skipped or seen twice.
    curve = {record["step"]: record["total_loss"] for record in read_metrics(output_dir)}
    expected = {record["step"]: record["total_loss"] for record in read_metrics(whole)}
    assert curve.keys() == expected.keys() == set(range(1, 21))
    for step, loss in expected.items():
        assert abs(curve[step] - loss) < 2e-3 * abs(loss), step

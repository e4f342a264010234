"""Two processes, fed by an unreliable hub, are killed outright; one goes on with the next unseen samples."""

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
from tests.helpers import slow_order
from tests.helpers.hub_server import RETRY_AFTER, HubServer, seeded_faults
from tests.helpers.runs import TINY, read_metrics, write_tissue_shards

TRAIN = Path(dinov2.__file__).parent / "train" / "train.py"
# Drop path draws per rank, so without it the loss curve does not depend on the number of processes.
SAME_CURVE = ("student.drop_path_rate=0", "dino.kde_gather=true", "dino.koleo_gather=true", "optim.epochs=5",
              "train.checkpoint_period_iterations=4", "logging.samples=true", "train.stream_lanes=16")  # fmt: skip
STEPS, BATCH = 20, 8


def command(output_dir: Path, dataset: Path | str, processes: int) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    # The batch is fixed at the first launch; eight images, whatever the number of processes.
    return [*launch, str(TRAIN), "--output-dir", str(output_dir), *TINY, *SAME_CURVE,
            f"train.batch_size_per_gpu={BATCH // processes}", f"train.streaming_dataset_path={dataset}"]  # fmt: skip


def environment() -> dict[str, str]:
    root = str(TRAIN.parents[2])
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}


def consumed(output_dir: Path) -> dict[int, list[tuple[int, tuple[int, int]]]]:
    """Sample indices with their rows that each step of the surviving run consumed, ranks joined."""
    lines = {}  # by step, number of ranks and rank; a later line replaces an earlier one
    last = {}  # ranks of each step's valid line
    for path in sorted((output_dir / "logs").glob("samples.rank*.jsonl")):
        rank = int(path.suffixes[0].removeprefix(".rank"))
        for line in map(json.loads, path.read_text().splitlines()):
            lines[line["step"], line["ranks"], rank] = line
            if rank == 0:
                last[line["step"]] = line["ranks"]
    return {
        step: [
            (index, tuple(row))
            for rank in range(ranks)
            for line in [lines[step, ranks, rank]]
            for index, row in zip(line["indices"], line["rows"], strict=True)
        ]
        for step, ranks in sorted(last.items())
    }


def kill_outright(argument: str) -> None:
    """SIGKILL every process with this argument: torchrun gives each worker a session of its own."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in cmdline.read_bytes().split(b"\0"):
                os.kill(int(cmdline.parent.name), signal.SIGKILL)


def test_sigkill_on_two_processes_resumes_on_one(tmp_path: Path):
    shards = write_tissue_shards(tmp_path / "shards")
    whole = tmp_path / "whole"
    subprocess.run(command(whole, shards, 1), env=environment(), check=True, timeout=600)

    output_dir = tmp_path / "out"
    with HubServer() as hub:
        hub.push("org/tissue", shards)
        # A read asks twice, for the address and for the bytes: a read that meets many faults takes long.
        hub.faults = seeded_faults(0, {"503": 0.05, "cut": 0.05, "drop": 0.02, RETRY_AFTER: 0.02})
        env = environment() | hub.environment()
        process = subprocess.Popen(command(output_dir, "org/tissue", 2), env=env)
        deadline = time.monotonic() + 600  # a guard against hanging, on the busiest machine
        while not (output_dir / "last_checkpoint").exists():
            assert process.poll() is None, "the two processes ended before their first checkpoint"
            assert time.monotonic() < deadline, "no checkpoint in time"
            time.sleep(0.02)
        kill_outright(str(output_dir))
        process.wait()

        newest = max((output_dir / "checkpoints").glob("step_???????/state.json"))
        state = json.loads(newest.read_text())
        assert state["samples"] == BATCH * state["step"] < BATCH * STEPS
        again = command(output_dir, "org/tissue", 1)
        resumed = subprocess.run(again, env=env, timeout=600, capture_output=True, text=True, check=True)
    assert f"Resumed from {newest.parent}" in resumed.stderr

    # Every sample once and in order, though two processes consumed the first and one the rest, ...
    steps = consumed(output_dir)
    assert steps.keys() == set(range(1, STEPS + 1))
    joined = [sample for step in steps.values() for sample in step]
    assert [index for index, _ in joined] == list(range(BATCH * STEPS))
    groups = [8, 8, 8, 6] * 3
    order = [row for epoch in range(2) for row in slow_order.epoch_order(groups, 0, 16, 4, epoch)]
    assert [row for _, row in joined] == order[: BATCH * STEPS]
    # ... and the losses are those of an uninterrupted run on local files.
    curve = {record["step"]: record["total_loss"] for record in read_metrics(output_dir)}
    expected = {record["step"]: record["total_loss"] for record in read_metrics(whole)}
    assert curve.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, loss in expected.items():
        assert abs(curve[step] - loss) < 2e-3 * abs(loss), step

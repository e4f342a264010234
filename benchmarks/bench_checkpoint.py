"""Checkpoints by size of the model: how long training stands still, and how long saving and resuming take.

    python benchmarks/bench_checkpoint.py [--arch vit_small,vit_large] [--folder DIR] [--repeats N] [--output OUT]

One process on the CPU, networks and heads of the recipe vits14_reg4.yaml with the backbone exchanged. Page cache and
disk are the machine's, as for a run. The work that goes on beside a save is a matrix product of one thread.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import describe_machine
from dinov2.configs import load_config
from dinov2.fsdp import Checkpointer
from dinov2.train.run import build_arch
from dinov2.train.update.optim import adam_state, build_optimizer
from dinov2.utils import files

RECIPE = Path(__file__).parents[1] / "dinov2" / "configs" / "train" / "vits14_reg4.yaml"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small,vit_large", help="backbones, with commas (%(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is reported (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": describe_machine(("torch", "xxhash")), "checkpoints": {}}
    for arch in args.arch.split(","):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found = results["checkpoints"][arch] = measure(arch, Path(folder), args.repeats)
        sys.stdout.write(f"{arch}: " + ", ".join(f"{key} {value:.3g}" for key, value in found.items()) + "\n")
    if args.output:
        files.write_json(args.output, results)
    return 0


def measure(arch: str, folder: Path, repeats: int) -> dict[str, float]:
    """Seconds, GiB and rates for one backbone."""
    small = ("dino.head_n_prototypes=64", "ibot.head_n_prototypes=64") if arch == "vit_demo" else ()
    config = load_config(RECIPE, [f"student.arch={arch}", "train.use_pretrained=false", "data.path=unused", *small])
    model = build_arch(config, torch.device("cpu"), from_checkpoint=False)
    optimizer = build_optimizer(model.get_params_groups(), (0.9, 0.999))
    tensors = {
        "student": model.student.state_dict(),
        "teacher": model.teacher.state_dict(),
        "optimizer": adam_state(model.trained, optimizer),
    }
    waiting, beside = (Checkpointer(folder / name, keep=1, background=name == "b") for name in "ab")
    alone = rate(lambda: time.perf_counter() - start < 1, start := time.perf_counter())
    saved, stalled, written, slowed = [], [], [], []
    for step in range(1, repeats + 1):
        saved.append(timed(lambda step=step: waiting.save(step, tensors, {"step": step})))
        start = time.perf_counter()
        stalled.append(timed(lambda step=step: beside.save(step, tensors, {"step": step})))
        slowed.append(rate(lambda step=step: not beside.path(step).exists(), time.perf_counter()) / alone)
        beside.finish()
        written.append(time.perf_counter() - start)
    shutil.rmtree(folder / "b")
    verified = [timed(lambda: waiting.newest(dict)) for _ in range(repeats)]
    loaded = [timed(lambda: waiting.load(repeats, tensors)) for _ in range(repeats)]
    size = sum(path.stat().st_size for path in waiting.path(repeats).iterdir())
    middle = statistics.median
    return {
        "gib": size / 2**30,
        "stall_s": middle(stalled),
        "background_s": middle(written),
        "synchronous_s": middle(saved),
        "verify_s": middle(verified),
        "verify_mb_per_s": size / 1e6 / middle(verified),
        "load_s": middle(loaded),
        "speed_beside": middle(slowed),
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def rate(goes_on: Callable[[], bool], start: float) -> float:
    """Matrix products per second while something goes on."""
    a, count = torch.randn(256, 256), 0
    while goes_on() or not count:
        a @ a
        count += 1
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())

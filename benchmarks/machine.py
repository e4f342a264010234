"""What a figure was measured on, and how long a piece of work takes there."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dinov2.utils.provenance import package_versions

ROOT = Path(__file__).parents[1]


def describe_machine(packages: tuple[str, ...]) -> dict[str, Any]:
    """Processor, GPU, versions of the packages, and the commit (with "+" where files differ from it)."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "versions": package_versions(packages),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_ms(work: Callable[[], object], seconds: float) -> float:
    """Median CPU time of this thread for one call, in milliseconds, over at least `seconds` and 5 calls."""
    work()
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return 1000 * statistics.median(taken)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None

"""How long steps and their phases take: CUDA events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.step_batches import Batch

Mark = Callable[[str], None]

_GPU_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


class Instants:
    """Instants on the device's current stream; each ends the phase it is named after."""

    def __init__(self, device: torch.device):
        self._device = device
        self._taken: list[tuple[str, Any]] = []

    def __call__(self, phase: str) -> None:
        """End ``phase`` here; the first instant only starts the clock."""
        if self._device.type == "cuda":
            instant: Any = torch.cuda.Event(enable_timing=True)
            instant.record()
        else:
            instant = time.perf_counter()
        self._taken.append((phase, instant))

    def intervals(self) -> list[tuple[str, float]]:
        """(phase, milliseconds) in order of time. Waits for the device."""
        wait(self._device)
        pairs = zip(self._taken, self._taken[1:], strict=False)
        return [(phase, self._milliseconds(start, end)) for (_, start), (phase, end) in pairs]

    def _milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._device.type == "cuda" else 1000 * (end - start)


def wait(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(step: Callable[[], None], steps: int, images: int, device: torch.device) -> dict[str, Any]:
    """Images per second of host time between two synchronisations, and the spread of single steps."""
    instants, sample = Instants(device), None
    wait(device)
    start = time.perf_counter()
    instants("start")
    for number in range(steps):
        step()
        instants("step")
        if number == steps // 2 and device.type == "cuda":
            sample = _start_gpu_query(device)
    wait(device)
    wall = time.perf_counter() - start
    each = sorted(ms for _, ms in instants.intervals())
    return {
        "images": images,
        "steps": steps,
        "img_per_s": steps * images / wall,
        "step_ms": 1000 * wall / steps,
        "step_ms_median": statistics.median(each),
        "step_ms_p10": each[len(each) // 10],
        "step_ms_p90": each[9 * len(each) // 10],
        "gpu": _read_gpu_query(sample),
    }


def time_phases(
    staged_step: Callable[[Mark], None], steps: int, step_ms: float, device: torch.device
) -> dict[str, Any]:
    """Milliseconds per phase, and whether they add up to a step that nothing was measured in (within 3 %)."""
    instants = Instants(device)
    instants("start")
    for _ in range(steps):
        staged_step(instants)
    phases: dict[str, float] = {}
    for phase, ms in instants.intervals():
        phases[phase] = phases.get(phase, 0.0) + ms / steps
    total = sum(phases.values())
    return {"ms": phases, "sum_ms": total, "sums_to_step": abs(total / step_ms - 1) <= 0.03}


@contextlib.contextmanager
def around_forward(module: nn.Module, mark: Mark, before: str, inside: str) -> Iterator[None]:
    """While open, the first forward pass of ``module`` ends phase ``before``, and the end of each ends ``inside``.

    What lies between two passes of it counts as ``inside``.
    """
    started = iter([before])
    handles = (
        module.register_forward_pre_hook(lambda *_: mark(next(started, inside))),
        module.register_forward_hook(lambda *_: mark(inside)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_launches(run: Callable[[], None], device: torch.device) -> int | None:
    """Kernels, copies and fills of one call of ``run``; None on a CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        wait(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def load_batch(batches: Iterator[Batch], copy: Callable[[Batch], Batch], mark: Mark) -> Batch:
    """Take a batch and copy it to the device, each a phase."""
    batch = next(batches)
    mark("data_wait")
    moved = copy(batch)
    mark("h2d_and_normalise")
    return moved


def _start_gpu_query(device: torch.device) -> subprocess.Popen[str] | None:
    """Ask for clocks and power while the device works; nothing is changed, and the answer is read later."""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        f"--query-gpu={','.join(_GPU_FIELDS)}",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _read_gpu_query(query: subprocess.Popen[str] | None) -> dict[str, str] | None:
    """The answer, or None where there is none."""
    if query is None:
        return None
    try:
        text, _ = query.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        query.kill()
        query.communicate()
        return None
    if query.returncode or not text.strip():
        return None
    values = text.splitlines()[0].split(",")
    return dict(zip(_GPU_FIELDS, map(str.strip, values), strict=False))

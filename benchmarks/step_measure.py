"""One implementation from the correctness gate to its figures, in the process that calls."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.step_batches import Preset, host_batches, to_device
from benchmarks.step_phases import Mark, count_launches, load_batch, time_phases, time_steps, wait
from benchmarks.step_variants import ABLATIONS, VARIANTS, Ours, Variant, build, check
from dinov2.configs import Config
from dinov2.train.plan.gpus import find_gpu
from dinov2.train.plan.measure import StepCosts
from dinov2.train.plan.memory import MemoryModel

PHASE_STEPS = 5
BASE = "ours_bf16"
IMPLEMENTATIONS = VARIANTS | {f"{BASE}-{switch}": variant for switch, variant in ABLATIONS.items()}

Save = Callable[[dict[str, Any]], None]


def measure(name: str, preset: Preset, device: torch.device, *, steps: int | None, brief: bool, save: Save) -> None:
    """Check an implementation, time it, and take it apart; the result is handed over anew after each stage.

    Args:
        name: of `IMPLEMENTATIONS`.
        preset: configuration and numbers of steps.
        device: where to run.
        steps: timed steps of ours in place of the preset's; references make half as many.
        brief: time only, for a repetition.
        save: receives everything known so far.
    """
    variant = IMPLEMENTATIONS[name]
    result: dict[str, Any] = {"status": "failed", "overrides": list(variant.overrides)}
    if not brief:
        gate = check(variant, preset, device)
        result["gate"] = gate.report()
        if not gate.passed:
            faults = "; ".join(gate.failures)
            save(result | {"error": f"not timed, since it computes something else: {faults}"})
            return
        save(result)
        _release(device)
    config = preset.config(*variant.overrides)
    images = preset.separate_images if variant.separate else config.train.batch_size_per_gpu
    # Before anything is compiled: measuring compiled blocks forgets what was.
    costs = StepCosts(config, _compiles(config, device))
    work = _work(costs, variant, images)
    predicted = None if variant.reference else MemoryModel(costs).exactly(images).total / 2**30
    runner, batches = build(variant, config, device), host_batches(config, images, device)
    latest: dict[str, Any] = {}

    def step() -> None:
        losses = runner.step(to_device(next(batches), config, device))
        latest.update({name: torch.as_tensor(loss).detach() for name, loss in losses.items()})

    result["warm_up"] = _warm_up(step, preset.warmups, device)
    _reset_peak(device)
    graphs = _graphs()
    timing = time_steps(step, _steps(variant, preset, steps), images, device)
    losses = {key: value.item() for key, value in latest.items()}
    result |= {
        "timing": timing,
        "losses": losses,
        "recompiled": _graphs() - graphs,
        "memory": _peak(device),
        "predicted_gib": predicted,
        "work": work | _rates(work, timing["step_ms"], device),
    }
    if not all(map(math.isfinite, losses.values())):
        save(result | {"error": "a loss is not finite after the timed steps"})
        return
    result["status"] = "measured"
    save(result)
    if isinstance(runner, Ours) and name in VARIANTS and not brief:

        def staged_step(mark: Mark) -> None:
            batch = load_batch(batches, lambda host: to_device(host, config, device), mark)
            runner.staged_step(batch, mark)

        result["phases"] = time_phases(staged_step, PHASE_STEPS, timing["step_ms"], device)
        save(result)
        save(result | {"launches": count_launches(step, device)})


def _steps(variant: Variant, preset: Preset, steps: int | None) -> int:
    if variant.reference is None:
        return steps or preset.steps
    return max(steps // 2, 1) if steps else preset.reference_steps


def _warm_up(step: Callable[[], None], steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the first step, which compiles, and of all; graphs compiled."""
    before, start = _graphs(), time.perf_counter()
    step()
    wait(device)
    first = time.perf_counter() - start
    for _ in range(steps - 1):
        step()
    wait(device)
    return {
        "first_step_s": first,
        "all_s": time.perf_counter() - start,
        "steps": steps,
        "graphs": _graphs() - before,
    }


def _graphs() -> int:
    """Graphs compiled so far in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _work(costs: StepCosts, variant: Variant, images: int) -> dict[str, float | None]:
    """Arithmetic of a step; what a reference executes is not counted."""
    flops = costs.flops(images)
    hardware = None if variant.reference else flops.hardware / 1e12
    return {
        "model_tflop": flops.model / 1e12,
        "dense_tflop": flops.dense / 1e12,
        "hardware_tflop": hardware,
    }


def _rates(work: dict[str, float | None], step_ms: float, device: torch.device) -> dict[str, float | None]:
    """Rate of the arithmetic relative to the data sheet's 16-bit peak, for FP8 too."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    names = {"mfu": "model_tflop", "dense_equivalent": "dense_tflop", "hfu": "hardware_tflop"}
    return {
        name: 1e15 * work[count] / (step_ms * gpu.bf16) if gpu and work[count] else None
        for name, count in names.items()
    }


def _compiles(config: Config, device: torch.device) -> bool:
    return device.type == "cuda" and config.performance.compile is not False


def _release(device: torch.device) -> None:
    """Give back all that the gate's networks held."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, float] | None:
    """GiB at most since the warm-up; None on a CPU."""
    if device.type != "cuda":
        return None
    return {
        "allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
    }

"""A configuration on a number of GPUs: steps, learning rate, FLOPs, memory, time and cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from dinov2.configs.schema import Config
from dinov2.train.plan.hardware import ASSUMED_GPU, ASSUMED_PEAK_FRACTION, DOLLARS_PER_GPU_HOUR, Gpu, find_gpu
from dinov2.train.plan.measure import StepCosts
from dinov2.train.plan.memory import MemoryModel


@dataclass(frozen=True)
class RunPlan:
    """Derived figures of a run.

    Attributes:
        world_size: training processes.
        global_batch: images per step over all processes, fixed at the first launch.
        epoch_steps: steps per epoch.
        total_steps: steps after which training ends.
        schedule_steps: span of the cosine schedules.
        peak_lr: learning rate after the scaling rule.
    """

    world_size: int
    global_batch: int
    epoch_steps: int
    total_steps: int
    schedule_steps: int
    peak_lr: float

    @property
    def local_batch(self) -> int:
        """Images per step and process."""
        return self.global_batch // self.world_size

    @property
    def total_images(self) -> int:
        """Images over the whole run, repeats counted."""
        return self.total_steps * self.global_batch


def make_plan(config: Config, world_size: int, global_batch: int | None = None) -> RunPlan:
    """Derive the plan.

    The sqrt rule is ``lr = base_lr * sqrt(global_batch / 1024)`` (DINOv2's ``sqrt_wrt_1024``).

    Args:
        config: validated configuration.
        world_size: processes of this launch.
        global_batch: of the run being resumed, or of the batch that ``auto`` found; None takes the configured one.

    Raises:
        ValueError: if the batch does not divide into whole pairs of images per process.
    """
    batch = global_batch or config.train.batch_size_per_gpu * world_size
    if batch % (2 * world_size):
        raise ValueError(
            f"The global batch of {batch} images does not divide into pairs over {world_size} processes; use a "
            f"number of processes that divides {batch // 2}."
        )
    epoch_steps = config.train.OFFICIAL_EPOCH_LENGTH
    optim = config.optim
    scale = math.sqrt(batch / 1024) if optim.scaling_rule == "sqrt_wrt_1024" else 1.0
    last_epoch = optim.epochs if optim.early_stop is None else optim.early_stop
    return RunPlan(
        world_size=world_size,
        global_batch=batch,
        epoch_steps=epoch_steps,
        total_steps=round(last_epoch * epoch_steps),
        schedule_steps=round(optim.epochs * epoch_steps),
        peak_lr=optim.base_lr * scale,
    )


def describe_plan(
    config: Config, plan: RunPlan, costs: StepCosts, device_name: str | None = "", gpus_per_node: int = 8
) -> str:
    """The plan as lines of text, for the start of a run and for ``--dry-run``.

    Memory, time and cost are predictions for one kind of GPU, which the text names.

    Args:
        config: validated configuration.
        plan: of the run.
        costs: of the configuration's step.
        device_name: the driver's name of the GPU; one that is unknown here gives way to `ASSUMED_GPU`, and None,
            for a run on a CPU, leaves the predictions out.
        gpus_per_node: of the launch.
    """
    parameters = sum(p.numel() for p in costs.student.parameters())
    flops = costs.flops(plan.local_batch)
    processes = "1 process" if plan.world_size == 1 else f"{plan.world_size} processes"
    lines = [
        f"Run plan: {config.student.arch}/{config.student.patch_size}, {parameters / 1e6:.1f} M parameters",
        f"  batch     {plan.global_batch} images = {processes} x {plan.local_batch}",
        f"  steps     {plan.total_steps:,} of a {plan.schedule_steps:,}-step schedule, {plan.total_images:,} images",
        f"  peak lr   {plan.peak_lr:.4e}",
        f"  compute   {flops.model / 1e12:.3g} TFLOP per step and process "
        f"({flops.hardware / 1e12:.3g} executed, {flops.dense / 1e12:.3g} without stochastic depth)",
    ]
    if device_name is not None:
        known, gpu = find_gpu(device_name), find_gpu(device_name) or find_gpu(ASSUMED_GPU)
        memory = MemoryModel(costs, plan.world_size, gpus_per_node).exactly(plan.local_batch)
        lines += [
            f"Predicted, not measured, for {gpu.name if known else f'an assumed {gpu.name}'}:",
            f"  memory    {memory.total / 2**30:.1f} of {gpu.memory / 2**30:.0f} GiB per GPU, "
            f"{'compiled' if costs.compiled else 'eager'}",
            f"            {memory.describe()}",
            *_cost_lines(config, plan, max(flops.model, flops.hardware), gpu),  # recomputing takes time
        ]
    return "\n".join(lines)


def parameter_table(costs: StepCosts) -> str:
    """The student's parameters by module, as lines of text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what fvcore uses of torch.jit
        from fvcore.nn import parameter_count_table
    return parameter_count_table(costs.student, max_depth=2)


def _cost_lines(config: Config, plan: RunPlan, flops: int, gpu: Gpu) -> Iterator[str]:
    in_fp32 = config.compute_precision.student.backbone.mixed_precision.param_dtype == "fp32"
    peak, name = (gpu.fp32, "fp32") if in_fp32 else (gpu.bf16, "16-bit")
    seconds = flops / (ASSUMED_PEAK_FRACTION * peak)
    hours = seconds * plan.total_steps / 3600
    gpu_hours = hours * plan.world_size
    yield (
        f"  time      {1e3 * seconds:.3g} ms per step, {plan.global_batch / seconds:.3g} images per second, if "
        f"{ASSUMED_PEAK_FRACTION:.0%} of the {name} peak is reached and data and links keep up"
    )
    yield (
        f"  cost      {hours:,.1f} h, {gpu_hours:,.1f} GPU-hours, {DOLLARS_PER_GPU_HOUR * gpu_hours:,.0f} dollars at "
        f"{DOLLARS_PER_GPU_HOUR:.2f} per GPU-hour"
    )

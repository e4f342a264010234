"""A configuration on a number of GPUs: steps, learning rate, FLOPs, memory, time and cost.

Peak rates of GPUs and links are those of their data sheets.
"""

import math
import warnings
from dataclasses import dataclass

from torch import nn

from dinov2.configs.schema import AUTO_EPOCHS, Config
from dinov2.train.plan.measure import StepCosts
from dinov2.train.plan.memory import MemoryModel

_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU, without sparsity."""

    name: str  # a word of the driver's name of the device
    memory: int  # bytes that PyTorch can see
    bf16: float  # floating-point operations per second of matmuls in 16 bit
    fp32: float  # the same in float32, TF32 off
    bandwidth: float  # of the memory, bytes per second
    link: float  # to the other GPUs of its node, bytes per second and direction


GPUS = (
    Gpu("B200", 178 * _GIB, 2250e12, 75e12, 7.7e12, 900e9),
    Gpu("H200", 139 * _GIB, 989.4e12, 67e12, 4.8e12, 450e9),
    Gpu("H100", 79 * _GIB, 989.4e12, 67e12, 3.35e12, 450e9),
    Gpu("A100-SXM4-80GB", 79 * _GIB, 312e12, 19.5e12, 2.04e12, 300e9),
    Gpu("A100-SXM4-40GB", 39 * _GIB, 312e12, 19.5e12, 1.56e12, 300e9),
    Gpu("L40S", 44 * _GIB, 362e12, 91.6e12, 0.86e12, 32e9),
)
"""SXM modules where there are several kinds; the PCIe and NVL kinds of the same name are slower and not listed."""

ASSUMED_GPU = "H200"
"""Device of a plan where there is no GPU, or one that is not in the table."""

ASSUMED_PEAK_FRACTION = 0.5
"""Fraction of the peak that the step's model FLOPs are assumed to reach; the published code reached 0.24."""

NETWORK_LINK = 50e9
"""Bytes per second, direction and GPU between nodes: one 400 Gb/s InfiniBand port per GPU."""

DOLLARS_PER_GPU_HOUR = 2.5
"""Rent of one H100 as the published run counted it in November 2025 (667 GPU-hours for 1,667 dollars)."""

AUTO_PASSES = (3, 100)
"""Fewest and most passes over the tiles that ``auto`` makes. A hundred is what DINOv2's default is of ImageNet-1k."""

AUTO_IMAGES = 96_000_000
"""Images at which ``auto`` makes fewer passes than the most: those of the published run, 3.2 passes over its tiles."""


def find_gpu(device_name: str) -> Gpu | None:
    """The table's entry for a driver's device name such as "NVIDIA H100 80GB HBM3"; None where there is none."""
    words = device_name.split()
    if {"PCIe", "NVL", "MIG"} & set(words):
        return None
    return next((gpu for gpu in GPUS if gpu.name in words), None)


@dataclass(frozen=True)
class RunPlan:
    """Derived figures of a run."""

    world_size: int  # training processes
    global_batch: int  # images per step over all processes, fixed at the first launch
    epoch_steps: int
    total_steps: int  # after which training ends
    schedule_steps: int  # span of the cosine schedules
    peak_lr: float  # after the scaling rule
    auto_tiles: int = 0  # tiles from whose number ``optim.epochs: auto`` follows; 0 where it is given

    @property
    def local_batch(self) -> int:
        """Images per step and process."""
        return self.global_batch // self.world_size

    @property
    def total_images(self) -> int:
        """Images over the whole run, repeats counted."""
        return self.total_steps * self.global_batch


def make_plan(
    config: Config, world_size: int, global_batch: int | None = None, num_tiles: int | None = None
) -> RunPlan:
    """Derive the plan; the sqrt rule is ``lr = base_lr * sqrt(global_batch / 1024)`` (DINOv2's ``sqrt_wrt_1024``; the
    rule of that name in DINOv3 is four times as much).

    ``global_batch`` is that of the run being resumed, or what ``auto`` found; None takes the configured one. Of
    ``num_tiles`` tiles, ``optim.epochs: auto`` makes `AUTO_PASSES` at most while these are fewer than `AUTO_IMAGES`
    images, and at least its fewest passes in any case. Raises ValueError if the batch does not divide over the
    processes, or the number of tiles is needed and None.
    """
    batch = global_batch or config.train.batch_size_per_gpu * world_size
    if batch % world_size:
        raise ValueError(
            f"The global batch of {batch} images does not divide over {world_size} processes; use a number of "
            f"processes that divides {batch}."
        )
    optim, epochs, epoch_steps = config.optim, config.optim.epochs, config.train.OFFICIAL_EPOCH_LENGTH
    auto_tiles = 0
    if epochs == "auto":
        if not num_tiles:
            raise ValueError(
                "optim.epochs = auto follows from the number of tiles, and these are drawn without end; give a number "
                "of epochs, or of tiles by data.max_tiles."
            )
        fewest, most = AUTO_PASSES
        images = max(fewest * num_tiles, min(most * num_tiles, AUTO_IMAGES))
        epochs, epoch_steps, auto_tiles = AUTO_EPOCHS, max(1, round(images / batch / AUTO_EPOCHS)), num_tiles
    factor = {"none": 0, "sqrt_wrt_1024": 1, "four_sqrt_wrt_1024": 4}[optim.scaling_rule]
    return RunPlan(
        world_size=world_size,
        global_batch=batch,
        epoch_steps=epoch_steps,
        total_steps=max(1, round(min(epochs, optim.early_stop or epochs) * epoch_steps)),
        schedule_steps=round(epochs * epoch_steps),
        peak_lr=optim.base_lr * (factor * math.sqrt(batch / 1024) if factor else 1),
        auto_tiles=auto_tiles,
    )


def _notes(config: Config, plan: RunPlan) -> list[str]:
    """What of the lengths that are given in epochs does not go without saying."""
    optim, epochs, notes = config.optim, plan.schedule_steps / plan.epoch_steps, []
    if plan.auto_tiles:
        passes = plan.schedule_steps * plan.global_batch / plan.auto_tiles
        notes.append(
            f"  epochs    auto: {AUTO_EPOCHS} of {plan.epoch_steps:,} steps, {passes:.3g} passes over "
            f"{plan.auto_tiles:,} tiles"
        )
    if optim.early_stop is not None and optim.early_stop > epochs:
        notes.append(
            f"  warning   optim.early_stop = {optim.early_stop:g} is beyond the {epochs:g} epochs of the schedules, "
            "with which training ends"
        )
    warmup, last = optim.warmup_epochs * plan.epoch_steps, plan.total_steps
    if warmup > last:
        notes.append(
            f"  warning   optim.warmup_epochs = {optim.warmup_epochs:g} is beyond the run's "
            f"{last / plan.epoch_steps:g} epochs: the learning rate rises to the end, where it is {last / warmup:.0%} "
            "of its peak"
        )
    return notes


@dataclass(frozen=True)
class DiskNeeds:
    """Files that a run keeps, in number and bytes each."""

    checkpoints: int  # the one that is being written before an older one goes among them
    checkpoint: int
    exports: int
    export: int

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.checkpoints * self.checkpoint + self.exports * self.export

    def describe(self) -> str:
        """Number and size, on one line."""
        parts = ((self.checkpoints, "checkpoint", self.checkpoint), (self.exports, "teacher", self.export))
        return ", ".join(f"{n:,} {name}{'s'[: n != 1]} of {_size(size)}" for n, name, size in parts if n)


def disk_needs(config: Config, plan: RunPlan, student: nn.Module, gram_teacher: nn.Module | None = None) -> DiskNeeds:
    """What a run writes: float32 student, teachers and AdamW's two moments; and teachers alone."""
    train, evaluation, steps = config.train, config.evaluation, plan.total_steps
    parameters = list(student.parameters())
    weights = 4 * sum(p.numel() for p in parameters)
    moments = 8 * sum(p.numel() for p in parameters if p.requires_grad)
    kept = steps // train.keep_checkpoints_every if train.keep_checkpoints_every else 0
    made = math.ceil(steps / train.checkpoint_period_iterations)
    exports = math.ceil(steps / evaluation.eval_period_iterations)
    snapshot = [] if gram_teacher is None else gram_teacher.parameters()
    return DiskNeeds(
        checkpoints=0 if train.skip_checkpointer else min(made, train.keep_checkpoints + 1 + kept),
        checkpoint=2 * weights + moments + 4 * sum(p.numel() for p in snapshot),
        exports=min(exports, evaluation.keep_exports + 1 if evaluation.keep_exports else exports),
        export=weights,
    )


def _size(size: int) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:,.1f} MiB"


def describe_plan(
    config: Config, plan: RunPlan, costs: StepCosts, device_name: str | None = "", gpus_per_node: int = 8
) -> str:
    """The plan as lines of text, for the start of a run and for ``--dry-run``.

    Memory, time and cost are predictions for one kind of GPU, which the text names: that of the driver's
    ``device_name``, or `ASSUMED_GPU` where it is unknown here; None, for a run on a CPU, leaves the predictions out.
    """
    parameters = sum(p.numel() for p in costs.student.parameters())
    flops = costs.flops(plan.local_batch)
    processes = "1 process" if plan.world_size == 1 else f"{plan.world_size} processes"
    disk = disk_needs(config, plan, costs.student, costs.gram_teacher)
    lines = [
        f"Run plan: {config.student.arch}/{config.student.patch_size}, {parameters / 1e6:.1f} M parameters",
        f"  batch     {plan.global_batch} images = {processes} x {plan.local_batch}",
        f"  steps     {plan.total_steps:,} of a {plan.schedule_steps:,}-step schedule, {plan.total_images:,} images",
        f"  peak lr   {plan.peak_lr:.4e}",
        *_notes(config, plan),
        f"  disk      {_size(disk.total)} in the run's folder: {disk.describe()}",
        f"  compute   {flops.model / 1e12:.3g} TFLOP per step and process "
        f"({flops.hardware / 1e12:.3g} executed, {flops.dense / 1e12:.3g} without stochastic depth)",
    ]
    if device_name is not None:
        known = find_gpu(device_name)
        gpu = known or find_gpu(ASSUMED_GPU)
        memory = MemoryModel(costs, plan.world_size, gpus_per_node).exactly(plan.local_batch)
        in_fp32 = config.compute_precision.student.backbone.mixed_precision.param_dtype == "fp32"
        peak, kind = (gpu.fp32, "fp32") if in_fp32 else (gpu.bf16, "16-bit")
        seconds = max(flops.model, flops.hardware) / (ASSUMED_PEAK_FRACTION * peak)  # recomputing takes time
        hours = seconds * plan.total_steps / 3600
        gpu_hours = hours * plan.world_size
        lines += [
            f"Predicted, not measured, for {gpu.name if known else f'an assumed {gpu.name}'}:",
            f"  memory    {memory.total / 2**30:.1f} of {gpu.memory / 2**30:.0f} GiB per GPU, "
            f"{'compiled' if costs.compiled else 'eager'}",
            f"            {memory.describe()}",
            f"  time      {1e3 * seconds:.3g} ms per step, {plan.global_batch / seconds:.3g} images per second, if "
            f"{ASSUMED_PEAK_FRACTION:.0%} of the {kind} peak is reached and data and links keep up",
            f"  cost      {hours:,.1f} h, {gpu_hours:,.1f} GPU-hours, {DOLLARS_PER_GPU_HOUR * gpu_hours:,.0f} dollars "
            f"at {DOLLARS_PER_GPU_HOUR:.2f} per GPU-hour",
        ]
    return "\n".join(lines)


def parameter_table(costs: StepCosts) -> str:
    """The student's parameters by module, as lines of text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what fvcore uses of torch.jit
        from fvcore.nn import parameter_count_table
    return parameter_count_table(costs.student, max_depth=2)

"""A run's plan in words: lengths, schedules, files, and what is predicted for a GPU."""

import warnings
from collections.abc import Iterator, Sequence

from dinov2.configs.schema import AUTO_EPOCHS, Config
from dinov2.train.plan.gpus import Gpu
from dinov2.train.plan.measure import StepCosts
from dinov2.train.plan.memory import MemoryModel, check_fits
from dinov2.train.plan.plan import DiskNeeds, RunPlan, disk_needs
from dinov2.train.update.optim import Schedules

PEAK_FRACTIONS = (0.5, 0.24)
"""Fractions of the peak that the step's model FLOPs reach: as hoped for, and as published of the reference's code."""

_GIB = 2**30


def describe_plan(
    config: Config,
    plan: RunPlan,
    costs: StepCosts,
    gpu: Gpu | None,
    gpus_per_node: int = 8,
    price: float | None = None,
) -> str:
    """The plan as lines of text, for the start of a run and for ``--dry-run``.

    Args:
        config: validated.
        plan: its derived figures.
        costs: of its step.
        gpu: for which memory and time are predicted, the latter where its peaks are known; None, for a run on a CPU,
            leaves both out.
        gpus_per_node: over which ``HYBRID_SHARD`` shards.
        price: of an hour of one GPU, in any currency; None leaves the cost out.
    """
    parameters = sum(p.numel() for p in costs.student.parameters())
    flops = costs.flops(plan.local_batch) * plan.accumulation
    processes = "1 process" if plan.world_size == 1 else f"{plan.world_size} processes"
    accumulated = f" x {plan.accumulation} micro-batches" if plan.accumulation > 1 else ""
    disk = disk_needs(config, plan, costs.student, costs.saved_teachers)
    lines = [
        f"Run plan: {config.student.arch}/{config.student.patch_size}, {parameters / 1e6:.1f} M parameters",
        f"  batch     {plan.global_batch} images = {processes} x {plan.local_batch}{accumulated}",
        f"  steps     {plan.total_steps:,} of a {plan.schedule_steps:,}-step schedule, {plan.total_images:,} images",
        f"  peak lr   {plan.peak_lr:.4e}",
        *_schedules(config, plan),
        *_notes(config, plan),
        f"  disk      {_size(disk.total)} in the run's folder: {_files(disk)}",
        f"  compute   {flops.model / 1e12:.3g} TFLOP per step and process "
        f"({flops.hardware / 1e12:.3g} executed, {flops.dense / 1e12:.3g} without stochastic depth)",
    ]
    if gpu is not None:
        work = max(flops.model, flops.hardware)  # recomputing takes time
        lines += [f"Predicted, not measured, for {gpu.name}:", *_memory(plan, costs, gpu, gpus_per_node)]
        lines += _time(config, plan, work, gpu, price)
    return "\n".join(lines)


def parameter_table(costs: StepCosts) -> str:
    """The student's parameters by module, as lines of text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what fvcore uses of torch.jit
        from fvcore.nn import parameter_count_table
    return parameter_count_table(costs.student, max_depth=2)


def hours_of(steps: int, flops: float, peak: float) -> tuple[float, ...]:
    """Hours of so many steps of so many floating-point operations, at each of `PEAK_FRACTIONS` of a peak rate."""
    return tuple(steps * flops / (fraction * peak) / 3600 for fraction in PEAK_FRACTIONS)


def _schedules(config: Config, plan: RunPlan) -> Iterator[str]:
    """Warm-up, and a table of what the schedules are in the first step, where each warm-up ends, and in the last."""
    schedules, last = Schedules(config, plan), plan.total_steps
    warm, sharpening = schedules.warmup_steps, schedules.temp_warmup_steps
    yield (
        f"  warm-up   {warm:,} steps of the learning rate, {sharpening:,} of the teacher's temperature; heads' last "
        f"layers frozen for {schedules.frozen_steps:,}"
    )
    steps = sorted({1, *(min(max(step, 1), last) for step in (warm, sharpening)), last})
    values = [schedules[step - 1] for step in steps]
    rows = {
        "step": [f"{step:,}" for step in steps],
        "learning rate": [f"{value.lr:.4g}" for value in values],
        "weight decay": [f"{value.wd:.4g}" for value in values],
        "teacher momentum": [f"{value.mom:.6g}" for value in values],
        "teacher temperature": [f"{value.teacher_temp:.4g}" for value in values],
    }
    for place, (name, cells) in enumerate(rows.items()):
        yield f"  {'' if place else 'schedules':<9} {name:<19}" + "".join(f" {cell:>11}" for cell in cells)


def _notes(config: Config, plan: RunPlan) -> list[str]:
    """What of the lengths that are given in epochs does not go without saying."""
    optim, epochs, notes = config.optim, plan.schedule_steps / plan.epoch_steps, []
    if plan.auto_tiles:
        passes = plan.schedule_steps * plan.global_batch / plan.auto_tiles
        notes.append(
            f"  epochs    auto: {AUTO_EPOCHS} of {plan.epoch_steps:,} steps, {passes:.3g} passes over "
            f"{plan.auto_tiles:,} tiles"
        )
    if plan.is_cut:
        notes.append(f"  budget    optim.max_flops = {optim.max_flops:g} pays for epochs of {plan.epoch_steps:,} steps")
    if optim.early_stop is not None and optim.early_stop > epochs:
        notes.append(
            f"  warning   optim.early_stop = {optim.early_stop:g} is beyond the {epochs:g} epochs of the schedules, "
            "with which training ends"
        )
    rate = config.schedules.lr
    key, epochs = ("schedules.lr", rate.warmup_epochs) if rate.is_given else ("optim", optim.warmup_epochs)
    warmup, last = epochs * plan.epoch_steps, plan.total_steps
    if warmup > last:
        notes.append(
            f"  warning   {key}.warmup_epochs = {epochs:g} is beyond the run's "
            f"{last / plan.epoch_steps:g} epochs: the learning rate rises to the end, where it is {last / warmup:.0%} "
            "of its peak"
        )
    return notes


def _memory(plan: RunPlan, costs: StepCosts, gpu: Gpu, gpus_per_node: int) -> Iterator[str]:
    model = MemoryModel(costs, plan.world_size, gpus_per_node)
    memory = model.exactly(plan.local_batch)
    yield (
        f"  memory    {memory.total / _GIB:.1f} of {gpu.memory / _GIB:.0f} GiB per GPU, "
        f"{'compiled' if costs.compiled else 'eager'}"
    )
    yield f"            {memory.describe()}"
    try:
        misfit = check_fits(plan.local_batch, model, gpu.memory)
    except ValueError as error:
        misfit = f"{error} A run refuses to start so"
    if misfit:
        yield f"  warning   {misfit.removesuffix('.')}"


def _time(config: Config, plan: RunPlan, flops: int, gpu: Gpu, price: float | None) -> Iterator[str]:
    if not gpu.is_known:
        yield "  time      unknown, since no peak rate of this GPU is known here"
        return
    in_fp32 = config.compute_precision.student.backbone.mixed_precision.param_dtype == "fp32"
    peak, kind = (gpu.fp32, "fp32") if in_fp32 else (gpu.bf16, "16-bit")
    hoped, published = (f"{fraction:.0%}" for fraction in PEAK_FRACTIONS)
    first = min(config.evaluation.eval_period_iterations, plan.total_steps)
    step, whole, export = (hours_of(steps, flops, peak) for steps in (1, plan.total_steps, first))
    gpu_hours = [plan.world_size * hours for hours in whole]
    yield (
        f"  time      {_span([3.6e6 * hours for hours in step])} ms per step, "
        f"{_span([plan.global_batch / (3600 * hours) for hours in step])} images per second, if data and links keep up"
    )
    yield f"            ({hoped} of the {kind} peak of {peak / 1e12:,.4g} TFLOP/s, as hoped; {published}, as published)"
    yield f"  length    {_duration(whole)}; the first teacher is exported at step {first:,}, after {_duration(export)}"
    money = "" if price is None else f", {_span([price * h for h in gpu_hours])} at {price:,.2f} per GPU-hour"
    yield f"  cost      {_span(gpu_hours)} GPU-hours{money}"


def _duration(hours: Sequence[float]) -> str:
    return f"{_span(hours)} h" if max(hours) >= 1 else f"{_span([60 * each for each in hours])} min"


def _span(values: Sequence[float]) -> str:
    if max(values) < 0.01:
        return "less than 0.01"
    return " to ".join(f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values)


def _size(size: int) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _files(disk: DiskNeeds) -> str:
    """Number and size of a run's files, on one line."""
    parts = ((disk.checkpoints, "checkpoint", disk.checkpoint), (disk.exports, "teacher", disk.export))
    return ", ".join(f"{n:,} {name}{'s'[: n != 1]} of {_size(size)}" for n, name, size in parts if n)

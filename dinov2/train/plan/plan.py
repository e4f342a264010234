"""A configuration on a number of GPUs: steps, learning rate and files."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from dinov2.configs.schema import AUTO_EPOCHS, Config

AUTO_PASSES = (3, 100)
"""Fewest and most passes over the tiles that ``auto`` makes. A hundred is what DINOv2's default is of ImageNet-1k."""

AUTO_IMAGES = 96_000_000
"""Images at which ``auto`` makes fewer passes than the most: those of the published run, 3.2 passes over its tiles."""


@dataclass(frozen=True)
class RunPlan:
    """Derived figures of a run."""

    world_size: int  # training processes
    global_batch: int  # images per optimiser step over all processes, fixed at the first launch
    epoch_steps: int
    total_steps: int  # after which training ends
    schedule_steps: int  # span of the cosine schedules
    peak_lr: float  # after the scaling rule
    lr_factor: float  # of that rule
    auto_tiles: int = 0  # tiles from whose number ``optim.epochs: auto`` follows; 0 where it is given
    accumulation: int = 1  # micro-batches per optimiser step
    is_cut: bool = False  # whether ``optim.max_flops`` has shortened the epochs

    @property
    def local_batch(self) -> int:
        """Images that a process computes at a time: those of a step, or of each of its micro-batches."""
        return self.global_batch // (self.world_size * self.accumulation)

    @property
    def total_images(self) -> int:
        """Images over the whole run, repeats counted."""
        return self.total_steps * self.global_batch


def make_plan(
    config: Config,
    world_size: int,
    global_batch: int | None = None,
    num_tiles: int | None = None,
    flops: Callable[[int], int] | None = None,
) -> RunPlan:
    """Derive the plan; the sqrt rule is ``lr = base_lr * sqrt(global_batch / 1024)`` (DINOv2's ``sqrt_wrt_1024``; the
    rule of that name in DINOv3 is four times as much).

    ``global_batch`` is that of the run being resumed, or what ``auto`` found; None takes the configured one. Of
    ``num_tiles`` tiles, ``optim.epochs: auto`` makes `AUTO_PASSES` at most while these are fewer than `AUTO_IMAGES`
    images, and at least its fewest passes in any case. ``flops`` gives the model FLOPs of a number of images on one
    process; ``optim.max_flops`` shortens epochs to what it pays for. Raises ValueError if the batch does not divide
    over the processes, the number of tiles is needed and None, or the FLOPs pay for less than one step an epoch.
    """
    accumulation = config.optim.accumulation_steps
    batch = global_batch or config.train.batch_size_per_gpu * world_size * accumulation
    check_divides(batch, world_size, accumulation)
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
    if is_cut := bool(optim.max_flops and flops):
        per_step = flops(batch // (world_size * accumulation)) * world_size * accumulation
        paid = int(optim.max_flops / per_step / epochs)
        if not paid:
            raise ValueError(
                f"optim.max_flops = {optim.max_flops:g} pays for {optim.max_flops / per_step:.3g} steps of "
                f"{per_step:.3g}, but there are {epochs:g} epochs of at least one; give more, or fewer optim.epochs."
            )
        is_cut, epoch_steps = paid < epoch_steps, min(paid, epoch_steps)
    factor = {"none": 0, "sqrt_wrt_1024": 1, "four_sqrt_wrt_1024": 4}[optim.scaling_rule]
    factor = factor * math.sqrt(batch / 1024) if factor else 1.0
    given = config.schedules.lr
    return RunPlan(
        world_size=world_size,
        global_batch=batch,
        epoch_steps=epoch_steps,
        total_steps=max(1, round(min(epochs, optim.early_stop or epochs) * epoch_steps)),
        schedule_steps=round(epochs * epoch_steps),
        peak_lr=factor * (max(given.values()) if given.is_given else optim.base_lr),
        lr_factor=factor,
        auto_tiles=auto_tiles,
        accumulation=accumulation,
        is_cut=is_cut,
    )


def check_divides(global_batch: int, world_size: int, accumulation: int) -> None:
    """Raise ValueError where the images of a step cannot be dealt out evenly to processes and micro-batches."""
    if global_batch % (world_size * accumulation) == 0:
        return
    if accumulation == 1:
        raise ValueError(
            f"The global batch of {global_batch} images does not divide over {world_size} processes; use a number of "
            f"processes that divides {global_batch}."
        )
    raise ValueError(
        f"The global batch of {global_batch} images does not divide over optim.accumulation_steps = {accumulation} "
        f"micro-batches of {world_size} processes; use numbers whose product divides {global_batch}."
    )


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


def disk_needs(
    config: Config, plan: RunPlan, student: nn.Module, saved_teachers: Iterable[nn.Module] = ()
) -> DiskNeeds:
    """What a run writes: float32 student, teachers and AdamW's two moments; and teachers alone."""
    train, evaluation, steps = config.train, config.evaluation, plan.total_steps
    parameters = list(student.parameters())
    weights = 4 * sum(p.numel() for p in parameters)
    moments = 8 * sum(p.numel() for p in parameters if p.requires_grad)
    kept = steps // train.keep_checkpoints_every if train.keep_checkpoints_every else 0
    made = math.ceil(steps / train.checkpoint_period_iterations)
    exports = math.ceil(steps / evaluation.eval_period_iterations)
    frozen = sum(p.numel() for teacher in saved_teachers for p in teacher.parameters())
    return DiskNeeds(
        checkpoints=0 if train.skip_checkpointer else min(made, train.keep_checkpoints + 1 + kept),
        checkpoint=2 * weights + moments + 4 * frozen,
        exports=min(exports, evaluation.keep_exports + 1 if evaluation.keep_exports else exports),
        export=weights,
    )

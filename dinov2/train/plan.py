"""What a configuration amounts to on a number of GPUs: steps, learning rate, tokens, FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from dinov2.configs.schema import Config


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
        global_batch: of the run being resumed; None at a first launch.

    Raises:
        ValueError: the batch does not divide into whole pairs of images per process.
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


def flops_per_step(config: Config, student: nn.ModuleDict, images: int) -> float:
    """Arithmetic of one training step on ``images`` images, for model FLOPs utilisation.

    A product of (n, a) by (a, b) counts 2nab, a training pass three forward passes, attention 4 n^2 D forward.
    Only the samples that stochastic depth keeps are counted, and every padded masked row.

    Args:
        config: the run's configuration.
        student: ``backbone``, ``dino_head`` and, where separate, ``ibot_head``; may be on the meta device.
        images: images of the step on one process.
    """
    patch, crops = config.student.patch_size, config.crops
    n_global, n_local = ((size // patch) ** 2 for size in (crops.global_crops_size, crops.local_crops_size))
    extra = 1 + config.student.num_register_tokens
    b_global, b_local = 2 * images, crops.local_crops_number * images
    backbone, dino_head = student["backbone"], student["dino_head"]
    ibot_head = student["ibot_head" if "ibot_head" in student else "dino_head"]
    width = backbone.embed_dim

    student = teacher = 0.0
    for block in backbone.blocks:
        products = 2 * _linear_weights(block)
        keep = 1 - block.drop_path_rate
        for batch, tokens in ((b_global, n_global + extra), (b_local, n_local + extra)):
            kept = max(int(batch * keep), 1) if keep < 1 else batch
            student += 3 * kept * (products * tokens + 4 * tokens**2 * width)
        teacher += b_global * (products * (n_global + extra) + 4 * (n_global + extra) ** 2 * width)

    low, high = config.ibot.mask_ratio_min_max
    masked_crops = round(4 * config.ibot.mask_sample_probability)
    edges = [low + (high - low) * (j + 1) / masked_crops for j in range(masked_crops)]
    masked_rows = images // 2 * sum(int(n_global * edge) for edge in edges)
    heads = 2 * _linear_weights(dino_head) * (3 * (b_global + b_local) + b_global)
    heads += 2 * _linear_weights(ibot_head) * 4 * masked_rows
    pixels = 2 * 3 * patch**2 * width
    embed = pixels * (2 * (b_global * n_global + b_local * n_local) + b_global * n_global)
    return student + teacher + heads + embed


def describe_plan(config: Config, plan: RunPlan, student: nn.ModuleDict) -> str:
    """The plan as lines of text, for the start of a run and for ``--dry-run``."""
    parameters = sum(p.numel() for p in student.parameters())
    flops = flops_per_step(config, student, plan.local_batch)
    processes = "1 process" if plan.world_size == 1 else f"{plan.world_size} processes"
    return "\n".join(
        (
            f"Run plan: {config.student.arch}/{config.student.patch_size}, {parameters / 1e6:.1f} M parameters",
            f"  batch     {plan.global_batch} images = {processes} x {plan.local_batch}",
            f"  steps     {plan.total_steps:,} of a {plan.schedule_steps:,}-step schedule, "
            f"{plan.total_images:,} images",
            f"  peak lr   {plan.peak_lr:.4e}",
            f"  compute   {flops / 1e12:.3g} TFLOP per step and process",
        )
    )


def _linear_weights(module: nn.Module) -> int:
    """Entries of all weight matrices that rows of tokens are multiplied by."""
    return sum(p.numel() for name, p in module.named_parameters() if p.ndim == 2 and "weight_g" not in name)

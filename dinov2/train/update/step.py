"""One training step: forward, backward, guard, update. Nothing in it waits for the device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2.distributed import get_global_rank
from dinov2.logging.metrics import CHANCE
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update.guard import FiniteGuard
from dinov2.train.update.optim import ScheduleValues, apply_schedule
from dinov2.train.update.weight_update import WeightUpdate
from dinov2.utils.seeding import step_seed


class TrainingStep:
    """Calling it makes one step; its parts may be called one by one, in the order below, to look between them.

    The networks are on their device; ``global_batch`` counts the images of a step over all ranks, ``seed`` is that of
    the device's random numbers.

    A step may be made on several micro-batches of equal size, in turn: the gradients of their losses are averaged, and
    what follows comes once. For losses that are means over images that is the step on all of them at once. What is
    computed of images together, prototypes shared out by Sinkhorn-Knopp and distances between class tokens, sees one
    micro-batch of all ranks, or of this one.
    """

    def __init__(self, arch: SSLMetaArch, update: WeightUpdate, global_batch: int, seed: int):
        self.arch, self.weight_update, self.seed = arch, update, seed
        self.guard = FiniteGuard(arch.device, global_batch, accumulation=arch.cfg.optim.accumulation_steps)

    def __call__(self, step: int, batches: Sequence[Mapping[str, Any]], values: ScheduleValues) -> dict[str, Tensor]:
        """Train on the micro-batches of one step, of which there may be one; all ranks must call, with equally many.

        Raises NonFiniteError if an earlier step was bad, see `FiniteGuard`.

        Args:
            step: zero-based.
            batches: this rank's part of each, see `SSLMetaArch.compute_losses`.
            values: the step's schedule values.

        Returns:
            The losses and the levels of chance of those that have one, as ``<loss>_chance``, means over the
            micro-batches, and gradient norms before clipping, as ``grad_norm_<module>``: 0-d tensors on the device.
        """
        self.begin(step, values)
        losses, levels = self.accumulate(batches, values)
        norms = self.update(step, losses, values)
        return {**losses, **levels, **{f"grad_norm_{name}": norm for name, norm in norms.items()}}

    def begin(self, step: int, values: ScheduleValues) -> None:
        """Set learning rates, the device's random numbers and the gram teacher; clear the gradients."""
        apply_schedule(self.weight_update.optimizer, values)
        torch.manual_seed(step_seed(self.seed, step, get_global_rank()))
        self.weight_update.optimizer.zero_grad(set_to_none=True)
        self.arch.begin_step(step, values.epoch)

    def accumulate(
        self, batches: Sequence[Mapping[str, Any]], values: ScheduleValues
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Forward and backward of each micro-batch; returns the means of their losses and of their levels of chance."""
        seen = []
        for number, batch in enumerate(batches, 1):
            self.arch.begin_micro_batch(completes_step=number == len(batches))
            losses = self.arch.compute_losses(batch, values.teacher_temp, values.epoch)
            self.backward(losses, len(batches))
            levels = {name + CHANCE: level for name, level in self.arch.chance.items()}
            seen.append([{name: value.detach() for name, value in part.items()} for part in (losses, levels)])
        losses, levels = (_means(parts) for parts in zip(*seen, strict=True))
        return losses, levels

    def backward(self, losses: Mapping[str, Tensor], micro_batches: int = 1) -> None:
        """Gradients of ``total_loss`` as one of so many micro-batches, scaled where gradients are fp16."""
        # A loss scaler skips an update for the sake of its gradients alone. Dividing by zero makes them non-finite
        # where the loss is, and after a bad step; otherwise it divides by one.
        total = losses["total_loss"] / micro_batches
        all_finite = self.guard.all_finite * torch.isfinite(total)
        scaler = self.weight_update.scaler
        (scaler.scale(total / all_finite) if scaler else total / all_finite).backward()

    def update(self, step: int, losses: Mapping[str, Tensor], values: ScheduleValues) -> dict[str, Tensor]:
        """Look at losses and gradients, then change the weights unless one is bad; returns the norms by module."""
        norms = self.weight_update.grad_norms()
        # A non-finite gradient under a loss scaler is an overflow, which the scaler handles by itself.
        self.guard.observe(step, losses, norms, scaled=self.weight_update.scaler is not None)
        self.weight_update.apply(values.mom, self.guard.all_finite)
        return norms


def _means(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}

"""DINO: the student's class tokens predict the teacher's, view against view."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dinov2.configs.schedule import NO_SCHEDULE, Schedule
from dinov2.loss.prototype_kernels import EAGER, PrototypeKernels
from dinov2.loss.soft_cross_entropy import soft_cross_entropy
from dinov2.loss.term import LossContext, LossTerm, StepOutputs

# Tensor dimensions below: V global views, L local views, B images, K prototypes.


def dino_global_loss(
    student_global: Tensor,
    teacher_probs: Tensor,
    num_local_views: int,
    student_temp: float = 0.1,
    kernels: PrototypeKernels = EAGER,
) -> Tensor:
    """Cross-entropy of each global view against the teacher's targets for the other global views.

    DINO (arXiv:2104.14294, section 3.1, equation 3), averaged over all V L + V (V - 1) pairs of views:

        L_global = 1 / (V L + V (V - 1)) sum_v sum_{v' != v} mean_b CE(t_v'b, s_vb)

    Args:
        student_global: (V, B, K) student logits, any float dtype.
        teacher_probs: (V, B, K) teacher probabilities of the same views.
        num_local_views: L, for the number of pairs only.
        student_temp: tau > 0.
        kernels: implementation of the passes over the logits.

    Returns:
        0-d float32. The mean over ranks is the loss of the joined batch.
    """
    num_views = len(teacher_probs)
    others = sum(teacher_probs.roll(shift, 0) for shift in range(1, num_views))
    entropy = soft_cross_entropy(student_global, others, student_temp, kernels)
    return _mean_over_pairs(entropy, num_views, num_local_views)


def dino_local_loss(
    student_local: Tensor, teacher_probs: Tensor, student_temp: float = 0.1, kernels: PrototypeKernels = EAGER
) -> Tensor:
    """Cross-entropy of each local view against the teacher's targets for all global views.

        L_local = 1 / (V L + V (V - 1)) sum_l sum_v mean_b CE(t_vb, s_lb)

    ``student_local`` are the (L, B, K) logits; the rest is as of `dino_global_loss`.
    """
    entropy = soft_cross_entropy(student_local, teacher_probs.sum(0), student_temp, kernels)
    return _mean_over_pairs(entropy, len(teacher_probs), len(student_local))


def _mean_over_pairs(entropy: Tensor, num_views: int, num_local: int) -> Tensor:
    return entropy.mean(1).sum() / (num_views * num_local + num_views * (num_views - 1))


class DINO(LossTerm):
    """`dino_local_loss`, where there are local views, and `dino_global_loss`; section ``dino``."""

    meta_keys: ClassVar[Mapping[str, str]] = {
        "weight": "dino.loss_weight", "local_loss_weight_schedule": "dino.local_loss_weight_schedule",
    }  # fmt: skip

    @dataclass(frozen=True)
    class Options(LossTerm.Options):
        """The weight, and the course of a further factor of the local loss."""

        local_loss_weight_schedule: Schedule = NO_SCHEDULE

    options: Options

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__(options, context)
        self._epochs = context.epochs

    def weight_of(self, loss: str, epoch: float) -> float:
        """As of `LossTerm`; that of the local loss has a schedule beside, as in DINOv3."""
        schedule = self.options.local_loss_weight_schedule
        own = schedule.at(epoch, self._epochs) if loss == "dino_local_crops_loss" and schedule.is_given else 1.0
        return own * self.weight_at(epoch)

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return ``dino_local_crops_loss`` and ``dino_global_crops_loss``."""
        targets, kernels = outputs.class_targets, outputs.kernels
        views, others = outputs.class_logits.split([len(targets), len(outputs.class_logits) - len(targets)])
        losses = {}
        if len(others):
            losses["dino_local_crops_loss"] = dino_local_loss(others, targets, kernels=kernels)
        losses["dino_global_crops_loss"] = dino_global_loss(views, targets, len(others), kernels=kernels)
        return losses

    def chance(self, outputs: StepOutputs) -> dict[str, float]:
        """Return the two for uniform predictions, whose cross-entropy is ln K against any target."""
        num_views, _, num_prototypes = outputs.class_targets.shape
        num_local = len(outputs.class_logits) - num_views
        pairs = {
            "dino_local_crops_loss": num_views * num_local,
            "dino_global_crops_loss": num_views * (num_views - 1),
        }
        of_a_pair = math.log(num_prototypes) / sum(pairs.values())
        return {name: count * of_a_pair for name, count in pairs.items() if count}

"""DINO: the student's class tokens predict the teacher's, view against view."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dinov2.loss.centering import TeacherCentering
from dinov2.loss.prototype_kernels import EAGER, PrototypeKernels
from dinov2.loss.sinkhorn import sinkhorn_knopp
from dinov2.loss.soft_cross_entropy import soft_cross_entropy

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
    student_local: Tensor,
    teacher_probs: Tensor,
    student_temp: float = 0.1,
    kernels: PrototypeKernels = EAGER,
) -> Tensor:
    """Cross-entropy of each local view against the teacher's targets for all global views.

        L_local = 1 / (V L + V (V - 1)) sum_l sum_v mean_b CE(t_vb, s_lb)

    Args:
        student_local: (L, B, K) student logits, any float dtype.
        teacher_probs: (V, B, K) teacher probabilities of the global views.
        student_temp: tau > 0.
        kernels: implementation of the passes over the logits.

    Returns:
        0-d float32, see `dino_global_loss`.
    """
    entropy = soft_cross_entropy(student_local, teacher_probs.sum(0), student_temp, kernels)
    return _mean_over_pairs(entropy, len(teacher_probs), len(student_local))


def _mean_over_pairs(entropy: Tensor, num_views: int, num_local: int) -> Tensor:
    return entropy.mean(1).sum() / (num_views * num_local + num_views * (num_views - 1))


class DINOLoss(TeacherCentering):
    """Teacher targets and cross-entropy for class tokens under DINOv2's public name.

    Training calls `dino_global_loss` and `dino_local_loss`; ``forward`` is the plain sum over pairs.

    Args:
        out_dim: K, number of prototypes.
        student_temp: tau > 0.
        center_momentum: see `TeacherCentering`.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), center_momentum)
        self.student_temp = student_temp

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float | Tensor, n_iterations: int = 3
    ) -> Tensor:
        """Return the targets of (N, K) teacher logits; see `sinkhorn_knopp`. All ranks must call."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(
        self, student_output_list: Iterable[Tensor], teacher_out_softmaxed_centered_list: Iterable[Tensor]
    ) -> Tensor:
        """Sum, over all pairs of a student and a teacher view, of the cross-entropy averaged over the batch.

        Args:
            student_output_list: logits, (B, K) each.
            teacher_out_softmaxed_centered_list: probabilities, (B, K) each.

        Returns:
            0-d float32.
        """
        target = torch.stack(tuple(teacher_out_softmaxed_centered_list)).sum(0)
        return sum(soft_cross_entropy(s, target, self.student_temp).mean() for s in student_output_list)

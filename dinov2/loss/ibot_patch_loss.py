"""iBOT: the student's masked patches predict what the teacher sees there."""

import torch
from torch import Tensor

from dinov2.loss.assignments import Assignments
from dinov2.loss.centering import TeacherCentering
from dinov2.loss.prototype_kernels import EAGER, PrototypeKernels
from dinov2.loss.sinkhorn import sinkhorn_knopp
from dinov2.loss.soft_cross_entropy import soft_cross_entropy

# Tensor dimensions below: C global crops, N patches each, M rows (masked patches, padding), K prototypes.


def ibot_loss(
    student_logits: Tensor,
    teacher: Tensor | Assignments,
    row_weight: Tensor,
    num_crops: int,
    student_temp: float = 0.1,
    kernels: PrototypeKernels = EAGER,
) -> Tensor:
    """Cross-entropy of masked patches, averaged over each crop's masked patches, then over all crops.

    iBOT (arXiv:2111.07832, section 3.1), with M_c the masked patches of crop c:

        L_iBOT = 1/C sum_{c: M_c not empty} 1/|M_c| sum_{j in M_c} CE(t_j, s_j)

    C counts crops without masks too: twice the batch, for two global crops an image.

    Args:
        student_logits: (M, K), any float dtype.
        teacher: (M, K) probabilities, written out or as factors.
        row_weight: (M,) 1/|M_c| of the row's crop, 0 for padding.
        num_crops: C on this rank, the same on all ranks.
        student_temp: tau > 0.
        kernels: implementation of the passes over the logits.

    Returns:
        0-d float32. The mean over ranks is the loss of the joined batch.
    """
    entropy = soft_cross_entropy(student_logits, teacher, student_temp, kernels)
    return (entropy * row_weight).sum() / num_crops


class iBOTPatchLoss(TeacherCentering):
    """Teacher targets and cross-entropy for masked patches under DINOv2's public name.

    Args:
        patch_out_dim: K, number of prototypes.
        student_temp: tau > 0.
        center_momentum: see `TeacherCentering`.
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, 1, patch_out_dim), center_momentum)
        self.student_temp = student_temp

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float | Tensor,
        n_masked_patches_tensor: Tensor | int,
        n_iterations: int = 3,
    ) -> Tensor:
        """Return the Sinkhorn-Knopp targets of masked patches; see `sinkhorn_knopp`. All ranks must call.

        Args:
            teacher_output: (M, K) teacher logits.
            teacher_temp: T > 0.
            n_masked_patches_tensor: this rank's masked patches; rows from this number on are padding.
            n_iterations: at least 1.

        Returns:
            (M, K) float32.
        """
        row_weight = _first_rows(len(teacher_output), n_masked_patches_tensor, teacher_output.device)
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations, row_weight)

    def forward(
        self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor
    ) -> Tensor:
        """`ibot_loss` from the outputs for all patches, masked or not.

        Args:
            student_patch_tokens: (C, N, K) logits.
            teacher_patch_tokens: (C, N, K) probabilities.
            student_masks_flat: (C, N) bool.

        Returns:
            0-d float32.
        """
        row_weight = student_masks_flat / student_masks_flat.sum(1, keepdim=True).clamp_min(1)
        rows = student_patch_tokens, teacher_patch_tokens, row_weight
        return ibot_loss(*(t.flatten(0, 1) for t in rows), len(student_masks_flat), self.student_temp)

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: Tensor | int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """`ibot_loss` from the outputs for masked patches, in the order of ``student_masks_flat``.

        Args:
            student_patch_tokens_masked: (M, K) logits.
            teacher_patch_tokens_masked: (M, K) probabilities.
            student_masks_flat: (C, N) bool.
            n_masked_patches: rows from this number on are padding; None when ``masks_weight`` says so.
            masks_weight: 1/|M_c| of the row's crop, for all M rows (padding 0) or those before the padding;
                None derives it from the masks.

        Returns:
            0-d float32.
        """
        if masks_weight is None:
            masks_weight = _weight_of_masked_rows(student_masks_flat, len(student_patch_tokens_masked))
        num_rows = len(masks_weight)
        if n_masked_patches is not None:
            masks_weight = masks_weight * _first_rows(num_rows, n_masked_patches, masks_weight.device)
        student, teacher = student_patch_tokens_masked[:num_rows], teacher_patch_tokens_masked[:num_rows]
        return ibot_loss(student, teacher, masks_weight, len(student_masks_flat), self.student_temp)


def _first_rows(num_rows: int, n: Tensor | int, device: torch.device) -> Tensor:
    return torch.arange(num_rows, device=device) < n


def _weight_of_masked_rows(masks: Tensor, num_rows: int) -> Tensor:
    """Return (num_rows,) 1/|M_c| for the masked patches of (C, N) masks in order, 0 after the last one."""
    counts = masks.sum(1)
    ends = counts.cumsum(0)
    rows = torch.arange(num_rows, device=masks.device)
    crop = torch.searchsorted(ends, rows, right=True).clamp_max(len(masks) - 1)
    return (rows < ends[-1]) / counts[crop].clamp_min(1)

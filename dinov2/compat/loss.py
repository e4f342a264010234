"""DINOv2's public interface to the losses and to a step, on the functions that training calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dinov2.loss.centering import Centering
from dinov2.loss.ibot import ibot_loss
from dinov2.loss.sinkhorn import sinkhorn_knopp
from dinov2.loss.soft_cross_entropy import soft_cross_entropy
from dinov2.loss.spreading import kde_loss, koleo_loss

if TYPE_CHECKING:
    from dinov2.train.ssl_meta_arch import SSLMetaArch

# Tensor dimensions below: C global crops, N patches each, M rows (masked patches, padding), K prototypes.

_BATCH = {
    "global_crops": "collated_global_crops",
    "local_crops": "collated_local_crops",
    "masks": "collated_masks",
    "mask_indices": "mask_indices_list",
    "mask_weight": "masks_weight",
}


class _TeacherCentering(Centering):
    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float | Tensor) -> Tensor:
        """`Centering.probs`."""
        return self.probs(teacher_output, teacher_temp)

    def reduce_center_update(self, teacher_output: Tensor) -> None:
        """`Centering.update_center`, which Meta's code begins here and ends in `apply_center_update`."""
        self.update_center(teacher_output)

    def apply_center_update(self) -> None:
        """Nothing is left to do: `update_center` has moved the centre."""


class DINOLoss(_TeacherCentering):
    """Teacher targets and cross-entropy for class tokens; ``out_dim`` is K, ``center_momentum`` that of `Centering`."""

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), center_momentum)
        self.student_temp = student_temp

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float | Tensor, n_iterations: int = 3
    ) -> Tensor:
        """`sinkhorn_knopp` of (N, K) teacher logits; all ranks must call."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(
        self, student_output_list: Iterable[Tensor], teacher_out_softmaxed_centered_list: Iterable[Tensor]
    ) -> Tensor:
        """Sum, over all pairs of student logits and teacher probabilities, each (B, K), of the mean cross-entropy."""
        target = torch.stack(tuple(teacher_out_softmaxed_centered_list)).sum(0)
        return sum(soft_cross_entropy(s, target, self.student_temp).mean() for s in student_output_list)


class iBOTPatchLoss(_TeacherCentering):
    """Teacher targets and cross-entropy for masked patches; ``patch_out_dim`` is K."""

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
        """`sinkhorn_knopp` of (M, K) teacher logits, rows from this rank's number of masked patches on being padding.

        All ranks must call.
        """
        rows = torch.arange(len(teacher_output), device=teacher_output.device)
        row_weight = rows < n_masked_patches_tensor
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations, row_weight)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """`ibot_loss` from (C, N, K) student logits and teacher probabilities of all patches, and bool (C, N) masks."""
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
        """`ibot_loss` from the outputs for masked patches, in the order of ``student_masks_flat``, bool (C, N).

        Args:
            student_patch_tokens_masked, teacher_patch_tokens_masked: (M, K) logits, and probabilities, or (1, M, K).
            n_masked_patches: rows from this number on are padding; None when ``masks_weight`` says so.
            masks_weight: 1/|M_c| of the row's crop, for all M rows (padding 0) or those before the padding;
                None derives it from the masks.
        """
        rows = student_patch_tokens_masked, teacher_patch_tokens_masked
        student_patch_tokens_masked, teacher_patch_tokens_masked = (t.flatten(0, -2) for t in rows)
        if masks_weight is None:
            counts = student_masks_flat.sum(1)
            ends = counts.cumsum(0)
            rows = torch.arange(len(student_patch_tokens_masked), device=counts.device)
            crop = torch.searchsorted(ends, rows, right=True).clamp_max(len(counts) - 1)
            masks_weight = (rows < ends[-1]) / counts[crop].clamp_min(1)  # 0 after the last masked patch
        num_rows = len(masks_weight)
        if n_masked_patches is not None:
            masks_weight = masks_weight * (torch.arange(num_rows, device=masks_weight.device) < n_masked_patches)
        student, teacher = student_patch_tokens_masked[:num_rows], teacher_patch_tokens_masked[:num_rows]
        return ibot_loss(student, teacher, masks_weight, len(student_masks_flat), self.student_temp)


class KDELoss(nn.Module):
    """`kde_loss` as a module, of (B, D) class tokens."""

    def __init__(self, kappa: float = 5.0, reference_sign: bool = False, gather: bool = False) -> None:
        super().__init__()
        self.kappa, self.reference_sign, self.gather = kappa, reference_sign, gather

    def forward(self, student_output: Tensor) -> Tensor:
        """Return the 0-d loss."""
        return kde_loss(student_output, self.kappa, self.reference_sign, self.gather)


class KoLeoLoss(nn.Module):
    """`koleo_loss` as a module, of (B, D) class tokens."""

    def __init__(self, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the 0-d loss."""
        return koleo_loss(student_output, self.gather, eps)


def forward_backward(arch: SSLMetaArch, images: Mapping[str, Any], teacher_temp: float) -> dict[str, Tensor]:
    """Losses of a batch from ``collate_data_and_cast``, whose gradients are added to the student's."""
    batch = {name: images[key].to(arch.device, non_blocking=True) for name, key in _BATCH.items()}
    losses = arch.compute_losses(batch, teacher_temp)
    losses["total_loss"].backward()
    return losses

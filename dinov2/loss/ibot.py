"""iBOT: the student's masked patches predict what the teacher sees there."""

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from dinov2.loss.prototype_kernels import EAGER, PrototypeKernels
from dinov2.loss.sinkhorn import Assignments
from dinov2.loss.soft_cross_entropy import soft_cross_entropy
from dinov2.loss.term import LossTerm, StepOutputs

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


class IBOT(LossTerm):
    """`ibot_loss`; section ``ibot``."""

    meta_keys: ClassVar[Mapping[str, str]] = {"weight": "ibot.loss_weight"}

    def forward(self, outputs: StepOutputs) -> Tensor:
        """Return the loss of the masked patches."""
        logits, targets, weight = outputs.patch_logits, outputs.patch_targets, outputs.mask_weight
        return ibot_loss(logits, targets, weight, len(outputs.masks), kernels=outputs.kernels)

    def chance(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return the loss for uniform predictions: ln K' times the fraction of crops that are masked."""
        masked_crops = outputs.mask_weight.sum() / len(outputs.masks)
        return {"ibot_loss": math.log(outputs.patch_logits.shape[-1]) * masked_crops}

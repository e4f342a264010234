"""Training losses. Each file gives its equation; all compute in float32 or better, without a host sync."""

from dinov2.loss.assignments import Assignments
from dinov2.loss.dino_clstoken_loss import DINOLoss, dino_global_loss, dino_local_loss
from dinov2.loss.ibot_patch_loss import ibot_loss, iBOTPatchLoss
from dinov2.loss.kde_loss import KDELoss
from dinov2.loss.koleo_loss import KoLeoLoss
from dinov2.loss.prototype_kernels import EAGER, PrototypeKernels, compiled_kernels
from dinov2.loss.sinkhorn import sinkhorn_assignments, sinkhorn_assignments_of, sinkhorn_knopp
from dinov2.loss.soft_cross_entropy import soft_cross_entropy

__all__ = [
    "EAGER",
    "Assignments",
    "DINOLoss",
    "KDELoss",
    "KoLeoLoss",
    "PrototypeKernels",
    "compiled_kernels",
    "dino_global_loss",
    "dino_local_loss",
    "iBOTPatchLoss",
    "ibot_loss",
    "sinkhorn_assignments",
    "sinkhorn_assignments_of",
    "sinkhorn_knopp",
    "soft_cross_entropy",
]

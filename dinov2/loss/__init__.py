"""Training losses. Each file gives its equation; all compute in float32 or better, without a host sync."""

from importlib import import_module
from typing import Any

from dinov2.loss.centering import Centering
from dinov2.loss.dino import dino_global_loss, dino_local_loss
from dinov2.loss.ibot import ibot_loss
from dinov2.loss.prototype_kernels import EAGER, PrototypeKernels, compiled_kernels
from dinov2.loss.sinkhorn import Assignments, sinkhorn_assignments, sinkhorn_assignments_of, sinkhorn_knopp
from dinov2.loss.soft_cross_entropy import soft_cross_entropy
from dinov2.loss.spreading import kde_loss, koleo_loss
from dinov2.loss.term import LossContext, LossTerm, StepOutputs, TermWithTeacher, build_terms

__all__ = [
    "EAGER", "Assignments", "Centering", "LossContext", "LossTerm", "PrototypeKernels", "StepOutputs",
    "TermWithTeacher", "build_terms", "compiled_kernels", "dino_global_loss", "dino_local_loss", "ibot_loss",
    "kde_loss", "koleo_loss", "sinkhorn_assignments", "sinkhorn_assignments_of", "sinkhorn_knopp", "soft_cross_entropy",
]  # fmt: skip

_PUBLIC = ("DINOLoss", "KDELoss", "KoLeoLoss", "iBOTPatchLoss")


def __getattr__(name: str) -> Any:
    """DINOv2's public classes, which nothing here uses."""
    if name in _PUBLIC:
        return getattr(import_module("dinov2.compat.loss"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

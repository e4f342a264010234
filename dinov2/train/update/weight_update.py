"""What follows the backward: clipping, AdamW, the teacher's moving average and 16-bit copies of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.fsdp import reshard


class WeightUpdate:
    """One update of student and teacher from the student's gradients, by PyTorch's own functions.

    ::

        g <- g min(1, max_norm / (|g| + 1e-6))      |g| over each module of the student
        s <- AdamW(s, g)
        t <- m t + (1 - m) s
        copy <- weight                              rounded to the copy's dtype

    Nothing waits for the device, except under an enabled loss scaler.

    Args:
        optimizer: fused AdamW over the student.
        student: modules, plain or sharded; a gradient's norm is clipped per module.
        teacher: the same modules.
        max_norm: largest gradient norm; 0 clips nothing.
        copies: pairs of a weight (of student or teacher) and its copy.
        scaler: loss scaler; with one enabled, it alone decides whether AdamW steps, by the gradients it unscales.
    """

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        student: nn.ModuleDict,
        teacher: nn.ModuleDict,
        max_norm: float,
        copies: Sequence[tuple[Tensor, Tensor]] = (),
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.optimizer = optimizer
        self.student = student
        self.teacher = teacher
        self.max_norm = max_norm
        self.copies = list(copies)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._norms: dict[str, Tensor] = {}

    @torch.no_grad()
    def grad_norms(self) -> dict[str, Tensor]:
        """L2 norm of each module's gradient before clipping, 0-d; all ranks must call.

        Gradients that are None count nothing. A loss scaler's factor is taken off the gradients first.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self._norms = module_norms(self.student)
        return dict(self._norms)

    @torch.no_grad()
    def apply(self, momentum: float, healthy: Tensor) -> None:
        """Update all weights; all ranks must call. Takes the norms itself where `grad_norms` was not called.

        Args:
            momentum: m of the moving average, in [0, 1].
            healthy: 0-d float on the device, 1, or 0 to leave weights and optimiser state as they are.
        """
        for module, factor in zip(self.student.values(), self._clip_factors(), strict=True):
            gradients = [local_shard(p.grad) for p in module.parameters() if p.grad is not None]
            if gradients and self.max_norm > 0:
                torch._foreach_mul_(gradients, factor)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = 1 - healthy  # fused AdamW skips its update where this is 1
            self.optimizer.step()
            del self.optimizer.found_inf
        ema_update(self.student, self.teacher, (1 - momentum) * healthy)
        refresh(self.copies)

    def _clip_factors(self) -> Tensor:
        """Factor of each module's gradients, float32 (modules,), by norms that are used once."""
        norms = torch.stack([norm.float() for norm in (self._norms or self.grad_norms()).values()])
        self._norms = {}
        if self.max_norm <= 0:
            return torch.ones_like(norms)
        return (self.max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_


@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, weight: Tensor | float) -> None:
    """Move the teacher's parameters towards the student's: ``t <- t + weight (s - t)``; no communication.

    Args:
        student, teacher: of the same structure, plain or sharded alike.
        weight: in [0, 1]; a 0-d tensor is not waited for.
    """
    reshard(teacher)
    targets = [local_shard(parameter) for parameter in teacher.parameters()]
    sources = [local_shard(parameter) for parameter in student.parameters()]
    weight = torch.as_tensor(weight, device=targets[0].device)
    torch._foreach_lerp_(targets, sources, [weight] * len(targets))


@torch.no_grad()
def refresh(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write each weight into its copy, rounded to the copy's dtype."""
    if copies:
        weights, targets = ([local_shard(tensor) for tensor in side] for side in zip(*copies, strict=True))
        torch._foreach_copy_(targets, weights)


def local_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def module_norms(student: nn.ModuleDict) -> dict[str, Tensor]:
    """L2 norm of each module's gradient, 0-d; all ranks must call. Gradients that are None count nothing."""
    norms = {}
    for name, module in student.items():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else _zero(module)
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


def _zero(module: nn.Module) -> Tensor:
    return torch.zeros((), device=next(module.parameters()).device)

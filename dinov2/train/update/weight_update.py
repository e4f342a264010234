"""The weight update: clipping, AdamW, the teacher's moving average and low-precision weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.fsdp import reshard


@dataclass(eq=False)
class WeightUpdate:
    """One update of student and teacher from the student's gradients, by PyTorch's own functions.

        g <- g min(1, max_norm / (|g| + 1e-6))      |g| over each module of the student
        s <- AdamW(s, g)
        t <- m t + (1 - m) s
        low <- weight                               rounded to the dtype of the low-precision weight

    Nothing waits for the device, except under an enabled loss scaler: that alone decides whether AdamW steps, by the
    gradients it unscales.
    """

    optimizer: torch.optim.AdamW  # fused, over the modules
    modules: Mapping[str, nn.Module]  # what is trained by name, plain or sharded; norms are clipped per module
    teacher: Mapping[str, nn.Module]  # modules that follow those of the same name
    max_norm: float  # largest gradient norm; 0 clips nothing
    low_precision: Sequence[tuple[Tensor, Tensor]] = ()  # weights of student or teacher, and their 16-bit ones
    scaler: torch.amp.GradScaler | None = None

    def __post_init__(self) -> None:
        if self.scaler is not None and not self.scaler.is_enabled():
            self.scaler = None
        self._norms: dict[str, Tensor] = {}

    @torch.no_grad()
    def grad_norms(self) -> dict[str, Tensor]:
        """L2 norm of each module's gradient before clipping, 0-d; all ranks must call.

        Gradients that are None count nothing. A loss scaler's factor is taken off the gradients first.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self._norms = module_norms(self.modules)
        return dict(self._norms)

    @torch.no_grad()
    def apply(self, momentum: float, all_finite: Tensor) -> None:
        """Update all weights; all ranks must call. Takes the norms itself where `grad_norms` was not called.

        Args:
            momentum: m of the moving average, in [0, 1].
            all_finite: 0-d float on the device, 1, or 0 to leave weights and optimiser state as they are.
        """
        for module, factor in zip(self.modules.values(), self._clip_factors(), strict=True):
            gradients = [local_shard(p.grad) for p in module.parameters() if p.grad is not None]
            if gradients and self.max_norm > 0:
                torch._foreach_mul_(gradients, factor)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = 1 - all_finite  # fused AdamW skips its update where this is 1
            self.optimizer.step()
            del self.optimizer.found_inf
        ema_update(self.modules, self.teacher, (1 - momentum) * all_finite)
        refresh(self.low_precision)

    def _clip_factors(self) -> Tensor:
        """Factor of each module's gradients, float32 (modules,), by norms that are used once."""
        norms = torch.stack([norm.float() for norm in (self._norms or self.grad_norms()).values()])
        self._norms = {}
        if self.max_norm <= 0:
            return torch.ones_like(norms)
        return (self.max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_


@torch.no_grad()
def ema_update(student: Mapping[str, nn.Module], teacher: Mapping[str, nn.Module], weight: Tensor | float) -> None:
    """Move the teacher's parameters towards the student's: ``t <- t + weight (s - t)``; no communication.

    Modules of one name are of the same structure, plain or sharded alike. A 0-d weight is not waited for.
    """
    for module in teacher.values():
        reshard(module)
    targets = [local_shard(p) for module in teacher.values() for p in module.parameters()]
    sources = [local_shard(p) for name in teacher for p in student[name].parameters()]
    weight = torch.as_tensor(weight, device=targets[0].device)
    torch._foreach_lerp_(targets, sources, [weight] * len(targets))


@torch.no_grad()
def refresh(low_precision: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write each weight into its low-precision weight, rounded to that one's dtype."""
    if low_precision:
        weights, targets = ([local_shard(t) for t in side] for side in zip(*low_precision, strict=True))
        torch._foreach_copy_(targets, weights)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def module_norms(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """L2 norm of each module's gradient, 0-d; all ranks must call. Gradients that are None count nothing."""
    norms = {}
    for name, module in modules.items():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        nothing = torch.zeros((), device=next(module.parameters()).device)
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else nothing
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms

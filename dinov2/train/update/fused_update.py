"""The weight update in one pass over memory, by a Triton kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.fsdp import reshard
from dinov2.train.update.optim import state_of
from dinov2.train.update.weight_update import WeightUpdate, local_shard, refresh

BLOCK, WARPS = 512, 4  # of the kernel
_COPY_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Weight:
    """A student's parameter with all that is updated beside it."""

    student: nn.Parameter
    teacher: nn.Parameter
    module: int
    group: int | None  # of the optimiser; None: AdamW does not know the parameter
    student_copy: Tensor | None
    teacher_copy: Tensor | None

    @property
    def is_trained(self) -> bool:
        return self.group is not None and self.student.grad is not None


class FusedWeightUpdate(WeightUpdate):
    """`WeightUpdate` reading and writing every tensor once: 36 bytes per weight, and 2 per copy.

    The optimiser's groups and state tensors are used as they are, so that checkpoints do not differ. Gradients are
    not scaled in place. A gradient that is no contiguous float32 is converted first, at the cost of a pass.

    Args:
        optimizer, student, teacher, max_norm, copies, scaler: as of `WeightUpdate`.

    Raises:
        ValueError: it cannot be used here; see `why_not_fused`.
    """

    chunk = 64 * 1024  # elements per program of the kernel

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        student: nn.ModuleDict,
        teacher: nn.ModuleDict,
        max_norm: float,
        copies: Sequence[tuple[Tensor, Tensor]] = (),
        scaler: torch.amp.GradScaler | None = None,
    ):
        super().__init__(optimizer, student, teacher, max_norm, copies, scaler)
        reason = why_not_fused(optimizer, student, teacher, scaler)
        if reason:
            raise ValueError(reason)
        from dinov2.train.update import kernel as update_kernel

        self._kernel = update_kernel
        self._weights, self._other_copies = _match(optimizer, student, teacher, self.copies)
        self._written = [*student.parameters(), *teacher.parameters(), *(copy for _, copy in self.copies)]
        self._sizes: list[int] = []
        self._chunks = torch.empty(0)

    @torch.no_grad()
    def apply(self, momentum: float, healthy: Tensor) -> None:
        """As of `WeightUpdate`."""
        reshard(self.teacher)
        trained = [weight for weight in self._weights if weight.is_trained]
        # Converted ones must live until the launch.
        gradients = {weight.student: _plain(weight.student.grad) for weight in trained}
        rows = [self._row(weight, gradients.get(weight.student)) for weight in self._weights]
        of_group = {None: [0.0] * 5} | dict(enumerate(map(_rates, self.optimizer.param_groups)))
        rates = [of_group[weight.group] for weight in self._weights]
        clip = self._clip_factors()
        chunks = self._chunks_of([row[self._kernel.SIZE.value] for row in rows], healthy.device)
        if len(chunks):
            self._kernel.weight_update_kernel[(len(chunks),)](
                _on_device(rows, torch.int64, healthy.device),
                _on_device(rates, torch.float64, healthy.device),
                chunks,
                clip,
                healthy.float(),
                float(1 - momentum),
                CHUNK=self.chunk,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        if trained:
            steps = [self.optimizer.state[weight.student]["step"] for weight in trained]
            torch._foreach_add_(steps, healthy.float(), alpha=1)  # without alpha the host reads the tensor
        torch.autograd.graph.increment_version(self._written)  # the kernel wrote behind autograd's back
        refresh(self._other_copies)

    def _row(self, weight: _Weight, gradient: Tensor | None) -> list[int]:
        """A row of the kernel's table; see its columns."""
        kernel, size = self._kernel, local_shard(weight.student).numel()
        places = [weight.student, weight.teacher, weight.student_copy, weight.teacher_copy, gradient]
        if gradient is None:
            places += [None] * 3
        else:
            state = state_of(self.optimizer, weight.student)
            places += [state["exp_avg"], state["exp_avg_sq"], state["step"]]
        addresses = [0 if place is None else local_shard(place).data_ptr() for place in places]
        is_aligned = size % 4 == 0 and not any(address % 16 for address in addresses[:-1])
        flags = (
            kernel.TRAINED.value * (gradient is not None)
            + kernel.ALIGNED.value * is_aligned
            + kernel.STUDENT_COPY_FP16.value * _is_fp16(weight.student_copy)
            + kernel.TEACHER_COPY_FP16.value * _is_fp16(weight.teacher_copy)
        )
        return [*addresses, size, weight.module, flags]

    def _chunks_of(self, sizes: list[int], device: torch.device) -> Tensor:
        """The kernel's table of chunks, made anew only when sizes change."""
        if sizes != self._sizes:
            chunks = [(row, at) for row, size in enumerate(sizes) for at in range(0, size, self.chunk)]
            self._sizes, self._chunks = sizes, _on_device(chunks, torch.int64, device)
        return self._chunks


def why_not_fused(
    optimizer: torch.optim.AdamW,
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    scaler: torch.amp.GradScaler | None = None,
) -> str | None:
    """One sentence on why `FusedWeightUpdate` cannot be used with these; None where it can."""
    try:
        from dinov2.train.update.kernel import IS_INTERPRETED
    except ImportError:
        return "The fused update needs Triton, which is not installed."
    if scaler is not None and scaler.is_enabled():
        return "The fused update does not work with a loss scaler (fp16); use bf16."
    if any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups):
        return "The fused update knows neither amsgrad nor maximize of AdamW."
    for network in (student, teacher):
        for name, parameter in network.named_parameters():
            if parameter.device.type != "cuda" and not IS_INTERPRETED:
                return f"The fused update needs a CUDA device, and {name} is on {parameter.device}."
            if parameter.dtype != torch.float32:
                return f"The fused update needs float32 weights, and {name} is {parameter.dtype}."
            if not local_shard(parameter).is_contiguous():
                return f"The fused update needs contiguous weights, and {name} is not."
    return None


def _match(
    optimizer: torch.optim.AdamW,
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    copies: Sequence[tuple[Tensor, Tensor]],
) -> tuple[list[_Weight], list[tuple[Tensor, Tensor]]]:
    """The weights, and the copies that the kernel does not write."""
    reshard(teacher)
    groups = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    fused = {weight: copy for weight, copy in copies if _kernel_writes(weight, copy)}
    weights = [
        _Weight(ours, theirs, index, groups.get(ours), fused.get(ours), fused.get(theirs))
        for index, name in enumerate(student)
        for ours, theirs in zip(student[name].parameters(), teacher[name].parameters(), strict=True)
    ]
    written = {id(copy) for weight in weights for copy in (weight.student_copy, weight.teacher_copy)}
    return weights, [pair for pair in copies if id(pair[1]) not in written]


def _kernel_writes(weight: Tensor, copy: Tensor) -> bool:
    is_plain = not isinstance(weight, DTensor) and not isinstance(copy, DTensor)
    return is_plain and copy.dtype in _COPY_DTYPES and copy.is_contiguous() and copy.device == weight.device


def _plain(gradient: Tensor) -> Tensor:
    return local_shard(gradient).to(torch.float32).contiguous()


def _is_fp16(copy: Tensor | None) -> bool:
    return copy is not None and copy.dtype == torch.float16


def _rates(group: dict[str, Any]) -> list[float]:
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in group["betas"])
    return [group["lr"], group["weight_decay"], *logs, group["eps"]]


def _on_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table sent without waiting; pinned memory is not reused before the copy has read it."""
    return torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)

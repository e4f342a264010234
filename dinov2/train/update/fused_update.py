"""The weight update in one pass over memory, by a Triton kernel."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.fsdp import reshard
from dinov2.train.update.optim import state_of
from dinov2.train.update.weight_update import WeightUpdate, local_shard, refresh

BLOCK, WARPS = 512, 4  # of the kernel


class _Weight(NamedTuple):
    """A trained parameter with all that is updated beside it."""

    student: nn.Parameter
    teacher: nn.Parameter | None
    module: int
    group: int | None  # of the optimiser; None: AdamW does not know the parameter
    student_low: Tensor | None
    teacher_low: Tensor | None


class FusedWeightUpdate(WeightUpdate):
    """`WeightUpdate` reading and writing every tensor once: 36 bytes per weight, and 2 per low-precision weight.

    Where a foreach update launches a kernel per operation and goes over memory as often, one kernel takes a table with
    the addresses of all tensors and a table of chunks, one program per chunk of one tensor. Two of its inputs stay on
    the device, the clip factors and the flag of the guard: the launch waits for neither.

    The optimiser's groups and state tensors are used as they are, so that checkpoints do not differ. Gradients are
    not scaled in place. A gradient that is no contiguous float32 is converted first, at the cost of a pass.

    Takes the arguments of `WeightUpdate`; raises ValueError if it cannot be used here, see `why_not_fused`.
    """

    chunk = 64 * 1024  # elements per program of the kernel

    def __post_init__(self) -> None:
        super().__post_init__()
        if reason := why_not_fused(self.optimizer, self.modules, self.teacher, self.scaler):
            raise ValueError(reason)
        from dinov2.train.update import kernel

        self._kernel = kernel
        for module in self.teacher.values():
            reshard(module)
        networks = (*self.modules.values(), *self.teacher.values())
        self._written = [p for module in networks for p in module.parameters()]
        self._written += [low for _, low in self.low_precision]
        # The kernel writes one low-precision weight of each weight; `refresh` writes the others.
        fused = {weight: low for weight, low in self.low_precision if _kernel_writes(weight, low)}
        self._others = [(weight, low) for weight, low in self.low_precision if fused.get(weight) is not low]
        groups = {p: index for index, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        self._weights = []
        for index, (name, module) in enumerate(self.modules.items()):
            trained = list(module.parameters())
            averages = list(self.teacher[name].parameters()) if name in self.teacher else [None] * len(trained)
            self._weights += [
                _Weight(parameter, average, index, groups.get(parameter), fused.get(parameter), fused.get(average))
                for parameter, average in zip(trained, averages, strict=True)
            ]
        self._sizes: list[int] = []
        self._chunks = torch.empty(0)

    @torch.no_grad()
    def apply(self, momentum: float, all_finite: Tensor) -> None:
        """As of `WeightUpdate`."""
        for module in self.teacher.values():
            reshard(module)
        device = all_finite.device
        trained = [w.student for w in self._weights if w.group is not None and w.student.grad is not None]
        # The table holds bare addresses: a gradient that was converted must live until the launch.
        gradients = {p: local_shard(p.grad).to(torch.float32).contiguous() for p in trained}
        rows = [self._row(weight, gradients.get(weight.student)) for weight in self._weights]
        rates: dict[int | None, list[float]] = {None: [0.0] * 5}
        for index, group in enumerate(self.optimizer.param_groups):
            logs = (math.log(beta) if beta > 0 else -math.inf for beta in group["betas"])
            rates[index] = [group["lr"], group["weight_decay"], *logs, group["eps"]]
        clip = self._clip_factors()
        sizes = [row[self._kernel.SIZE.value] for row in rows]
        if sizes != self._sizes:
            chunks = [(row, at) for row, size in enumerate(sizes) for at in range(0, size, self.chunk)]
            self._sizes, self._chunks = sizes, _on_device(chunks, torch.int64, device)
        if len(self._chunks):
            self._kernel.weight_update_kernel[(len(self._chunks),)](
                _on_device(rows, torch.int64, device),
                _on_device([rates[weight.group] for weight in self._weights], torch.float64, device),
                self._chunks,
                clip,
                all_finite.float(),
                float(1 - momentum),
                CHUNK=self.chunk,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        if trained:
            steps = [self.optimizer.state[parameter]["step"] for parameter in trained]
            torch._foreach_add_(steps, all_finite.float(), alpha=1)  # without alpha the host reads the tensor
        torch.autograd.graph.increment_version(self._written)  # the kernel wrote behind autograd's back
        refresh(self._others)

    def _row(self, weight: _Weight, gradient: Tensor | None) -> list[int]:
        """A row of the kernel's table; see its columns."""
        kernel, size = self._kernel, local_shard(weight.student).numel()
        state = {} if gradient is None else state_of(self.optimizer, weight.student)
        tensors = [weight.student, weight.teacher, weight.student_low, weight.teacher_low, gradient]
        tensors += [state.get(name) for name in ("exp_avg", "exp_avg_sq", "step")]
        addresses = [0 if tensor is None else local_shard(tensor).data_ptr() for tensor in tensors]
        is_aligned = size % 4 == 0 and not any(address % 16 for address in addresses[:-1])
        flags = kernel.TRAINED.value * (gradient is not None) + kernel.ALIGNED.value * is_aligned
        lows = (weight.student_low, kernel.STUDENT_LOW_FP16), (weight.teacher_low, kernel.TEACHER_LOW_FP16)
        flags += sum(flag.value for low, flag in lows if low is not None and low.dtype == torch.float16)
        return [*addresses, size, weight.module, flags]


def why_not_fused(
    optimizer: torch.optim.AdamW,
    modules: Mapping[str, nn.Module],
    teacher: Mapping[str, nn.Module],
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
    for module_name, module in (*modules.items(), *teacher.items()):
        for own_name, parameter in module.named_parameters():
            name = f"{module_name}.{own_name}"
            if parameter.device.type != "cuda" and not IS_INTERPRETED:
                return f"The fused update needs a CUDA device, and {name} is on {parameter.device}."
            if parameter.dtype != torch.float32:
                return f"The fused update needs float32 weights, and {name} is {parameter.dtype}."
            if not local_shard(parameter).is_contiguous():
                return f"The fused update needs contiguous weights, and {name} is not."
    return None


def _kernel_writes(weight: Tensor, low: Tensor) -> bool:
    if isinstance(weight, DTensor) or isinstance(low, DTensor):
        return False
    is_half = low.dtype in (torch.bfloat16, torch.float16)
    return is_half and low.is_contiguous() and low.device == weight.device


def _on_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table sent without waiting; pinned memory is not reused before the copy has read it."""
    return torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)

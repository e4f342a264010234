"""Fast kernels against their plain paths, on small tensors on the device that is to train with them."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.configs import Config
from dinov2.distributed import single_process
from dinov2.layers.attention_backends import Attend, attention_backend
from dinov2.layers.block import Block
from dinov2.layers.fp8 import fp8_problem
from dinov2.layers.linear import Linear, use_fp8
from dinov2.layers.stochastic_depth import draw_orders
from dinov2.loss import EAGER, compiled_kernels, sinkhorn_assignments_of, soft_cross_entropy
from dinov2.train.update.fused_update import FusedWeightUpdate
from dinov2.train.update.weight_update import WeightUpdate
from dinov2.utils.dtypes import DTYPES

_HEAD_WIDTH = 64
_SHOWN = 300  # characters of an error

Results = list[tuple[Tensor, Tensor]]
"""Pairs of a fast path's result and the plain path's."""


@dataclass(frozen=True)
class Check:
    """One switch and the comparison that it has to pass."""

    key: str  # of the configuration
    compare: Callable[[Config, torch.device], Results]  # computes both paths; raises where the fast one cannot run
    tolerance: float  # largest |fast - plain| / |plain| (L2 norms) of any result
    remedy: str  # what to set instead, as the end of a sentence

    def problem(self, config: Config, device: torch.device) -> str | None:
        """Reason against the fast path, as the end of a sentence; None where it may be."""
        try:
            # The run's random numbers stay as they are.
            gpus = [device] if torch.cuda.is_available() and device.type == "cuda" else []
            with single_process(), torch.random.fork_rng(gpus):
                torch.manual_seed(0)
                results = [[t.detach().double() for t in pair] for pair in self.compare(config, device)]
        except Exception as error:  # a kernel fails with whatever its compiler, loader or launch raises
            return f"it fails ({' '.join(str(error).split())[:_SHOWN].rstrip('.') or type(error).__name__})"
        for fast, plain in results:
            difference = float((fast - plain).norm() / plain.norm().clamp_min(1e-30))
            if not difference <= self.tolerance:  # also where it is no number
                return f"it differs from the plain path by {difference:.2g} of the norm, more than {self.tolerance:g}"
        return None


def compare_compiled(config: Config, device: torch.device, compiler: Callable[..., Any] = torch.compile) -> Results:
    """A block under stochastic depth and the passes of the losses, forward and backward."""
    backend = config.debug.compile_backend
    dtype = _dtype(config)
    block = Block(2 * _HEAD_WIDTH, 2, init_values=1.0, drop_path=0.4).to(device)
    segments = ((4, 17), (6, 5))
    orders = draw_orders(segments, 2, device)
    x = torch.randn(sum(images * tokens for images, tokens in segments), 2 * _HEAD_WIDTH, device=device)
    logits = torch.randn(2, 24, 512, device=device)

    def run(forward: Callable[..., Tensor], kernels: Any) -> list[Tensor]:
        rows, student = x.clone().requires_grad_(), logits[0].clone().requires_grad_()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = forward(rows, segments, orders)
        (targets,) = sinkhorn_assignments_of([logits[1]], 0.07, 3, [None], kernels)
        loss = soft_cross_entropy(student, targets.probs(), 0.1, kernels=kernels)
        (out.float().square().mean() + loss.mean()).backward()
        gradients = [p.grad for p in block.parameters()]
        block.zero_grad(set_to_none=True)
        return [out, rows.grad, loss, student.grad, *gradients]

    try:
        forward = compiler(block.forward, backend=backend, fullgraph=True, dynamic=False)
        fast = run(forward, compiled_kernels(backend))
    finally:
        torch.compiler.reset()  # these graphs are of no further use
    return list(zip(fast, run(block.forward, EAGER), strict=True))


def compare_updates(_: Config, device: torch.device, update: type[WeightUpdate] = FusedWeightUpdate) -> Results:
    """Two updates of weights, moments, teacher and low-precision weights."""
    student = nn.ModuleDict({"backbone": nn.Linear(67, 33), "dino_head": nn.Linear(33, 65)}).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    gradients = [[torch.randn_like(p) for p in student.parameters()] for _ in range(2)]

    def run(update: type[WeightUpdate]) -> list[Tensor]:
        ours, theirs = copy.deepcopy(student), copy.deepcopy(teacher)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2, weight_decay=0.04, fused=True)
        copies = [(p, p.detach().bfloat16()) for p in (*ours.parameters(), *theirs.parameters())]
        weights = update(optimizer, ours, theirs, 3.0, copies)
        for step in gradients:
            for parameter, gradient in zip(ours.parameters(), step, strict=True):
                parameter.grad = gradient.clone()
            weights.apply(0.9, torch.ones((), device=device))
        moments = [state["exp_avg_sq"] for state in optimizer.state.values()]
        return [*ours.parameters(), *theirs.parameters(), *(low for _, low in copies), *moments]

    return list(zip(run(update), run(WeightUpdate), strict=True))


def compare_attention(config: Config, device: torch.device, attend: Attend | None = None) -> Results:
    """Attended values and gradients in the backbone's dtype, against float32."""
    attend = attend or attention_backend(config.student.attention_backend)
    qkv, grad = torch.randn(4, 2, 37, 2, _HEAD_WIDTH, device=device).split([3, 1])

    def run(attend: Attend, dtype: torch.dtype) -> list[Tensor]:
        leaves = [part.to(dtype).requires_grad_() for part in qkv]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad[0].to(dtype))]

    return list(zip(run(attend, _dtype(config)), run(attention_backend("math"), torch.float32), strict=True))


def compare_fp8(config: Config, device: torch.device) -> Results:
    """A linear map with its gradients, against float32."""
    scaling = config.performance.fp8_scaling
    if problem := fp8_problem(device, scaling == "row"):
        raise ValueError(problem)
    plain = Linear(256, 128).to(device)
    fast = copy.deepcopy(plain)
    use_fp8(fast, scaling, backward=config.performance.fp8 == "all")
    x, grad = torch.randn(64, 256, device=device), torch.randn(64, 128, device=device)

    def run(layer: Linear) -> list[Tensor]:
        rows = x.clone().requires_grad_()
        out = layer(rows)
        out.backward(grad.to(out.dtype))
        return [out, rows.grad, layer.weight.grad, layer.bias.grad]

    return list(zip(run(fast), run(plain), strict=True))


CHECKS: Mapping[str, Check] = {
    "compile": Check("performance.compile", compare_compiled, 0.05, "auto or false runs without"),
    "fused_update": Check("performance.fused_update", compare_updates, 1e-3, "auto or false runs without"),
    "attention": Check("student.attention_backend", compare_attention, 0.03, "sdpa lets PyTorch choose"),
    "fp8": Check("performance.fp8", compare_fp8, 0.1, "none computes in 16 bit"),
}
"""Tolerances: rounding in bf16 (2^-9 of each number) through a block, to the low-precision weights and through one
attention, and in e4m3 (2^-4)."""


def _dtype(config: Config) -> torch.dtype:
    return DTYPES[config.compute_precision.student.backbone.mixed_precision.param_dtype]

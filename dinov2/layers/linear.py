"""The linear map of the transformer blocks."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.fp8 import COMPUTE_DTYPE, WIDTH_MULTIPLE, fp8_input_gradient, fp8_matmul

_SCALINGS = ("tensor", "row")


class Fp8(NamedTuple):
    """FP8 options of a layer."""

    per_row: bool  # a scale per row, or one per tensor
    backward: bool  # the input gradient too


class Linear(nn.Linear):
    """x W^T + b for x (..., I), computed in one of three ways.

    By default as `nn.Linear` does, under whatever autocast is active. After `keep_low_precision_weights`, with a 16-bit
    copy of the weight: the result has its dtype and is bit for bit that of autocast to this dtype, without
    the cast of the weight. After `use_fp8`, in FP8 with a bfloat16 result. The last two take any floating x, ignore
    autocast, and give parameters gradients in the parameters' own dtype.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.fp8: Fp8 | None = None
        self.register_buffer("low_precision_weight", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map each row."""
        if self.fp8 is None and self.low_precision_weight is None:
            return F.linear(x, self.weight, self.added())
        dtype = self.low_precision_weight.dtype if self.fp8 is None else COMPUTE_DTYPE
        rows = x.to(dtype).reshape(-1, self.in_features)
        out = _Matmul.apply(rows, self.weight, self.low_precision_weight, self.added(), self.fp8)
        return out.reshape(*x.shape[:-1], self.out_features)

    def added(self) -> Tensor | None:
        """Return the bias that is added."""
        return self.bias


class KeyMaskedLinear(Linear):
    """Joint projection of queries, keys and values whose bias leaves the keys out (DINOv3).

    Without rotary positions a bias of all keys adds the same to every score of a query, which softmax takes away again.
    The mask, 1 and over the middle third 0, is a buffer of the state dict: NaN until `reset_mask`, or a state dict,
    sets it.
    """

    bias_mask: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("bias_mask", torch.full((out_features,), torch.nan))

    def reset_mask(self) -> None:
        """Mask the keys' third."""
        of_keys = torch.arange(self.out_features, device=self.bias_mask.device) * 3 // self.out_features == 1
        self.bias_mask.copy_(~of_keys)

    def added(self) -> Tensor | None:
        """Return the bias of queries and values, zero for keys."""
        return self.bias * self.bias_mask.to(self.bias.dtype)


def keep_low_precision_weights(module: nn.Module, dtype: torch.dtype) -> list[tuple[nn.Parameter, Tensor]]:
    """Let every `Linear` below a module multiply with a second weight in ``dtype``, the first one rounded.

    It is a buffer outside the state dict. Whoever changes a weight must round it again: pairs of a weight and its
    low-precision weight are returned. Call on the final device, on whole (not sharded) weights.
    """
    pairs = []
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.low_precision_weight = layer.weight.detach().to(dtype, copy=True)
            pairs.append((layer.weight, layer.low_precision_weight))
    return pairs


def use_fp8(module: nn.Module, scaling: Literal["tensor", "row"], backward: bool) -> None:
    """Let every `Linear` below a module multiply in FP8 (e4m3); see `fp8_problem` for where this works.

    The weight's gradient stays a bfloat16 matmul: its sum runs over the rows, whose number need not divide by 16.

    Args:
        scaling: "tensor" for one scale per operand, "row" for one per row of x and per output channel.
        backward: the input gradient in FP8 as well, otherwise in bfloat16.

    Raises:
        ValueError: if the scaling is unknown, or a layer's widths do not divide by 16; no layer has been changed.
    """
    if scaling not in _SCALINGS:
        raise ValueError(f"FP8 scaling {scaling!r} is unknown; use {' or '.join(map(repr, _SCALINGS))}.")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear)}
    for name, layer in layers.items():
        if layer.in_features % WIDTH_MULTIPLE or layer.out_features % WIDTH_MULTIPLE:
            raise ValueError(
                f"{name or 'The layer'} maps {layer.in_features} to {layer.out_features} features, while FP8 needs "
                f"multiples of {WIDTH_MULTIPLE}; set another student.ffn_layer, or performance.fp8 = none."
            )
    fp8 = Fp8(scaling == "row", backward)
    for layer in layers.values():
        layer.fp8 = fp8


def draw_weights(network: nn.Module) -> None:
    """Draw truncated normal weights of deviation 0.02 and zero biases for linear maps; other layers reset theirs."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, KeyMaskedLinear):
                module.reset_mask()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


class _Matmul(torch.autograd.Function):
    """x W^T + b with W the weight or its low-precision weight; only x (M, I) and W are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, low: Tensor | None, bias: Tensor | None, fp8: Fp8 | None
    ) -> Tensor:
        operand = weight if low is None else low
        ctx.save_for_backward(x, operand)
        ctx.fp8, ctx.weight_dtype = fp8, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(x.dtype)
            if fp8 is None:
                return F.linear(x, operand, bias)
            return fp8_matmul(x, operand, fp8.per_row, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, operand = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if ctx.fp8 is not None and ctx.fp8.backward:
                    grad_x = fp8_input_gradient(grad, operand, ctx.fp8.per_row)
                else:
                    grad_x = grad @ operand.to(grad.dtype)
            if ctx.needs_input_grad[1]:
                # From its float32 accumulator where the device can write that out.
                options = {"out_dtype": torch.float32} if grad.is_cuda and ctx.weight_dtype == torch.float32 else {}
                grad_weight = torch.mm(grad.t(), x, **options).to(ctx.weight_dtype)
            if ctx.needs_input_grad[3]:
                grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, None, grad_bias, None

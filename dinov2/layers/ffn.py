"""The feed-forward layers of a transformer block; each maps (..., D) of any dtype to (..., D)."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.linear import Linear


class Mlp(nn.Module):
    """fc2(act(fc1(x))), ``hidden_features`` wide between the two maps."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module] = nn.GELU, bias: bool = True
    ):
        super().__init__()
        self.fc1 = Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each row."""
        return self.fc2(self.act(self.fc1(x.to(self.fc1.weight.dtype))))


class SwiGLUFFN(nn.Module):
    """w3(silu(a) * b) with (a, b) the halves of w12(x), each ``hidden_features`` wide (arXiv:2002.05202, eq. 6).

    The gate is always SiLU: ``act_layer`` is there so that all layers are built alike.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module] | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.w12 = Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each row."""
        gate, value = self.w12(x.to(self.w12.weight.dtype)).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SwiGLUFFNFused(SwiGLUFFN):
    """`SwiGLUFFN` of `gated_width`: two thirds as wide as asked for, rounded up to a multiple of 8.

    Its three matrices then hold about as many weights as the two of an `Mlp`; the giant model's is 4096 wide.
    """

    def __init__(self, in_features: int, hidden_features: int, *args: Any, **kwargs: Any):
        super().__init__(in_features, gated_width(hidden_features), *args, **kwargs)


class SwiGLUFFNSplit(nn.Module):
    """w3(silu(w1(x)) * w2(x)), as DINOv3 holds it; `gated_width` wide, rounded up to a multiple of ``align_to``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module] | None = None,
        bias: bool = True,
        align_to: int = 8,
    ):
        super().__init__()
        width = gated_width(hidden_features, align_to)
        self.w1 = Linear(in_features, width, bias=bias)
        self.w2 = Linear(in_features, width, bias=bias)
        self.w3 = Linear(width, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each row."""
        x = x.to(self.w1.weight.dtype)
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


def gated_width(hidden: int, align_to: int = 8) -> int:
    """Width of either half of a SwiGLU layer in place of an MLP with ``hidden`` features: two thirds, rounded up."""
    return -(-int(hidden * 2 / 3) // align_to) * align_to

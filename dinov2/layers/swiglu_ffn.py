"""Gated feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLUFFN(nn.Module):
    """w3(silu(a) * b) with (a, b) the halves of w12(x) (Shazeer, arXiv:2002.05202).

    Args:
        in_features: D, also the output width.
        hidden_features: width of each half.
        act_layer: ignored; the gate is always SiLU.
        bias: of both maps.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[..., nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SwiGLUFFNFused(SwiGLUFFN):
    """`SwiGLUFFN` with two thirds of the hidden width asked for, rounded up to a multiple of 8.

    The three maps then hold about as many weights as the two of an MLP; 4096 for the giant model.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[..., nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, (int(hidden_features * 2 / 3) + 7) // 8 * 8, act_layer, bias)

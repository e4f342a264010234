"""A learned gain for every channel of a residual branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2.layers.precision import at_least_float32


class LayerScale(nn.Module):
    """y = gamma * x, with gamma small at first (arXiv:2103.17239, section 2).

    Args:
        dim: D.
        init_values: initial gain.
    """

    def __init__(self, dim: int, init_values: float = 1e-5):
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every gain its initial value."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """Scale (..., D), in float32 or better."""
        return at_least_float32(x) * at_least_float32(self.gamma)

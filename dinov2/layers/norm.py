"""Layer norm and layer scale, and the precision of everything in a network that is not a matmul."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(t: Tensor) -> Tensor:
    """Return ``t`` in float32, or unchanged where it is float32 or float64 already."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class LayerNorm(nn.LayerNorm):
    """Layer norm (arXiv:1607.06450) of (..., D), computed in the input's dtype whatever that of the parameters.

    Under FSDP mixed precision they are gathered in 16 bit while the residual stream stays float32.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467) of (..., D) with gains, computed as `LayerNorm` is."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def reset_parameters(self) -> None:
        """Give every gain 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension: ``weight x / sqrt(mean_d x_d^2 + eps)``."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerScale(nn.Module):
    """y = gamma * x of (..., D), with gamma small at first (arXiv:2103.17239, section 2)."""

    def __init__(self, dim: int, init_values: float = 1e-5):
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every gain its initial value."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last dimension, in float32 or better."""
        return at_least_float32(x) * at_least_float32(self.gamma)

"""Layer norm of a residual stream that is more precise than the parameters."""

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm (arXiv:1607.06450) computed in the input's dtype, whatever dtype the parameters arrive in.

    Under FSDP mixed precision they are gathered in 16 bit while the residual stream stays float32.

    Args:
        dim: D.
        eps: added to the variance; DINOv2's value by default.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of (..., D)."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

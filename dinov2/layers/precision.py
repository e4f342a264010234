"""The precision of everything in a network that is not a matmul."""

import torch
from torch import Tensor


def at_least_float32(t: Tensor) -> Tensor:
    """Return ``t`` in float32, or unchanged where it is float32 or float64 already."""
    return t.to(torch.promote_types(t.dtype, torch.float32))

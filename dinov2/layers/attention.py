"""Multi-head self-attention over packed rows of several crop sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tensor dimensions below: T rows of all segments, B samples, N tokens, H heads, D width.
Segments = Sequence[tuple[int, int]]
"""(B, N) of each run of rows in a packed (T, D) matrix; T is the sum of B * N."""

BACKENDS = ("sdpa", "xformers")


class Attention(nn.Module):
    """Softmax attention within each sample (Vaswani et al., arXiv:1706.03762): softmax(Q K^T / sqrt(D/H)) V.

    Projections run on all rows at once; the attention itself is dense and static per segment.

    Args:
        dim: D.
        num_heads: H, a divisor of D.
        qkv_bias: bias of the joint query, key and value projection.
        proj_bias: bias of the output projection.
        backend: "sdpa" (PyTorch) or "xformers" (CUDA only).

    Raises:
        ValueError: unknown backend, or heads that do not divide the width.
        ImportError: xformers was chosen and cannot be used.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_bias: bool = True, backend: str = "sdpa"
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, which does not divide the width {dim}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self._attend = attention_function(backend)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """Attend within the samples of packed rows: (T, D) to (T, D)."""
        qkv = self.qkv(x)
        outputs = []
        for rows, (batch, tokens) in zip(qkv.split([b * n for b, n in segments]), segments, strict=True):
            q, k, v = rows.view(batch, tokens, 3, self.num_heads, -1).unbind(2)
            outputs.append(self._attend(q, k, v).reshape(batch * tokens, -1))
        return self.proj(torch.cat(outputs))


def attention_function(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function of q, k, v (B, N, H, D/H) that computes the attention output of the same shape."""
    if backend == "sdpa":
        return _sdpa
    if backend == "xformers":
        try:
            from xformers.ops import memory_efficient_attention
        except Exception as error:  # its compiled part raises whatever the loader raises
            raise ImportError(
                f"attention backend 'xformers' cannot be imported beside torch {torch.__version__} ({error}); install "
                "the xformers build for this torch or use 'sdpa'."
            ) from error
        return memory_efficient_attention
    raise ValueError(f"attention backend is {backend!r}; {' or '.join(map(repr, BACKENDS))} is expected.")


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

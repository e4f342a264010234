"""Multi-head self-attention over packed rows."""

from collections.abc import Sequence

from torch import Tensor, nn

from dinov2.layers.attention_backends import attention_backend
from dinov2.layers.linear import KeyMaskedLinear, Linear
from dinov2.layers.packing import Segments, pack, unpack
from dinov2.layers.rope import rotate

# Tensor dimensions below: B images, N tokens, H heads, D width, T packed rows.


class Attention(nn.Module):
    """Softmax attention among the tokens of each image: softmax(Q K^T / sqrt(D / H)) V (arXiv:1706.03762, eq. 1).

    The projections run on all packed rows at once; the attention itself is dense per segment, so that every
    call has a static shape.

    Args:
        dim, num_heads: D and H; ValueError if H does not divide D.
        qkv_bias, proj_bias: of the joint query, key and value projection, and of the output projection.
        backend: see `attention_backend`, which also says what it raises.
        mask_k_bias: see `KeyMaskedLinear`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        backend: str = "sdpa",
        mask_k_bias: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads = {num_heads} does not divide the width {dim}; choose a divisor of it.")
        self.num_heads = num_heads
        self.qkv = (KeyMaskedLinear if mask_k_bias and qkv_bias else Linear)(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim, bias=proj_bias)
        self._attend = attention_backend(backend)

    def forward(self, x: Tensor, segments: Segments, rotations: Sequence[Tensor] | None = None) -> Tensor:
        """Map packed rows (T, D) of any dtype to (T, D) in the dtype that the projections compute in.

        ``rotations``, of queries and keys, are one per segment, see `rotate`.
        """
        return self.proj(self.mix(x, segments, rotations))

    def mix(self, x: Tensor, segments: Segments, rotations: Sequence[Tensor] | None = None) -> Tensor:
        """Input of the output projection, (T, D): the only part in which rows see each other."""
        qkv = self.qkv(x.to(self.qkv.weight.dtype))
        mixed = []
        for part, rotation in zip(unpack(qkv, segments), rotations or [None] * len(segments), strict=True):
            q, k, v = part.unflatten(2, (3, self.num_heads, -1)).unbind(2)
            if rotation is not None:
                q, k = rotate(q, rotation), rotate(k, rotation)
            mixed.append(self._attend(q, k, v).flatten(2))
        return pack(mixed)

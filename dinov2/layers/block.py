"""The transformer block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dinov2.layers.attention import Attention
from dinov2.layers.ffn import Mlp
from dinov2.layers.layer_norm import LayerNorm
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.packing import Segments
from dinov2.layers.stochastic_depth import add_branch


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), each branch under stochastic depth.

    A pure function of its arguments: it draws no random numbers. The residual stream keeps its dtype; the branches
    multiply in the dtype of their parameters, or in that of autocast, and are added in float32 or better.

    Args:
        dim: D.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward layer over D.
        qkv_bias, proj_bias, ffn_bias: biases of the linear maps.
        drop_path: rate of stochastic depth, in [0, 1).
        init_values: initial LayerScale gain; None or 0 leaves LayerScale out.
        act_layer: activation of the feed-forward layer.
        ffn_layer: class of the feed-forward layer.
        attention_backend: see `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop_path: float = 0.0,
        init_values: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        attention_backend: str = "sdpa",
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, attention_backend)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path_rate = drop_path

    def forward(self, x: Tensor, segments: Segments, orders: Sequence[Tensor] | None = None) -> Tensor:
        """Transform a residual stream.

        Args:
            x: packed rows (T, D), float32 or float64.
            segments: images and tokens of each crop size in ``x``.
            orders: per segment int64 (2, B), a random order of its images for each branch (`draw_orders`); None
                computes every image.
        """
        first, second = ([order[branch] for order in orders] if orders else None for branch in (0, 1))
        x = add_branch(x, self._attention, segments, first, self.drop_path_rate)
        return add_branch(x, self._feed_forward, segments, second, self.drop_path_rate)

    def _attention(self, rows: Tensor, segments: Segments) -> Tensor:
        return self.ls1(self.attn(self.norm1(rows), segments)).to(rows.dtype)

    def _feed_forward(self, rows: Tensor, segments: Segments) -> Tensor:
        return self.ls2(self.mlp(self.norm2(rows))).to(rows.dtype)

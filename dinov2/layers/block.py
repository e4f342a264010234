"""The transformer block."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from dinov2.layers.attention import Attention
from dinov2.layers.ffn import Mlp
from dinov2.layers.norm import LayerNorm, LayerScale
from dinov2.layers.packing import Segments
from dinov2.layers.stochastic_depth import add_branch, kept_rows, take_rows


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), each branch under stochastic depth.

    A pure function of its arguments: it draws no random numbers. The residual stream keeps its dtype; the branches
    multiply in the dtype of their parameters, or in that of autocast, and are added in float32 or better.

    Args:
        mlp_ratio: hidden width of the feed-forward layer over D.
        drop_path: rate of stochastic depth, in [0, 1).
        init_values: initial LayerScale gain; None or 0 leaves LayerScale out.
        act_layer, ffn_layer: activation and class of the feed-forward layer.
        attention_backend, inverse_gather: see `attention_backend` and `add_branch`.
        norm_layer: class of both norms.
        mask_k_bias: see `Attention`.
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
        inverse_gather: bool = True,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        mask_k_bias: bool = False,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, attention_backend, mask_k_bias)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path_rate = drop_path
        self.inverse_gather = inverse_gather

    def forward(
        self,
        x: Tensor,
        segments: Segments,
        orders: Sequence[Tensor] | None = None,
        selected: Tensor | None = None,
        rotations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Transform a residual stream.

        Args:
            x: packed rows (T, D), float32 or float64.
            segments: images and tokens of each crop size in ``x``.
            orders: per segment int64 (2, 2, B), each branch's part of `draw_orders`; None computes every image.
            selected: int64 (S,), the rows to return; None returns all. What is not needed for them is not computed.
            rotations: of queries and keys, one per segment, see `rotate`; None leaves them as they are.
        """
        branches = [[order[branch] for order in orders] if orders else None for branch in (0, 1)]
        if selected is None:
            # Images that are kept have as many tokens as all, and the same positions.
            attention = partial(self._attention, rotations=rotations)
            for branch, kept in zip((attention, self._feed_forward), branches, strict=True):
                x = add_branch(x, branch, segments, kept, self.drop_path_rate, self.inverse_gather)
            return x
        # Every row is a key, but projection and feed-forward see the selected rows alone. How many of them lie in kept
        # images depends on the draw, so all are computed and the others weighted by 0.
        rows = x.index_select(0, selected)
        if orders is None or self.drop_path_rate == 0:
            mixed = self.attn.mix(self.norm1(x), segments, rotations).index_select(0, selected)
            attention_scale = feed_forward_scale = 1.0
        else:
            kept, also_kept = (kept_rows(segments, branch, self.drop_path_rate, x.dtype) for branch in branches)
            mixed = self.attn.mix(self.norm1(take_rows(x, kept.rows, kept.inverse)), kept.segments, rotations)
            number, attention_scale = kept.of(selected)
            mixed = mixed.index_select(0, number)
            _, feed_forward_scale = also_kept.of(selected)
        rows = rows + attention_scale * self.ls1(self.attn.proj(mixed)).to(rows.dtype)
        return rows + feed_forward_scale * self._feed_forward(rows, ())

    def _attention(self, rows: Tensor, segments: Segments, rotations: Sequence[Tensor] | None) -> Tensor:
        return self.ls1(self.attn(self.norm1(rows), segments, rotations)).to(rows.dtype)

    def _feed_forward(self, rows: Tensor, segments: Segments) -> Tensor:
        return self.ls2(self.mlp(self.norm2(rows))).to(rows.dtype)

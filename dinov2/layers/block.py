"""Transformer block whose residual branches run on the samples that stochastic depth keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov2.layers.attention import Attention, Segments
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp

# Tensor dimensions below: T rows of all segments, B samples, N tokens, D width.


class Block(nn.Module):
    """Pre-norm block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).

    In training each branch draws, per segment of B samples, k = max(floor(B (1 - p)), 1) of them without
    replacement and is computed for those alone (DINOv2, arXiv:2304.07193, section 5, "efficient stochastic depth"):

        x[kept] <- x[kept] + (B / k) ls(f(norm(x[kept])))

    The residual keeps the dtype it comes in, whatever autocast or sharding make of the branch.

    Args:
        dim: D.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward part over D.
        qkv_bias, proj_bias, ffn_bias: biases of the linear maps.
        drop_path: p in [0, 1).
        init_values: initial LayerScale gain; None leaves LayerScale out.
        act_layer: activation of the MLP.
        norm_layer: normalisation.
        ffn_layer: feed-forward module class.
        attention_backend: see `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop_path: float = 0.0,
        init_values: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        attention_backend: str = "sdpa",
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, attention_backend)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, bias=ffn_bias)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path_rate = drop_path

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """Transform packed rows (T, D); ``segments`` says which rows belong to which sample."""
        x = self._add(x, segments, lambda rows, kept: self.ls1(self.attn(self.norm1(rows), kept).to(x.dtype)))
        return self._add(x, segments, lambda rows, _: self.ls2(self.mlp(self.norm2(rows)).to(x.dtype)))

    def _add(self, x: Tensor, segments: Segments, branch: Callable[[Tensor, Segments], Tensor]) -> Tensor:
        if not self.training or self.drop_path_rate == 0:
            return x + branch(x, segments)
        rows, scale, kept = keep_rows(segments, self.drop_path_rate, x.device)
        return x.index_add(0, rows, branch(x.index_select(0, rows), kept) * scale.to(x.dtype))


def keep_rows(segments: Segments, drop_rate: float, device: torch.device) -> tuple[Tensor, Tensor, Segments]:
    """Draw the samples that a residual branch is computed for, with torch's generator of the device.

    Returns:
        Packed row numbers (K,) int64, their weights B / k as (K, 1) float32, and the kept segments (k, N).
    """
    rows, scales, kept, offset = [], [], [], 0
    for batch, tokens in segments:
        count = max(int(batch * (1 - drop_rate)), 1)
        samples = torch.rand(batch, device=device).argsort()[:count]
        first = samples[:, None] * tokens + offset
        rows.append((first + torch.arange(tokens, device=device)).flatten())
        scales.append(torch.full((count * tokens, 1), batch / count, device=device))
        kept.append((count, tokens))
        offset += batch * tokens
    return torch.cat(rows), torch.cat(scales), kept

"""Building blocks of the networks; they import torch only."""

from dinov2.layers.attention import Attention
from dinov2.layers.block import Block
from dinov2.layers.dino_head import DINOHead
from dinov2.layers.ffn import Mlp, SwiGLUFFN, SwiGLUFFNFused
from dinov2.layers.norm import LayerNorm, LayerScale
from dinov2.layers.patch_embed import PatchEmbed

__all__ = [
    "Attention", "Block", "DINOHead", "LayerNorm", "LayerScale", "Mlp", "PatchEmbed", "SwiGLUFFN", "SwiGLUFFNFused",
]  # fmt: skip

"""Building blocks of the networks; they import torch only."""

from dinov2.layers.attention import Attention
from dinov2.layers.block import Block
from dinov2.layers.dino_head import DINOHead
from dinov2.layers.ffn import Mlp, SwiGLUFFN, SwiGLUFFNFused, SwiGLUFFNSplit
from dinov2.layers.norm import LayerNorm, LayerScale, RMSNorm
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.rope import RopePositionEmbedding

__all__ = [
    "Attention", "Block", "DINOHead", "LayerNorm", "LayerScale", "Mlp", "PatchEmbed", "RMSNorm",
    "RopePositionEmbedding", "SwiGLUFFN", "SwiGLUFFNFused", "SwiGLUFFNSplit",
]  # fmt: skip

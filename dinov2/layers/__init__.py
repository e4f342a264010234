"""Building blocks of the networks; they import torch only."""

from dinov2.layers.attention import Attention
from dinov2.layers.block import Block
from dinov2.layers.dino_head import DINOHead
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNFused

__all__ = ["Attention", "Block", "DINOHead", "LayerScale", "Mlp", "PatchEmbed", "SwiGLUFFN", "SwiGLUFFNFused"]

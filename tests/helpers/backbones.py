"""Small backbones with random weights, and their weights under the names of other libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinov2.models.dinov3 import Dinov3VisionTransformer
from dinov2.models.vision_transformer import DinoVisionTransformer

SMALL = {"img_size": 56, "patch_size": 14, "embed_dim": 96, "depth": 3, "num_heads": 4, "init_values": 1.0}
SWIGLU_WIDTH = 256  # of the half for D = 96: 2/3 of 384


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Draw every parameter, so that none is zero, one or negligible; values that float32 holds exactly."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape)
        if name.endswith("gamma") or "norm" in name or name.endswith("weight_g"):
            values = 1 + 0.2 * noise
        elif parameter.ndim > 1 and name.endswith("weight"):
            values = noise / parameter[0].numel() ** 0.5
        else:
            values = 0.5 * noise
        parameter.copy_(values)
    return module


def random_backbone(**kwargs: Any) -> DinoVisionTransformer:
    """A float64 backbone in evaluation mode."""
    return randomise(DinoVisionTransformer(**{**SMALL, **kwargs})).double().eval()


def random_dinov3(**kwargs: Any) -> Dinov3VisionTransformer:
    """A float64 backbone in evaluation mode, as the published ones but for its sizes."""
    published = {
        "img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 3, "num_heads": 4, "layerscale_init": 1.0,
        "norm_layer": "layernormbf16", "n_storage_tokens": 4, "mask_k_bias": True,
    }  # fmt: skip
    return randomise(Dinov3VisionTransformer(**published | kwargs)).double().eval()


def chunked(state: dict[str, Tensor], chunk: int = 2) -> dict[str, Tensor]:
    """The key layout ``blocks.<chunk>.<i>.`` of sharded training."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            index = int(key.split(".")[1])
            key = key.replace(f"blocks.{index}.", f"blocks.{index // chunk}.{index}.", 1)
        renamed[key] = value
    return renamed


def timm_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under timm's names, which hold the class token's position in the class token."""
    names = {"register_tokens": "reg_token", "mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
    renamed = {_replace(key, names): value for key, value in state.items() if key != "mask_token"}
    renamed["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    renamed["pos_embed"] = state["pos_embed"][:, 1:]
    return renamed


def transformers_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of transformers' files, which split the joint projection."""
    names = {
        "blocks.": "encoder.layer.",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "attn.proj": "attention.output.dense",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    }
    renamed = {}
    for key, value in state.items():
        if key.endswith("_token") or key.endswith("_tokens"):
            renamed[f"embeddings.{key}"] = value
        elif "attn.qkv" in key:
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                split = _replace(key, names).replace("attn.qkv", f"attention.attention.{part}")
                renamed[split] = tensor.contiguous()
        elif key.startswith("norm."):
            renamed[f"layer{key}"] = value
        else:
            renamed[_replace(key, names)] = value
    return renamed


def _replace(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key

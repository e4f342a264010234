"""Transformers' names of DINOv2 weights, as the Midnight teachers are published, and Meta's, in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Modules by Meta's name and by the one that transformers writes to files, in every version.
_STEM = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_BLOCK = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
# Modules of transformers 5 in memory.
_IN_MEMORY = {"attention.o_proj": "attn.proj", "mlp.down_proj": "mlp.w3"}
# Parts of a joint module, in its order.
_JOINT = {
    _QKV: "attn.qkv",
    tuple(f"attention.{part}_proj" for part in "qkv"): "attn.qkv",
    ("mlp.gate_proj", "mlp.up_proj"): "mlp.w12",
}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors, on disk or in memory, and join those that Meta holds in one.

    Where the file has no mask token, which only training uses, it is zero.
    """
    stem = {theirs: ours for ours, theirs in _STEM.items()}
    block = {theirs: ours for ours, theirs in _BLOCK.items()} | _IN_MEMORY
    part_of = {part: (joint, i) for parts, joint in _JOINT.items() for i, part in enumerate(parts)}
    renamed: dict[str, Tensor] = {}
    joints: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        in_block = re.match(r"encoder\.layer\.(\d+)\.(.+)", key)
        if not in_block:
            renamed[_rename(key, stem)] = tensor
            continue
        number, name = in_block.groups()
        module, _, kind = name.rpartition(".")
        if module in part_of:
            joint, i = part_of[module]
            joints.setdefault(f"blocks.{number}.{joint}.{kind}", {})[i] = tensor
        else:
            renamed[f"blocks.{number}.{_rename(name, block)}"] = tensor
    for key, parts in joints.items():
        renamed[key] = torch.cat([parts[i] for i in sorted(parts)])
    renamed.setdefault("mask_token", torch.zeros_like(renamed["cls_token"][0]))
    return renamed


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Meta's tensors as transformers' files have them, which every version of it reads."""
    renamed = {}
    for key, tensor in state.items():
        in_block = re.match(r"blocks\.(\d+)\.(.+)", key)
        if not in_block:
            renamed[_rename(key, _STEM)] = tensor
            continue
        layer, name = f"encoder.layer.{in_block[1]}.", in_block[2]
        if name.startswith("attn.qkv."):
            kind = name.removeprefix("attn.qkv")
            parts = tensor.chunk(3)
            renamed |= {layer + theirs + kind: part for theirs, part in zip(_QKV, parts, strict=True)}
        else:
            renamed[layer + _rename(name, _BLOCK)] = tensor
    return renamed


def _rename(key: str, modules: Mapping[str, str]) -> str:
    for name, other in modules.items():
        if key == name or key.startswith(f"{name}."):
            return other + key.removeprefix(name)
    return key

"""Weights of transformers' DINOv2 models, as the Midnight teachers are published, under Meta's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {
    r"^encoder\.layer\.": "blocks.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"\.mlp\.weights_in\.": ".mlp.w12.",
    r"\.mlp\.weights_out\.": ".mlp.w3.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.": "",
    r"^layernorm\.": "norm.",
}
_PROJECTION = re.compile(r"(.*\.attention)\.attention\.(query|key|value)\.(weight|bias)$")


def is_transformers_layout(state: Mapping[str, object]) -> bool:
    """Whether a state dict has transformers' names."""
    return "embeddings.cls_token" in state


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors and join queries, keys and values (D, D) into one projection (3D, D)."""
    renamed, projections = {}, {}
    for key, tensor in state.items():
        if split := _PROJECTION.match(key):
            projections.setdefault(f"{split[1]}.{split[3]}", {})[split[2]] = tensor
            continue
        for theirs, ours in _NAMES.items():
            key = re.sub(theirs, ours, key)
        renamed[key] = tensor
    for key, parts in projections.items():
        joint = re.sub(r"^encoder\.layer\.(\d+)\.attention\.", r"blocks.\1.attn.qkv.", key)
        renamed[joint] = torch.cat([parts[part] for part in ("query", "key", "value") if part in parts])
    return renamed

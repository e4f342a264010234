"""timm's names of DINOv2 weights and Meta's, in both directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def is_timm_layout(state: Mapping[str, object]) -> bool:
    """Whether a state dict has timm's names: Meta's but for registers and SwiGLU, and no mask token."""
    return {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys() and not (
        {"mask_token", "register_tokens"} & state.keys()
    )


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's tensors.

    The class token has no position of its own beside registers, and Meta's is zero then. So is the mask token, which
    only training uses.
    """
    renamed = {_rename(key, state): tensor for key, tensor in state.items()}
    if "register_tokens" in renamed:
        nowhere = torch.zeros_like(renamed["pos_embed"][:, :1])
        renamed["pos_embed"] = torch.cat([nowhere, renamed["pos_embed"]], dim=1)
    renamed["mask_token"] = torch.zeros_like(renamed["cls_token"][0])
    return renamed


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Meta's tensors.

    Beside registers the class token's position becomes part of the token; their sum is float64.
    """
    names = {"register_tokens": "reg_token"}
    renamed = {}
    for key, tensor in state.items():
        key = names.get(key, key).replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        renamed[key] = tensor
    del renamed["mask_token"]
    if "reg_token" in renamed:
        positions = state["pos_embed"]
        renamed["cls_token"] = state["cls_token"].double() + positions[:, :1].double()
        renamed["pos_embed"] = positions[:, 1:]
    return renamed


def _rename(key: str, state: Mapping[str, Tensor]) -> str:
    if key == "reg_token":
        return "register_tokens"
    first, _, last = key.rpartition(".")
    block, _, layer = first.rpartition(".")
    names = {"fc1": "w12", "fc2": "w3"}
    if layer in names and _is_gated(state, block):
        return f"{block}.{names[layer]}.{last}"
    return key


def _is_gated(state: Mapping[str, Tensor], mlp: str) -> bool:
    """Whether the first map is twice as wide as the second takes: SwiGLU with its halves in one."""
    first, second = (state.get(f"{mlp}.{layer}.weight") for layer in ("fc1", "fc2"))
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[-1]

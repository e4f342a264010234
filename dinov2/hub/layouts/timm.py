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
    renamed = {}
    for key, tensor in state.items():
        mlp, _, layer = key.rpartition(".mlp.")
        first, second = (state.get(f"{mlp}.mlp.{name}.weight") for name in ("fc1", "fc2"))
        # SwiGLU with its halves in one: the first map is twice as wide as the second takes.
        if layer and first is not None and second is not None and first.shape[0] == 2 * second.shape[-1]:
            key = key.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        renamed["register_tokens" if key == "reg_token" else key] = tensor
    if "register_tokens" in renamed:
        zero = torch.zeros_like(renamed["pos_embed"][:, :1])
        renamed["pos_embed"] = torch.cat([zero, renamed["pos_embed"]], dim=1)
    renamed["mask_token"] = torch.zeros_like(renamed["cls_token"][0])
    return renamed


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Meta's tensors; beside registers the class token's position becomes part of the token, float64."""
    renamed = {
        key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensor for key, tensor in state.items()
    }
    del renamed["mask_token"]
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        positions = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"].double() + positions[:, :1].double()
        renamed["pos_embed"] = positions[:, 1:]
    return renamed

"""Open a teacher from any of the layouts in which such weights are passed around."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.models.pretrained import backbone_state_dict, check_fit, read_checkpoint
from dinov2.models.transformers_layout import is_transformers_layout
from dinov2.models.vision_transformer import ARCHITECTURES, DinoVisionTransformer

HEADS = {128: 4, 192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}
"""Attention heads by width: the one figure that no tensor's shape tells."""


class FeatureMap(nn.Module):
    """A backbone whose output is what segmentation decoders take: a list of feature maps.

    Args:
        backbone: a teacher.
    """

    def __init__(self, backbone: DinoVisionTransformer):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) to one map (B, D, H/p, W/p): the last block's patch tokens before the final norm."""
        return list(self.backbone.get_intermediate_layers(x, n=1, reshape=True, norm=False))


def load_teacher(path: str | Path, feature_map: bool = False) -> nn.Module:
    """Open a backbone in evaluation mode, float32, on the CPU: (B, C, H, W) to CLS features (B, D).

    Files: exported teachers, the released OpenMidnight and Midnight teachers, Meta's backbones; see
    `backbone_state_dict`. The architecture is that of the JSON beside the file (same name, key ``architecture``)
    or, without one, follows from the tensors. The position grid stays as the file has it and is resampled to the
    images as they come.

    Args:
        path: file, or a URL, which goes through torch.hub's cache.
        feature_map: return a `FeatureMap` of the backbone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds no backbone, or does not fit the architecture.
    """
    path = str(path)
    checkpoint = read_checkpoint(path)
    state = backbone_state_dict(checkpoint)
    absent = [key for key in ("cls_token", "pos_embed", "patch_embed.proj.weight") if key not in state]
    if absent:
        raise ValueError(
            f"Weights {path!r} hold no backbone: {', '.join(absent)} missing; a DINOv2 ViT is expected."
        )
    with torch.device("meta"):
        model = _build(path, state, exact_sides=is_transformers_layout(checkpoint))
    check_fit(model, state, path)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return (FeatureMap(model) if feature_map else model).eval()


def _build(path: str, state: Mapping[str, Tensor], exact_sides: bool) -> DinoVisionTransformer:
    arguments = _described(path)
    if arguments is None:
        return DinoVisionTransformer(**_inferred(path, state, exact_sides))
    make = ARCHITECTURES.get(arguments.pop("arch", None))
    if make is None:
        raise ValueError(f"The JSON beside {path!r} names no arch out of {', '.join(ARCHITECTURES)}.")
    try:
        return make(**arguments | {"img_size": _image_side(state)})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The architecture in the JSON beside {path!r} does not describe a ViT ({error})."
        ) from error


def _described(path: str) -> dict[str, Any] | None:
    """The constructor arguments in the JSON beside the file, if there is one."""
    described = Path(path).with_suffix(".json")
    if not described.is_file():
        return None
    try:
        return dict(json.loads(described.read_text())["architecture"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(described)!r} does not describe a teacher's architecture ({error!r}); mend or remove it."
        ) from error


def _inferred(path: str, state: Mapping[str, Tensor], exact_sides: bool) -> dict[str, Any]:
    """Constructor arguments from shapes.

    Positions are resampled as in Meta's models of as many registers; transformers' always have exact sides.
    """
    width = state["cls_token"].shape[-1]
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    if width not in HEADS or not blocks:
        raise ValueError(
            f"The architecture of {path!r} cannot be inferred from its width {width} and {len(set(blocks))} blocks "
            f"(known widths: {', '.join(map(str, HEADS))}); put a JSON with its architecture beside it."
        )
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    ffn_layers = {"mlp.fc1": "mlp", "mlp.w12": "swiglufused"}
    first = {key.removeprefix("blocks.0.").rpartition(".")[0] for key in state if key.startswith("blocks.0.")}
    return {
        "img_size": _image_side(state),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "embed_dim": width,
        "depth": max(blocks) + 1,
        "num_heads": HEADS[width],
        "ffn_layer": next((name for module, name in ffn_layers.items() if module in first), "identity"),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": "blocks.0.mlp.fc1.bias" in state or "blocks.0.mlp.w12.bias" in state,
        "init_values": 1.0 if "ls1" in first else None,
        "num_register_tokens": registers,
        "interpolate_antialias": registers > 0,
        "interpolate_offset": 0.0 if registers or exact_sides else 0.1,
    }


def _image_side(state: Mapping[str, Tensor]) -> int:
    """Side in pixels of the images that the file's position grid is made for."""
    return math.isqrt(state["pos_embed"].shape[1] - 1) * state["patch_embed.proj.weight"].shape[-1]

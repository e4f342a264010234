"""What a weights file's backbone is: stated beside the file, or inferred from its tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.extensions import BACKBONES
from dinov2.models.vision_transformer import DinoVisionTransformer

HEADS = {128: 4, 192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}
"""Attention heads by width: the one figure that no tensor's shape tells."""

_DIMENSIONS = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "register_tokens": 3}
_TRANSFORMERS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}  # settings that the backbone shares


def build(path: str, state: Mapping[str, Tensor], layout: str) -> DinoVisionTransformer:
    """The backbone that a file's tensors are of, without weights (on the meta device).

    Args:
        path: the file; beside it may lie a JSON of the same name with ``architecture``, or the ``config.json`` that
            transformers and timm write.
        state: its tensors under Meta's names.
        layout: whose names the file has; see `dinov2.hub.pretrained.layout`.

    Raises:
        ValueError: the tensors are not a backbone's, or what lies beside the file describes none.
    """
    absent = [key for key in ("cls_token", "pos_embed", "patch_embed.proj.weight") if key not in state]
    if absent:
        raise ValueError(
            f"Weights {path!r} hold no backbone: {', '.join(absent)} missing; a DINOv2 ViT is expected."
        )
    for key, dimensions in _DIMENSIONS.items():
        if key in state and (state[key].ndim != dimensions or not state[key].numel()):
            raise ValueError(
                f"Weights {path!r} hold no DINOv2 ViT: {key} is {tuple(state[key].shape)}, of other than {dimensions} "
                "dimensions."
            )
    stated = description(path).get("architecture")
    with torch.device("meta"):
        if stated is None:
            heads = _heads_beside(path) if layout != "meta" else None
            return DinoVisionTransformer(**_inferred(path, state, layout, heads))
        return _stated(path, stated, state)


def description(path: str) -> dict[str, Any]:
    """The JSON beside a teacher (same name, key ``architecture``); empty if there is none.

    Raises:
        ValueError: it says nothing of an architecture.
    """
    beside = Path(path).with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        described = json.loads(beside.read_text())
        return described | {"architecture": dict(described["architecture"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(beside)!r} does not describe a teacher's architecture ({error!r}); mend or remove it."
        ) from error


def arguments_of(model: DinoVisionTransformer) -> dict[str, Any]:
    """Constructor keywords that make a model's like again."""
    own = {
        "num_heads": model.num_heads,
        "interpolate_antialias": model.interpolate_antialias,
        "interpolate_offset": model.interpolate_offset,
    }
    return _arguments(model.state_dict()) | own


def _stated(path: str, stated: dict[str, Any], state: Mapping[str, Tensor]) -> DinoVisionTransformer:
    """From the JSON: ``arch`` and its options, or all of the constructor's keywords."""
    arguments = stated | {"img_size": _image_side(state)}
    make = DinoVisionTransformer
    if "embed_dim" not in arguments:
        make = BACKBONES.get(arguments.pop("arch", None))
    if make is None:
        raise ValueError(f"The JSON beside {path!r} names no arch out of {', '.join(BACKBONES)}.")
    try:
        return make(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The architecture in the JSON beside {path!r} does not describe a ViT ({error})."
        ) from error


def _heads_beside(path: str) -> int | None:
    """The number of heads in the ``config.json`` of transformers or timm in the file's folder, if it has one."""
    beside = Path(path).with_name("config.json")
    if not beside.is_file():
        return None
    try:
        config = json.loads(beside.read_text())
        other = {key: config[key] for key, ours in _TRANSFORMERS.items() if config.get(key, ours) != ours}
        heads = config.get("num_attention_heads") or config.get("model_args", {}).get("num_heads")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(beside)!r} does not describe a model ({error!r}); mend or remove it."
        ) from error
    if other:
        raise ValueError(f"{str(beside)!r} has {other}, but a DINOv2 ViT has {_TRANSFORMERS}.")
    if heads is not None and not (isinstance(heads, int) and heads > 0):
        raise ValueError(f"{str(beside)!r} has {heads!r} attention heads; a positive number is expected.")
    return heads


def _inferred(path: str, state: Mapping[str, Tensor], layout: str, heads: int | None) -> dict[str, Any]:
    """Constructor keywords from shapes.

    Positions are resampled as the models with these names do it: timm's always, Meta's and transformers' with
    registers antialiased to exact sides.
    """
    width = state["cls_token"].shape[-1]
    heads = heads or HEADS.get(width)
    arguments = _arguments(state)
    if heads is None or width % heads or not arguments["depth"]:
        raise ValueError(
            f"The architecture of {path!r} cannot be inferred from its width {width}, {heads or 'unknown'} heads and "
            f"{arguments['depth']} blocks (known widths: {', '.join(map(str, HEADS))}); put a JSON with its "
            "architecture beside it."
        )
    registers = arguments["num_register_tokens"] > 0
    return arguments | {
        "num_heads": heads,
        "interpolate_antialias": registers or layout == "timm",
        "interpolate_offset": 0.0 if registers or layout != "meta" else 0.1,
    }


def _arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell."""
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    width = state["cls_token"].shape[-1]
    ffn_layer, hidden_over_width = "identity", 4.0
    if "blocks.0.mlp.fc1.weight" in state:
        ffn_layer, hidden_over_width = "mlp", width_ratio(state["blocks.0.mlp.fc1.weight"].shape[0], width)
    elif "blocks.0.mlp.w12.weight" in state:
        # The layer makes its halves 2/3 as wide as it is asked to.
        half = state["blocks.0.mlp.w12.weight"].shape[0] // 2
        ffn_layer, hidden_over_width = "swiglufused", width_ratio(-(-3 * half // 2), width)
        if gated_width(4 * width) == half:
            hidden_over_width = 4.0
    return {
        "img_size": _image_side(state),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "embed_dim": width,
        "depth": max(blocks, default=-1) + 1,
        "mlp_ratio": hidden_over_width,
        "ffn_layer": ffn_layer,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": "blocks.0.mlp.fc1.bias" in state or "blocks.0.mlp.w12.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "num_register_tokens": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
    }


def gated_width(hidden: int) -> int:
    """Width of either half of a fused SwiGLU in place of an MLP with ``hidden`` features."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def width_ratio(hidden: int, width: int) -> float:
    """The ratio that gives ``hidden`` when it is multiplied by the width and rounded down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _image_side(state: Mapping[str, Tensor]) -> int:
    """Side in pixels of the images that the file's position grid is made for."""
    return math.isqrt(state["pos_embed"].shape[1] - 1) * state["patch_embed.proj.weight"].shape[-1]

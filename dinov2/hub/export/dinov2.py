"""DINOv2's ViTs in formats of other libraries: the files that describe them."""

from collections.abc import Mapping
from typing import Any

import torch

from dinov2.hub.layouts import width_ratio
from dinov2.hub.pixels import Colours
from dinov2.layers.ffn import gated_width

_PUBLISHED = {(384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large", (1536, 40, 24): "giant"}
_HIGHEST_RATIO = 16


def timm_config(arguments: Mapping[str, Any], colours: Colours) -> dict[str, Any]:
    """timm's ``config.json``: the arguments of ``create_model``; raises ValueError where timm has no such model."""
    _require(arguments, "timm")
    if arguments["proj_bias"] != arguments["ffn_bias"]:
        raise ValueError("timm's ViT has proj_bias and ffn_bias both or neither, this teacher one of them.")
    gated, registers = arguments["ffn_layer"] == "swiglufused", arguments["num_register_tokens"]
    shape = (arguments["embed_dim"], arguments["depth"], arguments["num_heads"])
    size = _PUBLISHED.get(shape)
    side = arguments["img_size"]
    told = {"img_size": side, "dynamic_img_size": True}
    if size is None or (size == "giant") != gated or arguments["mlp_ratio"] != 4:
        size = "giant" if gated else "small"
        told |= dict(zip(("embed_dim", "depth", "num_heads"), shape, strict=True))
        told["mlp_ratio"] = arguments["mlp_ratio"]
        if gated:  # timm's ratio is that of both halves together
            half = gated_width(int(arguments["embed_dim"] * arguments["mlp_ratio"]))
            told["mlp_ratio"] = width_ratio(2 * half, arguments["embed_dim"])
    defaults = {"patch_size": 14, "in_chans": 3, "qkv_bias": True, "proj_bias": True}
    told |= {key: arguments[key] for key, usual in defaults.items() if arguments[key] != usual}
    if registers not in (0, 4):
        told["reg_tokens"] = registers
    return {
        "architecture": f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2",
        "num_classes": 0,
        "num_features": arguments["embed_dim"],
        "model_args": told,
        "pretrained_cfg": {
            "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
            "input_size": [arguments["in_chans"], side, side], "fixed_input_size": False,
            "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
            "mean": list(colours.mean), "std": list(colours.std),
        },
    }  # fmt: skip


def transformers_config(arguments: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Transformers' ``config.json``; raises ValueError where transformers has no such model."""
    _require(arguments, "transformers")
    if not (arguments["proj_bias"] and arguments["ffn_bias"]):
        raise ValueError("Transformers' DINOv2 has proj_bias and ffn_bias, this teacher has not.")
    registers = arguments["num_register_tokens"]
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_size": arguments["embed_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "patch_size": arguments["patch_size"],
        "image_size": arguments["img_size"],
        "num_channels": arguments["in_chans"],
        "mlp_ratio": _whole_ratio(arguments),
        "use_swiglu_ffn": arguments["ffn_layer"] == "swiglufused",
        "qkv_bias": arguments["qkv_bias"],
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "layerscale_value": 1.0, "initializer_range": 0.02,
        "drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "apply_layernorm": True, "reshape_hidden_states": True,
    }  # fmt: skip
    return config | ({"num_register_tokens": registers} if registers else {"use_mask_token": True})


def _require(arguments: Mapping[str, Any], library: str) -> None:
    if arguments["ffn_layer"] == "identity" or arguments["init_values"] is None:
        lacking = "feed-forward layers" if arguments["ffn_layer"] == "identity" else "LayerScale"
        raise ValueError(f"DINOv2 in {library} has {lacking}, this teacher has none; --format meta can hold it.")


def _whole_ratio(arguments: Mapping[str, Any]) -> int:
    """Transformers' ``mlp_ratio``, a whole number, that gives the feed-forward layers their width."""
    width, ratio = arguments["embed_dim"], arguments["mlp_ratio"]
    gated = arguments["ffn_layer"] == "swiglufused"
    hidden = [gated_width(int(width * r)) if gated else int(width * r) for r in (ratio, *range(_HIGHEST_RATIO))]
    if hidden[0] not in hidden[1:]:
        raise ValueError(f"Transformers' mlp_ratio is a whole number, this teacher's is {ratio:g}.")
    return hidden.index(hidden[0], 1) - 1

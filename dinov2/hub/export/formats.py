"""Formats of other libraries: a teacher's weights under their names, and the files that describe them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.hub.export import dinov3
from dinov2.hub.layouts import resize_grid, to_timm, to_transformers, vit_arguments, width_ratio
from dinov2.hub.layouts_dinov3 import is_dinov3
from dinov2.hub.layouts_dinov3 import to_timm as dinov3_to_timm
from dinov2.hub.layouts_dinov3 import to_transformers as dinov3_to_transformers
from dinov2.hub.pixels import Colours
from dinov2.hub.teacher import describe
from dinov2.layers.ffn import gated_width

_PUBLISHED = {(384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large", (1536, 40, 24): "giant"}
_HIGHEST_RATIO = 16


def resampled_by(target: str, num_registers: int) -> tuple[bool, float]:
    """Manner in which the reader of a format resamples the position grid for images of another size: antialias, offset.

    "meta" stands for Meta's own models; without registers those and transformers' do not antialias.
    """
    if target == "meta":
        return num_registers > 0, 0.0 if num_registers else 0.1
    return target == "timm" or num_registers > 0, 0.0


def files_for(
    target: str, model: nn.Module, dtype: torch.dtype, colours: Colours, described: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The files of an export by name: state dicts (.pth, .safetensors) in ``dtype``, and what goes into JSON.

    ``target`` is "meta", "timm" or "hf"; ``described`` the JSON beside the teacher, or nothing. Raises ValueError where
    the format cannot express the architecture, or ``dtype`` the weights.
    """
    state = model.state_dict()
    if target == "meta":  # a backbone that is no ViT is written under its own names
        described = {**described, "architecture": describe(model)}
        return {"backbone.pth": _cast(state, dtype), "backbone.json": described}
    side = arguments_of(model)["img_size"]
    if target == "timm":
        config, rename = timm_file(model, colours), dinov3_to_timm if is_dinov3(model) else to_timm
        return {"model.safetensors": _cast(rename(state), dtype), "config.json": config}
    processor = {  # resizes the shorter edge and cuts the centre out
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,  # bicubic
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(colours.mean), "image_std": list(colours.std),
    }  # fmt: skip
    if is_dinov3(model):
        weights, config = dinov3_to_transformers, dinov3.transformers_config(model, dtype)
    else:
        weights, config = to_transformers, transformers_config(vit_arguments(model), dtype)
    weights = _cast(weights(state), dtype)
    return {"model.safetensors": weights, "preprocessor_config.json": processor, "config.json": config}


def arguments_of(model: nn.Module) -> dict[str, Any]:
    """Constructor keywords of a ViT of DINOv2 or DINOv3; raises ValueError for another backbone."""
    return model.describe() if is_dinov3(model) else vit_arguments(model)


def timm_file(model: nn.Module, colours: Colours) -> dict[str, Any]:
    """timm's ``config.json`` of a model."""
    return dinov3.timm_config(model, colours) if is_dinov3(model) else timm_config(vit_arguments(model), colours)


def fit_to_images(model: nn.Module, image_size: int) -> None:
    """Make square images of so many px a ViT's own: its position grid is resampled, if it has one; in place."""
    if not is_dinov3(model):
        resize_grid(model, image_size)
    elif image_size < model.patch_size or image_size % model.patch_size:
        raise ValueError(
            f"The image size is {image_size}; a positive multiple of the patch's {model.patch_size} px is expected."
        )
    else:
        model.img_size = image_size


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


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast = {
        # Periods of rotary positions are no weights, and rounded to 16 bit would turn far patches elsewhere.
        key: tensor.detach().to(tensor.dtype if key.endswith(".periods") else dtype).contiguous().clone()
        for key, tensor in state.items()
    }
    for key, tensor in cast.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"The teacher's {key} is not finite in {dtype}; finite weights are expected.")
    return cast

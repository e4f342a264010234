"""DINOv3's ViTs in formats of other libraries: the files that describe them."""

from typing import Any

import torch

from dinov2.hub.layouts import width_ratio
from dinov2.hub.layouts_dinov3 import has_key_bias
from dinov2.hub.pixels import Colours
from dinov2.models.dinov3 import Dinov3VisionTransformer

# timm's names by width, depth, heads and width of the FFN.
_SIZES = {
    (384, 12, 6, "mlp", 1536): "small",
    (384, 12, 6, "swiglu", 1536): "small_plus",
    (768, 12, 12, "mlp", 3072): "base",
    (1024, 24, 16, "mlp", 4096): "large",
    (1280, 32, 20, "swiglu", 5120): "huge_plus",
    (4096, 40, 32, "swiglu", 8192): "7b",
}


def timm_config(model: Dinov3VisionTransformer, colours: Colours) -> dict[str, Any]:
    """timm's ``config.json``: the arguments of ``create_model``; raises ValueError where timm has no such model."""
    _require(
        model,
        "timm",
        {
            "no bias of keys": has_key_bias(model.state_dict()),
            "layer norms of eps 1e-5": model.norm.eps != 1e-5,
            "proj_bias and ffn_bias": not all(_options(model, "proj_bias", "ffn_bias")),
        },
    )
    kind, hidden = _ffn(model)
    shape = (model.embed_dim, len(model.blocks), model.num_heads)
    side, patch, channels = _options(model, "img_size", "patch_size", "in_chans")
    told: dict[str, Any] = {"img_size": side, "global_pool": "token"}
    size = _SIZES.get((*shape, kind, hidden))
    with_bias = "blocks.0.attn.qkv.bias" in model.state_dict()
    if size is None or (size == "7b" and with_bias):
        size = "small_plus" if kind == "swiglu" else "small"
        told |= dict(zip(("embed_dim", "depth", "num_heads"), shape, strict=True))
        told["mlp_ratio"] = width_ratio(hidden, model.embed_dim)
    defaults = {"patch_size": (patch, 16), "in_chans": (channels, 3), "num_reg_tokens": (model.n_storage_tokens, 4)}
    told |= {key: value for key, (value, usual) in defaults.items() if value != usual}
    if model.rope_embed.base != 100:
        told["rope_temperature"] = model.rope_embed.base
    return {
        "architecture": f"vit_{size}_patch16_dinov3{'_qkvb' if with_bias else ''}",
        "num_classes": 0,
        "num_features": model.embed_dim,
        "model_args": told,
        "pretrained_cfg": {
            "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
            "input_size": [channels, side, side], "fixed_input_size": False,
            "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
            "mean": list(colours.mean), "std": list(colours.std),
        },
    }  # fmt: skip


def transformers_config(model: Dinov3VisionTransformer, dtype: torch.dtype) -> dict[str, Any]:
    """Transformers' ``config.json``; raises ValueError where transformers has no such model."""
    _require(model, "transformers", {})
    kind, hidden = _ffn(model)
    side, patch, channels, proj_bias, ffn_bias = _options(
        model, "img_size", "patch_size", "in_chans", "proj_bias", "ffn_bias"
    )
    with_bias, rope = "blocks.0.attn.qkv.bias" in model.state_dict(), model.rope_embed
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_size": model.embed_dim,
        "intermediate_size": hidden,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.num_heads,
        "num_register_tokens": model.n_storage_tokens,
        "patch_size": patch,
        "image_size": side,
        "num_channels": channels,
        "use_gated_mlp": kind == "swiglu",
        "hidden_act": "silu" if kind == "swiglu" else "gelu",
        "query_bias": with_bias, "key_bias": has_key_bias(model.state_dict()), "value_bias": with_bias,
        "proj_bias": proj_bias, "mlp_bias": ffn_bias,
        "rope_theta": rope.base, "pos_embed_shift": rope.shift_coords, "pos_embed_jitter": rope.jitter_coords,
        "pos_embed_rescale": rope.rescale_coords,
        "layer_norm_eps": model.norm.eps, "layerscale_value": 1.0, "initializer_range": 0.02,
        "drop_path_rate": 0.0, "attention_dropout": 0.0,
        "apply_layernorm": True, "reshape_hidden_states": True,
    }  # fmt: skip


def _options(model: Dinov3VisionTransformer, *names: str) -> list[Any]:
    described = model.describe()
    return [described[name] for name in names]


def _ffn(model: Dinov3VisionTransformer) -> tuple[str, int]:
    mlp = model.blocks[0].mlp
    return ("swiglu", mlp.w1.out_features) if hasattr(mlp, "w1") else ("mlp", mlp.fc1.out_features)


def _require(model: Dinov3VisionTransformer, library: str, lacking: dict[str, bool]) -> None:
    rope = model.rope_embed
    lacking = {
        "layer norms": not hasattr(model.norm, "bias"),
        "LayerScale": "blocks.0.ls1.gamma" not in model.state_dict(),
        "one final norm for all tokens": model.cls_norm is not None,
        "rotary positions by a base, of each side for itself": rope.base is None or rope.normalize_coords != "separate",
        **lacking,
    }
    for what, is_so in lacking.items():
        if is_so:
            raise ValueError(f"DINOv3 in {library} has {what}, this teacher has not; --format meta can hold it.")

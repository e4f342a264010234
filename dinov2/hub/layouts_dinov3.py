"""Names under which DINOv3's ViTs are passed around: Meta's, which our backbone has too, timm's and transformers'.

What Meta's names and the shapes tell of the architecture follows below them.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.hub.layouts import depth_of, width_ratio, with_mask_token
from dinov2.layers.ffn import gated_width
from dinov2.layers.rope import RopePositionEmbedding
from dinov2.models.dinov3 import Dinov3VisionTransformer

HEADS = {384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}
"""Attention heads of the published models by width, for files that hold no periods of rotary positions."""

NORM_LAYERS = {1e-5: "layernormbf16", 1e-6: "layernorm"}
"""Names of layer norms by their eps."""

# Modules, those of a block without its number, by Meta's name and by timm's; then by transformers'.
_TIMM = {
    "storage_tokens": "reg_token",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
}
_TIMM_OF_SWIGLU = {"mlp.w3": "mlp.fc2"}
_TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_TRANSFORMERS_FFN = {
    "mlp": {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"},
    "swiglu": {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"},
}
_TRAINED_ONLY = ("mask_token", "local_cls_norm.weight", "local_cls_norm.bias")
_TABLES = re.compile(r"(.*\.)?(bias_mask|periods)")


def is_dinov3(model: nn.Module) -> bool:
    """Whether a backbone is DINOv3's ViT, and not one derived from it."""
    return type(model) is Dinov3VisionTransformer


def layout(state: Mapping[str, Tensor]) -> str | None:
    """Whose names the weights of a DINOv3 ViT have: "meta", "timm" or "transformers"; None for those of others.

    It is a ViT without a position grid, with rotary positions, storage tokens or timm's names of gains.
    """
    if {"embeddings.cls_token", "embeddings.patch_embeddings.weight"} <= state.keys():
        return "transformers"
    if "pos_embed" in state or not {"cls_token", "patch_embed.proj.weight"} <= state.keys():
        return None
    if "rope_embed.periods" in state or "storage_tokens" in state:
        return "meta"
    return "timm" if "reg_token" in state or "blocks.0.gamma_1" in state else None


def to_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights in one of the layouts Meta's names; an absent mask token is zero."""
    renamed = {"timm": _from_timm, "transformers": _from_transformers}.get(layout(state), dict)(state)
    return with_mask_token(renamed)


def _from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gated = any(".mlp.fc1_g." in key for key in state)
    names = {theirs: ours for ours, theirs in (_TIMM | (_TIMM_OF_SWIGLU if gated else {})).items()}
    renamed = {_renamed(key, names): tensor for key, tensor in state.items() if not key.startswith("rope.")}
    for key in [key for key in renamed if key.endswith("attn.q_bias")]:
        block = key.removesuffix("q_bias")
        query, value = renamed.pop(key), renamed.pop(f"{block}v_bias")
        renamed |= _joint_bias(f"{block}qkv", query, None, value)
    return renamed


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gated = any(".mlp.gate_proj." in key for key in state)
    names = {theirs: ours for ours, theirs in _transformers_names(gated).items()}
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        key = re.sub(r"^(model\.)?layer\.", "blocks.", key)
        if match := re.fullmatch(r"(blocks\.\d+\.)attention\.([qkv])_proj\.(weight|bias)", key):
            parts.setdefault(f"{match[1]}attn.qkv", {})[match[2] + match[3]] = tensor
        elif not key.startswith("rope_embeddings."):
            renamed[_renamed(key, names)] = tensor
    for joint, found in parts.items():
        renamed[f"{joint}.weight"] = torch.cat([found[f"{part}weight"] for part in "qkv"])
        if "qbias" in found and "vbias" in found:
            renamed |= _joint_bias(joint, found["qbias"], found.get("kbias"), found["vbias"])
    return renamed


def _joint_bias(joint: str, query: Tensor, keys: Tensor | None, value: Tensor) -> dict[str, Tensor]:
    """Bias of a joint projection; with its mask where keys have none."""
    if keys is not None:
        return {f"{joint}.bias": torch.cat([query, keys, value])}
    zeros, one = torch.zeros_like(query), torch.ones_like(query)
    return {f"{joint}.bias": torch.cat([query, zeros, value]), f"{joint}.bias_mask": torch.cat([one, zeros, one])}


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Meta's tensors; those that only training uses are left out."""
    names = _TIMM | (_TIMM_OF_SWIGLU if _is_gated(state) else {})
    renamed = {}
    for key, tensor in _unmasked(state).items():
        if key.endswith("qkv.bias"):
            query, _, value = tensor.chunk(3)
            block = key.removesuffix("qkv.bias")
            renamed |= {f"{block}q_bias": query, f"{block}v_bias": value}
        else:
            renamed[_renamed(key, names)] = tensor
    return {key: value for key, value in renamed.items() if key not in _TRAINED_ONLY}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Meta's tensors as transformers' files have them, which every version of it reads."""
    names = _transformers_names(_is_gated(state))
    renamed = {}
    with_key_bias = has_key_bias(state)
    for key, tensor in _unmasked(state).items():
        key = re.sub(r"^blocks\.", "layer.", key)
        if match := re.fullmatch(r"(.*)attn\.qkv\.(weight|bias)", key):
            split = zip("qkv", tensor.chunk(3), strict=True)
            renamed |= {
                f"{match[1]}attention.{part}_proj.{match[2]}": value
                for part, value in split
                if match[2] == "weight" or part != "k" or with_key_bias
            }
        elif not key.startswith("local_cls_norm."):
            renamed[_renamed(key, names)] = tensor
    renamed["embeddings.mask_token"] = renamed["embeddings.mask_token"][None]
    return renamed


def has_key_bias(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys have a bias, which rotary positions make something of."""
    biases = [value for key, value in _unmasked(state).items() if key.endswith("attn.qkv.bias")]
    return any(not bias.is_meta and bool(bias.chunk(3)[1].any()) for bias in biases)


def rounding_of_periods(model: Dinov3VisionTransformer) -> float:
    """Largest relative distance of the periods from those that follow from the base: Meta's files hold rounded ones."""
    rope, periods = model.rope_embed, model.rope_embed.periods.detach().double()
    exact = RopePositionEmbedding(4 * len(periods), rope.base, rope.min_period, rope.max_period).periods.double()
    return float((periods / exact - 1).abs().max())


def _unmasked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without periods, and with masked biases in place of biases and masks."""
    masks = {key.removesuffix("_mask"): value for key, value in state.items() if key.endswith(".bias_mask")}
    return {
        key: value * masks[key].to(value.dtype) if key in masks else value
        for key, value in state.items()
        if not _TABLES.fullmatch(key)
    }


def _transformers_names(gated: bool) -> dict[str, str]:
    return _TRANSFORMERS | _TRANSFORMERS_FFN["swiglu" if gated else "mlp"]


def _is_gated(state: Mapping[str, Tensor]) -> bool:
    return "blocks.0.mlp.w1.weight" in state


def _renamed(key: str, names: Mapping[str, str]) -> str:
    block, name = re.fullmatch(r"((?:blocks|layer)\.\d+\.)?(.*)", key, re.DOTALL).groups(default="")
    for one, other in names.items():
        if name == one or name.startswith(f"{one}."):
            return block + other + name.removeprefix(one)
    return key


def completed(model: Dinov3VisionTransformer, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights with what a model has beside them and that leaves their function, and what that is in words.

    Periods of rotary positions that are not there are the model's; masks of keys' biases are set, or multiplied out;
    absent biases of queries and values are zero; the norm of local class tokens, which only training uses, starts as
    that of the others, or is left out.
    """
    state, own, told = dict(state), model.state_dict(), []
    if "rope_embed.periods" not in state:
        rope = model.rope_embed
        with torch.device("cpu"):
            options = (rope.base, rope.min_period, rope.max_period)
            state["rope_embed.periods"] = RopePositionEmbedding(4 * len(rope.periods), *options).periods
    masked = any(key.endswith(".bias_mask") for key in own)
    if not masked:
        state = _unmasked(state) | {"rope_embed.periods": state["rope_embed.periods"]}
    for key, value in own.items():
        if key.endswith("attn.qkv.bias") and key.removesuffix("bias") + "weight" in state:
            bias = state.setdefault(key, torch.zeros(value.shape))
            if masked and not bias.chunk(3)[1].any() and len(bias) == len(value):
                third = torch.ones(len(bias) // 3)
                state.setdefault(f"{key}_mask", torch.cat([third, 0 * third, third]))
    for kind in ("weight", "bias"):
        local, of_class = f"local_cls_norm.{kind}", state.get(f"cls_norm.{kind}", state.get(f"norm.{kind}"))
        if local in own and local not in state and of_class is not None:
            state[local] = of_class.clone()
            told += ["have no norm of local class tokens: it starts as that of others"] if kind == "weight" else []
        elif local not in own:
            state.pop(local, None)
    return state, told


def vit_from_shapes(
    path: str, state: Mapping[str, Tensor], config: Mapping[str, Any], eps: float
) -> Dinov3VisionTransformer:
    """Build the ViT that weights, under Meta's names, are of.

    ``config`` are the entries of a ``config.json`` beside them, of transformers or timm's ``model_args``. Raises
    ValueError where heads or blocks do not follow.
    """
    width, depth = state["cls_token"].shape[-1], depth_of(state)
    heads = config.get("num_attention_heads") or config.get("num_heads")
    if heads is None and "rope_embed.periods" in state:
        heads = width // (4 * len(state["rope_embed.periods"]))
    heads = heads or HEADS.get(width)
    if heads is None or width % (4 * heads) or not depth:
        raise ValueError(
            f"The architecture of {path!r} cannot be inferred from its width {width}, {heads or 'unknown'} heads and "
            f"{depth} blocks (known widths: {', '.join(map(str, HEADS))}); put a JSON with its architecture beside it."
        )
    patch = state["patch_embed.proj.weight"].shape[-1]
    image = config.get("image_size") or config.get("img_size")
    return Dinov3VisionTransformer(
        img_size=image if isinstance(image, int) and image >= patch else 14 * patch,
        patch_size=patch,
        in_chans=state["patch_embed.proj.weight"].shape[1],
        pos_embed_rope_base=float(config.get("rope_theta") or config.get("rope_temperature") or 100),
        embed_dim=width, depth=depth, num_heads=heads, **_ffn(state, width),
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        proj_bias="blocks.0.attn.proj.bias" in state,
        ffn_bias=any(f"blocks.0.mlp.{name}.bias" in state for name in ("fc1", "w1")),
        layerscale_init=1.0 if "blocks.0.ls1.gamma" in state else None,
        norm_layer="rmsnorm" if "norm.bias" not in state else NORM_LAYERS.get(eps, "layernormbf16"),
        n_storage_tokens=state["storage_tokens"].shape[1] if "storage_tokens" in state else 0,
        mask_k_bias="blocks.0.attn.qkv.bias_mask" in state,
        untie_cls_and_patch_norms="cls_norm.weight" in state,
        untie_global_and_local_cls_norm="local_cls_norm.weight" in state,
    )  # fmt: skip


def _ffn(state: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    if not _is_gated(state):
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in state else 4 * width
        return {"ffn_layer": "mlp", "ffn_ratio": width_ratio(hidden, width)}
    # The layer makes its maps 2/3 as wide as it is asked to.
    hidden = state["blocks.0.mlp.w1.weight"].shape[0]
    ratios = [r for r in (3.0, 4.0, 6.0, 8.0) if gated_width(int(width * r)) == hidden]
    return {"ffn_layer": "swiglu", "ffn_ratio": (ratios or [width_ratio(-(-3 * hidden // 2), width)])[0]}

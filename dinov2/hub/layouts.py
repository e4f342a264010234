"""Names under which DINOv2 weights are passed around: Meta's, which our backbone has too, timm's and transformers'.

What Meta's names and the shapes tell of a ViT's architecture follows below them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.layers.ffn import gated_width
from dinov2.models.vision_transformer import DinoVisionTransformer, resample_positions

HEADS = {128: 4, 192: 3, 256: 4, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
"""Attention heads by width: the one figure that no tensor's shape tells."""

LAYER_NORM_EPS = 1e-6
"""Of DINOv2's layer norms."""

_DIMENSIONS = {
    "cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "register_tokens": 3, "storage_tokens": 3
}  # fmt: skip

# Modules by Meta's name and by the one that transformers writes to files, in every version; then those of a block.
_MODULES = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
# Modules of transformers 5 in memory, and of its plain ViT, by whose names no DINOv2 is written.
_READ_ONLY = {
    "attention.o_proj": "attn.proj",
    "mlp.down_proj": "mlp.w3",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
# Parts of a joint module, in its order.
_JOINT = {
    _QKV: "attn.qkv",
    tuple(f"attention.{part}_proj" for part in "qkv"): "attn.qkv",
    ("mlp.gate_proj", "mlp.up_proj"): "mlp.w12",
}


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's tensors; the mask token, which only training uses, is zero.

    Beside registers the class token has no position in timm's DINOv2, so that it is zero here; in other models, such
    as Virchow2, registers too have positions, which become part of them.
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
        positions, number = renamed["pos_embed"], num_registers(renamed)
        tokens = positions.shape[1]
        if math.isqrt(tokens) ** 2 != tokens and math.isqrt(max(tokens - 1 - number, 0)) ** 2 == tokens - 1 - number:
            first, of_registers, positions = positions.split([1, number, tokens - 1 - number], dim=1)
            renamed["register_tokens"] = renamed["register_tokens"] + of_registers
        else:
            first = torch.zeros_like(positions[:, :1])
        renamed["pos_embed"] = torch.cat([first, positions], dim=1)
    return with_mask_token(renamed)


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


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors, on disk or in memory, and join those that Meta holds in one.

    Where the file has no mask token it is zero.
    """
    modules = {theirs: ours for ours, theirs in _MODULES.items()} | _READ_ONLY
    part_of = {part: (joint, i) for parts, joint in _JOINT.items() for i, part in enumerate(parts)}
    renamed: dict[str, Tensor] = {}
    joints: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        _, layer, name = re.match(r"((?:encoder\.layer|layers)\.(\d+\.))?(.*)", key, re.DOTALL).groups(default="")
        block = f"blocks.{layer}" if layer else ""
        module, _, kind = name.rpartition(".")
        if module in part_of:
            joint, i = part_of[module]
            joints.setdefault(f"{block}{joint}.{kind}", {})[i] = tensor
        else:
            renamed[block + _rename(name, modules)] = tensor
    for key, parts in joints.items():
        renamed[key] = torch.cat([parts[i] for i in sorted(parts)])
    return with_mask_token(renamed)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Meta's tensors as transformers' files have them, which every version of it reads."""
    renamed = {}
    for key, tensor in state.items():
        _, number, name = re.match(r"(blocks\.(\d+\.))?(.*)", key, re.DOTALL).groups(default="")
        layer = f"encoder.layer.{number}" if number else ""
        if name.startswith("attn.qkv."):
            names = [layer + part + name.removeprefix("attn.qkv") for part in _QKV]
            renamed |= zip(names, tensor.chunk(3), strict=True)
        else:
            renamed[layer + _rename(name, _MODULES)] = tensor
    return renamed


def _rename(key: str, modules: Mapping[str, str]) -> str:
    for name, other in modules.items():
        if key == name or key.startswith(f"{name}."):
            return other + key.removeprefix(name)
    return key


def is_vit(model: nn.Module) -> bool:
    """Whether a backbone is Meta's ViT, and not one derived from it."""
    return type(model) is DinoVisionTransformer


def from_chunks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``blocks.<chunk>.<i>.`` of sharded training to ``blocks.<i>.``; a ViT's absent mask token is zero."""
    renamed = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}
    return with_mask_token(renamed) if "cls_token" in renamed else renamed


def with_mask_token(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's weights with its mask token in two dimensions, zero where they have none."""
    token, found = state["cls_token"], state.get("mask_token", state.get("masked_embed"))  # the latter is iBOT's
    if found is None or found.numel() == token.shape[-1]:  # some have it in three dimensions
        found = torch.zeros_like(token[0]) if found is None else found.reshape(1, -1)
    return {key: value for key, value in state.items() if key != "masked_embed"} | {"mask_token": found}


def traits(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Sizes and kinds of layers of a ViT in words, as its weights tell them; nothing of other networks."""
    if "cls_token" not in state or "patch_embed.proj.weight" not in state:
        return {}
    layers = {"MLP": state.get("blocks.0.mlp.fc1.weight"), "SwiGLU": state.get("blocks.0.mlp.w12.weight")}
    layers["split SwiGLU"] = state.get("blocks.0.mlp.w1.weight")
    return {
        "positions": "learned positions (DINOv2)" if "pos_embed" in state else "rotary positions (DINOv3)",
        "width": f"width {state['cls_token'].shape[-1]}",
        "depth": f"{depth_of(state)} blocks",
        "patch": f"patches of {state['patch_embed.proj.weight'].shape[-1]} px",
        "registers": f"{num_registers(state)} registers",
        "gains": f"{'' if 'blocks.0.ls1.gamma' in state else 'no '}LayerScale",
        "ffn": " and ".join(f"{kind} of width {len(w)}" for kind, w in layers.items() if w is not None) or "no FFN",
    }


def depth_of(state: Mapping[str, Tensor]) -> int:
    """Count the blocks of a ViT's weights."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))), default=-1)


def num_registers(state: Mapping[str, Tensor]) -> int:
    """Count the registers of a ViT's weights."""
    tokens = [state[key] for key in ("register_tokens", "storage_tokens") if key in state]
    return tokens[0].shape[1] if tokens else 0


def require_vit(path: str, state: Mapping[str, Tensor]) -> None:
    """Make sure that the tensors by which a ViT's architecture is told are there; raises ValueError."""
    absent = [key for key in _DIMENSIONS if key not in state and key not in ("register_tokens", "storage_tokens")]
    if absent and absent != ["pos_embed"] * ("rope_embed.periods" in state or "storage_tokens" in state):
        raise ValueError(
            f"Weights {path!r} hold no backbone: {', '.join(absent)} missing; a DINOv2 or DINOv3 ViT is expected."
        )
    for key, dimensions in _DIMENSIONS.items():
        if key in state and (state[key].ndim != dimensions or not state[key].numel()):
            raise ValueError(
                f"Weights {path!r} hold no ViT: {key} is {tuple(state[key].shape)}, of other than {dimensions} "
                "dimensions."
            )


def vit_from_shapes(path: str, state: Mapping[str, Tensor], layout: str, heads: int | None) -> DinoVisionTransformer:
    """Build the ViT that weights, under Meta's names, are of.

    Positions are resampled as the models with the file's ``layout`` do it: timm's always, Meta's and transformers'
    with registers antialiased to exact sides.

    ``heads`` is their number where something beside the file tells it. Raises ValueError where heads or blocks do not
    follow.
    """
    arguments, width = _arguments(state), state["cls_token"].shape[-1]
    heads = heads or HEADS.get(width)
    if heads is None or width % heads or not arguments["depth"]:
        raise ValueError(
            f"The architecture of {path!r} cannot be inferred from its width {width}, {heads or 'unknown'} heads and "
            f"{arguments['depth']} blocks (known widths: {', '.join(map(str, HEADS))}); put a JSON with its "
            "architecture beside it."
        )
    exact = num_registers(state) > 0
    return DinoVisionTransformer(
        **arguments,
        num_heads=heads,
        interpolate_antialias=exact or layout == "timm",
        interpolate_offset=0.0 if exact or layout != "meta" else 0.1,
    )


def vit_arguments(model: nn.Module) -> dict[str, Any]:
    """Constructor keywords that a ViT's function and weights depend on; raises ValueError for another backbone."""
    if not is_vit(model):
        raise ValueError(f"The backbone is a {type(model).__name__}; a DINOv2 ViT is expected.")
    if model.norm.eps != LAYER_NORM_EPS:
        raise ValueError(
            f"The backbone's layer norms have eps = {model.norm.eps}; files of a DINOv2 ViT stand for {LAYER_NORM_EPS}."
        )
    return _arguments(model.state_dict()) | {
        "num_heads": model.num_heads,
        "interpolate_antialias": model.interpolate_antialias,
        "interpolate_offset": model.interpolate_offset,
    }


def _arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
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
        "img_size": _grid_side(state) * patch,
        "patch_size": patch,
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "embed_dim": width,
        "depth": depth_of(state),
        "mlp_ratio": hidden_over_width,
        "ffn_layer": ffn_layer,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": "blocks.0.mlp.fc1.bias" in state or "blocks.0.mlp.w12.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "num_register_tokens": num_registers(state),
    }


def width_ratio(hidden: int, width: int) -> float:
    """The ratio that gives ``hidden`` when it is multiplied by the width and rounded down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def take_grid(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a ViT without weights the position grid that its weights have: its size is that of the images."""
    tokens = 1 + _grid_side(state) ** 2
    if model.pos_embed.shape[1] != tokens:
        _set_grid(model, model.pos_embed.new_empty(1, tokens, model.embed_dim))


def resize_grid(model: nn.Module, image_size: int) -> None:
    """Give a ViT a position grid for square images of so many px, resampled as it resamples its own; in place."""
    patch = vit_arguments(model)["patch_size"]
    if image_size < patch or image_size % patch:
        raise ValueError(f"The image size is {image_size}; a positive multiple of the patch's {patch} px is expected.")
    with torch.no_grad():
        grid = model.interpolate_pos_encoding(model.pos_embed, image_size, image_size)
    _set_grid(model, grid.clone())


def with_grid_of(model: nn.Module, state: Mapping[str, Tensor], own: bool) -> dict[str, Tensor]:
    """Weights with the position grid of a model's size: resampled (bicubic, antialiased, exact sides), or its own.

    Weights of backbones without a position grid, and grids that are not square, stay as they are.
    """
    grid = getattr(model, "pos_embed", None)
    if grid is None:
        return dict(state)
    if own:
        return {**state, "pos_embed": grid.detach()}
    stored, side = state.get("pos_embed"), math.isqrt(grid.shape[1] - 1)
    if stored is None or stored.ndim != 3 or _grid_side(state) ** 2 != stored.shape[1] - 1 or stored.shape[1] < 2:
        return dict(state)
    return {**state, "pos_embed": resample_positions(stored, (side, side))}


def _set_grid(model: nn.Module, grid: Tensor) -> None:
    rows = math.isqrt(grid.shape[1] - 1)
    model.pos_embed = nn.Parameter(grid)
    model.patch_embed.img_size, model.patch_embed.num_patches = rows * model.patch_size, rows**2


def _grid_side(state: Mapping[str, Tensor]) -> int:
    return math.isqrt(max(state["pos_embed"].shape[1] - 1, 0))

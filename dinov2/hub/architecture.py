"""The backbone that a weights file is of: stated beside the file, or told by its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.extensions import BACKBONES
from dinov2.hub.layouts import meta
from dinov2.hub.record import read_record
from dinov2.models.vision_transformer import DinoVisionTransformer

_TRANSFORMERS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}  # settings that the backbone shares


def describe(model: nn.Module) -> dict[str, Any]:
    """Constructor keywords that make a backbone's like again; ``arch`` among them names it where it is no ViT."""
    return meta.vit_arguments(model) if meta.is_vit(model) else model.describe()


def description(path: str) -> dict[str, Any]:
    """The JSON beside a teacher (same name, key ``architecture``); empty if there is none.

    Raises:
        ValueError: if it says nothing of an architecture.
    """
    try:
        record = read_record(path)
        return {} if record is None else record | {"architecture": dict(record["architecture"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(Path(path).with_suffix('.json'))!r} does not describe a teacher's architecture ({error!r}); mend or "
            "remove it."
        ) from error


def stated_backbone(path: str) -> nn.Module | None:
    """Build the backbone that the JSON beside a file states, a ViT without weights; None where nothing is stated.

    Raises:
        ValueError: if the JSON states none that there is.
    """
    arguments = description(path).get("architecture")
    if arguments is None:
        return None
    arch = arguments.pop("arch", None)
    if arch is None and "embed_dim" in arguments:
        make = DinoVisionTransformer
    elif arch in BACKBONES:
        make = BACKBONES[arch]
    else:
        raise ValueError(f"The JSON beside {path!r} names no arch out of {', '.join(BACKBONES)}.")
    try:
        with torch.device("meta"):
            model = make(**arguments)
        # A ViT gets all its tensors from the file; others may have tables that no file holds.
        return model if meta.is_vit(model) else make(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The architecture in the JSON beside {path!r} does not describe a backbone ({error})."
        ) from error


def inferred_backbone(path: str, state: Mapping[str, Tensor], layout: str) -> nn.Module:
    """Build, without weights, the ViT that a file's tensors, under Meta's names, are of.

    Args:
        path: the file; beside it may lie the ``config.json`` that transformers and timm write.
        layout: whose names the file has; see `dinov2.hub.pretrained.layout`.

    Raises:
        ValueError: if the tensors are not a ViT's, or the architecture does not follow from them.
    """
    meta.require_vit(path, state)
    beside, heads = Path(path).with_name("config.json"), None
    if layout != "meta" and beside.is_file():
        try:
            config = json.loads(beside.read_text())
            other = {key: config[key] for key, ours in _TRANSFORMERS.items() if config.get(key, ours) != ours}
            heads = config.get("num_attention_heads") or config.get("model_args", {}).get("num_heads")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{str(beside)!r} does not describe a model ({error!r}); mend or remove it.") from error
        if other:
            raise ValueError(f"{str(beside)!r} has {other}, but a DINOv2 ViT has {_TRANSFORMERS}.")
        if heads is not None and not (isinstance(heads, int) and heads > 0):
            raise ValueError(f"{str(beside)!r} has {heads!r} attention heads; a positive number is expected.")
    with torch.device("meta"):
        return meta.vit_from_shapes(path, state, layout, heads)

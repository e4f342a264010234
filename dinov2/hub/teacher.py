"""Open a teacher from any of the layouts in which such weights are passed around."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.extensions import BACKBONES
from dinov2.hub import layouts, layouts_dinov3, pretrained
from dinov2.hub.locate import weights_path
from dinov2.hub.record import read_record
from dinov2.models.vision_transformer import DinoVisionTransformer

POOLINGS = ("cls", "cls_mean")
"""Poolings, or what a teacher returns per image: the class token, or it and the mean patch token."""

_MOST_BLOCKS = 1000  # that a JSON may state: they are built before the tensors are looked at


class _Around(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone


class FeatureMap(_Around):
    """A backbone whose output is what segmentation decoders take: a list of feature maps."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) to one map (B, D, H/p, W/p): the last block's patch tokens before the final norm."""
        return list(self.backbone.get_intermediate_layers(x, n=1, reshape=True, norm=False))


class ClassAndMean(_Around):
    """A backbone whose output is the class token followed by the mean patch token, both after the final norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, 2D)."""
        tokens = self.backbone(x, is_training=True)
        return torch.cat([tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(1)], dim=1)


def load_teacher(
    path: str | Path | None = None,
    feature_map: bool = False,
    output: str = "cls",
    checkpoint_path: str | Path | None = None,
    *,
    pooling: str | None = None,
) -> nn.Module:
    """Open a backbone in evaluation mode, float32, on the CPU: (B, C, H, W) to class tokens (B, D).

    Files: our exports, of any registered backbone; the released OpenMidnight and Midnight teachers, Meta's,
    transformers' and timm's backbones; tensors are found by name, see `dinov2.hub.pretrained.backbone_state_dict`.
    The architecture is that of the JSON beside the file (same name, key ``architecture``) or, without one, follows
    from the tensors and a ``config.json``. The position grid stays as the file has it and is resampled to the images
    as they come.

    Args:
        path: file, folder or id on the hub, see `weights_path`; or a URL, which goes through torch.hub's cache.
        feature_map: return a `FeatureMap` of the backbone.
        output: an older name of ``pooling``.
        checkpoint_path: another name of ``path``.
        pooling: "cls" (the default), or "cls_mean" for a `ClassAndMean`.

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file, or a folder does not hold one.
        ValueError: if it cannot be read, is not what the checksums in its JSON are of, holds no backbone, does not fit
            the architecture or is not finite; or for wrong arguments.
        ImportError: if the backbone is of a module that cannot be imported.
    """
    if (path is None) == (checkpoint_path is None):
        raise ValueError(f"path is {path!r} and checkpoint_path {checkpoint_path!r}; one of them is expected.")
    pooling = pooling or output
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; one of {', '.join(POOLINGS)} is expected.")
    if feature_map and pooling != "cls":
        raise ValueError(f"A feature map has no class token; pooling = {pooling!r} goes with feature_map = False.")
    model, state = open_backbone(str(checkpoint_path if path is None else path))
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, assign=True)
    if feature_map:
        return FeatureMap(model).eval()
    return ClassAndMean(model).eval() if pooling == "cls_mean" else model.eval()


def open_backbone(path: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build the backbone of weights, as `load_teacher` does, and leave them beside it; a ViT is on the meta device."""
    path = path if pretrained.is_url(path) else str(weights_path(path))
    checkpoint = pretrained.read_checkpoint(path)
    model = stated_backbone(path)
    if model is None:
        state = pretrained.backbone_state_dict(checkpoint)
        model = inferred_backbone(path, state, pretrained.layout(pretrained.unwrapped(checkpoint)))
        if layouts_dinov3.is_dinov3(model):
            state, _ = layouts_dinov3.completed(model, state)
    else:
        state = pretrained.weights_for(model, checkpoint)
        if layouts.is_vit(model):
            layouts.require_vit(path, state)
            layouts.take_grid(model, state)
    pretrained.check_fit(model, state, path)
    return model, state


def describe(model: nn.Module) -> dict[str, Any]:
    """Constructor keywords that make a backbone's like again; ``arch`` among them names it where it is no ViT."""
    return layouts.vit_arguments(model) if layouts.is_vit(model) else model.describe()


def description(path: str) -> dict[str, Any]:
    """The JSON beside a teacher (same name); empty if there is none. Raises ValueError without an ``architecture``."""
    try:
        record = read_record(path)
        return {} if record is None else record | {"architecture": dict(record["architecture"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(Path(path).with_suffix('.json'))!r} does not describe a teacher's architecture ({error!r}); mend or "
            "remove it."
        ) from error


def stated_backbone(path: str) -> nn.Module | None:
    """Build the backbone that the JSON beside a file states, a ViT without weights; None where nothing is stated."""
    described = description(path)
    arguments = described.get("architecture")
    if arguments is None:
        return None
    arch = arguments.pop("arch", None)
    if arch is None and "embed_dim" in arguments:
        make = DinoVisionTransformer
    else:
        if arch not in BACKBONES:  # a backbone's own name for itself; the one trained is in the run's configuration
            arch = _trained_arch(described) or arch
        if arch not in BACKBONES:
            raise ValueError(
                f"The JSON beside {path!r} names arch {arch!r}; one of {', '.join(BACKBONES)} is expected, or "
                "package.module:Name."
            )
        make = BACKBONES[arch]
        if ":" in arch and not _makes_modules(make):  # a file must not have any function called by naming it
            raise ValueError(
                f"The JSON beside {path!r} names arch {arch!r}, which is no backbone; a subclass of torch.nn.Module is "
                "expected, or a function that is annotated to return one."
            )
    try:
        if isinstance(depth := arguments.get("depth"), int) and depth > _MOST_BLOCKS:
            raise ValueError(f"depth is {depth}; at most {_MOST_BLOCKS} is expected")
        with torch.device("meta"):
            model = make(**arguments)
        # A ViT gets all its tensors from the file; others may have tables that no file holds.
        return model if layouts.is_vit(model) or layouts_dinov3.is_dinov3(model) else make(**arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"The architecture in the JSON beside {path!r} does not describe a backbone ({error})."
        ) from error


def _makes_modules(make: Any) -> bool:
    """Whether something is a class of modules, or a function that says it returns one."""
    if inspect.isfunction(make):
        try:
            make = inspect.signature(make, eval_str=True).return_annotation
        except (NameError, TypeError, ValueError):  # of what cannot be told
            return False
    return isinstance(make, type) and issubclass(make, nn.Module)


def _trained_arch(described: Mapping[str, Any]) -> str | None:
    try:
        return described["config"]["student"]["arch"]
    except (KeyError, TypeError):
        return None


def inferred_backbone(path: str, state: Mapping[str, Tensor], layout: str) -> nn.Module:
    """Build, without weights, the ViT that tensors under Meta's names are of; a ``config.json`` may tell its heads."""
    layouts.require_vit(path, state)
    is_dinov3 = "pos_embed" not in state
    beside, heads, eps = Path(path).with_name("config.json"), None, 1e-5 if is_dinov3 else layouts.LAYER_NORM_EPS
    config: dict[str, Any] = {}
    if layout != "meta" and beside.is_file():
        usual = "silu" if "blocks.0.mlp.w1.weight" in state else "gelu"
        try:
            config = json.loads(beside.read_text())
            config |= config.get("model_args", {})
            heads = config.get("num_attention_heads") or config.get("num_heads")
            activation, eps = config.get("hidden_act", usual), float(config.get("layer_norm_eps", eps))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{str(beside)!r} does not describe a model ({error!r}); mend or remove it.") from error
        if activation != usual:
            raise ValueError(f"{str(beside)!r} has hidden_act = {activation!r}, but this ViT has {usual!r}.")
        if heads is not None and not (isinstance(heads, int) and heads > 0):
            raise ValueError(f"{str(beside)!r} has {heads!r} attention heads; a positive number is expected.")
    with torch.device("meta"):
        if is_dinov3:
            model = layouts_dinov3.vit_from_shapes(path, state, config, eps)
        else:
            model = layouts.vit_from_shapes(path, state, layout, heads)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return model

"""Open a teacher from any of the layouts in which such weights are passed around."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2.hub import pretrained
from dinov2.hub.architecture import inferred_backbone, stated_backbone
from dinov2.hub.layouts import meta

POOLINGS = ("cls", "cls_mean")
"""What a teacher may return per image: the class token, or it and the mean patch token."""


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
        path: file, or a URL, which goes through torch.hub's cache.
        feature_map: return a `FeatureMap` of the backbone.
        output: an older name of ``pooling``.
        checkpoint_path: another name of ``path``.
        pooling: "cls" (the default), or "cls_mean" for a `ClassAndMean`.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a folder.
        ValueError: if it cannot be read, holds no backbone, or does not fit the architecture; or for wrong arguments.
    """
    if (path is None) == (checkpoint_path is None):
        raise ValueError(f"path is {path!r} and checkpoint_path {checkpoint_path!r}; one of them is expected.")
    pooling = pooling or output
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; one of {', '.join(POOLINGS)} is expected.")
    if feature_map and pooling != "cls":
        raise ValueError(f"A feature map has no class token; pooling = {pooling!r} goes with feature_map = False.")
    path = str(checkpoint_path if path is None else path)
    checkpoint = pretrained.read_checkpoint(path)
    model = stated_backbone(path)
    if model is None:
        state = pretrained.backbone_state_dict(checkpoint)
        model = inferred_backbone(path, state, pretrained.layout(pretrained.unwrapped(checkpoint)))
    else:
        state = pretrained.weights_for(model, checkpoint)
        if meta.is_vit(model):
            meta.require_vit(path, state)
            meta.take_grid(model, state)
    pretrained.check_fit(model, state, path)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, assign=True)
    if feature_map:
        return FeatureMap(model).eval()
    return ClassAndMean(model).eval() if pooling == "cls_mean" else model.eval()

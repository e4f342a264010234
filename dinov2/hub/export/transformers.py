"""Transformers' format: weights under its names, the configuration of the model, and that of its images."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.hub.export import dinov2, dinov3
from dinov2.hub.export.layout import Layout, Resampling, arguments_of, cast, preprocessor
from dinov2.hub.layouts import to_transformers, vit_arguments
from dinov2.hub.layouts_dinov3 import is_dinov3
from dinov2.hub.layouts_dinov3 import to_transformers as dinov3_to_transformers
from dinov2.hub.pixels import Colours


class Transformers(Layout):
    """ViTs of DINOv2 and DINOv3 that transformers has."""

    library = card_library = reader = "transformers"

    def files(
        self, model: nn.Module, dtype: torch.dtype, colours: Colours, record: Mapping[str, Any], scratch: Path
    ) -> dict[str, Any]:
        """Weights and both configurations."""
        rename = dinov3_to_transformers if is_dinov3(model) else to_transformers
        config = transformers_config(model, dtype)
        return {
            "model.safetensors": cast(rename(model.state_dict()), dtype),
            "preprocessor_config.json": preprocessor(arguments_of(model)["img_size"], colours),
            "config.json": config,
        }

    def opener(self, model: nn.Module, colours: Colours) -> Callable[[Path], nn.Module]:
        """By the class that ``config.json`` names, of which no weight may be missing."""
        return _open_folder

    def loading(self, repo: str) -> str:
        """By the classes that find the others."""
        return (
            "from transformers import AutoImageProcessor, AutoModel\n\n"
            f'model = AutoModel.from_pretrained("DIR").eval()  # or "{repo}"\n'
            'processor = AutoImageProcessor.from_pretrained("DIR")'
        )

    def resampling(self, num_registers: int) -> Resampling:
        """Without registers it does not antialias."""
        return num_registers > 0, 0.0


def transformers_config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Transformers' ``config.json``; raises ValueError where transformers has no such model."""
    if is_dinov3(model):
        return dinov3.transformers_config(model, dtype)
    return dinov2.transformers_config(vit_arguments(model), dtype)


def _open_folder(folder: Path) -> nn.Module:
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"transformers {transformers.__version__} reads other names than {str(folder)!r} has.")
    return model.eval()

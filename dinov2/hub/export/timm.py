"""Timm's format: weights under its names, and the arguments of ``create_model``."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.hub.export import dinov2, dinov3
from dinov2.hub.export.layout import Layout, Resampling, cast
from dinov2.hub.layouts import to_timm, vit_arguments
from dinov2.hub.layouts_dinov3 import is_dinov3
from dinov2.hub.layouts_dinov3 import to_timm as dinov3_to_timm
from dinov2.hub.pixels import Colours


class Timm(Layout):
    """ViTs of DINOv2 and DINOv3 that timm has."""

    library = card_library = reader = "timm"

    def files(
        self, model: nn.Module, dtype: torch.dtype, colours: Colours, record: Mapping[str, Any], scratch: Path
    ) -> dict[str, Any]:
        """Weights and ``config.json``."""
        config, rename = timm_config(model, colours), dinov3_to_timm if is_dinov3(model) else to_timm
        return {"model.safetensors": cast(rename(model.state_dict()), dtype), "config.json": config}

    def opener(self, model: nn.Module, colours: Colours) -> Callable[[Path], nn.Module]:
        """By the arguments in ``config.json``, strictly: "local-dir:" is known to newer versions of timm only."""
        return _open_folder

    def loading(self, repo: str) -> str:
        """By timm's names of places."""
        return (
            "import timm\n\n"
            f'model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # or "hf-hub:{repo}"\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        )

    def resampling(self, num_registers: int) -> Resampling:
        """All alike."""
        return True, 0.0


def timm_config(model: nn.Module, colours: Colours) -> dict[str, Any]:
    """timm's ``config.json``: the arguments of ``create_model``; raises ValueError where timm has no such model."""
    return dinov3.timm_config(model, colours) if is_dinov3(model) else dinov2.timm_config(vit_arguments(model), colours)


def _open_folder(folder: Path) -> nn.Module:
    import timm
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], **config["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()

"""Meta's format: the bare state dict, with a JSON that `dinov2.hub.load_teacher` reads."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.hub.export.layout import Layout, Resampling, cast
from dinov2.hub.export.timm import Timm, timm_config
from dinov2.hub.pixels import Colours
from dinov2.hub.teacher import describe


class Meta(Layout):
    """Of any backbone; one that is no ViT is written under its own names."""

    library = "timm"  # reads Meta's names too
    card_library = "path-fm"
    reader = "Meta's model"

    def files(
        self, model: nn.Module, dtype: torch.dtype, colours: Colours, record: Mapping[str, Any], scratch: Path
    ) -> dict[str, Any]:
        """Weights, and the teacher's JSON."""
        return {
            "backbone.pth": cast(model.state_dict(), dtype),
            "backbone.json": {**record, "architecture": describe(model)},
        }

    def opener(self, model: nn.Module, colours: Colours) -> Callable[[Path], nn.Module]:
        """Timm's models of such weights."""
        config = timm_config(model, colours)

        def open_folder(folder: Path) -> nn.Module:
            import timm

            weights = {"file": str(folder / "backbone.pth")}
            arguments = {**config["model_args"], "pretrained": True, "pretrained_cfg_overlay": weights}
            return timm.create_model(config["architecture"], **arguments).eval()

        return open_folder

    def loading(self, repo: str) -> str:
        """With Meta's code, whose architecture has to be named."""
        return (
            "import torch\n\n"
            'state = torch.load("DIR/backbone.pth", weights_only=True)  # for load_state_dict of Meta\'s model'
        )

    def resampling(self, num_registers: int) -> Resampling:
        """Without registers Meta's models do not antialias."""
        return num_registers > 0, 0.0 if num_registers else 0.1

    def verified_resampling(self, num_registers: int) -> Resampling:
        """Timm's."""
        return Timm().resampling(num_registers)

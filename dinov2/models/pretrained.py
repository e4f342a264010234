"""Published weights and teacher exports into a backbone, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.models.vision_transformer import resample_grid

_PUBLISHED = {"vit_small": "vits", "vit_base": "vitb", "vit_large": "vitl", "vit_giant2": "vitg"}
_SHOWN = 6  # keys named in an error


def published_url(arch: str, patch_size: int, num_register_tokens: int) -> str:
    """Address of Meta's weights of an architecture.

    Raises:
        ValueError: none are published for it.
    """
    if arch not in _PUBLISHED or patch_size != 14 or num_register_tokens not in (0, 4):
        raise ValueError(
            f"There are no published DINOv2 weights for {arch} with patch size {patch_size} and {num_register_tokens} "
            f"registers; they exist for {', '.join(_PUBLISHED)} with patch size 14 and 0 or 4 registers."
        )
    name = f"dinov2_{_PUBLISHED[arch]}14"
    return f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}{'_reg4' if num_register_tokens else ''}_pretrain.pth"


def read_checkpoint(path_or_url: str) -> Any:
    """Read a weights file on the CPU; a URL goes through torch.hub's cache. Only tensors and plain data load.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or is damaged; or the address cannot be read.
    """
    try:
        if re.match(r"https?://", path_or_url):
            return torch.hub.load_state_dict_from_url(path_or_url, map_location="cpu", weights_only=True)
        if not Path(path_or_url).is_file():
            raise FileNotFoundError(f"Weights file {path_or_url!r} does not exist; give a .pth file or a URL.")
        return torch.load(path_or_url, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"Weights {path_or_url!r} cannot be read ({detail}); a PyTorch .pth file is expected.") from error


def backbone_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the backbone in a checkpoint: our exports, OpenMidnight's and Midnight's, Meta's, with or without wrappers.

    Wrappers ``teacher``, ``model`` and ``state_dict``, prefixes ``module.`` and ``backbone.`` and chunked block
    names are undone.
    """
    state: Any = checkpoint
    for wrapper in ("teacher", "model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}


def load_pretrained(model: nn.Module, path_or_url: str) -> None:
    """Fill a backbone from a file, its position grid resampled (bicubic, antialiased, exact sides) to the model's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: keys or shapes do not fit; all are named.
    """
    checkpoint = read_checkpoint(path_or_url)
    state = backbone_state_dict(checkpoint) if isinstance(checkpoint, Mapping) else {}
    if "pos_embed" in state:
        state["pos_embed"] = _fit_positions(state["pos_embed"], model.pos_embed.shape)
    own = model.state_dict()
    faults = _list("missing", own.keys() - state.keys()) + _list("unknown", state.keys() - own.keys())
    faults += _list("of another shape", [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own.keys() & state.keys() if state[key].shape != own[key].shape
    ])  # fmt: skip
    if faults:
        raise ValueError(f"Weights {path_or_url!r} do not fit the model: {'; '.join(faults)}.")
    model.load_state_dict(state)


def _fit_positions(pos_embed: Tensor, shape: torch.Size) -> Tensor:
    """Resample (1, 1 + n, D) to the shape of the model's; left alone where it is no square grid of that width."""
    sides = [math.isqrt(max(count - 1, 0)) for count in (pos_embed.shape[1], shape[1])] if pos_embed.ndim == 3 else []
    if not sides or sides[0] == sides[1] or sides[0] ** 2 + 1 != pos_embed.shape[1]:
        return pos_embed
    grid = pos_embed[:, 1:].float().unflatten(1, (sides[0], sides[0])).permute(0, 3, 1, 2)
    grid = resample_grid(grid, (sides[1], sides[1]), antialias=True)
    return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)], dim=1)


def _list(what: str, names: Any) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"]

"""Published weights and teacher exports into a backbone, by name."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor, nn

from dinov2.hub import layouts

_PUBLISHED = {"vit_small": "vits", "vit_base": "vitb", "vit_large": "vitl", "vit_giant2": "vitg"}
# In the order in which they nest; the last two are those of transformers' models with heads.
_PREFIXES = ("module.", "teacher.", "backbone.", "dinov2.", "dinov2_with_registers.")
_SHOWN = 6  # keys named in an error


def published_url(arch: str, patch_size: int, num_register_tokens: int, ffn_layer: str | None = None) -> str:
    """Address of Meta's weights of an architecture; without a feed-forward layer that is left unchecked."""
    if arch not in _PUBLISHED or patch_size != 14 or num_register_tokens not in (0, 4):
        raise ValueError(
            f"There are no published DINOv2 weights for {arch} with patch size {patch_size} and {num_register_tokens} "
            f"registers; they exist for {', '.join(_PUBLISHED)} with patch size 14 and 0 or 4 registers."
        )
    published = ("swiglufused", "swiglu") if arch == "vit_giant2" else ("mlp",)
    if ffn_layer is not None and ffn_layer not in published:
        raise ValueError(
            f"The published {arch} weights do not fit ffn_layer = {ffn_layer!r}; they need {published[0]!r}."
        )
    name = f"dinov2_{_PUBLISHED[arch]}14"
    return f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}{'_reg4' if num_register_tokens else ''}_pretrain.pth"


def local_weights(path_or_url: str) -> Path:
    """Path of a weights file; what a URL names is downloaded to torch.hub's folder once for all processes."""
    url = urlsplit(path_or_url)
    if url.scheme not in ("http", "https"):
        return Path(url2pathname(url.path) if url.scheme == "file" else path_or_url)
    cache = Path(torch.hub.get_dir(), "checkpoints")
    cached_by_torch = cache / Path(url.path).name
    if cached_by_torch.is_file():
        return cached_by_torch
    from iopath.common.file_io import HTTPURLHandler, PathManager

    paths = PathManager()
    paths.register_handler(HTTPURLHandler())
    return Path(paths.get_local_path(path_or_url, cache_dir=str(cache)))


def read_checkpoint(path_or_url: str) -> Any:
    """Read a weights file on the CPU, see `local_weights`. Only tensors and plain data load.

    Raises FileNotFoundError or IsADirectoryError if there is no such file, or it is a folder; ValueError if the file
    holds something else, or is corrupt; or the address cannot be read.
    """
    if not re.match(r"(https?|file)://", path_or_url):
        if Path(path_or_url).is_dir():
            raise IsADirectoryError(f"{path_or_url!r} is a folder; name the .pth or .safetensors file in it.")
        if not Path(path_or_url).is_file():
            raise FileNotFoundError(f"Weights file {path_or_url!r} does not exist; give a .pth file or a URL.")
    try:
        path = local_weights(path_or_url)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the corrupt bytes lead to
        # What follows torch's first sentence is advice to load the file without its safeguard.
        detail = (" ".join(str(error).split()) or type(error).__name__).split(". ")[0][:200]
        raise ValueError(
            f"Weights {path_or_url!r} cannot be read ({detail}); a PyTorch .pth or a .safetensors file is expected."
        ) from error


def unwrapped(checkpoint: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint without wrappers (``teacher``, ``model``, ``state_dict``) and prefixes
    (``module.``, ``teacher.``, ``backbone.``, transformers' names of a backbone); keys without the prefix go.

    Where nothing of the kind is found the result is empty, or all there is.
    """
    state = checkpoint
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        return {}
    state = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)} or state
    return state


def layout(state: Mapping[str, Tensor]) -> str:
    """Whose names an `unwrapped` state dict has: "transformers", "timm" or, all others, "meta"."""
    if "embeddings.cls_token" in state:
        return "transformers"
    # timm's names are Meta's but for registers and SwiGLU, and no mask token.
    if {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        return "meta" if {"mask_token", "register_tokens"} & state.keys() else "timm"
    return "meta"


def backbone_state_dict(checkpoint: Any) -> dict[str, Tensor]:
    """Find the backbone in a checkpoint and give it Meta's names.

    Known are our exports, OpenMidnight's and Midnight's teachers, Meta's files, those of transformers and timm, with
    or without wrappers (see `unwrapped`) and chunked block names. Where nothing of the kind is found the result is
    empty or fits no model.
    """
    state = unwrapped(checkpoint)
    by_layout = {"transformers": layouts.from_transformers, "timm": layouts.from_timm, "meta": layouts.from_chunks}
    return by_layout[layout(state)](state)


def weights_for(model: nn.Module, checkpoint: Any) -> dict[str, Tensor]:
    """Find the backbone in a checkpoint under the names of a model: as they are where they fit, else Meta's."""
    state = unwrapped(checkpoint)
    return state if state.keys() == model.state_dict().keys() else backbone_state_dict(checkpoint)


def load_pretrained(model: nn.Module, path_or_url: str, positions: bool = True) -> None:
    """Fill a backbone from a file, its position grid resampled (bicubic, antialiased, exact sides) to the model's.

    Without ``positions`` the model keeps its own grid. Raises as `read_checkpoint` and `check_fit` do.
    """
    state = layouts.with_grid_of(model, weights_for(model, read_checkpoint(path_or_url)), own=not positions)
    check_fit(model, state, path_or_url)
    model.load_state_dict(state)


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Make sure that a state dict has exactly the keys and shapes of a model; raises ValueError, which names misfits.

    Weights with another number of registers are refused too: registers take part in every attention, so neither
    fresh ones nor their absence would leave the features as they were trained.
    """
    own = model.state_dict()
    registers = [layouts.num_registers(state), layouts.num_registers(own)]
    misfits = {
        "missing": own.keys() - state.keys(),
        "unknown": state.keys() - own.keys(),
        "of another shape": {
            f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        },
    }
    faults = [] if registers[0] == registers[1] else ["they have {} registers and the model {}".format(*registers)]
    for what, found in misfits.items():
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        faults += [f"{what}: {', '.join(sorted(found)[:_SHOWN])}{more}"] if found else []
    if faults:
        raise ValueError(f"Weights {source!r} do not fit the model: {'; '.join(faults)}.")

"""Published weights and teacher exports into a backbone, by name."""

import argparse
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.hub import layouts, layouts_dinov3, locate
from dinov2.hub.locate import INDEX, hub_id, no_such_file, weights_path
from dinov2.hub.record import verify

logger = logging.getLogger("dinov2")

_PUBLISHED = {"vit_small": "vits", "vit_base": "vitb", "vit_large": "vitl", "vit_giant2": "vitg"}
_SHOWN = 6  # keys named in an error
# What libraries put around modules of a network, anywhere in a name.
_AROUND = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Plain data that training loops save beside weights: options of DINO's and iBOT's runs, numbers of NumPy.
_SAFE = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
# Parts of a network beside its backbone, which no token passes.
_BESIDE = re.compile(r"(\w*heads?|\w*head_\w+|classifier|fc|linear|pooler|projector|predictor|decoder)\.")
# Outer names of a backbone whose own names are unknown, in the order in which they nest.
_OUTER = ("model_state_dict.", "model.", "state_dict.", "teacher.", "module.", "model.", "teacher.", "backbone.")


def published_url(arch: str, patch_size: int, num_register_tokens: int, ffn_layer: str | None = None) -> str:
    """Address of Meta's weights of an architecture; without a feed-forward layer that is left unchecked."""
    if arch.startswith("dinov3_"):
        raise ValueError(
            f"Meta gives out the weights of {arch} on request alone, so that they have no public address; name the "
            "file, folder or hub id in student.pretrained_weights."
        )
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
    if (cached := _cached_by_torch(path_or_url)).is_file():
        return cached
    from iopath.common.download import download
    from iopath.common.file_io import file_lock

    file = cache / url.path.lstrip("/")  # as iopath has it, but without the query, which may be secret
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(file)):
        if not file.is_file():
            download(path_or_url, str(file.parent), filename=file.name)
    return file


def _cached_by_torch(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)


def read_checkpoint(name: str) -> Any:
    """Read weights on the CPU, see `weights_path` and `local_weights`. Only tensors and plain data load.

    Raises FileNotFoundError or IsADirectoryError if there is no such file, or a folder holds not one; ValueError if the
    file holds something else, is corrupt or, see `verify`, not the one that was written; or the address cannot be read.
    """
    if not is_url(name):
        path = weights_path(name)
        if not path.is_file():
            raise no_such_file(name)
        verify(path)
        name = str(path)
    path = None
    try:
        path = local_weights(name)
        if not path.name.endswith(INDEX):
            return _read(path)
        parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {key: value for part in parts for key, value in _read(path.with_name(part)).items()}
    except Exception as error:  # torch.load raises whatever the corrupt bytes lead to
        # What follows torch's first sentence is advice to load the file without its safeguard.
        detail = (" ".join(str(error).split()) or type(error).__name__).split(". ")[0][:200]
        if not any(map(str.isalpha, detail)):  # a number, which the unpickler has stumbled over
            detail = "it is another kind of file"
        expected = "a PyTorch .pth or a .safetensors file is expected"
        if path and (classes := _foreign_classes(path)):
            detail = f"it holds objects of {', '.join(classes[:_SHOWN])}"
            expected = "tensors and plain data are expected, as torch.save(model.state_dict(), FILE) keeps them"
        raise ValueError(f"Weights {name!r} cannot be read ({detail}); {expected}.") from error


def check_found(name: str) -> None:
    """Make sure that weights are where a name says, without downloading them: see `weights_path`, or a URL.

    Raises FileNotFoundError or IsADirectoryError, and ValueError for an address of another kind.
    """
    if not is_url(name):
        locate.check_found(name)
    elif name.startswith("file:"):
        if not local_weights(name).is_file():
            raise no_such_file(name)
    elif not _cached_by_torch(name).is_file():
        try:
            urlopen(Request(name, method="HEAD"), timeout=10).close()
        except HTTPError as error:
            if error.code in (404, 410):  # some servers refuse the method, which says nothing
                raise no_such_file(name) from error
        except OSError as error:
            raise FileNotFoundError(f"Weights {name!r} cannot be asked for ({error}); check the address.") from error


def needs_download(name: str) -> bool:
    """Whether weights are neither on this machine nor in torch's cache of downloads; the hub's is not looked into."""
    if is_url(name):
        return not name.startswith("file:") and not _cached_by_torch(name).is_file()
    return hub_id(name) is not None and not locate.is_here(name)


def _read(path: Path) -> Any:
    # Files are renamed: their first bytes tell, where they are of either kind.
    with path.open("rb") as file:
        start = file.read(9)
    is_torch = start.startswith((b"PK\x03\x04", b"\x80"))
    header = int.from_bytes(start[:8], "little")
    if (path.suffix == ".safetensors" and not is_torch) or (start[8:] == b"{" and header < path.stat().st_size):
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals(_SAFE), path.open("rb") as file:  # of a path torch, too, asks the ending
        return torch.load(file, map_location="cpu", weights_only=True)


def _foreign_classes(path: Path) -> list[str]:
    """Classes and functions that a file of PyTorch needs and that are not loaded; empty where that cannot be told."""
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a file that is none, or corrupt
        return []


def is_url(name: str) -> bool:
    """Whether a name is an address and no path."""
    return re.match(r"(https?|file)://", name) is not None


def tensors_of(checkpoint: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors in nested mappings, by their keys joined with dots."""
    if isinstance(checkpoint, Tensor):
        return {_AROUND.sub("", path): checkpoint} if path else {}
    found: dict[str, Tensor] = {}
    if isinstance(checkpoint, Mapping):
        for key, value in checkpoint.items():
            if isinstance(key, str):
                found |= tensors_of(value, f"{path}.{key}" if path else key)
    return found


def backbone_prefix(state: Mapping[str, Tensor]) -> str | None:
    """What stands before the names of a ViT, by its class token and patch embedding; None where there is no ViT.

    Of several ViTs a teacher (or EMA) is taken before others, and a student last.
    """
    tokens = [key for key in state if key.rpartition(".")[2] == "cls_token"]
    prefixes = dict.fromkeys(key.removesuffix("cls_token").removesuffix("embeddings.") for key in tokens)
    whole = [p for p in prefixes if f"{p}patch_embed.proj.weight" in state or f"{p}embeddings.cls_token" in state]
    return min(whole or prefixes, key=_rank, default=None)


def _rank(prefix: str) -> int:
    words = set(re.split(r"[._]", prefix))
    return 0 if words & {"teacher", "ema"} else 2 if "student" in words else 1


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors under a prefix without it and without heads."""
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in inner.items() if not _BESIDE.match(key)}


def unwrapped(checkpoint: Any) -> dict[str, Tensor]:
    """The backbone's tensors in a checkpoint, without whatever stands before their names; heads beside it go.

    Where nothing of the kind is found the result is empty, or all there is.
    """
    state = tensors_of(checkpoint)
    prefix = backbone_prefix(state)
    if prefix is not None:
        return _below(state, prefix)
    for outer in _OUTER:
        state = {key.removeprefix(outer): value for key, value in state.items() if key.startswith(outer)} or state
    return state


def head_state_dict(checkpoint: Any, name: str) -> dict[str, Tensor]:
    """The head of a name (``dino_head``, ``ibot_head``) beside the backbone of a checkpoint; empty without one."""
    state = tensors_of(checkpoint)
    found = [re.match(rf"(.*\.)?{name}\.", key) for key in state]
    beside = min((match[0] for match in found if match), key=_rank, default=None)
    return {key.removeprefix(beside): value for key, value in state.items() if beside and key.startswith(beside)}


def layout(state: Mapping[str, Tensor]) -> str:
    """Whose names an `unwrapped` state dict has: "transformers", "timm" or, all others, "meta"."""
    if of_dinov3 := layouts_dinov3.layout(state):
        return of_dinov3
    if "embeddings.cls_token" in state:
        return "transformers"
    # timm's names are Meta's but for registers and SwiGLU, and no mask token.
    if {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        return "meta" if {"mask_token", "register_tokens"} & state.keys() else "timm"
    return "meta"


def backbone_state_dict(checkpoint: Any) -> dict[str, Tensor]:
    """Find the backbone in a checkpoint and give it Meta's names; a mask token that it has not is zero.

    Known are our exports, OpenMidnight's and Midnight's teachers, Meta's files, those of transformers and timm, of
    DINOv2, DINOv3 and plain ViTs, in any wrappers and with any heads beside them (see `unwrapped`), and chunked block
    names. Where nothing of the kind is found the result is empty or fits no model.
    """
    state = unwrapped(checkpoint)
    if layouts_dinov3.layout(state):
        return layouts_dinov3.to_meta(layouts.from_chunks(state))
    by_layout = {"transformers": layouts.from_transformers, "timm": layouts.from_timm, "meta": layouts.from_chunks}
    return by_layout[layout(state)](state)


def weights_for(model: nn.Module, checkpoint: Any) -> dict[str, Tensor]:
    """Find the backbone in a checkpoint under the names of a model: as they are where they fit, else Meta's."""
    state, names = tensors_of(checkpoint), list(model.state_dict())
    prefixes = dict.fromkeys(key.removesuffix(names[0]) for key in state if key.endswith(names[0]))
    whole = [prefix for prefix in prefixes if all(prefix + name in state for name in names)]
    if not whole:
        return backbone_state_dict(checkpoint)
    found = _below(state, min(whole, key=_rank))
    return layouts.with_mask_token(found) if {"mask_token", "cls_token"} <= set(names) else found


def load_pretrained(model: nn.Module, name: str, positions: bool = True) -> Any:
    """Fill a backbone from weights, their position grid resampled (bicubic, antialiased, exact sides) to the model's.

    Without ``positions`` the model keeps its own grid. Weights without LayerScale are those of gains of one. Returns
    the checkpoint; raises as `read_checkpoint` and `check_fit` do.
    """
    checkpoint = read_checkpoint(name)
    state, notes = starting_state(model, checkpoint, positions)
    check_fit(model, state, name)
    model.load_state_dict(state)
    for note in notes:
        logger.info("Weights %r %s.", name, note)
    return checkpoint


def starting_state(
    model: nn.Module, checkpoint: Any, positions: bool = True
) -> tuple[dict[str, Tensor], Sequence[str]]:
    """What `load_pretrained` makes of a checkpoint for a model, which may be on the meta device, and notes on that."""
    state, notes = layouts.with_grid_of(model, weights_for(model, checkpoint), own=not positions), []
    if layouts_dinov3.is_dinov3(model) and "pos_embed" not in state and "cls_token" in state:
        state, notes = layouts_dinov3.completed(model, state)
    has_gains = layouts.is_vit(model) or layouts_dinov3.is_dinov3(model)
    gains = {key: value for key, value in model.state_dict().items() if has_gains and ".ls" in key}
    if gains and "cls_token" in state and not gains.keys() & state.keys():
        notes.append("have no LayerScale: its gains start at one, which leaves their function")
        state |= {key: torch.ones_like(value) for key, value in gains.items()}
    return state, notes


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Make sure that a state dict is what `check_shapes` expects, and finite; raises ValueError."""
    check_shapes(model, state, source)
    masks = [key for key in state if key.endswith("bias_mask")]
    read = {name: state[name] for name in (*dict(model.named_parameters()), *masks)}
    check_finite({name: value for name, value in read.items() if not value.is_meta}, source)


def check_shapes(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Make sure that a state dict has exactly the keys and shapes of a model; reads no values.

    Raises ValueError, which says both sizes where a ViT's differ, else names misfits.
    Weights with another number of registers are refused too: registers take part in every attention, so neither
    fresh ones nor their absence would leave the features as they were trained.
    """
    own = model.state_dict()
    theirs, ours = layouts.traits(state), layouts.traits(own)
    faults = []
    if unequal := [what for what in theirs if what in ours and theirs[what] != ours[what]]:
        their, our = (", ".join(traits[what] for what in unequal) for traits in (theirs, ours))
        faults = [f"they have {their}, the model {our}"]
    else:
        misfits = {
            "missing": own.keys() - state.keys(),
            "unknown": state.keys() - own.keys(),
            "of another shape": {
                f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
                for key in own.keys() & state.keys()
                if state[key].shape != own[key].shape
            },
        }
        for what, found in misfits.items():
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            faults += [f"{what}: {', '.join(sorted(found)[:_SHOWN])}{more}"] if found else []
    if faults:
        raise ValueError(f"Weights {source!r} do not fit the model: {'; '.join(faults)}.")
    other = {
        str(state[name].dtype).removeprefix("torch."): name
        for name, value in own.items()
        if _differs(state[name], value)
    }
    if other:
        found = ", ".join(f"{dtype} in {name}" for dtype, name in other.items())
        raise ValueError(f"Weights {source!r} hold {found}; floating-point numbers are expected (fp32, fp16, bf16).")


def _differs(found: Tensor, expected: Tensor) -> bool:
    return expected.is_floating_point() and not found.is_floating_point()


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Make sure that weights are finite; raises ValueError, which names those that are not."""
    broken = [key for key, tensor in state.items() if not tensor.float().isfinite().all()]
    if broken:
        more = f" and {len(broken) - _SHOWN} more tensors" if len(broken) > _SHOWN else ""
        raise ValueError(
            f"Weights {source!r} hold values that are not finite in {', '.join(broken[:_SHOWN])}{more}; a run that "
            "diverged saves such: take an earlier checkpoint."
        )

"""From the name of weights to a file here: a path, a folder of timm or transformers, an id on the Hugging Face hub."""

import json
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

logger = logging.getLogger("dinov2")

# In the order in which a folder of several is searched; the indexes name the parts of weights that are split.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_CONFIGS = ("config.json", "preprocessor_config.json")
_HUB = re.compile(
    r"(?P<scheme>hf[-_]hub:|hf://)?(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[^/@]+))?"
    r"(/(?P<file>.+))?"
)
_SCHEME = re.compile(r"(?!https?:|file:|hf:)[A-Za-z][A-Za-z0-9+.-]*://")
_EXPORTS = "training_[0-9]*/teacher_checkpoint.pth"
INDEX = ".index.json"
"""Ending of a file that lists the files over which weights are split."""


def weights_path(name: str) -> Path:
    """Path of the file that a name means, its index where it is split; paths of files stay as they are, there or not.

    Names are a file; a folder that holds one (``model.safetensors`` of several; timm's ``local-dir:`` may stand
    before it); the folder of a run, or its ``eval``, of which the newest teacher is taken; ``org/name[@revision]`` on
    the hub, timm's ``hf-hub:org/name``, or ``hf://org/name[@revision][/file]``.
    What is here wins over the hub, from which weights are downloaded to its cache once, with their configurations.

    Raises ValueError for a URL of a scheme that is not read; IsADirectoryError if a folder holds no weights, or
    several; FileNotFoundError if the hub has none of the
    name, or no answer.
    """
    if _SCHEME.match(name) and not hub_id(name):
        raise ValueError(
            f"Weights {name!r} have an address that is not read; http, https and file URLs, hf://org/name[/file] and "
            "local paths are."
        )
    path = _local(name)
    if path.is_dir():
        if export := newest_export(path):
            return export
        files = [entry.name for entry in path.iterdir() if entry.is_file()]
        return path / _chosen(repr(str(path)), files)
    if path.exists() or not (hub := hub_id(name)):
        return path
    return _from_hub(hub)


def newest_export(folder: Path) -> Path | None:
    """The teacher of the latest step in the folder of a run, or in its ``eval``; None where it holds none."""
    exports = [*folder.glob(f"eval/{_EXPORTS}"), *folder.glob(_EXPORTS)]
    return max(exports, key=lambda path: int(path.parent.name.partition("_")[2]), default=None)


def teacher_file(name: str) -> str:
    """The name of one file in place of a run's folder, whose newest teacher may be another one by and by."""
    path = Path(name).expanduser()
    export = newest_export(path) if path.is_dir() else None
    if export is None and (path / "checkpoints").is_dir():
        raise FileNotFoundError(f"Run '{name}' has exported no teacher yet; pathfm train --eval-only exports one.")
    if export:
        logger.info("The teacher is '%s'.", export)
    return str(export or name)


def check_found(name: str) -> None:
    """Make sure that weights named as in `weights_path` are there; asks the hub, but downloads none.

    Raises as `weights_path`, and FileNotFoundError if there is no such file here.
    """
    path = _local(name)
    if not path.exists() and (hub := hub_id(name)):
        _from_hub(hub, download=False)
    elif not weights_path(name).is_file():
        raise no_such_file(name)


def is_here(name: str) -> bool:
    """Whether a name is that of a file or folder on this machine."""
    return _local(name).exists()


def _local(name: str) -> Path:
    return Path(name.removeprefix("local-dir:")).expanduser()


def no_such_file(name: str) -> FileNotFoundError:
    """The error of weights that are not there."""
    return FileNotFoundError(
        f"Weights file {name!r} does not exist; give a .pth or .safetensors file, a folder of timm or transformers, "
        "org/name on the Hugging Face hub, or a URL."
    )


def hub_id(name: str) -> re.Match[str] | None:
    """The parts of a name on the hub: ``repo``, ``revision``, ``file``; None where it can only be a path or a URL."""
    found = _HUB.fullmatch(name)
    if found and not found["scheme"] and (found["file"] or name.endswith((*_ENDINGS, ".json"))):
        return None
    return found


def _chosen(place: str, files: Collection[str]) -> str:
    """The weights among the files of a folder."""
    weights = sorted(file for file in files if file.endswith(_ENDINGS) and not file.startswith("."))
    for name in _NAMES:
        if name in files:
            return name
    if len(weights) == 1:
        return weights[0]
    found = ", ".join(weights[:6]) or "there is none"
    raise IsADirectoryError(f"{place} is a folder; name the .pth or .safetensors file in it ({found}).")


def _from_hub(hub: re.Match[str], download: bool = True) -> Path:
    """The file in the hub's cache, downloaded where that is not forbidden; its name there alone if it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, revision, file = hub["repo"], hub["revision"], hub["file"]
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    place = f"'{repo}' on the Hugging Face hub"
    try:
        try:
            info = api.model_info(repo, revision=revision, timeout=10)
            files = [sibling.rfilename for sibling in info.siblings or ()]
        except HfHubHTTPError:
            raise
        except Exception as error:  # of some HTTP library: no answer, so what an earlier download has left will do
            try:
                folder = Path(api.snapshot_download(repo, revision=revision, local_files_only=True))
            except LocalEntryNotFoundError:
                raise error from None
            files, download = [str(path.relative_to(folder)) for path in folder.rglob("*")], False
        else:
            folder = Path()
        file = file or _chosen(place, files)
        if download and file in files:
            wanted = [file, str(PurePosixPath(file).with_suffix(".json")), *_CONFIGS]
            if file.endswith(INDEX):
                split = Path(api.snapshot_download(repo, revision=revision, allow_patterns=[file]), file)
                wanted += set(json.loads(split.read_text())["weight_map"].values())
            folder = Path(api.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except IsADirectoryError:
        raise
    except Exception as error:  # of the hub's library, or of the HTTP library that it uses
        reason = " ".join(str(error).split())[:300]
        here = f"There is no local path {os.fspath(hub[0])!r}, and " if not hub["scheme"] else ""
        raise FileNotFoundError(f"{here}{place} cannot be read ({reason}).") from error
    if file not in files:
        raise FileNotFoundError(f"{place} holds no file {file!r}.")
    return folder / file

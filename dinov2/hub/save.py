"""Teachers and exports as files that are whole or absent, each named after its contents are on the disk."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.hub.record import sealed
from dinov2.utils.files import checksum, replacing


def save_teacher(path: Path, modules: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any]) -> str:
    """Write ``{"teacher": {"backbone.*", "dino_head.*", "ibot_head.*"}}`` in fp32, then the JSON that vouches for it.

    ``modules`` are the whole state dicts by name. The JSON beside the ``.pth`` holds the ``metadata``: ``architecture``
    (the backbone's constructor arguments), ``step``, ``samples``, ``config``; and checksums of both. Returns that of
    the weights. Raises FileExistsError where one of them is there with other contents; the same ones stay.
    """
    teacher = {
        f"{module}.{key}": tensor.float() if tensor.is_floating_point() else tensor
        for module, state in modules.items()
        for key, tensor in state.items()
    }
    with _readable_errors(f"Teacher {str(path)!r}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, path.with_suffix(".json"), new=True) as (weights, described):
            _write(weights, ".pth", {"teacher": teacher})
            written = checksum(weights)
            _write(described, ".json", sealed(metadata, written))
    return written


def write_new(folder: Path, files: Mapping[str, Mapping[str, Any] | str | Path]) -> bool:
    """Write all files of an export, or none; returns False where the very same ones are there already.

    ``files`` are contents by name, in the order in which they appear: texts, files that are moved here, and mappings,
    ``.json`` as JSON, ``.safetensors`` and ``.pth`` as tensors. A JSON after weights of the same stem gets checksums of
    both. Raises FileExistsError where one of them is there with other contents.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"Output {str(folder)!r} is a file; name a new or empty folder.")
    paths = [folder / name for name in files]
    with _readable_errors(f"Output {str(folder)!r}"):
        folder.mkdir(parents=True, exist_ok=True)
        complete = all(path.exists() for path in paths)
        with replacing(*paths, new=True) as partials:
            checksums: dict[str, str] = {}  # of weights, by stem
            for path, partial, content in zip(paths, partials, files.values(), strict=True):
                if path.suffix == ".json" and path.stem in checksums:
                    content = sealed(content, checksums[path.stem])
                _write(partial, path.suffix, content)
                if path.suffix not in (".json", ".md"):
                    checksums[path.stem] = checksum(partial)
    return not complete


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
        raise OSError(f"{what} cannot be written ({error}); make room or mend the folder.") from error


def _write(path: Path, suffix: str, content: Mapping[str, Any] | str | Path) -> None:
    if isinstance(content, Path):
        path.touch()
        mode = path.stat().st_mode
        shutil.move(content, path)
        path.chmod(mode)
    elif isinstance(content, str):
        path.write_text(content)
    elif suffix == ".json":
        path.write_text(json.dumps(dict(content), indent=1) + "\n")
    elif suffix == ".safetensors":
        from safetensors.torch import save_file

        path.touch()
        mode = path.stat().st_mode
        save_file(dict(content), path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors lets nobody but the owner read
    else:
        # An open file has no name that torch would store in it: equal weights are equal bytes.
        with path.open("wb") as file:
            torch.save(dict(content), file)

"""Files of an export, none of which replaces one that is there."""

from __future__ import annotations

import filecmp
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_new(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Write all files of an export, or none; returns False where the very same ones are there already.

    Args:
        folder: made where it does not exist.
        files: contents by name, in the order in which they appear: ``.json`` as JSON, ``.safetensors`` and ``.pth``
            as tensors.

    Raises:
        FileExistsError: one of them is there with other contents.
        OSError: they cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"Output {str(folder)!r} is a file; name a new or empty folder.")
    unfinished = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
        for name, content in files.items():
            _write(unfinished / name, content)
        there = [name for name in files if (folder / name).exists()]
        for name in there:
            if not filecmp.cmp(folder / name, unfinished / name, shallow=False):
                raise FileExistsError(
                    f"{str(folder / name)!r} exists and differs from this export; name a new or empty folder."
                )
        for name in files.keys() - set(there):
            (unfinished / name).rename(folder / name)
        return len(there) < len(files)
    except FileExistsError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
        raise OSError(
            f"Output {str(folder)!r} cannot be written ({error}); make room or mend the folder."
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(content, indent=1) + "\n")
    elif path.suffix == ".safetensors":
        path.touch()
        mode = path.stat().st_mode
        save_file(dict(content), path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors lets nobody but the owner read
    else:
        torch.save(dict(content), path)

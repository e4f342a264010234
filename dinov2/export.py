"""Write a teacher to a file that other tools open, with a JSON beside it that says what it is.

``python -m dinov2.export`` turns such a file, or any that `dinov2.hub.load_teacher` opens, into other libraries'.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.hub.export.command import main

__all__ = ["main", "save_teacher"]


def save_teacher(
    path: Path, modules: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any]
) -> None:
    """Write ``{"teacher": {"backbone.*", "dino_head.*", "ibot_head.*"}}`` in fp32, then the JSON, atomically.

    Args:
        path: target ``.pth``; the JSON has the same name with ``.json``.
        modules: whole state dict of each module by name.
        metadata: JSON-serialisable: ``architecture`` (the backbone's constructor arguments), ``step``,
            ``samples``, ``config``.

    Raises:
        OSError: the files cannot be written.
    """
    teacher = {
        f"{module}.{key}": tensor.float() if tensor.is_floating_point() else tensor
        for module, state in modules.items()
        for key, tensor in state.items()
    }
    beside, json_beside = (
        path.with_name(f"{path.stem}{kind}.tmp{os.getpid()}") for kind in (".pth", ".json")
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"teacher": teacher}, beside)
        json_beside.write_text(json.dumps(dict(metadata), indent=1))
        json_beside.replace(path.with_suffix(".json"))
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
        for unfinished in (beside, json_beside):
            unfinished.unlink(missing_ok=True)
        raise OSError(
            f"Teacher {str(path)!r} cannot be written ({error}); make room or mend the folder."
        ) from error


if __name__ == "__main__":
    sys.exit(main())

"""How a teacher was trained, as far as the JSON beside it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PLACES = {
    "step": ("step",),
    "size": ("config", "crops", "global_crops_size"),
    "mean": ("config", "augmentation", "normalize_mean"),
    "std": ("config", "augmentation", "normalize_std"),
}


def trained_with(checkpoint: str) -> dict[str, Any]:
    """``step``, ``size`` of global crops in px, ``mean`` and ``std`` of the normalisation; what is unknown left out."""
    beside = Path(checkpoint).with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        record = json.loads(beside.read_text())
    except ValueError as error:
        raise ValueError(f"{str(beside)!r} is not JSON ({error}); mend or remove it.") from error
    found = {key: _look_up(record, place) for key, place in _PLACES.items()}
    return {key: value for key, value in found.items() if value is not None}


def _look_up(record: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record

"""The JSON beside a teacher: how it was trained, and how its images are normalised."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov2.data.augment.normalize import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub.locate import INDEX, weights_path

_LOCATIONS = {
    "step": ("step",),
    "size": ("config", "crops", "global_crops_size"),
    "mean": ("config", "augmentation", "normalize_mean"),
    "std": ("config", "augmentation", "normalize_std"),
}
# Where the files of transformers and timm state the normalisation of images.
_OTHERS = {
    "preprocessor_config.json": {"mean": ("image_mean",), "std": ("image_std",)},
    "config.json": {"mean": ("pretrained_cfg", "mean"), "std": ("pretrained_cfg", "std")},
}


def read_record(checkpoint: str) -> Any:
    """Content of the JSON of a teacher's name; None where there is none. Raises ValueError, or as `weights_path`."""
    file = weights_path(checkpoint)
    return None if file.name.endswith(INDEX) else _read(file.with_suffix(".json"))


def _read(beside: Path) -> Any:
    if not beside.is_file():
        return None
    try:
        return json.loads(beside.read_text())
    except ValueError as error:
        raise ValueError(f"{str(beside)!r} is not JSON ({error}); mend or remove it.") from error


def trained_with(checkpoint: str) -> dict[str, Any]:
    """``step``, ``size`` of global crops in px, ``mean`` and ``std`` of the normalisation; what is unknown left out."""
    found = _found(read_record(checkpoint), _LOCATIONS)
    file = weights_path(checkpoint)
    if not found and (file.suffix in (".safetensors", ".bin") or file.name.endswith(INDEX)):
        for name, locations in _OTHERS.items():
            found = _found(_read(file.with_name(name)), locations) | found
    return found


def _found(record: Any, locations: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    found = {}
    for name, location in locations.items():
        value = record
        for key in location:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found[name] = value
    return found


def normalisation(
    checkpoint: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and deviation of a teacher's images, per channel: those asked for, or of training, or ImageNet's.

    Both are of values in [0, 1]; the third is where they are from, in words. Raises ValueError where they do not
    normalise such values.
    """
    trained, chosen, words = trained_with(checkpoint), [], []
    for key, asked, imagenet in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
        origins = {"as asked": asked, "of training": trained.get(key), "of ImageNet": imagenet}
        origin, value = next(item for item in origins.items() if item[1])
        chosen.append(value)
        words.append(f"{key} {value} {origin}")
    try:
        mean, std = (tuple(map(float, value)) for value in chosen)
        fit = all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(mean, std, strict=True)) and len(mean) > 0
    except (TypeError, ValueError):
        fit = False
    if not fit:
        raise ValueError(
            f"{', '.join(words)} does not normalise values in [0, 1]; a mean and a positive std of such are expected."
        )
    return mean, std, ", ".join(words)

"""The JSON beside a teacher: how it was trained, how its images are normalised, and the checksums of both files."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dinov2.data.augment.normalize import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub.locate import INDEX, weights_path
from dinov2.utils import files

_CHECKSUMS = "checksums"
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
    if not beside.is_file() and not beside.is_symlink():  # a link that leads nowhere is none that is not there
        return None
    try:
        return json.loads(beside.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(beside)!r} is not JSON ({error}); mend or remove it.") from error


def sealed(record: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """A record with the checksum of the file of weights beside it, see `files.checksum`, and its own."""
    record = {key: value for key, value in json.loads(json.dumps(dict(record))).items() if key != _CHECKSUMS}
    return record | {_CHECKSUMS: {"weights": weights, "record": _checksum(record)}}


def verify(file: Path) -> None:
    """Raise ValueError where weights, or the JSON beside them, are not what the checksums in it are of.

    Without such a JSON, or checksums in it, nothing is known.
    """
    record = None
    with suppress(ValueError):  # whoever needs it says so
        record = _read(file.with_suffix(".json"))
    if not isinstance(record, dict) or _CHECKSUMS not in record:
        return
    stated, beside = record.pop(_CHECKSUMS), file.with_suffix(".json")
    found = {"weights": files.checksum(file), "record": _checksum(record)}
    if stated == found:
        return
    differing = [key for key in found if not isinstance(stated, Mapping) or stated.get(key) != found[key]] or ["record"]
    path = file if differing[0] == "weights" else beside
    raise ValueError(
        f"{str(path)!r} is not the file that was written: its checksum is {found[differing[0]]}, and {beside.name} "
        f"states checksums = {stated!r:.200}; get both files anew, or remove that key if the change is meant."
    )


def _checksum(record: Mapping[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


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

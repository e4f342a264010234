"""Data: from stored tiles to augmented, masked batches."""

from importlib import import_module
from typing import Any

# Loaded at first use: the commands that only read slides or footers then start without torch.
_HOMES = {
    "AugmentationStep": "dinov2.data.augment.step",
    "DataAugmentationDINO": "dinov2.compat.data",
    "EncodedSample": "dinov2.data.source",
    "IMAGENET_MEAN": "dinov2.data.augment.normalize",
    "IMAGENET_STD": "dinov2.data.augment.normalize",
    "MaskingGenerator": "dinov2.compat.data",
    "MultiCropAugmentation": "dinov2.data.augment.multi_crop",
    "MultiCropCollate": "dinov2.data.augment.collate",
    "MultiCrops": "dinov2.data.augment.multi_crop",
    "Sample": "dinov2.data.augment.collate",
    "StratifiedMasks": "dinov2.data.augment.masking",
    "View": "dinov2.data.augment.step",
    "block_mask": "dinov2.data.augment.masking",
    "collate_data_and_cast": "dinov2.compat.data",
    "normalize": "dinov2.data.augment.normalize",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

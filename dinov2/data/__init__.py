"""Data: from stored tiles to augmented, masked batches."""

from importlib import import_module
from typing import Any

# Loaded at first use: the commands that only read slides or footers then start without torch.
_HOMES = {
    "IMAGENET_MEAN": "normalization",
    "IMAGENET_STD": "normalization",
    "AugmentationOptions": "augmentation_options",
    "BatchedAugmentation": "batched_augmentation",
    "DataAugmentationDINO": "augmentations",
    "DeferredAugmentation": "batched_augmentation",
    "EncodedSample": "sample",
    "MaskingGenerator": "masking",
    "MultiCropAugmentation": "augmentations",
    "MultiCropCollate": "collate",
    "MultiCrops": "augmentations",
    "Sample": "sample",
    "StratifiedMasks": "masking",
    "ViewParameters": "views",
    "block_mask": "masking",
    "collate_data_and_cast": "collate",
    "normalize": "normalization",
    "sample_view": "views",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

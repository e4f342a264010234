"""Data: from stored tiles to augmented, masked batches."""

from importlib import import_module
from typing import Any

# Loaded at first use: the commands that only read slides or footers then start without torch.
_HOMES = {
    "IMAGENET_MEAN": "augment.normalize",
    "IMAGENET_STD": "augment.normalize",
    "AugmentationOptions": "augment.options",
    "BatchedAugmentation": "augment.batched_augmentation",
    "DataAugmentationDINO": "augment.multi_crop",
    "DeferredAugmentation": "augment.batched_augmentation",
    "EncodedSample": "source",
    "MaskingGenerator": "augment.masking",
    "MultiCropAugmentation": "augment.multi_crop",
    "MultiCropCollate": "augment.collate",
    "MultiCrops": "augment.multi_crop",
    "Sample": "augment.collate",
    "StratifiedMasks": "augment.masking",
    "ViewParameters": "augment.views",
    "block_mask": "augment.masking",
    "collate_data_and_cast": "augment.collate",
    "normalize": "augment.normalize",
    "sample_view": "augment.views",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""Data: from stored tiles to augmented, masked batches."""

from importlib import import_module
from typing import Any

_NAMES = {
    "dinov2.compat.data": ("DataAugmentationDINO", "MaskingGenerator", "collate_data_and_cast"),
    "dinov2.data.augment.collate": ("MultiCropCollate", "Sample"),
    "dinov2.data.augment.masking": ("StratifiedMasks", "block_mask"),
    "dinov2.data.augment.multi_crop": ("MultiCropAugmentation", "MultiCrops"),
    "dinov2.data.augment.normalize": ("IMAGENET_MEAN", "IMAGENET_STD", "normalize"),
    "dinov2.data.augment.step": ("AugmentationStep", "View"),
    "dinov2.data.source": ("EncodedSample",),
}
__all__ = sorted(name for names in _NAMES.values() for name in names)


def __getattr__(name: str) -> Any:
    # Loaded at first use: the commands that only read slides or footers then start without torch.
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""Data: from stored tiles to augmented, masked batches."""

from dinov2.utils.lazy import lazy_names

_NAMES = {
    "dinov2.compat.data": ("DataAugmentationDINO", "MaskingGenerator", "collate_data_and_cast"),
    "dinov2.data.augment.collate": ("MultiCropCollate", "Sample"),
    "dinov2.data.augment.masking": ("StratifiedMasks", "block_mask"),
    "dinov2.data.augment.multi_crop": ("MultiCropAugmentation", "MultiCrops"),
    "dinov2.data.augment.normalize": ("IMAGENET_MEAN", "IMAGENET_STD", "normalize"),
    "dinov2.data.augment.step": ("AugmentationStep", "View"),
    "dinov2.data.source": ("EncodedSample",),
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES)

"""Data: from stored tiles to augmented, masked batches."""

from dinov2.data.augmentation_options import AugmentationOptions
from dinov2.data.augmentations import DataAugmentationDINO, MultiCropAugmentation, MultiCrops
from dinov2.data.batched_augmentation import BatchedAugmentation, DeferredAugmentation
from dinov2.data.collate import MultiCropCollate, collate_data_and_cast
from dinov2.data.masking import MaskingGenerator, StratifiedMasks, block_mask
from dinov2.data.normalization import IMAGENET_MEAN, IMAGENET_STD, normalize
from dinov2.data.sample import EncodedSample, Sample
from dinov2.data.views import ViewParameters, sample_view

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AugmentationOptions",
    "BatchedAugmentation",
    "DataAugmentationDINO",
    "DeferredAugmentation",
    "EncodedSample",
    "MaskingGenerator",
    "MultiCropAugmentation",
    "MultiCropCollate",
    "MultiCrops",
    "Sample",
    "StratifiedMasks",
    "ViewParameters",
    "block_mask",
    "collate_data_and_cast",
    "normalize",
    "sample_view",
]

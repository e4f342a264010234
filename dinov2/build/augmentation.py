"""Augmentation, collate function and batches on the device, as a configuration states them."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dinov2.configs import Config
from dinov2.configs.schema import AugmentationConfig
from dinov2.data import MultiCropAugmentation, MultiCropCollate, normalize
from dinov2.data.augment.step import AugmentationStep
from dinov2.data.stream.to_device import on_device
from dinov2.extensions import AUGMENTATIONS, BUILT_IN_STEPS

_CROPS = ("global_crops", "local_crops", "gram_crops")


def build_steps(augmentation: AugmentationConfig) -> dict[str, AugmentationStep]:
    """Steps of the augmentation by name, in the order of application.

    The built-in ones are followed by those of ``augmentation.steps`` in the order given there, but for those that
    name a built-in step to stand in front of.
    """
    added = {name: AUGMENTATIONS[name](options) for name, options in augmentation.steps.items()}
    steps: dict[str, AugmentationStep] = {}
    for built_in in BUILT_IN_STEPS:
        steps |= {name: step for name, step in added.items() if step.before == built_in}
        steps[built_in] = AUGMENTATIONS[built_in](augmentation)
    return steps | {name: step for name, step in added.items() if name not in steps}


def build_augmentation(config: Config) -> MultiCropAugmentation:
    """The multi-crop transform of the configuration."""
    steps = build_steps(config.augmentation)
    crops = dataclasses.asdict(config.crops)
    return MultiCropAugmentation(steps, **crops, patch_size=config.student.patch_size, seed=config.train.seed)


def build_collate(config: Config) -> MultiCropCollate:
    """The collate function of the configuration, which also draws the masks."""
    ibot, patch_size, size = config.ibot, config.student.patch_size, config.crops.global_crops_size
    return MultiCropCollate(config.train.seed, patch_size, ibot.mask_sample_probability, ibot.mask_ratio_min_max, size)


def device_batches(batches: Iterable[dict[str, Any]], config: Config, device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches on the device, where their crops are normalised to float32."""
    mean, std = config.augmentation.normalize_mean, config.augmentation.normalize_std

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {name: normalize(batch[name], mean, std) for name in _CROPS if name in batch}

    return on_device(batches, device, prepare)

"""From configuration to parts: the only place where config objects meet the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from dinov2.build.data import OpenData, prefetch_for
from dinov2.configs import Config
from dinov2.data import (
    AugmentationOptions,
    BatchedAugmentation,
    DeferredAugmentation,
    MultiCropAugmentation,
    MultiCropCollate,
    normalize,
)
from dinov2.data.stream.loader import TrainLoader, make_train_loader
from dinov2.data.stream.to_device import DeviceBatches
from dinov2.distributed import get_global_rank, get_global_size
from dinov2.train.plan.plan import RunPlan


def build_augmentation(config: Config) -> MultiCropAugmentation:
    """The multi-crop transform of the configuration."""
    options = {
        field.name: getattr(config.augmentation, field.name)
        for field in dataclasses.fields(AugmentationOptions)
    }
    crops = config.crops
    return MultiCropAugmentation(
        AugmentationOptions(**options),
        crops.global_crops_scale,
        crops.local_crops_scale,
        crops.local_crops_number,
        crops.global_crops_size,
        crops.local_crops_size,
        seed=config.train.seed,
        backend=config.augmentation.backend,
    )


def build_collate(config: Config) -> MultiCropCollate:
    """The collate function of the configuration, which also draws the masks."""
    ibot = config.ibot
    return MultiCropCollate(
        config.train.seed,
        config.student.patch_size,
        ibot.mask_sample_probability,
        ibot.mask_ratio_min_max,
        config.crops.global_crops_size,
    )


def build_loader(
    config: Config,
    plan: RunPlan,
    data: OpenData,
    start_sample: int,
    order: dict[str, int],
    device: torch.device,
) -> TrainLoader:
    """This rank's training loader.

    Args:
        config: validated configuration.
        plan: of the run.
        data: from `open_data`.
        start_sample: samples consumed so far.
        order: ``seed``, ``lanes`` and ``block_rows`` of the sample order.
        device: where batches go.
    """
    source, transform = data.source, build_augmentation(config)
    return make_train_loader(
        source,
        DeferredAugmentation(transform) if config.train.augmentation_device == "gpu" else transform,
        build_collate(config),
        global_batch=plan.global_batch,
        rank=get_global_rank(),
        world_size=get_global_size(),
        start_sample=start_sample,
        order=data.order(**order),
        num_workers=config.train.num_workers,
        prefetch=prefetch_for(config, source),
        prefetch_factor=config.train.prefetch_factor,
        pin_memory=device.type == "cuda",
        max_damaged_share=config.train.max_damaged_share,
    )


def device_batches(batches: Iterable[dict[str, Any]], config: Config, device: torch.device) -> DeviceBatches:
    """Batches on the device, where crops are normalised to float32 and, if so configured, rendered before."""
    mean, std = config.augmentation.normalize_mean, config.augmentation.normalize_std
    render = BatchedAugmentation(
        config.crops.global_crops_size,
        config.crops.local_crops_size,
        config.augmentation.blur_kernel_size,
        compile=device.type == "cuda",
    )

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        if config.train.augmentation_device == "gpu":
            batch |= render({name: batch.pop(name) for name in ("images", "view_parameters")})
        return batch | {name: normalize(batch[name], mean, std) for name in ("global_crops", "local_crops")}

    return DeviceBatches(batches, device, prepare)

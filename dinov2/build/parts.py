"""From configuration to parts: the only place where config objects meet models, data and losses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.build.data import OpenData, prefetch_for
from dinov2.configs import Config
from dinov2.data import (
    AugmentationOptions,
    MultiCropAugmentation,
    MultiCropCollate,
    normalize,
)
from dinov2.data.stream.loader import TrainLoader, make_train_loader
from dinov2.data.stream.to_device import DeviceBatches
from dinov2.distributed import get_global_rank, get_global_size, is_main_process, on_main_process
from dinov2.hub.pretrained import load_pretrained, published_url, read_checkpoint
from dinov2.train.plan.plan import RunPlan
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2")


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
        transform,
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
        max_damaged_share=config.data.max_corrupt_fraction,
    )


def device_batches(batches: Iterable[dict[str, Any]], config: Config, device: torch.device) -> DeviceBatches:
    """Batches on the device, where crops are normalised to float32."""
    mean, std = config.augmentation.normalize_mean, config.augmentation.normalize_std

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {name: normalize(batch[name], mean, std) for name in ("global_crops", "local_crops")}

    return DeviceBatches(batches, device, prepare)


def build_arch(config: Config, device: torch.device, from_checkpoint: bool) -> SSLMetaArch:
    """Student and teacher with their starting weights, sharded over the ranks, on ``device``.

    The starting weights depend on the seed alone, whatever the number of ranks. All ranks must call.

    Args:
        config: validated configuration.
        device: of this rank.
        from_checkpoint: a checkpoint will be loaded over them, so no published weights are needed.

    Raises:
        FileNotFoundError, ValueError: weights are missing or do not fit.
    """
    torch.manual_seed(config.train.seed)
    arch = SSLMetaArch(config, weights_device="cpu" if is_main_process() else "meta")
    arch.freeze_all_but_last_blocks(config.train.unfreeze_last_n_blocks)
    if not from_checkpoint:
        on_main_process(lambda: load_starting_weights(arch, config))
    arch.prepare_for_distributed_training(device)
    return arch.train()


def load_starting_weights(arch: SSLMetaArch, config: Config) -> None:
    """Fill student and teacher from the weights that the configuration names, if any.

    ``MODEL.WEIGHTS`` is a teacher export (backbone, and heads where it holds them); otherwise
    ``student.pretrained_weights`` or, under ``train.use_pretrained``, Meta's published file fill the backbone.
    """
    weights = starting_weights(config)
    if config.MODEL.WEIGHTS:
        load_export(arch.student, weights)
    elif weights:
        load_pretrained(arch.student.backbone, weights, config.student.pretrained_pos_embed)
        logger.info("Backbone initialised from %s.", weights)
    arch.copy_student_to_teacher()


def starting_weights(config: Config) -> str:
    """Path or URL of the weights that the configuration names, or an empty text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none are published for this architecture.
    """
    student = config.student
    if config.train.use_pretrained:
        return published_url(student.arch, student.patch_size, student.num_register_tokens, student.ffn_layer)
    for key, weights in (("MODEL.WEIGHTS", config.MODEL.WEIGHTS),
                         ("student.pretrained_weights", student.pretrained_weights)):  # fmt: skip
        if weights and "://" not in weights and not Path(weights).is_file():
            raise FileNotFoundError(f"{key} = {weights!r} is no file; give the path or URL of a .pth file.")
    return config.MODEL.WEIGHTS or student.pretrained_weights


def load_export(network: nn.ModuleDict, path: str) -> None:
    """Fill a network from a teacher export: the backbone always, each head that the file holds.

    Raises:
        ValueError: a head's shapes differ, or the backbone does not fit.
    """
    load_pretrained(network.backbone, path)
    teacher = read_checkpoint(path).get("teacher", {})
    loaded = ["backbone"]
    for name in ("dino_head", "ibot_head"):
        head = {
            key.removeprefix(f"{name}."): value
            for key, value in teacher.items()
            if key.startswith(f"{name}.")
        }
        if not head or name not in network:
            continue
        try:
            network[name].load_state_dict(head)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise ValueError(
                f"MODEL.WEIGHTS = {path!r} holds a {name} that does not fit ({detail})."
            ) from error
        loaded.append(name)
    logger.info("%s initialised from %s.", ", ".join(loaded), path)

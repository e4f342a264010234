"""What the step benchmark runs on: presets, and batches of random images with masks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dinov2.configs
from dinov2.configs import Config, load_config
from dinov2.data.augment.masking import StratifiedMasks

Batch = dict[str, Tensor]
ROTATION = 4  # batches in turn, so that no step meets what its predecessor left in the caches


@dataclass(frozen=True)
class Preset:
    """A configuration and how long to run it.

    Attributes:
        file: shipped YAML file; None: the defaults.
        overrides: of that configuration.
        warmups, steps, reference_steps: steps not timed, timed of ours, and timed of a reference.
        gate_images: batch on which results are compared with the fp32 reference.
        separate_images: batch of the reference that computes dropped branches too, which needs more memory.
        large_product: side of the square matrices by which the device's rate is measured.
        copy_bytes: copied to measure the memory's bandwidth.
        sample_ms: shortest time over which one product or copy is measured.
    """

    file: str | None
    overrides: tuple[str, ...]
    warmups: int
    steps: int
    reference_steps: int
    gate_images: int
    separate_images: int
    large_product: int
    copy_bytes: int
    sample_ms: float

    def config(self, *overrides: str) -> Config:
        """The configuration, with further overrides."""
        folder = Path(dinov2.configs.__file__).parent / "train"
        return load_config(folder / self.file if self.file else None, [*self.overrides, *overrides])


# A gain of 0.3 is of the order of a trained network's; with the initial 1e-5 the loss would not see the blocks.
PRESETS = {
    "vitg48": Preset(
        file="vitg14_reg4.yaml",
        overrides=("train.use_pretrained=false", "student.layerscale=0.3"),
        warmups=10,
        steps=30,
        reference_steps=15,
        gate_images=2,
        separate_images=32,
        large_product=8192,
        copy_bytes=8 * 10**9,
        sample_ms=100.0,
    ),
    "tiny": Preset(
        file=None,
        overrides=(
            "student.arch=vit_demo",
            "student.num_register_tokens=2",
            "student.layerscale=0.3",
            "student.drop_path_rate=0.4",
            "dino.head_n_prototypes=512",
            "dino.head_hidden_dim=64",
            "dino.head_bottleneck_dim=32",
            "dino.koleo_loss_weight=0.0",
            "dino.kde_loss_weight=0.05",
            "ibot.separate_head=true",
            "ibot.head_n_prototypes=512",
            "ibot.head_hidden_dim=64",
            "ibot.head_bottleneck_dim=16",
            "ibot.mask_ratio_min_max=[0.1,0.45]",
            "train.centering=sinkhorn_knopp",
            "train.batch_size_per_gpu=4",
            "crops.global_crops_size=56",
            "crops.local_crops_size=28",
            "crops.local_crops_number=3",
            "optim.layerwise_decay=1.0",
        ),
        warmups=1,
        steps=2,
        reference_steps=2,
        gate_images=4,
        separate_images=2,
        large_product=64,
        copy_bytes=2**16,
        sample_ms=0.0,
    ),
}


def host_batches(config: Config, images: int, device: torch.device, seed: int = 0) -> Iterator[Batch]:
    """An endless rotation of distinct batches of random bytes, page-locked where the device is a GPU."""
    rng = np.random.default_rng(seed)
    batches = [_host_batch(config, images, rng) for _ in range(ROTATION)]
    if device.type == "cuda":
        batches = [{name: value.pin_memory() for name, value in batch.items()} for batch in batches]
    return itertools.cycle(batches)


def to_device(batch: Batch, config: Config, device: torch.device) -> Batch:
    """Copy a batch without waiting, and normalise its crops there."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    mean, std = config.augmentation.normalize_mean, config.augmentation.normalize_std
    for name in ("global_crops", "local_crops"):
        # Plain numbers per channel: a tensor of constants would be a blocking copy to the device.
        channels = zip(moved[name].unbind(1), mean, std, strict=True)
        moved[name] = torch.stack([(x.float() / 255 - m) / s for x, m, s in channels], dim=1)
    return moved


def _host_batch(config: Config, images: int, rng: np.random.Generator) -> Batch:
    crops = config.crops

    def views(number: int, size: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, (number * images, 3, size, size), np.uint8))

    return {
        "global_crops": views(2, crops.global_crops_size),
        "local_crops": views(crops.local_crops_number, crops.local_crops_size),
        "slide_ids": torch.arange(images),
        **_masks(config, images, int(rng.integers(2**32))),
    }


def _masks(config: Config, images: int, seed: int) -> Batch:
    """Masks as the data path draws them, and the padded index of what they mask."""
    side, ibot = config.crops.global_crops_size // config.student.patch_size, config.ibot
    draw = StratifiedMasks(seed, (side, side), ibot.mask_sample_probability, ibot.mask_ratio_min_max)
    pairs = [draw(pair) for pair in range(images // 2)]
    masks = np.concatenate(pairs).swapaxes(0, 1).reshape(2 * images, side**2)  # view-major
    positions = np.flatnonzero(masks)
    padded = draw.bound(images)
    indices, weight = np.zeros(padded, np.int64), np.zeros(padded, np.float32)
    indices[: len(positions)] = positions
    weight[: len(positions)] = 1 / masks.sum(1)[positions // side**2]
    return {
        "masks": torch.from_numpy(masks),
        "mask_indices": torch.from_numpy(indices),
        "mask_weight": torch.from_numpy(weight),
        "n_masked": torch.tensor(len(positions)),
    }

"""Batches of random images, collated and normalised as in training."""

from __future__ import annotations

from typing import Any

import torch

from dinov2.build.augmentation import build_collate
from dinov2.configs import Config
from dinov2.data import MultiCrops, Sample, normalize


def random_batch(
    config: Config, images: int = 8, rank: int = 0, world: int = 1, first_index: int = 0
) -> dict[str, Any]:
    """Rank ``rank``'s share of a global batch of ``images`` random images that depends on nothing else."""
    pixels = torch.Generator().manual_seed(7 + first_index)
    crops = config.crops

    def views(number: int, size: int) -> torch.Tensor:
        return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=pixels)

    samples = [
        Sample(
            first_index + i,
            MultiCrops(views(2, crops.global_crops_size), views(crops.local_crops_number, crops.local_crops_size)),
            "slide",
            replaced=False,
        )
        for i in range(images)
    ]
    share = images // world
    batch = build_collate(config)(samples[rank * share : (rank + 1) * share])
    return batch | {name: normalize(batch[name]) for name in ("global_crops", "local_crops")}

"""Tiles as a network takes them: one centred square, one normalisation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.data.augment.multi_crop import resized_crop
from dinov2.data.augment.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize


class Colours(NamedTuple):
    """Mean and deviation per channel, of values in [0, 1], that images are normalised with."""

    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD


def centred_square(image: np.ndarray, size: int) -> np.ndarray:
    """Largest centred square of a uint8 (H, W, 3) image, resized to (size, size), bicubic with antialiasing."""
    height, width = image.shape[:2]
    side = min(height, width)
    return resized_crop(image, (height - side) // 2, (width - side) // 2, side, side, size)


def network_input(
    tiles: Sequence[np.ndarray],
    colours: Colours,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise uint8 (H, W, 3) tiles of one shape, on the device: (B, 3, H, W)."""
    pixels = torch.from_numpy(np.stack(tiles)).to(device).permute(0, 3, 1, 2)
    return normalize(pixels, colours.mean, colours.std, dtype)

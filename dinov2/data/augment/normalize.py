"""Normalisation of uint8 images to network input, on whatever device they lie."""

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    images: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute ``(images / 255 - mean) / std`` per channel of uint8 (B, 3, H, W), mean and std of values in [0, 1].

    The arithmetic is float32, the result (B, 3, H, W) of ``dtype`` on the same device.
    """
    # Plain numbers per channel: a tensor of constants would be a blocking copy to the device.
    channels = zip(images.unbind(1), mean, std, strict=True)
    return torch.stack([(x.float() * (1 / (255 * s)) - m / s).to(dtype) for x, m, s in channels], dim=1)

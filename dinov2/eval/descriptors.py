"""Descriptors of tiles that nobody trained, as baselines for features; and tiles without colour and tone."""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor, nn


def colour(image: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of red, green and blue of a uint8 (H, W, 3) RGB image, float64 (6,) in [0, 1]."""
    pixels = image.reshape(-1, 3) / 255
    return np.concatenate([pixels.mean(0), pixels.std(0)])


def pattern_codes(grey: np.ndarray) -> np.ndarray:
    """Local binary patterns of the eight neighbours of each inner pixel (Ojala et al. 1996), uint8 (H - 2, W - 2)."""
    height, width = np.subtract(grey.shape, 2)
    codes = np.zeros((height, width), np.uint8)
    around = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    for bit, (y, x) in enumerate(around):
        codes |= (grey[y : y + height, x : x + width] >= grey[1:-1, 1:-1]).astype(np.uint8) << bit
    return codes


def texture(image: np.ndarray, codes: Callable[[np.ndarray], np.ndarray] = pattern_codes) -> np.ndarray:
    """Histograms of 8-bit codes of a uint8 (H, W, 3) RGB image and of its half-size copy, float64 (512,)."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    half = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    found = [codes(scale) for scale in (grey, half)]
    return np.concatenate([np.bincount(one.ravel(), minlength=256) / one.size for one in found])


DESCRIPTORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"colour": colour, "lbp": texture}
"""By the names that stand for them in place of a teacher."""


class Descriptor(nn.Module):
    """A descriptor in place of a backbone: images (B, 3, H, W) in [0, 1] to features (B, D)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._describe = DESCRIPTORS[name]
        self.register_parameter("device", nn.Parameter(torch.empty(0)))  # features are computed on a network's device

    def forward(self, images: Tensor) -> Tensor:
        """Describe each image after rounding it to 8 bits."""
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        features = np.stack([self._describe(np.ascontiguousarray(image)) for image in pixels])
        return torch.from_numpy(features).float().to(images.device)


def flat_grey(image: np.ndarray) -> np.ndarray:
    """Grey copy of flat histogram, uint8 (H, W, 3), of an RGB image: each pixel's rank, equal ones in reading order.

    Neither colour nor tone is left to tell tiles apart by, only texture and shape.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    ranks = np.argsort(np.argsort(grey, axis=None, kind="stable"))
    flat = (ranks * (255 / grey.size)).astype(np.uint8).reshape(grey.shape)
    return np.repeat(flat[..., None], 3, axis=2)

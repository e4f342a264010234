"""Fast image operations: uint8 (H, W, 3) RGB in, the same out.

They equal the slow ones of ``reference_transforms`` within rounding. Hue is the loosest: 8-bit HSV differs by
several levels between any two libraries.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch

from dinov2.data.stain import perturb_stains

__all__ = [
    "ADJUSTMENTS",
    "blur",
    "grayscale",
    "horizontal_flip",
    "perturb_stains",
    "resized_crop",
    "vertical_flip",
]

# Pillow truncates where OpenCV rounds. Just under a half, since OpenCV rounds exact halves to the even level.
_TRUNCATE = -0.499


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """Cut a box and resize it to (size, size), bicubic (a = -0.5) with antialiasing, as Pillow does."""
    # torch's fast uint8 kernel wants memory that truly lies channels-last: a copy of the box, not a view.
    box = torch.from_numpy(image[top : top + height, left : left + width].copy())[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(box, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def horizontal_flip(image: np.ndarray) -> np.ndarray:
    """Mirror left and right."""
    return cv2.flip(image, 1)


def vertical_flip(image: np.ndarray) -> np.ndarray:
    """Mirror top and bottom."""
    return cv2.flip(image, 0)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image``."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATE)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * m``, m the mean grey level of the whole image."""
    mean = round(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + _TRUNCATE)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * grey``."""
    return cv2.addWeighted(image, factor, grayscale(image), 1 - factor, _TRUNCATE)


def adjust_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue by ``turn`` of the full circle, in [-0.5, 0.5]."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma (ITU-R 601) in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image: np.ndarray, sigma: float, kernel_size: int) -> np.ndarray:
    """Gaussian blur, sigma in pixels, borders reflected without repeating the edge."""
    # cv2.GaussianBlur on 8 bits works in fixed point: twice as slow here and less exact.
    kernel = cv2.getGaussianKernel(kernel_size, sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


ADJUSTMENTS = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}

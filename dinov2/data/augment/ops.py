"""Fast image operations: uint8 (H, W, 3) RGB in, the same out.

They equal the slow ones of ``reference_transforms`` within rounding. Hue is the loosest: 8-bit HSV differs by
several levels between any two libraries.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch

from dinov2.data.augment.stain import perturb_stains

__all__ = [
    "ADJUSTMENTS",
    "blur",
    "grayscale",
    "perturb_stains",
    "resized_crop",
]

# Pillow truncates where OpenCV rounds. Just under a half, since OpenCV rounds exact halves to the even level.
_TRUNCATE = -0.499
_FLIP_CODES = {(True, False): 1, (False, True): 0, (True, True): -1}  # OpenCV's


def resized_crop(
    image: np.ndarray,
    top: int,
    left: int,
    height: int,
    width: int,
    size: int,
    horizontal_flip: bool = False,
    vertical_flip: bool = False,
) -> np.ndarray:
    """Cut a box, mirror it and resize it to (size, size), bicubic (a = -0.5) with antialiasing, as Pillow does."""
    box = image[top : top + height, left : left + width]
    flipped = horizontal_flip or vertical_flip
    # torch's fast uint8 kernel wants memory that truly lies channels-last: a copy of the box, not a view.
    box = cv2.flip(box, _FLIP_CODES[horizontal_flip, vertical_flip]) if flipped else box.copy()
    planes = torch.from_numpy(box)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy()[0])


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image``."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATE)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * m``, m the mean grey level of the whole image."""
    mean = round(cv2.mean(grayscale(image))[0])
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + _TRUNCATE)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * grey``."""
    grey = cv2.cvtColor(grayscale(image), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, _TRUNCATE)


def adjust_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue by ``turn`` of the full circle, in [-0.5, 0.5]."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    # One row of (shift, 0, 0, ...) added to whole rows: three times as fast as to every third byte.
    shift = np.zeros((image.shape[1], 3), np.uint8)
    shift[:, 0] = int(turn * 255) % 256
    rows = hsv.reshape(len(hsv), -1)
    rows += shift.reshape(-1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma (ITU-R 601), (H, W)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def blur(image: np.ndarray, sigma: float, kernel_size: int) -> np.ndarray:
    """Gaussian blur, sigma in pixels, borders reflected without repeating the edge."""
    # cv2.GaussianBlur on 8 bits works in fixed point: twice as slow here and less exact. What lies beyond four
    # sigma is 0.02 levels.
    kernel = cv2.getGaussianKernel(min(kernel_size, 2 * math.ceil(4 * sigma) + 1), sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


ADJUSTMENTS = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}

"""Image operations that several parts share: uint8 (H, W, 3) RGB in."""

from __future__ import annotations

import cv2
import numpy as np
import torch


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """Cut a box and resize it to (size, size), bicubic (a = -0.5) with antialiasing, as Pillow does."""
    # torch's fast uint8 kernel wants memory that truly lies channels-last: a copy of the box, not a view.
    box = image[top : top + height, left : left + width].copy()
    planes = torch.from_numpy(box)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy()[0])


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma (ITU-R 601), (H, W)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)

"""Stain augmentation in haematoxylin-eosin-DAB (HED) space, on 8-bit images.

Definition of scikit-image >= 0.19 (Ruifrok and Johnston, 2001), with rgb in [0, 1] and eps = 1e-6::

    hed = max(0, ln(max(rgb, eps)) / ln(eps) @ HED_FROM_RGB)
    rgb = clip(exp(ln(eps) * hed @ RGB_FROM_HED), 0, 1)

One HED unit is therefore -ln(eps) = 13.8 nepers: tissue lies near 0.02-0.11, and a shift of 0.05 is strong.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)

_LOG_EPS = np.log(1e-6)
_LOG_255 = np.log(255.0)
_MIXING = _LOG_EPS * RGB_FROM_HED.T
_DENSITY = (np.log(np.maximum(np.arange(256) / 255, 1e-6)) / _LOG_EPS).astype(np.float32)


def perturb_stains(image: np.ndarray, scale: Sequence[float], shift: Sequence[float]) -> np.ndarray:
    """Change each stain's amount: ``hed' = scale * hed + shift`` (Tellez et al., arXiv:1808.05896).

    Args:
        image: uint8 (H, W, 3) RGB.
        scale: Factor per stain (H, E, D); 1 leaves it.
        shift: Amount added per stain, in scikit-image's HED units; 0 leaves it.

    Returns:
        uint8 (H, W, 3) RGB, rounded to the nearest level.
    """
    density = cv2.LUT(image, _DENSITY)
    stains = cv2.transform(density, HED_FROM_RGB.T)
    # cv2.max and cv2.min would compare the 2nd and 3rd channel of an image with 0 whatever the scalar.
    cv2.threshold(stains, 0, 0, cv2.THRESH_TOZERO, stains)
    affine = np.empty((3, 4))
    affine[:, :3] = _MIXING * scale
    affine[:, 3] = _MIXING @ shift + _LOG_255
    log_rgb = cv2.transform(stains, affine, density)  # into memory that lies in cache
    cv2.threshold(log_rgb, _LOG_255, 0, cv2.THRESH_TRUNC, log_rgb)
    return cv2.convertScaleAbs(cv2.exp(log_rgb, log_rgb))

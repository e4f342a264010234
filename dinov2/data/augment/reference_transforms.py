"""The operations of ``transforms`` as the published recipes run them: Pillow, torchvision and scikit-image.

Some nine times slower; kept for parity tests and ablations. Images are ``PIL.Image`` between operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torchvision.transforms import functional as F

ADJUSTMENTS = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def resized_crop(
    image: np.ndarray,
    top: int,
    left: int,
    height: int,
    width: int,
    size: int,
    horizontal_flip: bool = False,
    vertical_flip: bool = False,
) -> Image.Image:
    """Cut a box from a uint8 (H, W, 3) array, resize it to (size, size), bicubic, and mirror it."""
    bicubic = F.InterpolationMode.BICUBIC
    crop = F.resized_crop(Image.fromarray(image), top, left, height, width, [size, size], bicubic)
    crop = F.hflip(crop) if horizontal_flip else crop
    return F.vflip(crop) if vertical_flip else crop


def perturb_stains(image: Image.Image, scale: Sequence[float], shift: Sequence[float]) -> Image.Image:
    """``hed' = scale * hed + shift`` per stain, in float64."""
    from skimage.color import hed2rgb, rgb2hed

    rgb = hed2rgb(rgb2hed(np.asarray(image)) * np.asarray(scale) + np.asarray(shift))
    return Image.fromarray(np.round(rgb * 255).astype(np.uint8))


def grayscale(image: Image.Image) -> Image.Image:
    """Luma (ITU-R 601), one channel."""
    return F.rgb_to_grayscale(image)


def blur(image: Image.Image, sigma: float, kernel_size: int) -> Image.Image:
    """Gaussian blur, sigma in pixels."""
    return F.gaussian_blur(image, kernel_size, sigma)

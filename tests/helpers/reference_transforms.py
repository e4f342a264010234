"""The augmentation as the published recipes run it: Pillow, torchvision and scikit-image; some nine times slower.

Images are ``PIL.Image`` between operations. What is drawn is ours, so that results can be compared view by view.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from skimage.color import hed2rgb, rgb2hed
from torchvision.transforms import functional as F

from dinov2.data import MultiCropAugmentation, MultiCrops
from dinov2.data.augment.multi_crop import DrawnView

ADJUSTMENTS = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> Image.Image:
    """Cut a box from a uint8 (H, W, 3) array and resize it to (size, size), bicubic."""
    bicubic = F.InterpolationMode.BICUBIC
    return F.resized_crop(Image.fromarray(image), top, left, height, width, [size, size], bicubic)


def perturb_stains(
    image: np.ndarray | Image.Image, scale: Sequence[float], shift: Sequence[float], clip: bool = True
) -> Image.Image:
    """``hed' = scale * hed + shift`` per stain, in float64, clipped to [0, 1] where asked for."""
    hed = rgb2hed(np.asarray(image)) * np.asarray(scale) + np.asarray(shift)
    rgb = hed2rgb(np.clip(hed, 0, 1) if clip else hed)
    return Image.fromarray(np.round(rgb * 255).astype(np.uint8))


def reference_view(image: np.ndarray, view: DrawnView, size: int, kernel_size: int = 9) -> np.ndarray:
    """Render one drawn view of the built-in steps: uint8 (size, size, 3), or (size, size) where it is grey."""
    crop, params = resized_crop(image, *view.box, size), view.params
    left_right, top_bottom = params.get("flips", (False, False))
    crop = F.hflip(crop) if left_right else crop
    crop = F.vflip(crop) if top_bottom else crop
    crop = perturb_stains(crop, *params["hed"]) if "hed" in params else crop
    for name, amount in params.get("jitter", ()):
        crop = ADJUSTMENTS[name](crop, amount)
    crop = F.rgb_to_grayscale(crop) if "grayscale" in params else crop
    crop = F.gaussian_blur(crop, kernel_size, params["blur"]) if "blur" in params else crop
    return np.asarray(crop)


def reference_crops(augmentation: MultiCropAugmentation, image: np.ndarray, index: int) -> MultiCrops:
    """What ``augmentation(image, index)`` should be, with its clipped stains and a blur kernel of 9 pixels."""
    drawn = augmentation.sample(image.shape[:2], index)
    crops = []
    for views, size in (
        (drawn[:2], augmentation.global_crops_size),
        (drawn[2:], augmentation.local_crops_size),
    ):
        planes = np.empty((len(views), 3, size, size), np.uint8)
        for plane, view in zip(planes, views, strict=True):
            rendered = reference_view(image, view, size)
            plane[:] = rendered if rendered.ndim == 2 else rendered.transpose(2, 0, 1)
        crops.append(torch.from_numpy(planes))
    return MultiCrops(*crops)

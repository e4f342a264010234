"""Application of one view's parameters to an image, with a choice of image operations."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from dinov2.data.augment import ops as transforms
from dinov2.data.augment.views import ViewParameters


def load_operations(backend: str) -> ModuleType:
    """The operations called "fast" (OpenCV, torch) or "reference" (Pillow, torchvision, scikit-image)."""
    if backend == "fast":
        return transforms
    if backend == "reference":
        from dinov2.data.augment import reference_transforms

        return reference_transforms
    raise ValueError(f"backend is {backend!r}; 'fast' or 'reference' is needed.")


def apply_view(
    image: np.ndarray,
    view: ViewParameters,
    size: int,
    blur_kernel_size: int,
    backend: str = "fast",
) -> np.ndarray:
    """Render one view in the order crop, flips, stains, jitter, grey, blur.

    Args:
        image: uint8 (H, W, 3) RGB.
        view: What to do.
        size: Side of the result in pixels.
        blur_kernel_size: Odd width of the blur's kernel in pixels.
        backend: "fast" or "reference".

    Returns:
        uint8 (size, size, 3) RGB, or (size, size) where ``view.grayscale``.
    """
    operations = load_operations(backend)
    box = view.top, view.left, view.height, view.width
    crop = operations.resized_crop(image, *box, size, view.horizontal_flip, view.vertical_flip)
    if view.hed:
        crop = operations.perturb_stains(crop, *view.hed)
    for name, amount in view.jitter:
        crop = operations.ADJUSTMENTS[name](crop, amount)
    if view.grayscale:
        crop = operations.grayscale(crop)
    if view.blur_sigma is not None:
        crop = operations.blur(crop, view.blur_sigma, blur_kernel_size)
    return np.asarray(crop)

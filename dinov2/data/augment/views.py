"""What is done to one view of an image: drawn here, applied elsewhere, so that all backends share it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dinov2.data.augment.options import AugmentationOptions


class ViewParameters(NamedTuple):
    """One view, in the order of application; None or empty means the step is left out.

    Attributes:
        top, left, height, width: Crop box in pixels of the image.
        horizontal_flip, vertical_flip: Whether mirrored.
        hed: ``(scale, shift)``, each per stain (H, E, D).
        jitter: ``(name, amount)`` in order of application, names as in ``transforms.ADJUSTMENTS``.
        grayscale: Whether the colours are dropped.
        blur_sigma: Of the Gaussian blur, in pixels of the view.
    """

    top: int
    left: int
    height: int
    width: int
    horizontal_flip: bool
    vertical_flip: bool
    hed: tuple[tuple[float, ...], tuple[float, ...]] | None
    jitter: tuple[tuple[str, float], ...]
    grayscale: bool
    blur_sigma: float | None


def sample_view(
    rng: np.random.Generator,
    image_size: tuple[int, int],
    scale: tuple[float, float],
    blur_prob: float,
    options: AugmentationOptions,
) -> ViewParameters:
    """Draw one view.

    The draws do not depend on the options, so changing one of those leaves all else as it was.

    Args:
        rng: Generator of this view alone.
        image_size: (height, width) of the image in pixels, each at least 1.
        scale: Range of the crop's share of the image area.
        blur_prob: Probability that this view is blurred.
        options: Everything else.
    """
    draws = rng.random(57).tolist()
    order = rng.permutation(4).tolist()
    top, left, height, width = _sample_crop(draws[:40], *image_size, scale)
    flip, flop, hed, jitter, grey, blur, sigma = draws[40:47]
    sigma_min, sigma_max = options.blur_sigma_min_max
    return ViewParameters(
        top=top,
        left=left,
        height=height,
        width=width,
        horizontal_flip=flip < options.horizontal_flip_prob,
        vertical_flip=flop < options.vertical_flip_prob,
        hed=_stains(draws[47:53], options) if hed < options.hed_prob else None,
        jitter=_jitter(draws[53:], order, options) if jitter < options.jitter_prob else (),
        grayscale=grey < options.grayscale_prob,
        blur_sigma=sigma_min + (sigma_max - sigma_min) * sigma if blur < blur_prob else None,
    )


def _sample_crop(
    draws: list[float], image_height: int, image_width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Box (top, left, height, width), distributed as torchvision's RandomResizedCrop.

    The area's share is U(scale), the log aspect U(ln 3/4, ln 4/3); the first of ten tries (of four draws each)
    that fits is taken, else the largest centred box whose aspect lies in [3/4, 4/3].
    """
    for area_draw, aspect_draw, top_draw, left_draw in zip(*[iter(draws)] * 4, strict=True):
        area = image_height * image_width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = (4 / 3) ** (2 * aspect_draw - 1)
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(top_draw * (image_height - height + 1))
            left = int(left_draw * (image_width - width + 1))
            return top, left, height, width
    height = min(image_height, round(image_width * 4 / 3))
    width = min(image_width, round(image_height * 4 / 3))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def _stains(draws: list[float], options: AugmentationOptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift per stain from six draws."""
    scale, shift = options.hed_scale, options.hed_shift
    signed = [-1 + 2 * draw for draw in draws]
    return tuple([1 + scale * u for u in signed[:3]]), tuple([shift * u for u in signed[3:]])


def _jitter(
    draws: list[float], order: list[int], options: AugmentationOptions
) -> tuple[tuple[str, float], ...]:
    """The four adjustments with their amounts, in order; those of strength 0 are left out."""
    ranges = options.jitter_ranges
    return tuple(
        [(name, low + span * draws[i]) for i, (name, low, span) in [(i, ranges[i]) for i in order] if span]
    )

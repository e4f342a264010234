"""How strongly and how often images are changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

_NEUTRAL_AMOUNTS = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


@dataclass(frozen=True)
class AugmentationOptions:
    """Every probability and strength; the defaults are the published ViT-G/14 recipe's.

    Attributes:
        horizontal_flip_prob: Probability of a left-right mirror.
        vertical_flip_prob: Probability of a top-bottom mirror.
        hed_prob: Probability of the stain perturbation.
        hed_shift: Each stain is shifted by its own U(-hed_shift, hed_shift), in scikit-image's HED units.
        hed_scale: Each stain is first multiplied by its own U(1 - hed_scale, 1 + hed_scale).
        jitter_prob: Probability of the four colour adjustments, which come in random order.
        brightness: Factor U(max(0, 1 - brightness), 1 + brightness); contrast and saturation likewise.
        contrast: See ``brightness``.
        saturation: See ``brightness``.
        hue: Turn U(-hue, hue) of the full circle, at most 0.5.
        grayscale_prob: Probability of dropping the colours.
        blur_prob_global1: Probability that the first global view IS blurred.
        blur_prob_global2: The same for the second global view.
        blur_prob_local: The same for each local view.
        blur_sigma_min_max: Range of the blur's sigma in pixels of the view.
        blur_kernel_size: Odd width of the blur's kernel in pixels of the view.
    """

    horizontal_flip_prob: float = 0.5
    vertical_flip_prob: float = 0.0
    hed_prob: float = 0.5
    hed_shift: float = 0.05
    hed_scale: float = 0.0
    jitter_prob: float = 0.8
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.1
    hue: float = 0.05
    grayscale_prob: float = 0.2
    blur_prob_global1: float = 1.0
    blur_prob_global2: float = 0.1
    blur_prob_local: float = 0.5
    blur_sigma_min_max: tuple[float, float] = (0.1, 2.0)
    blur_kernel_size: int = 9

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if "_prob" in field.name and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}; a probability in [0, 1] is needed.")
        for name in ("hed_shift", "hed_scale", "brightness", "contrast", "saturation", "hue"):
            upper = 0.5 if name == "hue" else math.inf
            if not 0 <= getattr(self, name) <= upper:
                raise ValueError(f"{name} is {getattr(self, name)}; a strength in [0, {upper}] is needed.")
        low, high = self.blur_sigma_min_max
        if not 0 < low <= high:
            raise ValueError(f"blur_sigma_min_max is {low, high}; 0 < min <= max is needed.")
        if self.blur_kernel_size < 1 or self.blur_kernel_size % 2 == 0:
            raise ValueError(f"blur_kernel_size is {self.blur_kernel_size}; an odd number is needed.")

    @cached_property
    def jitter_ranges(self) -> tuple[tuple[str, float, float], ...]:
        """``(name, lowest amount, width of the range)`` of the four adjustments; the width is 0 at strength 0."""
        ranges = []
        for name, neutral in _NEUTRAL_AMOUNTS.items():
            strength = getattr(self, name)
            low = max(0.0, neutral - strength) if neutral else -strength
            ranges.append((name, low, neutral + strength - low))
        return tuple(ranges)

"""Augmentations of the default configuration with some keys set otherwise, and a step that is not built in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.build.augmentation import build_steps
from dinov2.configs.fields import key
from dinov2.configs.schema import AugmentationConfig
from dinov2.data import AugmentationStep, MultiCropAugmentation, View

DEFAULTS = AugmentationConfig()
OFF = dict.fromkeys(
    ("horizontal_flip_prob", "hed_prob", "jitter_prob", "grayscale_prob", "blur_prob_global1",
     "blur_prob_global2", "blur_prob_local"),
    0.0,
)  # fmt: skip


def options(**changes: Any) -> AugmentationConfig:
    """Section ``augmentation`` with some keys set otherwise."""
    return dataclasses.replace(DEFAULTS, **changes)


def make_augmentation(
    section: AugmentationConfig = DEFAULTS, added: dict[str, AugmentationStep] | None = None, **settings: Any
) -> MultiCropAugmentation:
    """Two views of 224 and eight of 98 pixels, with further steps behind the built-in ones."""
    steps = build_steps(section) | (added or {})
    return MultiCropAugmentation(
        steps,
        (0.32, 1.0),
        (0.05, 0.32),
        **{"local_crops_number": 8, "local_crops_size": 98, "seed": 7} | settings,
    )


class Tint(AugmentationStep):
    """Sets the red channel to what it draws."""

    @dataclass(frozen=True)
    class Options:
        """Keys of the step."""

        prob: float = key(1.0, "probability", least=0, most=1)

    def draw(self, rng: np.random.Generator, view: View) -> int | None:
        """Draw the level."""
        return int(rng.integers(256)) if rng.random() < self.options.prob else None

    def apply(self, image: np.ndarray, params: int) -> np.ndarray:
        """Set the channel."""
        image[..., 0] = params
        return image


class EarlyTint(Tint):
    """The same in front of the grey."""

    before = "grayscale"

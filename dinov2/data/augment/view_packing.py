"""View parameters as rows of numbers, so that the views of a whole batch can be drawn in one place and rendered in
another.

A row is laid out by ``COLUMNS``. Steps that are left out are written as steps that change nothing, or carry an
``apply`` of 0 where no such step exists. The colour adjustments but hue are all blends with something (black, the
mean grey, grey), so three blends, the turn of the hue and three more blends give every order of the four.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2.data.augment.views import ViewParameters

_BLENDS = {"brightness": 0.0, "contrast": 1.0, "saturation": 2.0}
_NO_BLEND = (0.0, 1.0)
_NO_STAINS = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))

COLUMNS = {
    "box": 4,  # top, left, height, width in pixels
    "flips": 2,  # left-right, top-bottom
    "apply_stains": 1,
    "stain_scale": 3,
    "stain_shift": 3,
    "blends_before": 6,  # three of (what with: 0 black, 1 mean grey, 2 grey; factor)
    "apply_hue": 1,
    "hue_shift": 1,  # in 1/255 of the circle, 0 to 255
    "blends_after": 6,
    "apply_grayscale": 1,
    "blur_sigma": 1,  # 0 for none
}


@dataclass(frozen=True, slots=True)
class ImageAndViews:
    """An image whose views are drawn but not rendered.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        parameters: float32 (V, P), a row per view as `pack_view` gives it.
    """

    image: np.ndarray
    parameters: np.ndarray


def pack_view(view: ViewParameters) -> list[float]:
    """The P numbers of one view, in the order of ``COLUMNS``."""
    before: list[float] = []
    after: list[float] = []
    turn, blends = None, before
    for name, amount in view.jitter:
        if name == "hue":
            turn, blends = amount, after
        else:
            blends += _BLENDS[name], amount
    scale, shift = view.hed or _NO_STAINS
    return [
        *(view.top, view.left, view.height, view.width),
        *(view.horizontal_flip, view.vertical_flip),
        *(view.hed is not None, *scale, *shift),
        *(*before, *_NO_BLEND * (3 - len(before) // 2)),
        *(turn is not None, int((turn or 0.0) * 255) % 256),
        *(*after, *_NO_BLEND * (3 - len(after) // 2)),
        view.grayscale,
        view.blur_sigma or 0.0,
    ]


def unpack_views(parameters: Tensor) -> dict[str, Tensor]:
    """Columns of rows (N, P) by name, each (N, width)."""
    return dict(zip(COLUMNS, torch.split(parameters, list(COLUMNS.values()), dim=1), strict=True))

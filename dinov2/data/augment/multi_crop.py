"""Multi-crop augmentation: one image in, two global and several local views out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dinov2.data.augment.step import AugmentationStep, View
from dinov2.utils.seeding import SampleStreams, hash_name

_CROP_STREAM = hash_name("crop box")


@dataclass(frozen=True)
class MultiCrops:
    """The views of one image: ``global_crops`` uint8 (2, 3, S, S), ``local_crops`` uint8 (L, 3, s, s).

    ``gram_crops`` uint8 (2, 3, S', S'), where they are asked for, are the boxes of the global views, undistorted.
    """

    global_crops: Tensor
    local_crops: Tensor
    gram_crops: Tensor | None = None


class DrawnView(NamedTuple):
    """All that is random of one view."""

    box: tuple[int, int, int, int]  # top, left, height and width of the crop in pixels of the image
    params: dict[str, Any]  # of each step that is applied, by its name and in the order of application


class MultiCropAugmentation:
    """Random views of an image that depend on nothing but ``(seed, index)``; ValueError if a scale range is impossible.

    Args:
        steps: what is done to a view after its crop, by name and in the order of application.
        global_crops_scale, local_crops_scale: range of a crop's fraction of the image area.
        local_crops_number: local views per image, L.
        global_crops_size, local_crops_size: sides of the views in pixels, S and s.
        seed: seed of the run, in [0, 2^64).
        gram_teacher_crops_size: side S' of further views of the two global boxes; None for none.
        gram_teacher_no_distortions: whether only geometric steps are applied to these, as they are to the global views.
            With the others they would be the global views, and are left out, so that S' must be S.
    """

    def __init__(
        self,
        steps: Mapping[str, AugmentationStep],
        global_crops_scale: tuple[float, float],
        local_crops_scale: tuple[float, float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        seed: int = 0,
        gram_teacher_crops_size: int | None = None,
        gram_teacher_no_distortions: bool = False,
    ) -> None:
        if not gram_teacher_no_distortions and gram_teacher_crops_size not in (None, global_crops_size):
            # Blur of one width, for one, is another distortion at another size.
            raise ValueError(
                f"gram_teacher_crops_size is {gram_teacher_crops_size} with distortions; {global_crops_size} is needed."
            )
        for kind, (low, high) in {"global": global_crops_scale, "local": local_crops_scale}.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"{kind}_crops_scale is {low, high}; 0 < min <= max <= 1 is needed.")
        self.steps, self.seed = dict(steps), seed
        self._streams = {name: hash_name(name) for name in self.steps}
        global_views = [View("global1", 0, global_crops_size), View("global2", 1, global_crops_size)]
        local_views = [View("local", number, local_crops_size) for number in range(2, 2 + local_crops_number)]
        self._views = [(view, global_crops_scale) for view in global_views]
        self._views += [(view, local_crops_scale) for view in local_views]
        self.global_crops_size, self.local_crops_size = global_crops_size, local_crops_size
        self._gram_crops_size = gram_teacher_crops_size if gram_teacher_no_distortions else None

    def sample(self, image_size: tuple[int, int], index: int) -> list[DrawnView]:
        """Draw sample ``index``'s views of an image of (height, width): two global, then the local ones."""
        streams = SampleStreams(self.seed, index)
        drawn = []
        for view, scale in self._views:
            box = sample_box(streams.move(_CROP_STREAM, view.number), image_size, scale)
            params = {}
            for name, step in self.steps.items():
                found = step.draw(streams.move(self._streams[name], 0 if step.per_tile else view.number), view)
                if found is not None:
                    params[name] = found
            drawn.append(DrawnView(box, params))
        return drawn

    def __call__(self, image: np.ndarray, index: int) -> MultiCrops:
        """Augment an image, uint8 (H, W, 3) RGB with H, W >= 1, as global sample ``index``, in [0, 2^64).

        ValueError if the image is of another type or shape, or a step makes it so.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"Image {index} is {image.dtype} {image.shape}; uint8 (H, W, 3) with H, W >= 1 is needed.")
        views = self.sample(image.shape[:2], index)
        return MultiCrops(
            global_crops=self._render(image, views[:2], self.global_crops_size),
            local_crops=self._render(image, views[2:], self.local_crops_size),
            gram_crops=self._render(image, self._undistorted(views[:2]), size)
            if (size := self._gram_crops_size)
            else None,
        )

    def _undistorted(self, views: list[DrawnView]) -> list[DrawnView]:
        return [
            DrawnView(box, {name: value for name, value in params.items() if self.steps[name].is_geometric})
            for box, params in views
        ]

    def _render(self, image: np.ndarray, views: list[DrawnView], size: int) -> Tensor:
        crops = np.empty((len(views), 3, size, size), np.uint8)
        for planes, view in zip(crops, views, strict=True):
            rendered = resized_crop(image, *view.box, size)
            for name, params in view.params.items():
                step = self.steps[name]
                if rendered.ndim == 2 and not step.takes_grey:
                    rendered = cv2.cvtColor(rendered, cv2.COLOR_GRAY2RGB)
                rendered = step.apply(rendered, params)
            if rendered.dtype != np.uint8 or rendered.shape not in ((size, size, 3), (size, size)):
                raise ValueError(
                    f"The augmentation steps {', '.join(view.params)} made a view {rendered.dtype} {rendered.shape}; "
                    f"uint8 ({size}, {size}, 3) or ({size}, {size}) is needed."
                )
            if rendered.ndim == 2:
                planes[:] = rendered
            else:
                cv2.split(rendered, list(planes))  # into them: a third of the time that a copy takes
        return torch.from_numpy(crops)


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """Cut a box of uint8 (H, W, 3) and resize it to (size, size), bicubic (a = -0.5) with antialiasing, as Pillow."""
    # torch's fast uint8 kernel wants memory that truly lies channels-last: a copy of the box, not a view.
    box = image[top : top + height, left : left + width].copy()
    planes = torch.from_numpy(box)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy()[0])


def sample_box(
    rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a crop's (top, left, height, width), distributed as torchvision's RandomResizedCrop.

    The fraction of the area is U(scale), the log aspect U(ln 3/4, ln 4/3); the first of ten draws that fits is taken,
    else the largest centred box whose aspect lies in [3/4, 4/3]. ``image_size`` is (height, width) in pixels.
    """
    image_height, image_width = image_size
    for _ in range(10):
        area_draw, aspect_draw, top_draw, left_draw = rng.random(4).tolist()
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

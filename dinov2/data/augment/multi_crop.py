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
    window: tuple[int, int] | None = None  # top and left of a local view in the global one that it is cut from


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
        max_aspect_ratio: x of the crops' aspect, whose logarithm is uniform over that of [1/x, x].
        localcrops_subset_of_globalcrops: cut local views out of the global ones, half of them from each: windows of s
            pixels at whole patches, moved and mirrored with the global view and coloured by themselves (DINOv3). Its
            windows never reach the last patch of a row or column; these do.
        patch_size: side of a patch in pixels, for these windows.
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
        max_aspect_ratio: float = 4 / 3,
        localcrops_subset_of_globalcrops: bool = False,
        patch_size: int = 14,
    ) -> None:
        if not gram_teacher_no_distortions and gram_teacher_crops_size not in (None, global_crops_size):
            # Blur of one width, for one, is another distortion at another size.
            raise ValueError(
                f"gram_teacher_crops_size is {gram_teacher_crops_size} with distortions; {global_crops_size} is needed."
            )
        for kind, (low, high) in {"global": global_crops_scale, "local": local_crops_scale}.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"{kind}_crops_scale is {low, high}; 0 < min <= max <= 1 is needed.")
        if localcrops_subset_of_globalcrops and (local_crops_number % 2 or local_crops_size > global_crops_size):
            raise ValueError(
                f"localcrops_subset_of_globalcrops cuts half of the local views out of either global one, but there "
                f"are {local_crops_number}, of {local_crops_size} of {global_crops_size} px; an even number of views "
                "that are no larger is needed."
            )
        self.steps, self.seed = dict(steps), seed
        self._max_aspect, self._patch = max_aspect_ratio, patch_size
        self._has_windows = localcrops_subset_of_globalcrops
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
            rng = streams.move(_CROP_STREAM, view.number)
            whole, window = None, None
            if self._has_windows and view.kind == "local":
                whole = drawn[0 if view.number < 2 + (len(self._views) - 2) // 2 else 1]
                box, window = whole.box, self._sample_window(rng)
            else:
                box = sample_box(rng, image_size, scale, self._max_aspect)
            params = {}
            for name, step in self.steps.items():
                if whole is not None and step.is_geometric:
                    found = whole.params.get(name)
                else:
                    found = step.draw(streams.move(self._streams[name], 0 if step.per_tile else view.number), view)
                if found is not None:
                    params[name] = found
            drawn.append(DrawnView(box, params, window))
        return drawn

    def _sample_window(self, rng: np.random.Generator) -> tuple[int, int]:
        places = (self.global_crops_size - self.local_crops_size) // self._patch + 1
        top, left = (rng.random(2) * places).astype(int).tolist()
        return top * self._patch, left * self._patch

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
        return [view._replace(params=self._geometric(view.params)) for view in views]

    def _geometric(self, params: Mapping[str, Any], is_so: bool = True) -> dict[str, Any]:
        return {name: value for name, value in params.items() if self.steps[name].is_geometric == is_so}

    def _render(self, image: np.ndarray, views: list[DrawnView], size: int) -> Tensor:
        crops = np.empty((len(views), 3, size, size), np.uint8)
        whole: dict[tuple[int, int, int, int], np.ndarray] = {}  # moved and mirrored, that windows are cut from
        for planes, view in zip(crops, views, strict=True):
            if view.window is None:
                rendered = self._apply(resized_crop(image, *view.box, size), view.params)
            else:
                if view.box not in whole:
                    uncut = resized_crop(image, *view.box, self.global_crops_size)
                    whole[view.box] = self._apply(uncut, self._geometric(view.params))
                top, left = view.window
                window = whole[view.box][top : top + size, left : left + size].copy()
                rendered = self._apply(window, self._geometric(view.params, is_so=False))
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

    def _apply(self, view: np.ndarray, params_by_step: Mapping[str, Any]) -> np.ndarray:
        for name, params in params_by_step.items():
            step = self.steps[name]
            if view.ndim == 2 and not step.takes_grey:
                view = cv2.cvtColor(view, cv2.COLOR_GRAY2RGB)
            view = step.apply(view, params)
        return view


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """Cut a box of uint8 (H, W, 3) and resize it to (size, size), bicubic (a = -0.5) with antialiasing, as Pillow."""
    # torch's fast uint8 kernel wants memory that truly lies channels-last: a copy of the box, not a view.
    box = image[top : top + height, left : left + width].copy()
    planes = torch.from_numpy(box)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy()[0])


def sample_box(
    rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float], max_aspect: float = 4 / 3
) -> tuple[int, int, int, int]:
    """Draw a crop's (top, left, height, width), distributed as torchvision's RandomResizedCrop.

    With x = ``max_aspect``, the fraction of the area is U(scale), the log aspect U(-ln x, ln x); the first of ten draws
    that fits is taken, else the largest centred box whose aspect lies in [1/x, x]. ``image_size`` is (height, width)
    in pixels.
    """
    image_height, image_width = image_size
    for _ in range(10):
        area_draw, aspect_draw, top_draw, left_draw = rng.random(4).tolist()
        area = image_height * image_width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = max_aspect ** (2 * aspect_draw - 1)
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(top_draw * (image_height - height + 1))
            left = int(left_draw * (image_width - width + 1))
            return top, left, height, width
    height = min(image_height, round(image_width * max_aspect))
    width = min(image_width, round(image_height * max_aspect))
    return (image_height - height) // 2, (image_width - width) // 2, height, width

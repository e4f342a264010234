"""Multi-crop augmentation: one image in, two global and several local views out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.augment.normalize import normalize
from dinov2.data.augment.options import AugmentationOptions
from dinov2.data.augment.rendering import apply_view, load_operations
from dinov2.data.augment.views import ViewParameters, sample_view
from dinov2.utils.seeding import fresh_rng, sample_rng


@dataclass(frozen=True)
class MultiCrops:
    """The views of one image: ``global_crops`` uint8 (2, 3, S, S), ``local_crops`` uint8 (L, 3, s, s)."""

    global_crops: Tensor
    local_crops: Tensor


class MultiCropAugmentation:
    """Random views of an image that depend on nothing but ``(seed, index)``.

    Args:
        options: Probabilities and strengths.
        global_crops_scale: Range of a global crop's share of the image area.
        local_crops_scale: The same for local crops.
        local_crops_number: Local views per image, L.
        global_crops_size: Side of a global view in pixels, S.
        local_crops_size: Side of a local view in pixels, s.
        seed: Seed of the run, in [0, 2^64).
        backend: "fast" (OpenCV, torch) or "reference" (Pillow, torchvision, scikit-image; nine times slower).

    Raises:
        ValueError: An unknown backend or an impossible scale range.
    """

    def __init__(
        self,
        options: AugmentationOptions,
        global_crops_scale: tuple[float, float],
        local_crops_scale: tuple[float, float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        seed: int = 0,
        backend: str = "fast",
    ) -> None:
        for kind, (low, high) in {"global": global_crops_scale, "local": local_crops_scale}.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"{kind}_crops_scale is {low, high}; 0 < min <= max <= 1 is needed.")
        load_operations(backend)  # refuses an unknown name now; modules themselves cannot be pickled
        self.options = options
        self.global_crops_scale = global_crops_scale
        self.local_crops_scale = local_crops_scale
        self.local_crops_number = local_crops_number
        self.global_crops_size = global_crops_size
        self.local_crops_size = local_crops_size
        self.seed = seed
        self.backend = backend

    def sample(self, image_size: tuple[int, int], index: int) -> list[ViewParameters]:
        """Draw sample ``index``'s views of an image of (height, width): two global, then the local ones.

        View v comes from stream v of ``(seed, index)``.
        """
        options = self.options
        kinds = [
            (self.global_crops_scale, options.blur_prob_global1),
            (self.global_crops_scale, options.blur_prob_global2),
            *[(self.local_crops_scale, options.blur_prob_local)] * self.local_crops_number,
        ]
        rng = sample_rng(self.seed, index, 0)
        views = []
        for view, (scale, blur_prob) in enumerate(kinds):
            if view:
                _switch_stream(rng, self.seed, index, view)
            views.append(sample_view(rng, image_size, scale, blur_prob, options))
        return views

    def __call__(self, image: np.ndarray, index: int) -> MultiCrops:
        """Augment one image.

        Args:
            image: uint8 (H, W, 3) RGB, H and W at least 1.
            index: Global sample index, in [0, 2^64).

        Raises:
            ValueError: The image is of another type or shape.
        """
        check_image(image, index)
        views = self.sample(image.shape[:2], index)
        return MultiCrops(
            global_crops=self._render(image, views[:2], self.global_crops_size),
            local_crops=self._render(image, views[2:], self.local_crops_size),
        )

    def _render(self, image: np.ndarray, views: list[ViewParameters], size: int) -> Tensor:
        kernel_size = self.options.blur_kernel_size
        crops = np.empty((len(views), 3, size, size), np.uint8)
        for planes, view in zip(crops, views, strict=True):
            rendered = apply_view(image, view, size, kernel_size, self.backend)
            if view.grayscale:
                planes[:] = rendered
            else:
                cv2.split(rendered, list(planes))  # into them: a third of the time that a copy takes
        return torch.from_numpy(crops)


def check_image(image: np.ndarray, index: int) -> None:
    """Refuse what is no uint8 (H, W, 3) image.

    Raises:
        ValueError: The image is of another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"Image {index} is {image.dtype} {image.shape}; uint8 (H, W, 3) with H, W >= 1 is needed."
        )


def _switch_stream(rng: np.random.Generator, seed: int, index: int, stream: int) -> None:
    """Make a generator the one of `sample_rng(seed, index, stream)`; ten times faster than another one."""
    rng.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": (0, 0, 0, stream), "key": (seed, index)},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }


class DataAugmentationDINO:
    """Meta's interface to :class:`MultiCropAugmentation`: fresh randomness on every call, normalised views.

    Randomness follows torch's global generator, as ``torch.manual_seed`` and DataLoader workers expect.
    """

    def __init__(
        self,
        global_crops_scale: tuple[float, float],
        local_crops_scale: tuple[float, float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        options: AugmentationOptions | None = None,
    ) -> None:
        self._augment = MultiCropAugmentation(
            options or AugmentationOptions(),
            global_crops_scale,
            local_crops_scale,
            local_crops_number,
            global_crops_size,
            local_crops_size,
        )

    def __call__(self, image: Image.Image | np.ndarray) -> dict[str, Any]:
        """Views of one image (PIL or uint8 (H, W, 3)): lists of float32 (3, S, S), and empty "offsets"."""
        pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
        crops = self._augment(pixels, index=int(fresh_rng().integers(2**63)))
        global_crops = list(normalize(crops.global_crops))
        return {
            "global_crops": global_crops,
            "global_crops_teacher": global_crops,
            "local_crops": list(normalize(crops.local_crops)),
            "offsets": (),
        }

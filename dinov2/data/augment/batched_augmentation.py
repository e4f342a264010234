"""Multi-crop augmentation of a whole batch on the device; workers only decode images and draw parameters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dinov2.data.augment import batched_transforms as transforms
from dinov2.data.augment.multi_crop import MultiCropAugmentation, check_image
from dinov2.data.augment.view_packing import ImageAndViews, pack_view, unpack_views


class DeferredAugmentation:
    """Draws the views of an image and leaves their rendering to `BatchedAugmentation`.

    Args:
        augmentation: Whose views are drawn, from the same streams; its backend does not matter.
    """

    def __init__(self, augmentation: MultiCropAugmentation) -> None:
        self._augmentation = augmentation

    def __call__(self, image: np.ndarray, index: int) -> ImageAndViews:
        """Draw the views of one image.

        Args:
            image: uint8 (H, W, 3) RGB, H and W at least 1.
            index: Global sample index, in [0, 2^64).

        Raises:
            ValueError: The image is of another type or shape.
        """
        check_image(image, index)
        views = self._augmentation.sample(image.shape[:2], index)
        return ImageAndViews(image, np.array([pack_view(view) for view in views], np.float32))


class BatchedAugmentation:
    """Renders the drawn views of a batch on the device where it lies, without waiting for it.

    Two views of 224 and eight of 98 pixels take, per image of 224 pixels, 0.15 MB on the way to the device and about
    14 MB of working memory there.

    Args:
        global_crops_size: Side of a global view in pixels, S.
        local_crops_size: Side of a local view in pixels, s.
        blur_kernel_size: Odd width of the blur's kernel in pixels of the view.
        compile: Whether to compile for the shape of the first batch. Batches of other shapes (images of mixed
            sizes) are rendered uncompiled, since each would take a compilation.

    Raises:
        ValueError: The blur's kernel is too wide for the views.
    """

    def __init__(
        self, global_crops_size: int, local_crops_size: int, blur_kernel_size: int, compile: bool = False
    ) -> None:
        smallest = min(global_crops_size, local_crops_size)
        if blur_kernel_size // 2 >= smallest:
            raise ValueError(
                f"blur_kernel_size is {blur_kernel_size}; less than {2 * smallest} is needed for views of "
                f"{smallest} pixels."
            )
        self._settings = (global_crops_size, local_crops_size, blur_kernel_size)
        self._compiled = torch.compile(render_crops, fullgraph=True, dynamic=False) if compile else None
        self._compiled_shape: torch.Size | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Render a batch that was collated from `ImageAndViews`.

        Args:
            batch: Holds ``images`` uint8 (B, H, W, 3) and ``view_parameters`` float32 (B, 2 + L, P).

        Returns:
            ``global_crops`` uint8 (2B, 3, S, S), all first views, then all second; ``local_crops`` uint8
            (L*B, 3, s, s), likewise.
        """
        images, parameters = batch["images"], batch["view_parameters"]
        render = render_crops
        if self._compiled is not None:
            self._compiled_shape = self._compiled_shape or images.shape
            render = self._compiled if images.shape == self._compiled_shape else render_crops
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            global_crops, local_crops = render(images, parameters, *self._settings)
        return {"global_crops": global_crops, "local_crops": local_crops}


def render_crops(
    images: Tensor, parameters: Tensor, global_size: int, local_size: int, blur_kernel_size: int
) -> tuple[Tensor, Tensor]:
    """Global and local crops, see `BatchedAugmentation`; one graph without breaks under ``torch.compile``."""
    return (
        render_views(images, parameters[:, :2], global_size, blur_kernel_size),
        render_views(images, parameters[:, 2:], local_size, blur_kernel_size),
    )


def render_views(images: Tensor, parameters: Tensor, size: int, blur_kernel_size: int) -> Tensor:
    """Views of one size, in the order of `rendering.apply_view`.

    Args:
        images: uint8 (B, H, W, 3), padded below and to the right where an image is smaller.
        parameters: float32 (B, V, P), see `view_packing`.
        size: Side of the views in pixels.
        blur_kernel_size: Odd width of the blur's kernel in pixels.

    Returns:
        uint8 (V*B, 3, size, size), all first views, then all second, and so on.
    """
    batch, views = parameters.shape[:2]
    if not views:
        return images.new_empty(0, 3, size, size)
    boxes, flips = parameters[..., :4], parameters[..., 4:6]
    steps = unpack_views(parameters.transpose(0, 1).reshape(views * batch, -1))
    crops = transforms.resized_crops(images, boxes, flips, size)
    stained = transforms.perturb_stains(crops, steps["stain_scale"], steps["stain_shift"])
    crops = _choose(steps["apply_stains"], stained, crops)
    crops = _blend_thrice(crops, steps["blends_before"])
    crops = _choose(steps["apply_hue"], transforms.turn_hue(crops, steps["hue_shift"]), crops)
    crops = _blend_thrice(crops, steps["blends_after"])
    crops = _choose(steps["apply_grayscale"], transforms.grayscale(crops), crops)
    return transforms.blur(crops, steps["blur_sigma"], blur_kernel_size).to(torch.uint8)


def _choose(apply: Tensor, changed: Tensor, unchanged: Tensor) -> Tensor:
    return torch.where(apply[..., None, None] > 0, changed, unchanged)


def _blend_thrice(crops: Tensor, blends: Tensor) -> Tensor:
    for blend in blends.split(2, dim=1):
        crops = transforms.blend(crops, *blend.split(1, dim=1))
    return crops

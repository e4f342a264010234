"""Meta's augmentation, mask generator and collate function on top of ours; randomness follows torch's generator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov2.build.augmentation import build_steps
from dinov2.configs.schema import AugmentationConfig
from dinov2.data.augment.collate import padded_mask_index, view_major
from dinov2.data.augment.masking import block_mask
from dinov2.data.augment.multi_crop import MultiCropAugmentation
from dinov2.data.augment.normalize import normalize


def fresh_rng() -> np.random.Generator:
    """Make a generator seeded by one draw from torch's global one, so that ``torch.manual_seed`` governs it."""
    return np.random.default_rng(int(torch.randint(2**63 - 1, ())))


class DataAugmentationDINO:
    """Multi-crop augmentation with fresh randomness on every call and normalised views.

    Scales are ranges of a view's fraction of the image area, sizes the side S of a view in px; ``options`` is section
    ``augmentation`` of a configuration, its defaults if None.
    """

    def __init__(
        self,
        global_crops_scale: tuple[float, float],
        local_crops_scale: tuple[float, float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        options: AugmentationConfig | None = None,
    ) -> None:
        self._augment = MultiCropAugmentation(
            build_steps(options or AugmentationConfig()),
            global_crops_scale, local_crops_scale, local_crops_number, global_crops_size, local_crops_size,
        )  # fmt: skip

    def __call__(self, image: Image.Image | np.ndarray) -> dict[str, Any]:
        """Views of one image (PIL or uint8 (H, W, 3)): lists of float32 (3, S, S), and empty "offsets"."""
        pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
        crops = self._augment(pixels, index=int(fresh_rng().integers(2**63)))
        of_global, of_local = list(normalize(crops.global_crops)), list(normalize(crops.local_crops))
        return {"global_crops": of_global, "global_crops_teacher": of_global, "local_crops": of_local, "offsets": ()}


class MaskingGenerator:
    """Block masks, one for each call.

    Args:
        input_size: grid as (rows, columns), or one number for a square.
        num_masking_patches: stands in for ``max_num_patches`` where that is None.
        min_num_patches, max_num_patches: least area drawn for a block, and most that it may add (None: half the grid).
        min_aspect, max_aspect: range of a block's height / width; the largest is ``1 / min_aspect`` if None.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = num_masking_patches if max_num_patches is None else max_num_patches
        self.aspect_min_max = (min_aspect, max_aspect or 1 / min_aspect)

    def get_shape(self) -> tuple[int, int]:
        """(rows, columns) of the grid."""
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0) -> np.ndarray:
        """Draw a mask of at most ``num_masking_patches`` patches: bool (rows, columns)."""
        sizes = (num_masking_patches, self.min_num_patches, self.max_num_patches)
        return block_mask(fresh_rng(), self.get_shape(), *sizes, self.aspect_min_max)


def collate_data_and_cast(
    samples_list: Sequence[tuple[Any, Any]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: Callable[[int], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Stack the views of ``(DataAugmentationDINO(...)(image), target)`` pairs, view-major, and mask them.

    Of 2B global crops int(mask_probability * 2B) are masked; the masked fractions of their patches are drawn one from
    each equal part of ``mask_ratio_tuple``. ``mask_generator`` maps a patch count to a bool mask of ``n_tokens``
    patches, as a ``MaskingGenerator`` does. Targets are ignored. Samples of OpenMidnight's datasets, ``((views,
    target), index)``, are taken too.

    Returns:
        ``collated_global_crops``, ``collated_local_crops``, ``collated_masks`` bool (2B, N), ``mask_indices_list``
        int64 (M,), ``masks_weight`` float32 (M,), ``upperbound`` int >= M, ``n_masked_patches`` int64 (1,);
        of samples with an index ``indexes``, a list of them.
    """
    if n_tokens is None or mask_generator is None:
        raise ValueError(f"n_tokens is {n_tokens} and mask_generator {mask_generator}; both are needed.")
    indexed = bool(samples_list) and not isinstance(samples_list[0][0], Mapping)
    views = [sample[0][0] if indexed else sample[0] for sample in samples_list]
    global_crops, local_crops = (
        view_major([torch.stack(crops[key]) for crops in views]) for key in ("global_crops", "local_crops")
    )
    rng = fresh_rng()
    edges = np.linspace(*mask_ratio_tuple, int(len(global_crops) * mask_probability) + 1)
    counts = np.zeros(len(global_crops), np.int64)
    counts[: len(edges) - 1] = n_tokens * rng.uniform(edges[:-1], edges[1:])
    masks = np.stack([mask_generator(int(count)) for count in rng.permutation(counts)])
    masks = torch.from_numpy(masks).flatten(1)
    n_masked = int(masks.sum())
    index = padded_mask_index(masks, n_masked)
    return {
        "collated_global_crops": global_crops.to(dtype), "collated_local_crops": local_crops.to(dtype),
        "collated_masks": masks,
        "mask_indices_list": index["mask_indices"], "masks_weight": index["mask_weight"],
        "upperbound": sum(int(n_tokens * edge) for edge in edges[1:]),
        "n_masked_patches": torch.tensor([n_masked]),
        **({"indexes": [index for _, index in samples_list]} if indexed else {}),
    }  # fmt: skip

"""From samples to a batch: views stacked view-major, masks, and the index of what is masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.augment.masking import StratifiedMasks
from dinov2.data.augment.multi_crop import MultiCrops
from dinov2.data.augment.view_packing import ImageAndViews
from dinov2.utils.seeding import fresh_rng


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded and augmented row, ready for the collate function.

    Attributes:
        index: Global sample index g.
        crops: The augmented views, or what the device renders them from.
        slide: Slide the tile was cut from.
        replaced: Whether the row at g was damaged and another of its row group stands in for it.
        damage: If replaced, where the damaged row is and what is wrong with it.
        unit: Unit that the row was taken from.
        row: Row within that unit.
    """

    index: int
    crops: MultiCrops | ImageAndViews
    slide: str
    replaced: bool
    damage: str = ""
    unit: int = 0
    row: int = 0


class MultiCropCollate:
    """Collates whole pairs of consecutive samples; equal for every split of the stream over ranks.

    Args:
        seed: Seed of the run, in [0, 2^64).
        patch_size: Side of a patch in pixels.
        mask_probability: Share of global crops that are masked.
        mask_ratio_min_max: Range of the share of a masked crop's patches.
        global_crops_size: Side of a global crop in pixels; N = (global_crops_size / patch_size)^2.

    Raises:
        ValueError: The crop is no multiple of the patch, or a share lies outside [0, 1].
    """

    def __init__(
        self,
        seed: int,
        patch_size: int,
        mask_probability: float,
        mask_ratio_min_max: tuple[float, float],
        global_crops_size: int = 224,
    ) -> None:
        if global_crops_size % patch_size:
            raise ValueError(
                f"global_crops_size is {global_crops_size}; a multiple of patch_size {patch_size} is needed."
            )
        side = global_crops_size // patch_size
        self._masks = StratifiedMasks(seed, (side, side), mask_probability, mask_ratio_min_max)

    def max_masked(self, batch_size: int) -> int:
        """M, the length of the masked-patch index of a batch of ``batch_size`` samples."""
        return batch_size // 2 * self._masks.max_masked

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate B samples whose indices come in whole pairs (2k, 2k + 1).

        Returns:
            ``global_crops`` uint8 (2B, 3, S, S), all first views, then all second; ``local_crops`` uint8
            (L*B, 3, s, s), likewise; ``masks`` bool (2B, N); ``mask_indices`` int64 (M,) into the 2B*N
            patches, ascending, then 0 as padding; ``mask_weight`` float32 (M,), 1 / (masked patches of that
            crop), 0 on padding; ``n_masked`` int64 (); ``indices`` int64 (B,); ``slides`` list of B str;
            ``slide_ids`` int64 (B,), a hash of each; ``rows``, the unit and row of each; ``replaced`` int.

            Where samples hold `ImageAndViews`, in place of the crops: ``images`` uint8 (B, H, W, 3), padded
            below and to the right to the largest, and ``view_parameters`` float32 (B, V, P).

        Raises:
            ValueError: The samples are not whole pairs.
        """
        indices = [sample.index for sample in samples]
        pairs = [first // 2 for first in indices[::2]]
        if not indices or indices != [index for pair in pairs for index in (2 * pair, 2 * pair + 1)]:
            raise ValueError(
                f"A batch with sample indices {indices} cannot be masked; whole pairs (2k, 2k + 1) are "
                "needed, so the batch of each process must be even."
            )
        masks = _view_major([torch.from_numpy(views) for pair in pairs for views in self._masks(pair)])
        return {
            **_collate_views([sample.crops for sample in samples]),
            "masks": masks,
            **_padded_mask_index(masks, self.max_masked(len(samples))),
            "indices": torch.tensor(indices, dtype=torch.int64),
            "slides": [sample.slide for sample in samples],
            "slide_ids": torch.tensor([_slide_id(sample.slide) for sample in samples]),
            "rows": [(sample.unit, sample.row) for sample in samples],
            "replaced": sum(sample.replaced for sample in samples),
        }


def collate_data_and_cast(
    samples_list: Sequence[tuple[dict[str, list[Tensor]], Any]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: Callable[[int], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Meta's collate: stacks the views of ``(DataAugmentationDINO(...)(image), target)`` pairs, view-major.

    int(mask_probability * 2B) global crops are masked; their ratios are drawn one from each equal part of
    ``mask_ratio_tuple``. Randomness follows torch's global generator.

    Args:
        samples_list: B pairs; targets are ignored.
        mask_ratio_tuple: Range of the share of a masked crop's patches.
        mask_probability: Share of global crops that are masked.
        dtype: Of the collated crops.
        n_tokens: Patches per global crop, N.
        mask_generator: Maps a patch count to a bool mask of N patches, e.g. a ``MaskingGenerator``.

    Returns:
        ``collated_global_crops``, ``collated_local_crops``, ``collated_masks`` bool (2B, N),
        ``mask_indices_list`` int64 (M,), ``masks_weight`` float32 (M,), ``upperbound`` int >= M,
        ``n_masked_patches`` int64 (1,).

    Raises:
        ValueError: ``n_tokens`` or ``mask_generator`` is missing.
    """
    if n_tokens is None or mask_generator is None:
        raise ValueError(f"n_tokens is {n_tokens} and mask_generator {mask_generator}; both are needed.")
    global_crops, local_crops = (
        _view_major([torch.stack(views[key]) for views, _ in samples_list])
        for key in ("global_crops", "local_crops")
    )
    rng = fresh_rng()
    edges = np.linspace(*mask_ratio_tuple, int(len(global_crops) * mask_probability) + 1)
    counts = np.zeros(len(global_crops), np.int64)
    counts[: len(edges) - 1] = n_tokens * rng.uniform(edges[:-1], edges[1:])
    masks = np.stack([mask_generator(int(count)) for count in rng.permutation(counts)])
    masks = torch.from_numpy(masks).flatten(1)
    n_masked = int(masks.sum())
    index = _padded_mask_index(masks, n_masked)
    return {
        "collated_global_crops": global_crops.to(dtype),
        "collated_local_crops": local_crops.to(dtype),
        "collated_masks": masks,
        "mask_indices_list": index["mask_indices"],
        "masks_weight": index["mask_weight"],
        "upperbound": sum(int(n_tokens * edge) for edge in edges[1:]),
        "n_masked_patches": torch.tensor([n_masked]),
    }


def _collate_views(samples: list[MultiCrops] | list[ImageAndViews]) -> dict[str, Tensor]:
    if not isinstance(samples[0], ImageAndViews):
        return {
            "global_crops": _view_major([sample.global_crops for sample in samples]),
            "local_crops": _view_major([sample.local_crops for sample in samples]),
        }
    shapes = {sample.image.shape for sample in samples}
    height, width = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    make = torch.empty if len(shapes) == 1 else torch.zeros
    images = make(len(samples), height, width, 3, dtype=torch.uint8)
    for padded, sample in zip(images.numpy(), samples, strict=True):
        padded[: sample.image.shape[0], : sample.image.shape[1]] = sample.image
    return {
        "images": images,
        "view_parameters": torch.from_numpy(np.stack([sample.parameters for sample in samples])),
    }


def _slide_id(slide: str) -> int:
    """63 bits that all processes agree on, so that slides can be counted over ranks."""
    return int.from_bytes(blake2b(slide.encode(errors="surrogateescape"), digest_size=8).digest()) >> 1


def _view_major(samples: list[Tensor]) -> Tensor:
    """B tensors (V, ...) to one (V*B, ...): all first views, then all second, and so on."""
    return torch.stack(samples, dim=1).flatten(0, 1)


def _padded_mask_index(masks: Tensor, length: int) -> dict[str, Tensor]:
    """Where the masked patches of bool (crops, N) lie, their weights, and how many they are."""
    positions = masks.flatten().nonzero().flatten()
    indices = torch.zeros(length, dtype=torch.int64)
    indices[: len(positions)] = positions
    weight = torch.zeros(length)
    weight[: len(positions)] = 1 / masks.sum(1)[positions // masks.shape[1]]
    return {"mask_indices": indices, "mask_weight": weight, "n_masked": torch.tensor(len(positions))}

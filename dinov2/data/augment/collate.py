"""Samples and batches: views stacked view-major, masks, and the index of what is masked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2.data.augment.masking import StratifiedMasks
from dinov2.data.augment.multi_crop import MultiCrops
from dinov2.utils.seeding import hash_name


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded and augmented row, ready for the collate function."""

    index: int  # global sample index g
    crops: MultiCrops
    slide: str  # that the tile was cut from
    replaced: bool  # whether the row at g was corrupt and another one stands in for it
    fault: str = ""  # if replaced, where the corrupt row is and what is wrong with it
    group: int = 0  # that the row was taken from
    row: int = 0  # within that row group


class MultiCropCollate:
    """Collate function for consecutive samples; equal for every split of the stream over ranks.

    Masks are drawn by `StratifiedMasks`, on a grid of N = (global_crops_size / patch_size)^2 patches; sizes in pixels.
    ValueError if the crop is no multiple of the patch, or a fraction lies outside [0, 1].
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
        return self._masks.bound(batch_size)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate B samples whose indices are consecutive, or in whole pairs (2k, 2k + 1); else ValueError.

        Returns:
            ``global_crops`` uint8 (2B, 3, S, S), all first views, then all second; ``local_crops`` uint8
            (L*B, 3, s, s), likewise; ``gram_crops`` uint8 (2B, 3, S', S') where samples have them; ``masks``
            bool (2B, N); ``mask_indices`` int64 (M,) into the 2B*N patches, ascending, then 0 as padding;
            ``mask_weight`` float32 (M,), 1 / (masked patches of that crop), 0 on padding; ``n_masked`` int64 ();
            ``indices`` int64 (B,); ``slides`` list of B str; ``slide_ids`` int64 (B,), 63 bits that all ranks agree
            on; ``rows``, the row group and row of each; ``replaced`` int.
        """
        indices = [sample.index for sample in samples]
        numbers = Counter(index // 2 for index in indices)
        halves = sum(number % 2 for number in numbers.values())
        if not indices or len({*indices}) < len(indices) or halves != len(indices) % 2:
            raise ValueError(
                f"A batch with sample indices {indices} cannot be masked; consecutive ones are needed, or whole pairs "
                "(2k, 2k + 1)."
            )
        gram_crops = [sample.crops.gram_crops for sample in samples if sample.crops.gram_crops is not None]
        of_pairs = {pair: self._masks(pair) for pair in numbers}
        masks = view_major([torch.from_numpy(of_pairs[index // 2][index % 2]) for index in indices])
        return {
            "global_crops": view_major([sample.crops.global_crops for sample in samples]),
            "local_crops": view_major([sample.crops.local_crops for sample in samples]),
            **({"gram_crops": view_major(gram_crops)} if gram_crops else {}),
            "masks": masks,
            **padded_mask_index(masks, self.max_masked(len(samples))),
            "indices": torch.tensor(indices, dtype=torch.int64),
            "slides": [sample.slide for sample in samples],
            "slide_ids": torch.tensor([hash_name(sample.slide) >> 1 for sample in samples]),
            "rows": [(sample.group, sample.row) for sample in samples],
            "replaced": sum(sample.replaced for sample in samples),
        }


def view_major(samples: list[Tensor]) -> Tensor:
    """Join B tensors (V, ...) to one (V*B, ...): all first views, then all second, and so on."""
    return torch.stack(samples, dim=1).flatten(0, 1)


def padded_mask_index(masks: Tensor, length: int) -> dict[str, Tensor]:
    """Find the masked patches of bool (crops, N): where they lie, their weights, and how many they are."""
    positions = masks.flatten().nonzero().flatten()
    indices = torch.zeros(length, dtype=torch.int64)
    indices[: len(positions)] = positions
    weight = torch.zeros(length)
    weight[: len(positions)] = 1 / masks.sum(1)[positions // masks.shape[1]]
    return {"mask_indices": indices, "mask_weight": weight, "n_masked": torch.tensor(len(positions))}

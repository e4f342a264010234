"""Block masks on a patch grid, stratified over the crops of two samples."""

import math

import numpy as np

from dinov2.utils.seeding import sample_rng

# Pairs and samples share their keys; this is the hash of no step's name (see MultiCropAugmentation).
_MASK_STREAM = 1 << 32


def block_mask(
    rng: np.random.Generator,
    grid_size: tuple[int, int],
    num_patches: int,
    min_block: int = 4,
    max_block: int | None = None,
    aspect_min_max: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Cover a patch grid with random rectangles until ``num_patches`` are masked (BEiT, arXiv:2106.08254).

    A block's area is U(min_block, min(remaining, max_block)) patches, its log aspect (height / width) uniform. A block
    that adds nothing or more than max_block, by default half the grid, is drawn again; after ten such draws the mask
    stays as it is. The count is never exceeded, and falls short by about one patch in a thousand on a 16 x 16 grid.
    Gives bool ``grid_size`` (rows, columns), True where masked.
    """
    height, width = grid_size
    log_low, log_high = map(math.log, aspect_min_max)
    max_block = height * width // 2 if max_block is None else max_block
    mask = np.zeros(grid_size, bool)
    remaining = num_patches
    while remaining > 0:
        largest = min(remaining, max_block)
        for area_draw, aspect_draw, top_draw, left_draw in rng.random((10, 4)).tolist():
            area = min_block + (largest - min_block) * area_draw
            aspect = math.exp(log_low + (log_high - log_low) * aspect_draw)
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows >= height or columns >= width:
                continue
            top, left = int(top_draw * (height - rows + 1)), int(left_draw * (width - columns + 1))
            block = mask[top : top + rows, left : left + columns]
            added = block.size - int(np.count_nonzero(block))
            if 0 < added <= largest:
                block[:] = True
                remaining -= added
                break
        else:
            break
    return mask


class StratifiedMasks:
    """Masks of the four global crops of a pair of consecutive samples, a function of ``(seed, pair)`` alone.

    n = round(4 * mask_probability) of the four are masked. Their ratios are drawn one from each of n equal parts of
    ``mask_ratio_min_max``, the range of the fraction of a masked crop's patches, so that one bound on the masked
    patches, `bound`, holds for all batches; which crop gets which ratio is drawn as well. ``seed`` is in [0, 2^64),
    ``grid_size`` (rows, columns) of a global crop's N patches. ValueError if a fraction is outside [0, 1].
    """

    def __init__(
        self, seed: int, grid_size: tuple[int, int], mask_probability: float, mask_ratio_min_max: tuple[float, float]
    ) -> None:
        if not 0 <= mask_probability <= 1:
            raise ValueError(f"mask_probability is {mask_probability}; a number in [0, 1] is needed.")
        low, high = mask_ratio_min_max
        if not 0 <= low <= high <= 1:
            raise ValueError(f"mask_ratio_min_max is {low, high}; 0 <= min <= max <= 1 is needed.")
        self.seed, self.grid_size, self.num_patches = seed, grid_size, math.prod(grid_size)
        self.ratio_edges = np.linspace(low, high, round(4 * mask_probability) + 1)

    def bound(self, images: int) -> int:
        """The most patches that are masked in a batch of consecutive samples.

        Of an odd number one is half of a pair, and its two crops may be those with the most.
        """
        counts = [int(self.num_patches * edge) for edge in self.ratio_edges[1:]]  # ascending
        return images // 2 * sum(counts) + images % 2 * sum(counts[-2:])

    def __call__(self, pair: int) -> np.ndarray:
        """Masks of samples 2 * pair and 2 * pair + 1: bool (2 samples, 2 views, N)."""
        rng = sample_rng(self.seed, pair, _MASK_STREAM)
        masks = np.zeros((4, *self.grid_size), bool)
        ratios = rng.uniform(self.ratio_edges[:-1], self.ratio_edges[1:])
        for crop, ratio in zip(rng.permutation(4), ratios, strict=False):
            masks[crop] = block_mask(rng, self.grid_size, int(self.num_patches * ratio))
        return masks.reshape(2, 2, self.num_patches)

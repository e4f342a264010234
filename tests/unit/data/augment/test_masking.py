"""Block masks against a naive sampler, and the promises of stratified masks."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from dinov2.data import StratifiedMasks, block_mask

GRID = (16, 16)


def naive_block_mask(height: int, width: int, count: int) -> set[tuple[int, int]]:
    """The sampler as the recipe states it, cell by cell, with Python's own generator."""
    masked: set[tuple[int, int]] = set()
    while len(masked) < count:
        limit = min(count - len(masked), height * width // 2)
        for _ in range(10):
            area = random.uniform(4, limit)
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                new = {(top + y, left + x) for y in range(h) for x in range(w)} - masked
                if 0 < len(new) <= limit:
                    masked |= new
                    break
        else:
            break
    return masked


def perimeter(mask: np.ndarray) -> int:
    padded = np.pad(mask, 1).astype(int)
    return int(np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum())


@pytest.mark.parametrize("count", [30, 90, 200])
def test_block_masks_are_shaped_like_a_naive_samplers(count):
    rng = np.random.default_rng(0)
    ours = [block_mask(rng, GRID, count) for _ in range(500)]
    theirs = np.zeros((500, *GRID), bool)
    for mask in theirs:
        mask[tuple(zip(*naive_block_mask(*GRID, count), strict=True))] = True
    assert stats.ks_2samp([perimeter(m) for m in ours], [perimeter(m) for m in theirs]).pvalue > 1e-3
    centre_of_mass = [[np.argwhere(m).mean() for m in masks] for masks in (ours, theirs)]
    assert stats.ks_2samp(*centre_of_mass).pvalue > 1e-3


@pytest.mark.parametrize("grid", [GRID, (4, 4), (7, 3), (28, 28), (1, 1), (2, 2)])
def test_block_masks_never_exceed_what_is_asked(grid):
    rng = np.random.default_rng(0)
    for count in [*range(math.prod(grid) + 1)][:120]:
        assert block_mask(rng, grid, count).sum() <= count


def test_block_masks_deliver_almost_all_that_is_asked():
    rng = np.random.default_rng(0)
    counts = rng.integers(25, 116, 1500)
    delivered = [block_mask(rng, GRID, count).sum() for count in counts]
    assert sum(delivered) / sum(counts) > 0.9985


def test_one_block_adds_at_most_its_cap():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = block_mask(rng, GRID, 12, min_block=12, max_block=12)
        assert mask.sum() <= 12


def test_stratified_ratios_come_one_from_each_half():
    masks = StratifiedMasks(3, GRID, 0.5, (0.1, 0.45))
    counts = np.array([np.sort(masks(pair).sum(-1).ravel()) for pair in range(1500)])
    assert (counts[:, :2] == 0).all()
    low, high = counts[:, 2] / 256, counts[:, 3] / 256
    rng = np.random.default_rng(1)
    for ours, lower, upper in ((low, 0.1, 0.275), (high, 0.275, 0.45)):
        asked = np.floor(256 * rng.uniform(lower, upper, 20_000)) / 256
        assert stats.ks_2samp(ours, asked).pvalue > 1e-3
        assert ours.max() <= upper


def test_every_crop_is_masked_alike():
    masks = StratifiedMasks(3, GRID, 0.5, (0.1, 0.45))
    largest = np.bincount([masks(pair).sum(-1).argmax() for pair in range(1200)], minlength=4)
    masked = sum((masks(pair).sum(-1) > 0).ravel() for pair in range(1200))
    assert stats.chisquare(largest).pvalue > 1e-3
    assert np.abs(masked / 1200 - 0.5).max() < 4 * math.sqrt(0.25 / 1200)


@pytest.mark.parametrize(
    ("probability", "ratios", "bound"),
    [
        (0.5, (0.1, 0.45), 70 + 115),  # int(256 * 0.275) + int(256 * 0.45)
        (0.5, (0.1, 0.5), 76 + 128),  # int(256 * 0.3) + int(256 * 0.5)
        (1.0, (0.2, 0.2), 4 * 51),
        (0.25, (0.0, 1.0), 256),
        (0.0, (0.1, 0.5), 0),
    ],
)
def test_static_bound_holds_for_every_pair(probability, ratios, bound):
    masks = StratifiedMasks(0, GRID, probability, ratios)
    assert masks.bound(2) == bound
    assert max(masks(pair).sum() for pair in range(400)) <= bound
    assert 1.5 * bound <= masks.bound(3) <= 2 * bound
    assert max(masks(pair)[half].sum() for pair in range(400) for half in (0, 1)) <= masks.bound(1)


def test_masks_depend_on_seed_and_pair_alone():
    masks = StratifiedMasks(5, GRID, 0.5, (0.1, 0.45))
    first = masks(11)
    masks(12)
    assert np.array_equal(first, StratifiedMasks(5, GRID, 0.5, (0.1, 0.45))(11))
    assert not np.array_equal(first, masks(12))
    assert not np.array_equal(first, StratifiedMasks(6, GRID, 0.5, (0.1, 0.45))(11))


@pytest.mark.parametrize(("probability", "ratios"), [(1.2, (0.1, 0.5)), (0.5, (0.1, 1.1)), (0.5, (0.6, 0.5))])
def test_fractions_outside_their_range_are_refused(probability, ratios):
    with pytest.raises(ValueError, match="mask_"):
        StratifiedMasks(0, GRID, probability, ratios)

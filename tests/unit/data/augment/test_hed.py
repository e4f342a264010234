"""Stain augmentation against scikit-image, with and without the clip of the stain amounts."""

import numpy as np
import pytest
from scipy import stats
from skimage.color import hed2rgb

from dinov2.data import View
from dinov2.data.augment.steps.hed import Hed, perturb_stains
from tests.helpers.augmentation import options
from tests.helpers.closeness import assert_close
from tests.helpers.reference_transforms import perturb_stains as reference

VIEW = View("local", 2, 98)
CHANGES = [
    ((1, 1, 1), (0.05, -0.05, 0.02)),
    ((1, 1, 1), (-0.03, 0.04, -0.05)),
    ((1, 1, 1), (-0.05, -0.05, -0.05)),
    ((1, 1, 1), (0, 0, 0)),
    ((0.95, 1.05, 1.02), (0.01, 0, -0.01)),
    ((0, 2.5, 1), (0.3, -0.2, 1.2)),
    ((1, 1, 1), (-2, -2, -2)),
]


def stained(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Something like tissue: amounts of haematoxylin and eosin in smooth patches, and white between them."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-0.06, 0.12, (shape[0] // 8, shape[1] // 8, 2))
    hed = np.zeros((*shape, 3))
    hed[..., :2] = np.maximum(np.kron(coarse, np.ones((8, 8, 1))) + rng.normal(0, 0.004, (*shape, 2)), 0)
    return np.round(255 * hed2rgb(hed)).astype(np.uint8)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("scale", "shift"), CHANGES)
def test_stains_are_scikit_images(tiles, scale, shift, clip):
    images = [*tiles, *(stained((168, 168), seed) for seed in range(3))]
    for image in images:  # one by one, since they differ in size
        assert_close(
            [image],
            lambda tile: perturb_stains(tile, scale, shift, clip),
            lambda tile: reference(tile, scale, shift, clip),
            largest=1,
            mean=0.03,
        )


def test_clipped_stains_are_scikit_images_for_every_kind_of_pixel():
    rng = np.random.default_rng(0)
    extremes = rng.choice(np.array([0, 1, 2, 254, 255], np.uint8), (64, 64, 3))
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for _ in range(30):
        scale, shift = rng.uniform(0, 2, 3), rng.uniform(-0.2, 0.2, 3)
        for image in (extremes, noise):
            difference = perturb_stains(image, scale, shift).astype(int) - reference(image, scale, shift)
            assert np.abs(difference).max() <= 1


@pytest.mark.data
def test_clipped_stains_are_scikit_images_on_a_real_slide(jpeg_slide):
    openslide = pytest.importorskip("openslide")
    region = openslide.OpenSlide(jpeg_slide).read_region((600, 600), 0, (448, 448)).convert("RGB")
    for scale, shift in CHANGES:
        difference = perturb_stains(np.asarray(region), scale, shift).astype(int) - reference(region, scale, shift)
        assert np.abs(difference).max() <= 1


def test_a_stain_is_not_taken_away_where_there_is_none():
    white = np.full((1, 1, 3), 255, np.uint8)
    shifted = perturb_stains(white, (1, 1, 1), (-0.05, 0.05, -0.05))[0, 0].astype(int)
    assert np.abs(shifted - [242, 128, 236]).max() <= 1  # of the published code, which truncates
    assert perturb_stains(white, (1, 1, 1), (-0.05, 0.05, -0.05), clip=False).tolist() == [[[255, 255, 255]]]


def test_haematoxylin_added_to_white_gives_the_published_colour():
    white = np.full((1, 1, 3), 255, np.uint8)
    for clip in (True, False):
        shifted = perturb_stains(white, (1, 1, 1), (0.05, 0, 0), clip)
        assert shifted[0, 0].tolist() == [163, 157, 209]


def test_the_key_switches_the_clip_and_nothing_else(tissue):
    clipped, unclipped = Hed(options()), Hed(options(hed_clip=False))
    params = clipped.draw(np.random.default_rng(3), VIEW)
    assert params == unclipped.draw(np.random.default_rng(3), VIEW)
    before = tissue.copy()
    assert np.array_equal(clipped.apply(tissue, params), perturb_stains(tissue, *params, clip=True))
    assert np.array_equal(unclipped.apply(tissue, params), perturb_stains(tissue, *params, clip=False))
    assert np.array_equal(tissue, before)


def test_stains_shift_uniformly_and_each_on_its_own():
    rng, step = np.random.default_rng(0), Hed(options(hed_prob=1.0, hed_scale=0.1))
    draws = [step.draw(rng, VIEW) for _ in range(4000)]
    scales, shifts = (np.array([draw[i] for draw in draws]) for i in (0, 1))
    for stain in range(3):
        assert stats.kstest(shifts[:, stain], stats.uniform(-0.05, 0.1).cdf).pvalue > 1e-3
        assert stats.kstest(scales[:, stain], stats.uniform(0.9, 0.2).cdf).pvalue > 1e-3
    correlation = np.corrcoef(np.hstack([scales, shifts]).T) - np.eye(6)
    assert np.abs(correlation).max() < 4 / np.sqrt(len(draws))
    step = Hed(options(hed_prob=1.0))
    assert all(step.draw(rng, VIEW)[0] == [1, 1, 1] for _ in range(50))
    step = Hed(options(hed_prob=1.0, hed_scale=3.0))
    assert min(min(step.draw(rng, VIEW)[0]) for _ in range(500)) >= 0

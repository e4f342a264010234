"""The built-in steps but the stains: their draws against the stated odds, their results against other libraries."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from skimage import color
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as F

from dinov2.data import AugmentationStep, View
from dinov2.data.augment.steps.blur import Blur
from dinov2.data.augment.steps.flips import Flips
from dinov2.data.augment.steps.grayscale import Grayscale
from dinov2.data.augment.steps.hed import Hed
from dinov2.data.augment.steps.jitter import ADJUSTMENTS, Jitter
from dinov2.data.augment.steps.rand_stain import RandStain
from dinov2.data.augment.steps.rotate90 import Rotate90
from dinov2.data.augment.steps.solarize import Solarize
from dinov2.extensions import AUGMENTATIONS, BUILT_IN_STEPS
from tests.helpers.augmentation import OFF, options
from tests.helpers.closeness import assert_close

FACTORS = (0.8, 0.93, 1.0, 1.07, 1.2)
VIEWS = [View(kind, number, 98) for number, kind in enumerate(("global1", "global2", "local"))]
DRAWS = 4000


def draws(step: AugmentationStep, count: int = DRAWS, view: View = VIEWS[2]) -> list:
    rng = np.random.default_rng(0)
    return [step.draw(rng, view) for _ in range(count)]


def assert_rate(drawn: list, probability: float) -> None:
    hits = sum(params is not None for params in drawn)
    assert stats.binomtest(hits, len(drawn), probability).pvalue > 1e-3


def test_the_built_in_steps_are_registered():
    assert [AUGMENTATIONS[name] for name in BUILT_IN_STEPS] == [Flips, Hed, Jitter, Grayscale, Blur]
    assert not any(hasattr(AUGMENTATIONS[name], "Options") for name in BUILT_IN_STEPS)


@pytest.mark.parametrize(
    ("step", "probability"),
    [(Hed, 0.5), (Jitter, 0.8), (Grayscale, 0.2), (Blur, 0.5)],
)
def test_each_step_happens_as_often_as_it_says(step: type[AugmentationStep], probability: float):
    assert_rate(draws(step(options())), probability)
    assert draws(step(options(**OFF)), 300) == [None] * 300
    certain = options(**dict.fromkeys(OFF, 1.0))
    assert None not in draws(step(certain), 300)


def test_both_axes_are_mirrored_as_often_as_they_say():
    drawn = [flips or (False, False) for flips in draws(Flips(options(vertical_flip_prob=0.3)))]
    for axis, probability in enumerate((0.5, 0.3)):
        assert_rate([flips[axis] or None for flips in drawn], probability)
    assert set(draws(Flips(options(horizontal_flip_prob=1.0, vertical_flip_prob=1.0)), 99)) == {(True, True)}
    assert set(draws(Flips(options(**OFF)), 99)) == {None}


@pytest.mark.parametrize("flips", [(True, False), (False, True), (True, True)])
def test_flips_mirror_the_right_axis(tissue, flips):
    expected = tissue[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
    assert np.array_equal(Flips(options()).apply(tissue, flips), expected)


def test_turns_are_as_often_as_they_say_and_each_alike():
    drawn = draws(Rotate90(Rotate90.Options()))
    assert_rate(drawn, 0.75)
    assert stats.chisquare([drawn.count(turns) for turns in (None, 1, 2, 3)]).pvalue > 1e-3
    certain = draws(Rotate90(Rotate90.Options(prob=1.0)))
    assert stats.chisquare([certain.count(turns) for turns in (1, 2, 3)]).pvalue > 1e-3
    assert None not in certain and set(draws(Rotate90(Rotate90.Options(prob=0.0)), 300)) == {None}


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turns_are_numpys(tissue, turns):
    before = tissue.copy()
    turned = Rotate90(Rotate90.Options()).apply(tissue, turns)
    assert np.array_equal(turned, np.rot90(tissue, turns)) and turned.flags.c_contiguous
    assert np.array_equal(tissue, before)


def test_blur_odds_belong_to_the_right_view():
    for view, probability in zip(VIEWS, (1.0, 0.1, 0.5), strict=True):
        assert_rate(draws(Blur(options()), view=view), probability)
    sigmas = draws(Blur(options()), view=VIEWS[0])
    assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8, 1.4, 2.0])
def test_blur_is_torchvisions(tiles, sigma):
    def slow(image: Image.Image) -> np.ndarray:
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
        return F.gaussian_blur(planes, [9, 9], [sigma, sigma]).round().permute(1, 2, 0).numpy()

    assert_close(tiles, lambda tile: Blur(options()).apply(tile, sigma), slow, largest=1, mean=0.05)


def test_jitter_is_distributed_as_torchvisions():
    transform = ColorJitter(0.2, 0.2, 0.1, 0.05)
    arguments = (transform.brightness, transform.contrast, transform.saturation, transform.hue)
    theirs = [ColorJitter.get_params(*arguments) for _ in range(DRAWS)]
    ours = draws(Jitter(options(jitter_prob=1.0)))
    for position, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        amounts = [dict(jitter)[name] for jitter in ours]
        assert stats.ks_2samp(amounts, [params[position] for params in theirs]).pvalue > 1e-3
    orders = Counter(tuple(name for name, _ in jitter) for jitter in ours)
    assert len(orders) == math.factorial(4)
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_jitter_stronger_than_one_never_turns_negative():
    amounts = [dict(jitter)["contrast"] for jitter in draws(Jitter(options(contrast=1.5, jitter_prob=1.0)))]
    assert stats.kstest(amounts, stats.uniform(0, 2.5).cdf).pvalue > 1e-3


def test_an_adjustment_of_strength_0_is_left_out_and_the_others_stay():
    without = draws(Jitter(options(hue=0.0)), 200)
    for full, rest in zip(draws(Jitter(options()), 200), without, strict=True):
        assert rest == (full and [adjustment for adjustment in full if adjustment[0] != "hue"])


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_colour_adjustments_are_pillows(tiles, name, enhancer, factor):
    def slow(image: Image.Image) -> Image.Image:
        return enhancer(image).enhance(factor)

    assert_close(tiles, lambda tile: ADJUSTMENTS[name](tile, factor), slow, largest=1, mean=0.01)


@pytest.mark.parametrize("turn", [-0.05, -0.02, 0.0, 0.01, 0.05, 0.5])
def test_hue_turns_as_in_pillows_hsv(tiles, turn):
    def slow(image: Image.Image) -> Image.Image:
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(level + int(turn * 255)) % 256 for level in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")

    assert_close(tiles, lambda tile: ADJUSTMENTS["hue"](tile, turn), slow, largest=7, mean=0.8)


def test_grayscale_is_pillows_luma(tiles):
    assert_close(tiles, lambda tile: Grayscale(options()).apply(tile, True), lambda image: image.convert("L"), 1, 0.01)


@pytest.mark.parametrize("threshold", [0, 1, 128, 255, 256])
def test_solarisation_is_pillows(tissue, threshold):
    solarize = Solarize(Solarize.Options(prob_global1=0.3, threshold=threshold))
    assert np.array_equal(solarize.apply(tissue, True), ImageOps.solarize(Image.fromarray(tissue), threshold))
    grey = tissue[..., 0]
    assert np.array_equal(solarize.apply(grey, True), ImageOps.solarize(Image.fromarray(grey), threshold))
    for view, probability in zip(VIEWS, (0.3, 0.2, 0.0), strict=True):
        assert_rate(draws(solarize, view=view), probability)


def test_rand_stain_gives_views_the_statistics_it_drew(tissue):
    """As scikit-image measures them, on tissue of a size at which no colour leaves the range of RGB."""
    stain = RandStain(RandStain.Options(prob=1.0))
    target = [60.0, 12.0, -14.0], [8.0, 4.0, 5.0]
    found = color.rgb2lab(stain.apply(tissue, target)).reshape(-1, 3)
    np.testing.assert_allclose(found.mean(0), target[0], atol=0.5)
    np.testing.assert_allclose(found.std(0), target[1], atol=0.5)
    flat = np.full((8, 8, 3), 120, np.uint8)
    assert np.unique(stain.apply(flat, target).reshape(-1, 3), axis=0).shape == (1, 3)


def test_rand_stain_draws_its_statistics_from_normals():
    options = RandStain.Options(prob=0.5, mean=(60, 20, -20), mean_spread=(4, 3, 2), deviation=(1, 10, 10), strength=2)
    drawn = draws(RandStain(options))
    assert_rate(drawn, 0.5)
    means, deviations = np.array([one for one in drawn if one is not None]).transpose(1, 0, 2)
    np.testing.assert_allclose(means.mean(0), (60, 20, -20), atol=1)
    np.testing.assert_allclose(means.std(0), (8, 6, 4), rtol=0.1)
    assert deviations.min() == 0 and abs(np.median(deviations[:, 1]) - 10) < 1


def test_steps_leave_their_input_alone(tissue):
    before = tissue.copy()
    jitter = [(name, 0.3) for name in ADJUSTMENTS]
    Jitter(options()).apply(tissue, jitter)
    Flips(options()).apply(tissue, (True, True))
    Grayscale(options()).apply(tissue, True)
    Blur(options()).apply(tissue, 2.0)
    RandStain(RandStain.Options()).apply(tissue, ([50, 0, 0], [9, 9, 9]))
    assert np.array_equal(tissue, before)

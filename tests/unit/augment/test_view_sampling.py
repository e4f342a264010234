"""Distribution of the drawn view parameters against torchvision's own draws and against the stated odds."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from dinov2.data import AugmentationOptions, ViewParameters, sample_view

OPTIONS = AugmentationOptions()
DRAWS = 4000


def draw(
    count: int = DRAWS,
    image_size: tuple[int, int] = (224, 224),
    scale: tuple[float, float] = (0.32, 1.0),
    blur_prob: float = 0.5,
    options: AugmentationOptions = OPTIONS,
) -> list[ViewParameters]:
    rng = np.random.default_rng(0)
    return [sample_view(rng, image_size, scale, blur_prob, options) for _ in range(count)]


def assert_rate(hits: list[bool], probability: float) -> None:
    assert stats.binomtest(sum(hits), len(hits), probability).pvalue > 1e-3


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
@pytest.mark.parametrize("image_size", [(224, 224), (150, 260), (300, 90)])
def test_crop_boxes_are_distributed_as_torchvisions(image_size, scale):
    image = torch.empty(3, *image_size)
    arguments = image, list(scale), [3 / 4, 4 / 3]
    theirs = np.array([RandomResizedCrop.get_params(*arguments) for _ in range(DRAWS)])
    ours = np.array([(v.top, v.left, v.height, v.width) for v in draw(image_size=image_size, scale=scale)])
    for statistic in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 1] / np.maximum(image_size[1] - box[:, 3], 1),
    ):
        assert stats.ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("image_size", [(1, 500), (500, 1), (37, 1000), (1000, 37)])
def test_impossible_crops_fall_back_as_torchvisions(image_size):
    expected = RandomResizedCrop.get_params(torch.empty(3, *image_size), [0.9, 0.9], [3 / 4, 4 / 3])
    views = draw(20, image_size=image_size, scale=(0.9, 0.9))
    assert {(v.top, v.left, v.height, v.width) for v in views} == {expected}


@pytest.mark.parametrize("image_size", [(1, 1), (1, 2), (2, 3), (5, 4)])
def test_crops_of_tiny_images_lie_within_them(image_size):
    for view in draw(200, image_size=image_size, scale=(0.05, 1.0)):
        assert 0 <= view.top < view.top + view.height <= image_size[0]
        assert 0 <= view.left < view.left + view.width <= image_size[1]


def test_each_step_happens_as_often_as_it_says():
    options = replace(OPTIONS, vertical_flip_prob=0.3)
    views = draw(blur_prob=0.1, options=options)
    assert_rate([view.horizontal_flip for view in views], 0.5)
    assert_rate([view.vertical_flip for view in views], 0.3)
    assert_rate([view.hed is not None for view in views], 0.5)
    assert_rate([bool(view.jitter) for view in views], 0.8)
    assert_rate([view.grayscale for view in views], 0.2)
    assert_rate([view.blur_sigma is not None for view in views], 0.1)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_certain_odds_are_certain(probability):
    names = ("horizontal_flip_prob", "vertical_flip_prob", "hed_prob", "jitter_prob", "grayscale_prob")
    options = replace(OPTIONS, **dict.fromkeys(names, probability))
    for view in draw(300, blur_prob=probability, options=options):
        flags = (view.horizontal_flip, view.vertical_flip, view.grayscale)
        steps = [bool(step) for step in (*flags, view.blur_sigma, view.hed, view.jitter)]
        assert all(steps) == any(steps) == bool(probability)


def test_stains_shift_uniformly_and_each_on_its_own():
    views = draw(options=replace(OPTIONS, hed_prob=1.0, hed_scale=0.1))
    scales, shifts = (np.array([view.hed[i] for view in views]) for i in (0, 1))
    for stain in range(3):
        assert stats.kstest(shifts[:, stain], stats.uniform(-0.05, 0.1).cdf).pvalue > 1e-3
        assert stats.kstest(scales[:, stain], stats.uniform(0.9, 0.2).cdf).pvalue > 1e-3
    correlation = np.corrcoef(np.hstack([scales, shifts]).T) - np.eye(6)
    assert np.abs(correlation).max() < 4 / math.sqrt(len(views))
    assert all(view.hed[0] == (1, 1, 1) for view in draw(50) if view.hed)


def test_jitter_is_distributed_as_torchvisions():
    transform = ColorJitter(0.2, 0.2, 0.1, 0.05)
    arguments = (transform.brightness, transform.contrast, transform.saturation, transform.hue)
    theirs = [ColorJitter.get_params(*arguments) for _ in range(DRAWS)]
    ours = [view.jitter for view in draw(options=replace(OPTIONS, jitter_prob=1.0))]
    for position, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        amounts = [dict(jitter)[name] for jitter in ours]
        assert stats.ks_2samp(amounts, [params[position] for params in theirs]).pvalue > 1e-3
    orders = Counter(tuple(name for name, _ in jitter) for jitter in ours)
    assert len(orders) == math.factorial(4)
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_jitter_stronger_than_one_never_turns_negative():
    views = draw(options=replace(OPTIONS, contrast=1.5, jitter_prob=1.0))
    amounts = [dict(view.jitter)["contrast"] for view in views]
    assert stats.kstest(amounts, stats.uniform(0, 2.5).cdf).pvalue > 1e-3


def test_blur_sigma_is_uniform():
    sigmas = [view.blur_sigma for view in draw(blur_prob=1.0)]
    assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


def test_an_option_changes_nothing_but_its_own_step():
    changed = draw(200, options=replace(OPTIONS, hed_prob=0.0, hue=0.0, grayscale_prob=1.0))
    for before, after in zip(draw(200), changed, strict=True):
        expected_jitter = tuple(step for step in before.jitter if step[0] != "hue")
        assert after == before._replace(hed=None, grayscale=True, jitter=expected_jitter)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hed_prob", 1.5),
        ("blur_prob_local", -0.1),
        ("hue", 0.6),
        ("contrast", -0.2),
        ("blur_sigma_min_max", (0.0, 2.0)),
        ("blur_sigma_min_max", (2.0, 1.0)),
        ("blur_kernel_size", 8),
    ],
)
def test_impossible_options_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        AugmentationOptions(**{name: value})

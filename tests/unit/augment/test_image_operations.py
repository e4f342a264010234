"""Each fast operation against the library that defines it, in grey levels of 255."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from skimage.color import hed2rgb, rgb2hed
from torchvision.transforms import functional as F
from torchvision.transforms.v2.functional import resized_crop

from dinov2.data.augment import ops as transforms
from dinov2.data.augment import reference_transforms

FACTORS = (0.8, 0.93, 1.0, 1.07, 1.2)


def assert_close(
    tiles: list[np.ndarray],
    fast: Callable[[np.ndarray], np.ndarray],
    slow: Callable[[Image.Image], np.ndarray | Image.Image],
    largest: float,
    mean: float,
) -> None:
    pairs = [(fast(tile), np.asarray(slow(Image.fromarray(tile)))) for tile in tiles]
    assert all(a.dtype == np.uint8 and a.shape == b.shape for a, b in pairs)
    differences = np.stack([np.abs(a.astype(int) - b) for a, b in pairs])
    assert differences.max() <= largest
    assert differences.mean() <= mean


@pytest.mark.parametrize("size", [98, 224])
@pytest.mark.parametrize("box", [(0, 0, 170, 170), (11, 25, 60, 47), (90, 3, 75, 100), (5, 160, 9, 8)])
def test_resized_crop_is_pillows_antialiased_bicubic(tiles, box, size):
    top, left, height, width = box

    def slow(image: Image.Image) -> Image.Image:
        box = (left, top, left + width, top + height)
        return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)

    assert_close(tiles, lambda tile: transforms.resized_crop(tile, *box, size), slow, largest=2, mean=0.01)


@pytest.mark.parametrize("size", [98, 224])
def test_resized_crop_is_torchvisions_to_the_bit(tiles, size):
    def slow(image: Image.Image) -> np.ndarray:
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        bicubic = F.InterpolationMode.BICUBIC
        return resized_crop(planes, 11, 25, 60, 47, [size, size], bicubic).permute(1, 2, 0).numpy()

    assert_close(tiles, lambda tile: transforms.resized_crop(tile, 11, 25, 60, 47, size), slow, 0, 0)


@pytest.mark.parametrize(("left_right", "top_bottom"), [(True, False), (False, True), (True, True)])
def test_flips_mirror_the_right_axis(tiles, left_right, top_bottom):
    box = (11, 25, 60, 47, 98)

    def slow(image: Image.Image) -> np.ndarray:
        crop = transforms.resized_crop(np.asarray(image), *box)
        return crop[:: -1 if top_bottom else 1, :: -1 if left_right else 1]

    flips = (left_right, top_bottom)
    assert_close(tiles, lambda tile: transforms.resized_crop(tile, *box, *flips), slow, 0, 0)
    for operations in (transforms, reference_transforms):
        flipped = np.asarray(operations.resized_crop(tiles[0], *box, *flips))
        assert np.abs(flipped.astype(int) - slow(Image.fromarray(tiles[0]))).max() <= 2


@pytest.mark.parametrize(
    ("scale", "shift"),
    [
        ((1, 1, 1), (0.05, -0.05, 0.02)),
        ((1, 1, 1), (-0.03, 0.04, -0.05)),
        ((1, 1, 1), (0, 0, 0)),
        ((0.95, 1.05, 1.02), (0.01, 0, -0.01)),
        ((1, 1, 1), (-2, -2, -2)),
    ],
)
def test_stains_are_scikit_images(tiles, scale, shift):
    def slow(image: Image.Image) -> np.ndarray:
        return np.round(255 * hed2rgb(rgb2hed(np.asarray(image)) * scale + shift))

    assert_close(tiles, lambda tile: transforms.perturb_stains(tile, scale, shift), slow, 1, 0.015)


def test_haematoxylin_added_to_white_gives_the_published_colour():
    white = np.full((1, 1, 3), 255, np.uint8)
    shifted = transforms.perturb_stains(white, (1, 1, 1), (0.05, 0, 0))
    assert shifted[0, 0].tolist() == [163, 157, 209]


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
    adjust = transforms.ADJUSTMENTS[name]

    def slow(image: Image.Image) -> Image.Image:
        return enhancer(image).enhance(factor)

    assert_close(tiles, lambda tile: adjust(tile, factor), slow, largest=1, mean=0.01)


@pytest.mark.parametrize("turn", [-0.05, -0.02, 0.0, 0.01, 0.05, 0.5])
def test_hue_turns_as_in_pillows_hsv(tiles, turn):
    def slow(image: Image.Image) -> Image.Image:
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(level + int(turn * 255)) % 256 for level in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")

    assert_close(tiles, lambda tile: transforms.ADJUSTMENTS["hue"](tile, turn), slow, largest=7, mean=0.8)


def test_grayscale_is_pillows_luma(tiles):
    assert_close(tiles, transforms.grayscale, lambda image: image.convert("L"), 1, 0.01)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8, 1.4, 2.0])
def test_blur_is_torchvisions(tiles, sigma):
    def slow(image: Image.Image) -> np.ndarray:
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
        return F.gaussian_blur(planes, [9, 9], [sigma, sigma]).round().permute(1, 2, 0).numpy()

    assert_close(tiles, lambda tile: transforms.blur(tile, sigma, 9), slow, largest=1, mean=0.05)


def test_operations_leave_their_input_alone(tissue):
    before = tissue.copy()
    transforms.resized_crop(tissue, 3, 4, 50, 60, 32, True, True)
    transforms.perturb_stains(tissue, (1, 1, 1), (0.05, 0.05, 0.05))
    for adjust in transforms.ADJUSTMENTS.values():
        adjust(tissue, 0.3)
    transforms.grayscale(tissue)
    transforms.blur(tissue, 2.0, 9)
    assert np.array_equal(tissue, before)

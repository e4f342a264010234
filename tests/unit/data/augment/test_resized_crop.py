"""Crops against the libraries that define them, in grey levels of 255."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F
from torchvision.transforms.v2.functional import resized_crop

from dinov2.data.augment.multi_crop import resized_crop as crop
from tests.helpers.closeness import assert_close


@pytest.mark.parametrize("size", [98, 224])
@pytest.mark.parametrize("box", [(0, 0, 170, 170), (11, 25, 60, 47), (90, 3, 75, 100), (5, 160, 9, 8)])
def test_resized_crop_is_pillows_antialiased_bicubic(tiles, box, size):
    top, left, height, width = box

    def slow(image: Image.Image) -> Image.Image:
        box = (left, top, left + width, top + height)
        return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)

    assert_close(tiles, lambda tile: crop(tile, *box, size), slow, largest=2, mean=0.01)


@pytest.mark.parametrize("size", [98, 224])
def test_resized_crop_is_torchvisions_to_the_bit(tiles, size):
    def slow(image: Image.Image) -> np.ndarray:
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        bicubic = F.InterpolationMode.BICUBIC
        return resized_crop(planes, 11, 25, 60, 47, [size, size], bicubic).permute(1, 2, 0).numpy()

    assert_close(tiles, lambda tile: crop(tile, 11, 25, 60, 47, size), slow, 0, 0)


def test_the_image_is_left_alone(tissue: np.ndarray):
    before = tissue.copy()
    crop(tissue, 3, 4, 50, 60, 32)
    assert np.array_equal(tissue, before)

"""Normalisation against its formula in float64."""

import pytest
import torch

from dinov2.data import IMAGENET_MEAN, IMAGENET_STD, normalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_follows_its_formula(dtype):
    images = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.double() / 255 - mean) / std
    result = normalize(images, dtype=dtype)
    assert result.dtype == dtype and result.is_contiguous()
    torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)

"""Whole multi-crop augmentations: determinism, backends, odds per view, Meta's interface."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentationOptions,
    DataAugmentationDINO,
    MultiCropAugmentation,
    MultiCrops,
    normalize,
    sample_view,
)
from dinov2.utils.seeding import sample_rng

OPTIONS = AugmentationOptions()


def augmentation(options: AugmentationOptions = OPTIONS, **settings) -> MultiCropAugmentation:
    return MultiCropAugmentation(options, (0.32, 1.0), (0.05, 0.32), 8, 224, 98, **{"seed": 7, **settings})


def equal(a: MultiCrops, b: MultiCrops) -> bool:
    return torch.equal(a.global_crops, b.global_crops) and torch.equal(a.local_crops, b.local_crops)


def test_crops_have_the_stated_form(tiles):
    crops = augmentation()(tiles[0], 3)
    assert crops.global_crops.shape == (2, 3, 224, 224) and crops.local_crops.shape == (8, 3, 98, 98)
    for crop in (crops.global_crops, crops.local_crops):
        assert crop.dtype == torch.uint8 and crop.is_contiguous()


def test_crops_depend_on_seed_and_index_alone(tiles):
    augment = augmentation()
    forwards = [augment(tiles[0], index) for index in range(4)]
    torch.manual_seed(1)
    np.random.seed(1)
    travelled = pickle.loads(pickle.dumps(augmentation()))
    backwards = [travelled(tiles[0], index) for index in reversed(range(4))][::-1]
    assert all(map(equal, forwards, backwards))
    assert not any(equal(forwards[0], other) for other in [*forwards[1:], augmentation(seed=8)(tiles[0], 0)])


def test_views_do_not_depend_on_how_many_follow():
    few = MultiCropAugmentation(OPTIONS, (0.32, 1.0), (0.05, 0.32), 2, seed=7)
    assert augmentation().sample((200, 300), 5)[:4] == few.sample((200, 300), 5)


@pytest.mark.parametrize(("seed", "index"), [(7, 5), (0, 0), (2**64 - 1, 2**64 - 1)])
def test_each_view_comes_from_its_own_stream(seed, index):
    views = augmentation(seed=seed).sample((200, 300), index)
    for number, view in enumerate(views):
        scale, blur = ((0.32, 1.0), (1.0, 0.1)[number]) if number < 2 else ((0.05, 0.32), 0.5)
        assert view == sample_view(sample_rng(seed, index, number), (200, 300), scale, blur, OPTIONS)


def test_drawn_numbers_are_what_they_were():
    """Drawn from numpy's generator one by one, as runs on record were."""
    rng = sample_rng(7, 5, 3)
    rng.random((10, 4))
    flip = rng.random(7)[0]
    shift = 0.05 * rng.uniform(-1, 1, (2, 3))[1]
    amounts, order = rng.random(4), rng.permutation(4)
    always = replace(OPTIONS, hed_prob=1.0, jitter_prob=1.0)
    view = augmentation(always).sample((224, 224), 5)[3]
    assert view.horizontal_flip == (flip < 0.5)
    assert view.hed == ((1, 1, 1), tuple(shift))
    low, high = np.array([0.8, 0.8, 0.9, -0.05]), np.array([1.2, 1.2, 1.1, 0.05])
    assert [amount for _, amount in view.jitter] == pytest.approx((low + (high - low) * amounts)[order])


def test_blur_odds_belong_to_the_right_view():
    blurred = np.mean(
        [[view.blur_sigma is not None for view in augmentation().sample((224, 224), i)] for i in range(1500)],
        axis=0,
    )
    four_sigma = 4 * np.sqrt(0.25 / 1500)
    assert blurred[0] == 1
    assert abs(blurred[1] - 0.1) < four_sigma
    assert np.abs(blurred[2:] - 0.5).max() < four_sigma


def test_fast_and_reference_backends_agree_on_equal_parameters(tissue):
    fast, reference = augmentation(), augmentation(backend="reference")
    pairs = [(fast(tissue, i), reference(tissue, i)) for i in range(12)]
    for kind in ("global_crops", "local_crops"):
        difference = torch.stack([(getattr(a, kind).int() - getattr(b, kind).int()).abs() for a, b in pairs])
        assert difference.float().mean() < 0.5
        assert (difference > 8).float().mean() < 1e-4


def test_backends_agree_to_rounding_without_hue(tissue):
    options = replace(OPTIONS, hue=0.0)
    fast, reference = augmentation(options), augmentation(options, backend="reference")
    for index in range(6):
        ours, theirs = (augment(tissue, index).global_crops.int() for augment in (fast, reference))
        difference = (ours - theirs).abs()
        assert difference.float().mean() < 0.05
        assert (difference > 2).float().mean() < 1e-3


@pytest.mark.parametrize("backend", ["fast", "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (7, 5), (40, 1000), (512, 512)])
def test_images_of_any_size_are_taken(tissue, shape, backend):
    image = np.resize(tissue, (*shape, 3))
    for index in range(3):
        crops = augmentation(backend=backend)(image, index)
        assert crops.global_crops.shape == (2, 3, 224, 224)


def test_a_flat_image_stays_flat_through_crop_flip_and_blur():
    options = replace(OPTIONS, hed_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0)
    image = np.empty((50, 60, 3), np.uint8)
    image[:] = (200, 120, 160)
    crops = augmentation(options)(image, 0)
    assert (crops.global_crops == torch.tensor([200, 120, 160], dtype=torch.uint8)[:, None, None]).all()


@pytest.mark.parametrize(
    "image",
    [*(np.zeros(shape, np.uint8) for shape in ((9, 9), (9, 9, 4), (9, 0, 3))), np.zeros((9, 9, 3))],
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match="Image 3"):
        augmentation()(image, 3)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="'gpu'"):
        augmentation(backend="gpu")
    with pytest.raises(ValueError, match="local_crops_scale"):
        MultiCropAugmentation(OPTIONS, (0.32, 1.0), (0.4, 0.32), 8)


def test_no_local_views_give_an_empty_tensor(tiles):
    crops = MultiCropAugmentation(OPTIONS, (0.32, 1.0), (0.05, 0.32), 0)(tiles[0], 0)
    assert crops.local_crops.shape == (0, 3, 96, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_follows_its_formula(dtype):
    images = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.double() / 255 - mean) / std
    result = normalize(images, dtype=dtype)
    assert result.dtype == dtype and result.is_contiguous()
    torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_metas_interface_gives_normalised_views_and_follows_torchs_seed(tissue):
    augment = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, global_crops_size=112, local_crops_size=42)
    first = augment(Image.fromarray(tissue))
    second = augment(tissue)
    torch.manual_seed(0)
    again = augment(tissue)
    assert set(first) == {"global_crops", "global_crops_teacher", "local_crops", "offsets"}
    assert [tuple(view.shape) for view in first["global_crops"]] == [(3, 112, 112)] * 2
    assert [tuple(view.shape) for view in first["local_crops"]] == [(3, 42, 42)] * 3
    assert first["offsets"] == ()
    assert all(map(torch.equal, first["global_crops"], first["global_crops_teacher"]))
    assert all(map(torch.equal, first["local_crops"], again["local_crops"]))
    assert not torch.equal(first["local_crops"][0], second["local_crops"][0])
    values = torch.stack(first["global_crops"])
    assert values.dtype == torch.float32 and -2.2 < values.min() < 0 < values.max() < 2.7

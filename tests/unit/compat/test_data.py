"""Meta's data interface: its keys and meanings, and randomness that follows torch's seed."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from dinov2.compat.data import fresh_rng
from dinov2.data import DataAugmentationDINO, MaskingGenerator, collate_data_and_cast
from tests.helpers.augmentation import OFF, options

SIZE = 56


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """A stained section, uint8 (512, 512, 3)."""
    return data.immunohistochemistry()


def test_fresh_rng_follows_torchs_seed():
    first, second = fresh_rng().random(), fresh_rng().random()
    torch.manual_seed(0)
    assert fresh_rng().random() == first != second


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


def test_metas_augmentation_takes_options(tissue):
    flat = np.full((64, 64, 3), 200, np.uint8)
    views = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 1, SIZE, 28, options(**OFF))(flat)
    assert all(view[channel].unique().numel() == 1 for view in views["global_crops"] for channel in range(3))


def test_metas_collate_returns_its_keys_and_meanings(tissue):
    augment = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, SIZE * 2, 28)
    samples = [(augment(tissue), None) for _ in range(5)]
    generator = MaskingGenerator(8, max_num_patches=32)
    batch = collate_data_and_cast(samples, (0.1, 0.5), 0.5, torch.float16, 64, generator)
    assert set(batch) == {
        "collated_global_crops",
        "collated_local_crops",
        "collated_masks",
        "mask_indices_list",
        "masks_weight",
        "upperbound",
        "n_masked_patches",
    }
    assert batch["collated_global_crops"].shape == (10, 3, 112, 112)
    assert batch["collated_local_crops"].shape == (15, 3, 28, 28)
    assert batch["collated_global_crops"].dtype == batch["collated_local_crops"].dtype == torch.float16
    assert torch.equal(batch["collated_global_crops"][7], samples[2][0]["global_crops"][1].half())
    masks = batch["collated_masks"]
    assert masks.shape == (10, 64) and (masks.sum(1) > 0).sum() == 5
    indices, weights = np.flatnonzero(masks), [1 / masks[i // 64].sum() for i in np.flatnonzero(masks)]
    assert batch["mask_indices_list"].tolist() == indices.tolist()
    torch.testing.assert_close(batch["masks_weight"], torch.tensor(weights))
    assert batch["upperbound"] == sum(int(64 * edge) for edge in (0.18, 0.26, 0.34, 0.42, 0.5))
    assert batch["n_masked_patches"].tolist() == [len(indices)] and len(indices) <= batch["upperbound"]


def test_samples_of_openmidnights_datasets(tissue):
    augment = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, SIZE, 28)
    views = [augment(tissue) for _ in range(3)]
    options = ((0.1, 0.5), 0.5, torch.float32, 16, MaskingGenerator(4, max_num_patches=8))
    torch.manual_seed(1)
    plain = collate_data_and_cast([(crops, None) for crops in views], *options)
    torch.manual_seed(1)
    indexed = collate_data_and_cast([((crops, None), 7 + i) for i, crops in enumerate(views)], *options)
    assert indexed.pop("indexes") == [7, 8, 9]
    torch.testing.assert_close(indexed, plain, rtol=0, atol=0)


def test_metas_collate_names_what_is_missing():
    with pytest.raises(ValueError, match="n_tokens"):
        collate_data_and_cast([], (0.1, 0.5), 0.5, torch.float32)


def test_metas_masking_generator():
    generator = MaskingGenerator((8, 10), max_num_patches=40)
    assert generator.get_shape() == (8, 10)
    assert MaskingGenerator(8).get_shape() == (8, 8)
    mask = generator(30)
    assert mask.dtype == bool and mask.shape == (8, 10) and 25 <= mask.sum() <= 30
    assert not generator().any()
    assert not np.array_equal(mask, generator(30))

"""Collation against a slow reference, its independence of the world size, and Meta's keys."""

from dataclasses import replace
from hashlib import blake2b

import numpy as np
import pytest
import torch

from dinov2.data import (
    DataAugmentationDINO,
    MaskingGenerator,
    MultiCropCollate,
    MultiCrops,
    Sample,
    collate_data_and_cast,
)
from dinov2.data.augment.view_packing import ImageAndViews

SIZE, PATCH = 56, 14
COLLATE = MultiCropCollate(9, PATCH, 0.5, (0.1, 0.6), SIZE)


def make_samples(first: int, count: int) -> list[Sample]:
    samples = []
    for index in range(first, first + count):
        generator = torch.Generator().manual_seed(index)
        crops = MultiCrops(
            torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
            torch.randint(0, 256, (5, 3, 28, 28), generator=generator, dtype=torch.uint8),
        )
        samples.append(Sample(index, crops, slide=f"slide{index % 3}", replaced=index % 4 == 1))
    return samples


def test_batch_equals_a_slow_reference():
    samples = make_samples(6, 8)
    batch = COLLATE(samples)
    for view in range(2):
        for b, sample in enumerate(samples):
            assert torch.equal(batch["global_crops"][view * 8 + b], sample.crops.global_crops[view])
    for view in range(5):
        for b, sample in enumerate(samples):
            assert torch.equal(batch["local_crops"][view * 8 + b], sample.crops.local_crops[view])
    masks, expected = batch["masks"], []
    for crop in range(16):
        for patch in range(16):
            if masks[crop, patch]:
                expected.append((crop * 16 + patch, 1 / int(masks[crop].sum())))
    n = int(batch["n_masked"])
    assert n == len(expected) > 0
    assert batch["mask_indices"][:n].tolist() == [index for index, _ in expected]
    torch.testing.assert_close(batch["mask_weight"][:n], torch.tensor([weight for _, weight in expected]))
    assert not batch["mask_indices"][n:].any() and not batch["mask_weight"][n:].any()
    assert batch["indices"].tolist() == list(range(6, 14))
    assert batch["slides"] == [sample.slide for sample in samples]
    assert batch["replaced"] == 2
    digests = [blake2b(sample.slide.encode(), digest_size=8).hexdigest() for sample in samples]
    assert batch["slide_ids"].tolist() == [int(digest, 16) // 2 for digest in digests]
    assert batch["masks"].dtype == torch.bool and batch["mask_weight"].dtype == torch.float32
    assert all(
        batch[key].dtype == torch.int64 for key in ("mask_indices", "n_masked", "indices", "slide_ids")
    )
    assert batch["n_masked"].shape == ()


def test_length_of_the_mask_index_never_changes():
    # Two masked crops per pair, 16 patches each: int(16 * 0.35) + int(16 * 0.6) = 5 + 9.
    assert COLLATE.max_masked(4) == 2 * 14
    for first in range(0, 400, 4):
        batch = COLLATE(make_samples(first, 4))
        assert len(batch["mask_indices"]) == len(batch["mask_weight"]) == 28
        assert batch["n_masked"] <= 28


def test_drawn_samples_are_padded_to_the_largest_and_masked_like_rendered_ones():
    rng = np.random.default_rng(0)
    shapes = [(20, 30), (1, 1), (7, 40), (20, 30)]
    drawn = [
        ImageAndViews(rng.integers(1, 256, (*shape, 3), dtype=np.uint8), rng.random((7, 29), np.float32))
        for shape in shapes
    ]
    rendered = make_samples(6, 4)
    batch, expected = (
        COLLATE([replace(s, crops=c) for s, c in zip(rendered, drawn, strict=True)]),
        COLLATE(rendered),
    )
    assert batch["images"].shape == (4, 20, 40, 3) and batch["images"].dtype == torch.uint8
    for image, (height, width), sample in zip(batch["images"].numpy(), shapes, drawn, strict=True):
        assert np.array_equal(image[:height, :width], sample.image)
        assert (image != 0).sum() == height * width * 3
    assert np.array_equal(batch["view_parameters"].numpy(), np.stack([s.parameters for s in drawn]))
    others = set(expected) - {"global_crops", "local_crops"}
    assert set(batch) == others | {"images", "view_parameters"}
    for key in others:
        same = torch.equal if isinstance(batch[key], torch.Tensor) else lambda a, b: a == b
        assert same(batch[key], expected[key])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_masks_do_not_depend_on_the_world_size(world_size):
    whole = COLLATE(make_samples(32, 16))["masks"].view(2, 16, -1)
    share = 16 // world_size
    for rank in range(world_size):
        part = COLLATE(make_samples(32 + rank * share, share))["masks"].view(2, share, -1)
        assert torch.equal(part, whole[:, rank * share : (rank + 1) * share])


@pytest.mark.parametrize(("first", "count"), [(0, 3), (1, 4), (0, 0)])
def test_broken_pairs_are_refused(first, count):
    with pytest.raises(ValueError, match="whole pairs"):
        COLLATE(make_samples(first, count))


def test_crop_must_be_whole_patches():
    with pytest.raises(ValueError, match="224"):
        MultiCropCollate(0, 16 + 1, 0.5, (0.1, 0.5), 224)


def test_no_masks_give_an_empty_index():
    batch = MultiCropCollate(0, PATCH, 0.0, (0.1, 0.5), SIZE)(make_samples(0, 4))
    assert len(batch["mask_indices"]) == 0 and not batch["masks"].any() and batch["n_masked"] == 0


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


def test_metas_collate_names_what_is_missing():
    with pytest.raises(ValueError, match="n_tokens"):
        collate_data_and_cast([], (0.1, 0.5), 0.5, torch.float32)

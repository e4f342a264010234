"""Collation against a slow reference, and its independence of the world size."""

from hashlib import blake2b

import pytest
import torch

from dinov2.data import MultiCropCollate, MultiCrops, Sample

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
    assert all(batch[key].dtype == torch.int64 for key in ("mask_indices", "n_masked", "indices", "slide_ids"))
    assert batch["n_masked"].shape == ()


def test_length_of_the_mask_index_never_changes():
    # Two masked crops per pair, 16 patches each: int(16 * 0.35) + int(16 * 0.6) = 5 + 9.
    assert COLLATE.max_masked(4) == 2 * 14
    for first in range(0, 400, 4):
        batch = COLLATE(make_samples(first, 4))
        assert len(batch["mask_indices"]) == len(batch["mask_weight"]) == 28
        assert batch["n_masked"] <= 28


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_masks_do_not_depend_on_the_world_size(world_size):
    whole = COLLATE(make_samples(32, 16))["masks"].view(2, 16, -1)
    share = 16 // world_size
    for rank in range(world_size):
        part = COLLATE(make_samples(32 + rank * share, share))["masks"].view(2, share, -1)
        assert torch.equal(part, whole[:, rank * share : (rank + 1) * share])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_odd_batches(size):
    whole = COLLATE(make_samples(0, 15 * 2))["masks"].view(2, 30, -1)
    for first in range(0, 30, size):
        batch = COLLATE(make_samples(first, size))
        assert torch.equal(batch["masks"].view(2, size, -1), whole[:, first : first + size])
        # Two masked crops per pair, 5 and 9 patches each: half a pair may have both.
        assert len(batch["mask_indices"]) == (size // 2 + 1) * 14 == COLLATE.max_masked(size)
        assert batch["n_masked"] == batch["masks"].sum()


@pytest.mark.parametrize(("first", "count"), [(1, 4), (0, 0)])
def test_broken_pairs_are_refused(first, count):
    with pytest.raises(ValueError, match="whole pairs"):
        COLLATE(make_samples(first, count))


def test_crop_must_be_whole_patches():
    with pytest.raises(ValueError, match="224"):
        MultiCropCollate(0, 16 + 1, 0.5, (0.1, 0.5), 224)


def test_no_masks_give_an_empty_index():
    batch = MultiCropCollate(0, PATCH, 0.0, (0.1, 0.5), SIZE)(make_samples(0, 4))
    assert len(batch["mask_indices"]) == 0 and not batch["masks"].any() and batch["n_masked"] == 0

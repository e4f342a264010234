"""Whole multi-crop augmentations: boxes, determinism, streams of the steps, and the slow reference."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from dinov2.data import AugmentationStep, MultiCropAugmentation, MultiCrops, View
from dinov2.data.augment.multi_crop import sample_box
from dinov2.data.augment.steps.rotate90 import Rotate90
from dinov2.utils.seeding import hash_name, sample_rng
from tests.helpers.augmentation import OFF, EarlyTint, Tint, make_augmentation, options
from tests.helpers.reference_transforms import reference_crops

DRAWS = 4000
TURNS = {"rotate90": Rotate90.Options()}


def equal(a: MultiCrops, b: MultiCrops) -> bool:
    return torch.equal(a.global_crops, b.global_crops) and torch.equal(a.local_crops, b.local_crops)


def test_views_of_a_gram_teacher_are_the_global_ones_undistorted():
    """Box, flips and turns of the global views, at their own size; all other views stay as they were."""
    image = np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8)
    sized = {"global_crops_size": 32, "gram_teacher_no_distortions": True}
    plain = make_augmentation(options(steps=TURNS), global_crops_size=32)
    with_gram = make_augmentation(options(steps=TURNS), gram_teacher_crops_size=64, **sized)
    only_moved = options(**OFF | {"horizontal_flip_prob": 0.5}, steps=TURNS)
    undistorted = make_augmentation(only_moved, global_crops_size=64)
    for index in range(8):
        expected, found = plain(image, index), with_gram(image, index)
        assert equal(expected, found) and expected.gram_crops is None
        assert torch.equal(found.gram_crops, undistorted(image, index).global_crops)
    same = make_augmentation(gram_teacher_crops_size=32, global_crops_size=32)
    assert same(image, 0).gram_crops is None
    with pytest.raises(ValueError, match="gram_teacher_crops_size is 64"):
        make_augmentation(gram_teacher_crops_size=64, global_crops_size=32)


def boxes(count: int, image_size: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([sample_box(rng, image_size, scale) for _ in range(count)])


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
@pytest.mark.parametrize("image_size", [(224, 224), (150, 260), (300, 90)])
def test_crop_boxes_are_distributed_as_torchvisions(image_size, scale):
    image = torch.empty(3, *image_size)
    arguments = image, list(scale), [3 / 4, 4 / 3]
    theirs = np.array([RandomResizedCrop.get_params(*arguments) for _ in range(DRAWS)])
    ours = boxes(DRAWS, image_size, scale)
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
    assert {tuple(box) for box in boxes(20, image_size, (0.9, 0.9)).tolist()} == {expected}


@pytest.mark.parametrize("image_size", [(1, 1), (1, 2), (2, 3), (5, 4)])
def test_crops_of_tiny_images_lie_within_them(image_size):
    for top, left, height, width in boxes(200, image_size, (0.05, 1.0)).tolist():
        assert 0 <= top < top + height <= image_size[0]
        assert 0 <= left < left + width <= image_size[1]


def test_crops_have_the_stated_form(tiles):
    crops = make_augmentation()(tiles[0], 3)
    assert crops.global_crops.shape == (2, 3, 224, 224) and crops.local_crops.shape == (8, 3, 98, 98)
    for crop in (crops.global_crops, crops.local_crops):
        assert crop.dtype == torch.uint8 and crop.is_contiguous()


def test_crops_depend_on_seed_and_index_alone(tiles):
    augment = make_augmentation()
    forwards = [augment(tiles[0], index) for index in range(4)]
    torch.manual_seed(1)
    np.random.seed(1)
    travelled = pickle.loads(pickle.dumps(make_augmentation()))
    backwards = [travelled(tiles[0], index) for index in reversed(range(4))][::-1]
    assert all(map(equal, forwards, backwards))
    others = [*forwards[1:], make_augmentation(seed=8)(tiles[0], 0)]
    assert not any(equal(forwards[0], other) for other in others)


def test_views_do_not_depend_on_how_many_follow():
    few = make_augmentation(local_crops_number=2)
    assert make_augmentation().sample((200, 300), 5)[:4] == few.sample((200, 300), 5)


@pytest.mark.parametrize(("seed", "index"), [(7, 5), (0, 0), (2**64 - 1, 2**64 - 1)])
def test_each_step_draws_from_a_stream_of_its_own_for_each_view(seed, index):
    augment = make_augmentation(seed=seed)
    kinds = ["global1", "global2", *["local"] * 8]
    for number, (drawn, kind) in enumerate(zip(augment.sample((200, 300), index), kinds, strict=True)):
        scale, size = ((0.32, 1.0), 224) if number < 2 else ((0.05, 0.32), 98)
        rng = sample_rng(seed, index, hash_name("crop box"), number)
        assert drawn.box == sample_box(rng, (200, 300), scale)
        alone = {
            name: step.draw(sample_rng(seed, index, hash_name(name), number), View(kind, number, size))
            for name, step in augment.steps.items()
        }
        assert drawn.params == {name: params for name, params in alone.items() if params is not None}


def test_drawn_numbers_are_what_they_were():
    """Drawn from numpy's generator one by one, as runs on record were."""
    always = options(hed_prob=1.0, jitter_prob=1.0)
    view = make_augmentation(always).sample((224, 224), 5)[3]
    flips = sample_rng(7, 5, hash_name("flips"), 3).random(2) < [0.5, 0.0]
    assert view.params.get("flips", (False, False)) == tuple(flips)
    rng = sample_rng(7, 5, hash_name("hed"), 3)
    rng.random()
    scale, shift = 1 + 0.0 * rng.random(3), rng.uniform(-0.05, 0.05, 3)
    assert view.params["hed"] == (scale.tolist(), pytest.approx(shift.tolist()))
    rng = sample_rng(7, 5, hash_name("jitter"), 3)
    rng.random()
    amounts, order = rng.random(4), np.argsort(rng.random(4))
    low, high = np.array([0.8, 0.8, 0.9, -0.05]), np.array([1.2, 1.2, 1.1, 0.05])
    assert [amount for _, amount in view.params["jitter"]] == pytest.approx((low + (high - low) * amounts)[order])


def test_a_step_that_is_added_or_set_otherwise_changes_no_other_draw():
    before = [make_augmentation().sample((224, 224), index) for index in range(30)]
    changed = options(hed_prob=0.0, grayscale_prob=1.0, blur_sigma_min_max=(1.0, 1.0))
    augment = make_augmentation(changed, {"tint": Tint(Tint.Options())})
    ours = ("hed", "grayscale", "blur", "tint")
    for index, views in enumerate(before):
        for old, new in zip(views, augment.sample((224, 224), index), strict=True):
            assert new.box == old.box
            assert "tint" in new.params and "hed" not in new.params
            kept = [{k: v for k, v in drawn.params.items() if k not in ours} for drawn in (old, new)]
            assert kept[0] == kept[1]
            assert ("blur" in old.params) == ("blur" in new.params)


def test_quarter_turns_leave_all_other_draws_as_they_were(tissue):
    section = options(**OFF | {"horizontal_flip_prob": 0.5})
    plain, turning = (make_augmentation(dataclasses.replace(section, steps=steps)) for steps in ({}, TURNS))
    assert "rotate90" not in plain.steps and list(turning.steps)[:3] == ["flips", "rotate90", "hed"]
    seen = set()
    for index in range(8):
        drawn = turning.sample(tissue.shape[:2], index)
        before, after = ([*c.global_crops, *c.local_crops] for c in (plain(tissue, index), turning(tissue, index)))
        for upright, turned, (_, params, _) in zip(before, after, drawn, strict=True):
            turns = params.get("rotate90", 0)
            assert np.array_equal(turned.numpy(), np.rot90(upright.numpy(), turns, (1, 2)))
            seen.add(turns)
        without = [v._replace(params={k: p for k, p in v.params.items() if k != "rotate90"}) for v in drawn]
        assert without == plain.sample(tissue.shape[:2], index)
    assert seen == {0, 1, 2, 3}


def test_stains_may_be_perturbed_in_all_views_of_a_tile_alike():
    each, alike = make_augmentation(), make_augmentation(options(hed_per_tile=True))
    applied = []
    for index in range(40):
        first, *others = zip(each.sample((224, 224), index), alike.sample((224, 224), index), strict=True)
        shared = first[0].params.get("hed")  # what the first view would have drawn by itself
        applied.append(shared is not None)
        for by_itself, together in (first, *others):
            assert together.params.get("hed") == shared
            assert by_itself.box == together.box
            rest = [{k: v for k, v in view.params.items() if k != "hed"} for view in (by_itself, together)]
            assert rest[0] == rest[1]
        assert len({repr(view.params.get("hed")) for view, _ in (first, *others)}) > 1
    assert 8 < sum(applied) < 32


def test_crops_agree_with_the_published_libraries_on_equal_parameters(tissue):
    augment = make_augmentation()
    pairs = [(augment(tissue, i), reference_crops(augment, tissue, i)) for i in range(12)]
    for kind in ("global_crops", "local_crops"):
        difference = torch.stack([(getattr(a, kind).int() - getattr(b, kind).int()).abs() for a, b in pairs])
        assert difference.float().mean() < 0.5
        assert (difference > 8).float().mean() < 1e-4


def test_crops_agree_to_rounding_without_hue(tissue):
    augment = make_augmentation(options(hue=0.0))
    for index in range(6):
        ours, theirs = augment(tissue, index), reference_crops(augment, tissue, index)
        difference = (ours.global_crops.int() - theirs.global_crops.int()).abs()
        assert difference.float().mean() < 0.05
        assert (difference > 2).float().mean() < 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (7, 5), (40, 1000), (512, 512)])
def test_images_of_any_size_are_taken(tissue, shape):
    image = np.resize(tissue, (*shape, 3))
    for index in range(3):
        crops = make_augmentation()(image, index)
        assert crops.global_crops.shape == (2, 3, 224, 224)


def test_a_flat_image_stays_flat_through_crop_flip_and_blur():
    section = options(hed_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0)
    image = np.empty((50, 60, 3), np.uint8)
    image[:] = (200, 120, 160)
    crops = make_augmentation(section)(image, 0)
    assert (crops.global_crops == torch.tensor([200, 120, 160], dtype=torch.uint8)[:, None, None]).all()


def test_a_further_step_sees_colours_even_behind_the_grey(tissue):
    grey = options(**OFF | {"grayscale_prob": 1.0})
    tint = Tint(Tint.Options())
    crops = make_augmentation(grey, {"tint": tint})(tissue, 0)
    levels = [view.params["tint"] for view in make_augmentation(grey, {"tint": tint}).sample((512, 512), 0)]
    for crop, level in zip([*crops.global_crops, *crops.local_crops], levels, strict=True):
        assert (crop[0] == level).all()
        assert torch.equal(crop[1], crop[2]) and crop[1].unique().numel() > 1
    early = {"early": EarlyTint(Tint.Options()), **make_augmentation(grey).steps}
    crops = MultiCropAugmentation(early, (0.32, 1.0), (0.05, 0.32), 8, seed=7)(tissue, 0)
    assert torch.equal(crops.global_crops[:, 0], crops.global_crops[:, 1])


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x.astype(np.float32), lambda x: x[..., :2]])
def test_a_step_that_makes_something_else_is_named(tissue, change):
    class Wrong(AugmentationStep):
        def draw(self, rng, view):
            return True

        def apply(self, image, params):
            return change(image)

    with pytest.raises(ValueError, match="wrong"):
        make_augmentation(options(**OFF), {"wrong": Wrong(None)})(tissue, 0)


@pytest.mark.parametrize(
    "image",
    [*(np.zeros(shape, np.uint8) for shape in ((9, 9), (9, 9, 4), (9, 0, 3))), np.zeros((9, 9, 3))],
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match="Image 3"):
        make_augmentation()(image, 3)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="local_crops_scale"):
        MultiCropAugmentation({}, (0.32, 1.0), (0.4, 0.32), 8)


def test_no_local_views_give_an_empty_tensor(tiles):
    crops = make_augmentation(local_crops_number=0, local_crops_size=96)(tiles[0], 0)
    assert crops.local_crops.shape == (0, 3, 96, 96)


def test_colours_may_be_adjusted_in_all_views_of_a_tile_alike():
    alike = make_augmentation(options(jitter_per_tile=True, grayscale_prob=0.5))
    jitters, greys = set(), set()
    for index in range(20):
        views = alike.sample((224, 224), index)
        for name, seen in (("jitter", jitters), ("grayscale", greys)):
            drawn = {repr(view.params.get(name)) for view in views}
            assert len(drawn) == 1
            seen |= drawn
    assert (len(jitters) > 10, greys) == (True, {"None", "True"})


def test_local_views_may_be_windows_of_the_global_ones(tissue):
    """Each is found at whole patches in the global view, mirrored and turned as it, in all places up to the borders."""
    section = options(**OFF | {"horizontal_flip_prob": 0.5}, steps=TURNS)
    cut = make_augmentation(
        section, localcrops_subset_of_globalcrops=True, patch_size=14, local_crops_number=6, global_crops_size=154
    )
    places = set()
    for index in range(30):
        crops = cut(tissue, index)
        for number, window in enumerate(crops.local_crops):
            whole = crops.global_crops[number // 3]
            windows = whole.unfold(1, 98, 14).unfold(2, 98, 14)  # (3, 5, 5, 98, 98)
            found = (windows == window[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
            assert len(found) == 1
            places.add(tuple(found[0]))
    assert len(places) == 25


def test_windows_are_coloured_by_themselves(tissue):
    cut = make_augmentation(localcrops_subset_of_globalcrops=True)
    views = cut.sample(tissue.shape[:2], 0)
    assert len({repr(view.params.get("jitter")) for view in views}) > 5
    assert {view.box for view in views[2:6]} == {views[0].box}
    assert {view.box for view in views[6:]} == {views[1].box}


@pytest.mark.parametrize("settings", [{"local_crops_number": 3}, {"local_crops_size": 238}])
def test_windows_that_cannot_be(settings):
    with pytest.raises(ValueError, match="localcrops_subset_of_globalcrops"):
        make_augmentation(localcrops_subset_of_globalcrops=True, **settings)


def test_aspects_of_boxes_reach_to_their_bounds():
    rng = np.random.default_rng(0)
    drawn = np.array([sample_box(rng, (4000, 4000), (0.2, 0.3), 1.05) for _ in range(2000)])
    logs = np.log(drawn[:, 3] / drawn[:, 2]) / np.log(1.05)
    assert abs(stats.kstest(logs, stats.uniform(-1, 2).cdf).statistic) < 0.04

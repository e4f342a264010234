"""Whole batched views against both CPU backends on equal draws; independence of the batch; one static graph."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from dinov2.data import AugmentationOptions, MultiCropAugmentation, MultiCropCollate, Sample, ViewParameters
from dinov2.data.augment.batched_augmentation import (
    BatchedAugmentation,
    DeferredAugmentation,
    render_crops,
    render_views,
)
from dinov2.data.augment.rendering import apply_view
from dinov2.data.augment.view_packing import COLUMNS, pack_view

OPTIONS = AugmentationOptions(vertical_flip_prob=0.5)
COLLATE = MultiCropCollate(0, 14, 0.5, (0.1, 0.45), 112)
RENDER = BatchedAugmentation(112, 42, 9)
PLAIN = ViewParameters(0, 0, 90, 100, False, False, None, (), False, None)
JITTER = {"brightness": 0.85, "contrast": 1.15, "saturation": 1.3, "hue": 0.04}


def augmentation(options: AugmentationOptions = OPTIONS, **settings) -> MultiCropAugmentation:
    return MultiCropAugmentation(options, (0.32, 1.0), (0.05, 0.32), 4, 112, 42, **{"seed": 7, **settings})


def collated(transform, images: list[np.ndarray], first: int = 0) -> dict[str, torch.Tensor]:
    samples = enumerate(images, start=first)
    return COLLATE([Sample(index, transform(image, index), "slide", False) for index, image in samples])


@pytest.fixture(scope="module")
def cut(tissue: np.ndarray) -> list[np.ndarray]:
    """Forty tiles, uint8 (128, 128, 3)."""
    corners = np.random.default_rng(0).integers(0, 384, (40, 2))
    return [np.ascontiguousarray(tissue[y : y + 128, x : x + 128]) for y, x in corners]


@pytest.fixture(scope="module")
def batches(cut: list[np.ndarray]) -> dict[str, dict[str, torch.Tensor]]:
    """Crops of the same draws by each way."""
    return {
        "batched": RENDER(collated(DeferredAugmentation(augmentation()), cut)),
        "fast": collated(augmentation(), cut),
        "reference": collated(augmentation(backend="reference"), cut),
    }


@pytest.mark.parametrize("kind", ["global_crops", "local_crops"])
@pytest.mark.parametrize(("other", "mean", "percentile"), [("reference", 0.06, 2), ("fast", 0.5, 8)])
def test_views_agree_with_the_cpu_on_equal_draws(batches, other, mean, percentile, kind):
    ours, theirs = batches["batched"][kind], batches[other][kind]
    assert ours.dtype == torch.uint8 and ours.shape == theirs.shape and ours.is_contiguous()
    difference = (ours.int() - theirs.int()).abs().numpy()
    assert difference.mean() < mean
    assert np.percentile(difference, 99.9) <= percentile


@pytest.mark.parametrize("kind", ["global_crops", "local_crops"])
@pytest.mark.parametrize(("other", "tolerance"), [("reference", 0.05), ("fast", 0.6)])
def test_colours_are_distributed_as_the_cpus(batches, kind, other, tolerance):
    """Mean and spread per channel within and between 80 global and 160 local views; OpenCV's hue is biased."""
    ours, theirs = (batches[way][kind].double() for way in ("batched", other))
    for statistic in (
        lambda views: views.mean((0, 2, 3)),
        lambda views: views.std((2, 3)).mean(0),
        lambda views: views.mean((2, 3)).std(0),
        lambda views: views.diff(dim=3).abs().mean((0, 2, 3)),
    ):
        assert (statistic(ours) - statistic(theirs)).abs().max() < tolerance


@pytest.mark.parametrize("order", [*itertools.permutations(JITTER)])
def test_adjustments_come_in_their_order(tissue, order):
    view = PLAIN._replace(jitter=tuple((name, JITTER[name]) for name in order))
    assert_like_reference(tissue, view, mean=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"jitter": (("brightness", 1.2),)},
        {"jitter": (("hue", -0.5), ("contrast", 0.5))},
        {"jitter": (("saturation", 0.0), ("hue", 0.0))},
        {"hed": ((1.0, 1.0, 1.0), (0.05, -0.05, 0.02))},
        {"hed": ((0.9, 1.1, 1.0), (0.0, 0.0, 0.0)), "grayscale": True, "blur_sigma": 1.5},
        {"horizontal_flip": True},
        {"vertical_flip": True, "top": 17, "left": 401, "height": 133, "width": 111},
    ],
)
def test_each_step_is_applied_and_no_other(tissue, changes):
    assert_like_reference(tissue, PLAIN._replace(**changes), mean=0.03)


def assert_like_reference(image: np.ndarray, view: ViewParameters, mean: float) -> None:
    parameters = torch.tensor([[pack_view(view)]])
    result = render_views(torch.from_numpy(image)[None], parameters, 42, 9)[0].permute(1, 2, 0).numpy()
    expected = apply_view(image, view, 42, 9, "reference")
    expected = expected[..., None] if view.grayscale else expected
    assert np.abs(result.astype(int) - expected).mean() < mean


def test_a_sample_does_not_depend_on_its_batch(cut, tissue):
    """To the bit: neighbours, size of the batch and padding."""
    drawn = DeferredAugmentation(augmentation())
    images = [*cut[:3], tissue[:60, :300], tissue[:1, :1], tissue[:7, :200]]
    together = RENDER(collated(drawn, images))
    for index in (0, 2, 4):
        alone = RENDER(collated(drawn, images[index : index + 2], index))
        for kind, views in (("global_crops", 2), ("local_crops", 4)):
            expected = together[kind].view(views, 6, *together[kind].shape[1:])[:, index : index + 2]
            assert torch.equal(alone[kind], expected.flatten(0, 1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (7, 5), (40, 700), (512, 512)])
def test_images_of_any_size_are_taken(tissue, shape):
    images = [np.resize(tissue, (*shape, 3))] * 2
    ours = RENDER(collated(DeferredAugmentation(augmentation()), images))
    theirs = collated(augmentation(backend="reference"), images)
    for kind in ours:
        assert (ours[kind].int() - theirs[kind].int()).abs().float().mean() < 0.1


def test_draws_are_the_augmentations_and_travel(cut):
    drawn = pickle.loads(pickle.dumps(DeferredAugmentation(augmentation())))(cut[0], 3)
    drawn = pickle.loads(pickle.dumps(drawn))
    assert np.array_equal(drawn.image, cut[0])
    assert drawn.parameters.dtype == np.float32 and drawn.parameters.shape == (6, sum(COLUMNS.values()))
    for row, view in zip(drawn.parameters, augmentation().sample((128, 128), 3), strict=True):
        assert row[:4].tolist() == [view.top, view.left, view.height, view.width]
        assert row[-1] == pytest.approx(view.blur_sigma or 0)


def test_no_local_views_give_an_empty_tensor(cut):
    none = MultiCropAugmentation(OPTIONS, (0.32, 1.0), (0.05, 0.32), 0, 112, 42)
    assert RENDER(collated(DeferredAugmentation(none), cut[:2]))["local_crops"].shape == (0, 3, 42, 42)


def test_nothing_is_read_back_from_the_device():
    """Meta tensors have no values, so any read of one, and any tensor made elsewhere, fails."""
    images = torch.empty(4, 50, 60, 3, dtype=torch.uint8, device="meta")
    parameters = torch.empty(4, 6, sum(COLUMNS.values()), device="meta")
    global_crops, local_crops = render_crops(images, parameters, 112, 42, 9)
    assert global_crops.shape == (8, 3, 112, 112) and local_crops.shape == (16, 3, 42, 42)
    assert global_crops.device.type == local_crops.device.type == "meta"


def test_rendering_is_one_graph(cut):
    batch = collated(DeferredAugmentation(augmentation()), cut[:2])
    arguments = batch["images"], batch["view_parameters"][:, :3], 28, 14, 9
    compiled = torch.compile(render_crops, backend="aot_eager", fullgraph=True, dynamic=False)
    assert all(map(torch.equal, compiled(*arguments), render_crops(*arguments)))


def test_only_the_first_batchs_shape_is_compiled(cut, tissue, monkeypatch):
    compiled_shapes = []

    def stand_in(function, **settings):
        assert settings == {"fullgraph": True, "dynamic": False}
        return lambda images, *others: compiled_shapes.append(images.shape) or function(images, *others)

    monkeypatch.setattr(torch, "compile", stand_in)
    render, drawn = BatchedAugmentation(112, 42, 9, compile=True), DeferredAugmentation(augmentation())
    for images in (cut[:2], cut[2:4], [tissue] * 2, cut[:2]):
        batch = collated(drawn, images)
        assert all(torch.equal(crops, RENDER(batch)[kind]) for kind, crops in render(batch).items())
    assert compiled_shapes == [(2, 128, 128, 3)] * 3


def test_autocast_changes_nothing(cut):
    batch = collated(DeferredAugmentation(augmentation()), cut[:2])
    with torch.autocast("cpu", torch.bfloat16):
        inside = RENDER(batch)
    assert all(torch.equal(inside[kind], crops) for kind, crops in RENDER(batch).items())


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="Image 3"):
        DeferredAugmentation(augmentation())(np.zeros((9, 9), np.uint8), 3)
    with pytest.raises(ValueError, match="blur_kernel_size is 29; less than 28"):
        BatchedAugmentation(28, 14, 29)

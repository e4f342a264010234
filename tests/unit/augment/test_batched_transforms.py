"""Each batched operation against the library that defines it, on equal parameters, in grey levels of 255."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.augment import batched_transforms, reference_transforms

FLAT = [(0, 0, 0), (1, 1, 1), (127, 127, 127), (255, 255, 255), (200, 120, 160), (255, 0, 0), (0, 255, 1)]


@pytest.fixture(scope="module", params=["tissue", "noise", "flat"])
def images(request, tiles: list[np.ndarray]) -> np.ndarray:
    """uint8 (N, 170, 170, 3)."""
    if request.param == "tissue":
        return np.stack(tiles)
    if request.param == "noise":
        return np.random.default_rng(0).integers(0, 256, (3, 170, 170, 3), dtype=np.uint8)
    return np.broadcast_to(np.array(FLAT, np.uint8)[:, None, None], (len(FLAT), 170, 170, 3)).copy()


def assert_close(
    images: np.ndarray,
    batched: Callable[[Tensor], Tensor],
    reference: Callable[[Image.Image], Image.Image],
    largest: float,
    mean: float,
) -> None:
    result = batched(torch.from_numpy(images).permute(0, 3, 1, 2).float()).permute(0, 2, 3, 1).numpy()
    expected = np.stack([np.asarray(reference(Image.fromarray(image))) for image in images])
    difference = np.abs(result - expected.reshape(result.shape))
    assert np.array_equal(result, result.round()) and result.min() >= 0 and result.max() <= 255
    assert difference.max() <= largest
    assert difference.mean() <= mean


def column(images: np.ndarray, *values: float) -> Tensor:
    return torch.tensor([values] * len(images), dtype=torch.float32)


@pytest.mark.parametrize("size", [98, 224])
@pytest.mark.parametrize(
    "box", [(0, 0, 170, 170), (11, 25, 60, 47), (90, 3, 75, 100), (0, 0, 1, 170), (3, 3, 1, 1)]
)
def test_crops_are_pillows(images, box, size):
    boxes = column(images, *box)[:, None]
    for flips in ((False, False), (True, False), (False, True)):
        assert_close(
            images,
            lambda _, flips=flips: batched_transforms.resized_crops(
                torch.from_numpy(images), boxes, column(images, *flips)[:, None], size
            ),
            lambda image, flips=flips: reference_transforms.resized_crop(
                np.asarray(image), *box, size, *flips
            ),
            largest=2,
            mean=0.01,
        )


@pytest.mark.parametrize("factor", [0.0, 0.8, 0.93, 1.0, 1.07, 1.9])
@pytest.mark.parametrize(("target", "name"), [(0, "brightness"), (1, "contrast"), (2, "saturation")])
def test_blends_are_pillows(images, target, name, factor):
    def batched(batch: Tensor) -> Tensor:
        return batched_transforms.blend(batch, column(images, target), column(images, factor))

    adjust = reference_transforms.ADJUSTMENTS[name]
    assert_close(images, batched, lambda image: adjust(image, factor), largest=1, mean=1e-4)


@pytest.mark.parametrize("turn", [-0.5, -0.05, 0.0, 0.01, 0.05, 0.5])
def test_hue_is_pillows(images, turn):
    """Pillow's floats miss some whole hue levels by one, which turned and saturated is a few levels of colour."""
    shift = column(images, int(turn * 255) % 256)
    adjust = reference_transforms.ADJUSTMENTS["hue"]
    assert_close(
        images,
        lambda batch: batched_transforms.turn_hue(batch, shift),
        lambda image: adjust(image, turn),
        6,
        0.02,
    )


def test_grey_is_pillows(images):
    assert_close(images, batched_transforms.grayscale, reference_transforms.grayscale, 0, 0)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8, 1.4, 2.0])
@pytest.mark.parametrize("kernel_size", [1, 9, 15])
def test_blur_is_torchvisions(images, sigma, kernel_size):
    assert_close(
        images,
        lambda batch: batched_transforms.blur(batch, column(images, sigma), kernel_size),
        lambda image: reference_transforms.blur(image, sigma, kernel_size),
        largest=1,
        mean=1e-3,
    )


@pytest.mark.parametrize(
    ("scale", "shift"),
    [
        ((1, 1, 1), (0.05, -0.05, 0.02)),
        ((1, 1, 1), (0, 0, 0)),
        ((0.95, 1.05, 1.02), (0.01, 0, -0.01)),
        ((1, 1, 1), (-2, -2, -2)),
    ],
)
def test_stains_are_scikit_images(images, scale, shift):
    assert_close(
        images,
        lambda batch: batched_transforms.perturb_stains(
            batch, column(images, *scale), column(images, *shift)
        ),
        lambda image: reference_transforms.perturb_stains(image, scale, shift),
        largest=1,
        mean=1e-3,
    )


def test_each_image_has_its_own_parameters(tiles):
    batch = torch.from_numpy(np.stack(tiles[:3])).permute(0, 3, 1, 2).float()
    target, factor = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.5], [0.8], [1.3]])
    sigma = torch.tensor([[0.0], [0.7], [2.0]])
    for operation in (
        lambda images, own: batched_transforms.blend(images, target[own], factor[own]),
        lambda images, own: batched_transforms.turn_hue(images, 50 * target[own]),
        lambda images, own: batched_transforms.blur(images, sigma[own], 9),
        lambda images, own: batched_transforms.perturb_stains(
            images, factor[own].expand(-1, 3), sigma[own].expand(-1, 3) / 40
        ),
    ):
        together = operation(batch, slice(None))
        assert all(
            torch.equal(together[i : i + 1], operation(batch[i : i + 1], slice(i, i + 1))) for i in range(3)
        )
    assert torch.equal(batched_transforms.blur(batch, sigma, 9)[0], batch[0])


def test_crops_do_not_depend_on_the_precision_of_matrix_products(tiles):
    """Their factors have eight significant bits, so those may be cut to bfloat16's."""
    images, boxes = torch.from_numpy(np.stack(tiles)), torch.tensor([3.0, 4.0, 60.0, 70.0]).expand(9, 1, 4)
    products = []
    matmul = Tensor.__matmul__

    def rounded(left: Tensor, right: Tensor) -> Tensor:
        products.append((left, right))
        return matmul(left.bfloat16().float(), right.bfloat16().float())

    flips = torch.zeros(9, 1, 2)
    expected = batched_transforms.resized_crops(images, boxes, flips, 98)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__matmul__", rounded)
        assert torch.equal(batched_transforms.resized_crops(images, boxes, flips, 98), expected)
    # Whole numbers below 2^24 in every partial sum: exact in float32, in any order.
    for left, right in products:
        exact = matmul(left.double(), right.double())
        assert torch.equal(matmul(left, right).double(), exact)
        assert torch.equal(exact, exact.round()) and matmul(left.abs(), right.abs()).max() < 2**24


def test_wide_boxes_are_antialiased_as_pillows():
    image = np.random.default_rng(1).integers(0, 256, (40, 1500, 3), dtype=np.uint8)
    box = torch.tensor([[[0.0, 10.0, 40.0, 1400.0]]])
    result = batched_transforms.resized_crops(torch.from_numpy(image)[None], box, torch.zeros(1, 1, 2), 32)
    expected = np.asarray(reference_transforms.resized_crop(image, 0, 10, 40, 1400, 32))
    difference = np.abs(result[0].permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 1 and difference.mean() < 0.05

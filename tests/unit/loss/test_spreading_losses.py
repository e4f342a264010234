"""KDE and KoLeo against loops in float64, and what descending them does to a batch of vectors."""

import math

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss import KDELoss, KoLeoLoss
from dinov2.loss.spreading import koleo_loss
from tests.helpers import loss_reference as reference
from tests.helpers.loss_reference import value_and_grad

CASES = {
    "kde": (KDELoss(kappa=5.0), lambda x: reference.kde(x, 5.0)),
    "kde as published": (KDELoss(5.0, reference_sign=True), lambda x: reference.kde_as_published(x, 5.0)),
    "koleo": (KoLeoLoss(), lambda x: reference.koleo(x, 1e-8)),
}


@pytest.mark.parametrize(("ours", "papers"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_formula(ours, papers, dtype):
    x = torch.randn(7, 5).to(dtype)
    expected, expected_grad = value_and_grad(papers, x.double())
    value, grad = value_and_grad(ours, x)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    rtol = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=1e-7)


def test_kde_at_its_known_values():
    simplex = torch.eye(48, dtype=torch.float64) - 1 / 48
    equal = torch.ones(48, 16)
    assert KDELoss(5.0)(simplex).item() == pytest.approx(-5 / 47)
    assert KDELoss(5.0)(equal).item() == pytest.approx(5.0)
    assert KDELoss(5.0, reference_sign=True)(equal).item() == pytest.approx(-math.log(48 * math.exp(5)))


def test_koleo_of_known_neighbours():
    corners = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert KoLeoLoss()(corners).item() == pytest.approx(-math.log(math.sqrt(2)))
    value, grad = value_and_grad(KoLeoLoss(), torch.ones(4, 3))
    assert value.item() == pytest.approx(-math.log(1e-8))
    assert not grad.any()


@pytest.mark.parametrize("loss", [KDELoss(), KoLeoLoss()])
def test_a_row_without_direction_gets_no_gradient(loss):
    """Of an untreated one it is 1e12 over the number of rows: the class token that starts from 0 and stays there."""
    x = torch.randn(8, 64)
    x[3] = 0
    value, grad = value_and_grad(loss, x)
    assert value.isfinite() and not grad[3].any()
    assert 0 < grad.norm() < 10
    x[3, 0] = 1e-4  # it has a direction, and the gradient that goes with it
    assert value_and_grad(loss, x)[1][3].norm() > 100


@pytest.mark.parametrize("bits", [1, 2])
def test_rounding_does_not_part_equal_rows(bits: int):
    x = torch.randn(6, 64)
    x[1] = x[0]
    equal, grad_of_equal = value_and_grad(KoLeoLoss(), x)
    assert not grad_of_equal[:2].any()
    x[1, 5] *= 1 + bits * 2.0**-23
    value, grad = value_and_grad(KoLeoLoss(), x)
    torch.testing.assert_close(grad, grad_of_equal, rtol=1e-5, atol=1e-7)
    assert value < equal  # the value is the formula's
    x[1] += 1e-4 * torch.randn(64)
    apart = value_and_grad(KoLeoLoss(), x)[1]
    assert apart[0] @ (x[1] - x[0]) > 0 > apart[1] @ (x[1] - x[0])  # descending it, they part


@pytest.mark.parametrize("topk", [1, 3, 6])
def test_koleo_of_several_neighbours_is_the_mean_over_them(topk: int):
    def loop(x):
        z = F.normalize(x, dim=1)
        rows = [torch.stack([(a - b).norm() for j, b in enumerate(z) if j != i]).sort().values for i, a in enumerate(z)]
        return -torch.stack([(distance + 1e-8).log() for row in rows for distance in row[:topk]]).mean()

    x = torch.randn(7, 5)
    expected, expected_grad = value_and_grad(loop, x.double())
    value, grad = value_and_grad(lambda x: koleo_loss(x, topk=topk), x)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-6, atol=1e-7)


def test_koleo_in_groups_is_the_mean_over_them():
    x = torch.randn(6, 5)
    groups = [koleo_loss(rows, topk=2) for rows in x.split(3)]
    torch.testing.assert_close(koleo_loss(x, topk=2, group=3), sum(groups) / 2)
    assert koleo_loss(x, group=6) == koleo_loss(x)
    for wrong in (4, 2):  # does not divide; holds no two neighbours
        with pytest.raises(ValueError, match=str(wrong)):
            koleo_loss(x, topk=2, group=wrong)


def test_koleo_of_more_neighbours_than_there_are():
    with pytest.raises(ValueError, match="7"):
        koleo_loss(torch.randn(7, 5), topk=7)


def descend(loss: torch.nn.Module, steps: int = 400) -> tuple[float, float]:
    """Descend from random vectors on the sphere; return the mean off-diagonal cosine and RankMe."""
    z = F.normalize(torch.randn(48, 128), dim=1)
    for _ in range(steps):
        z = F.normalize(z - 2.0 * value_and_grad(loss, z)[1], dim=1)
    cosines = z @ z.T
    share = torch.linalg.svdvals(z.double())
    share = share / share.sum() + 1e-12
    return ((cosines.sum() - 48) / (48 * 47)).item(), (-share * share.log()).sum().exp().item()


def test_descending_kde_spreads_vectors_into_a_simplex():
    cosine, rank = descend(KDELoss(5.0))
    assert cosine == pytest.approx(-1 / 47, abs=1e-4)
    assert rank > 46.5


def test_descending_the_published_kde_collapses_them():
    cosine, rank = descend(KDELoss(5.0, reference_sign=True))
    assert cosine > 0.999
    assert rank < 1.5


@pytest.mark.parametrize("loss", [KDELoss(), KDELoss(reference_sign=True), KoLeoLoss(), KDELoss(gather=True)])
def test_one_image_is_refused(loss):
    with pytest.raises(ValueError, match="at least 2 images in the batch, and it has 1"):
        loss(torch.randn(1, 4))


@pytest.mark.parametrize("loss", [KDELoss(), KoLeoLoss()])
def test_autocast_does_not_lower_the_precision(loss):
    x = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = value_and_grad(loss, x)
    expected, expected_grad = value_and_grad(loss, x)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)

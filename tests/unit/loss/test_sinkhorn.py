"""Sinkhorn-Knopp against the papers' rewriting form in float64."""

import pytest
import torch

from dinov2.loss import sinkhorn_knopp
from tests.helpers import loss_reference as reference

TEMP = 0.04


def cosines(rows: int, prototypes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.rand(rows, prototypes, dtype=torch.float64) * 2 - 1).to(dtype)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_equals_the_rewriting_form(iterations):
    logits = cosines(24, 40)
    expected = reference.sinkhorn(logits, TEMP, iterations)
    torch.testing.assert_close(sinkhorn_knopp(logits, TEMP, iterations), expected, rtol=1e-11, atol=1e-14)
    in_float32 = sinkhorn_knopp(logits.float(), TEMP, iterations)
    torch.testing.assert_close(in_float32.double(), expected, rtol=2e-4, atol=1e-7)


def test_rows_sum_to_one_and_prototypes_share_equally():
    few, many = (sinkhorn_knopp(cosines(64, 16), 0.5, iterations) for iterations in (3, 200))
    torch.testing.assert_close(few.sum(1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(many.sum(1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(many.sum(0), torch.full((16,), 64 / 16, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_float32_and_logits_stay(dtype):
    logits = cosines(8, 12, dtype)
    before = logits.clone()
    result = sinkhorn_knopp(logits, TEMP)
    assert result.dtype == torch.float32
    assert torch.equal(logits, before)
    expected = reference.sinkhorn(logits, TEMP, 3)
    torch.testing.assert_close(result.double(), expected, rtol=2e-4, atol=1e-7)


def test_padding_counts_for_nothing():
    logits = cosines(10, 12)
    row_weight = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1], dtype=torch.float64)
    real = row_weight > 0
    logits[~real] = torch.tensor([[500.0], [-500.0], [0.0]], dtype=torch.float64)
    result = sinkhorn_knopp(logits, TEMP, row_weight=row_weight)
    torch.testing.assert_close(result[real], sinkhorn_knopp(logits[real], TEMP), rtol=1e-12, atol=0)
    assert torch.equal(result[~real], torch.zeros(3, 12, dtype=torch.float64))


def test_one_row_is_its_own_share():
    # Whatever the logits: the only row gives every prototype 1/K.
    result = sinkhorn_knopp(cosines(1, 8), TEMP)
    torch.testing.assert_close(result, torch.full((1, 8), 1 / 8, dtype=torch.float64), rtol=1e-12, atol=0)


def test_gains_of_trained_prototypes():
    # The last layer's gains are trained: the largest logit is neither 1 nor the same in all rows.
    logits = cosines(24, 40) * torch.linspace(0.3, 2.5, 40, dtype=torch.float64)
    expected = reference.sinkhorn_in_logs(logits, TEMP, 3)
    torch.testing.assert_close(sinkhorn_knopp(logits, TEMP), expected, rtol=1e-11, atol=1e-14)
    for dtype in (torch.float16, torch.bfloat16):
        expected = reference.sinkhorn_in_logs(logits.to(dtype), TEMP, 3)
        in_float32 = sinkhorn_knopp(logits.to(dtype), TEMP).double()
        torch.testing.assert_close(in_float32, expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("temp", [0.04, 0.05, 0.07, 0.1])
@pytest.mark.parametrize("deviation", [0.1, 0.5, 1, 2, 5])
def test_exact_whatever_the_range_of_the_logits(deviation, temp):
    logits = deviation * torch.randn(30, 50)
    padded = torch.cat([logits, torch.full((4, 50), 1e3)])
    weight = (torch.arange(34) < 30).float()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        expected = reference.sinkhorn(logits.to(dtype), temp, 3)
        result = sinkhorn_knopp(padded.to(dtype), temp, row_weight=weight).double()
        torch.testing.assert_close(result[:30], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spread", [10, 1e3, 6e4])
def test_unpopular_prototypes_and_rows_get_their_share(spread):
    # Some prototypes and some rows are far below all others in every logit.
    logits = torch.rand(12, 16, dtype=torch.float64)
    logits[:, 5:] -= spread * torch.rand(11, dtype=torch.float64)
    logits[7:] -= spread * torch.rand(5, 1, dtype=torch.float64)
    logits = logits.float()
    expected = reference.sinkhorn_in_logs(logits, TEMP, 3)
    torch.testing.assert_close(sinkhorn_knopp(logits.double(), TEMP), expected, rtol=1e-9, atol=1e-12)
    in_float32 = sinkhorn_knopp(logits, TEMP)
    torch.testing.assert_close(in_float32.double(), expected, rtol=0, atol=1e-2 if spread > 1e3 else 1e-3)


def test_nothing_but_padding_gives_zeros():
    assert not sinkhorn_knopp(cosines(4, 6), TEMP, row_weight=torch.zeros(4)).any()
    assert sinkhorn_knopp(cosines(0, 6), TEMP).shape == (0, 6)


def test_logits_beyond_the_range_of_exp():
    # exp(l / T) reaches e^600, beyond float64 too; every prototype is some row's favourite.
    logits = torch.randn(12, 12).clamp(-1, 1) + 22 * torch.eye(12) + torch.linspace(0, 1.5, 12)[:, None]
    expected = reference.sinkhorn_in_logs(logits, TEMP, 3)
    torch.testing.assert_close(sinkhorn_knopp(logits, TEMP).double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: torch.randn(9, 7) * 1e4, lambda: torch.eye(9, 7) * 6e4, lambda: torch.full((9, 7), -6e4)]
)
def test_extreme_logits_stay_finite(make):
    result = sinkhorn_knopp(make(), TEMP)
    assert result.isfinite().all()
    torch.testing.assert_close(result.sum(1), torch.ones(9))


def test_autocast_does_not_lower_the_precision():
    logits = cosines(16, 20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = sinkhorn_knopp(logits, torch.tensor(TEMP))
    assert torch.equal(result, sinkhorn_knopp(logits, TEMP))


def test_refuses_zero_iterations():
    with pytest.raises(ValueError, match="n_iterations is 0"):
        sinkhorn_knopp(cosines(2, 2), TEMP, 0)

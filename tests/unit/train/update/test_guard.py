"""The non-finite guard: sticky flag, delayed look, what the message names."""

from __future__ import annotations

import math

import pytest
import torch

from dinov2.train.update.guard import FiniteGuard, NonFiniteError


def values(loss: float, norm: float = 1.0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return {"total_loss": torch.tensor(loss)}, {"backbone": torch.tensor(norm)}


def test_flag_is_sticky_and_the_host_looks_later():
    guard = FiniteGuard(torch.device("cpu"), global_batch=16, delay=2)
    guard.observe(0, *values(1.0))
    assert guard.all_finite == 1
    guard.observe(1, *values(float("nan")))
    assert guard.all_finite == 0
    guard.observe(2, *values(1.0))
    assert guard.all_finite == 0
    with pytest.raises(NonFiniteError, match=r"Step 2 is not finite on rank 0 \(samples 16 to 31\).*total_loss = nan"):
        guard.observe(3, *values(1.0))


def test_flush_looks_at_once():
    guard = FiniteGuard(torch.device("cpu"), global_batch=8, delay=5)
    guard.observe(0, *values(1.0))
    guard.flush()
    guard.observe(1, *values(float("inf")))
    with pytest.raises(NonFiniteError, match="Step 2"):
        guard.flush()


def test_a_non_finite_gradient_alone_stops_too():
    guard = FiniteGuard(torch.device("cpu"), global_batch=8, delay=0)
    message = r"Step 3 is not finite in the gradient of all ranks \(samples 16 to 23\).*backbone = inf"
    with pytest.raises(NonFiniteError, match=message):
        guard.observe(2, *values(1.0, float("inf")))
    assert guard.all_finite == 0


def test_under_a_loss_scaler_gradients_are_noted_and_not_judged():
    guard = FiniteGuard(torch.device("cpu"), global_batch=8, delay=0)
    guard.observe(0, *values(1.0, float("inf")), scaled=True)
    assert guard.all_finite == 1
    with pytest.raises(NonFiniteError) as error:
        guard.observe(1, *values(float("nan"), float("inf")), scaled=True)
    assert (error.value.step, error.value.ranks) == (2, [0])
    assert error.value.values["grad_norm_backbone"] == float("inf") and math.isnan(error.value.values["total_loss"])


def test_a_collapse_is_agreed_on_at_once_and_stays():
    guard = FiniteGuard(torch.device("cpu"), global_batch=8, delay=3)
    agreed = []
    for collapsed in (False, True, False):
        guard.agree_on_collapse(collapsed)
        agreed.append(guard.collapse_agreed)
    assert agreed == [False, True, True]


def test_without_gradient_norms_only_the_losses_count():
    guard = FiniteGuard(torch.device("cpu"), global_batch=8, delay=0)
    guard.observe(0, values(1.0)[0], {})
    assert guard.all_finite == 1


def test_a_request_to_stop_is_seen_as_late_as_a_fault_and_is_none():
    guard = FiniteGuard(torch.device("cpu"), global_batch=8, delay=2)
    agreed = []
    for step in range(5):
        guard.stop_asked = step == 1
        guard.observe(step, *values(1.0))
        agreed.append(guard.stop_agreed)
    assert agreed == [False, False, False, True, True]
    assert guard.all_finite == 1


@pytest.mark.parametrize(
    ("accumulation", "named"),
    [(2, r"\(samples 24 to 35, 36 to 47\)"), (6, r"24 to 27, .*36 to 39 and those of 2 more micro-batches")],
)
def test_samples_of_micro_batches(accumulation: int, named: str):
    guard = FiniteGuard(torch.device("cpu"), global_batch=24, delay=0, accumulation=accumulation)
    with pytest.raises(NonFiniteError, match=named):
        guard.observe(1, *values(float("nan")))

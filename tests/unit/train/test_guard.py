"""The non-finite guard: sticky flag, delayed look, what the message names."""

from __future__ import annotations

import pytest
import torch

from dinov2.train.guard import FiniteGuard, NonFiniteError


def values(loss: float) -> dict[str, torch.Tensor]:
    return {"total_loss": torch.tensor(loss), "backbone": torch.tensor(1.0)}


def test_flag_is_sticky_and_the_host_looks_later():
    guard = FiniteGuard(torch.device("cpu"), global_batch=16, delay=2)
    guard.observe(0, values(1.0))
    assert guard.healthy == 1
    guard.observe(1, values(float("nan")))
    assert guard.healthy == 0
    guard.observe(2, values(1.0))
    assert guard.healthy == 0
    with pytest.raises(
        NonFiniteError, match=r"Step 1 is not finite on rank 0 \(samples 16 to 31\).*total_loss = nan"
    ):
        guard.observe(3, values(1.0))


def test_flush_looks_at_once():
    guard = FiniteGuard(torch.device("cpu"), global_batch=8, delay=5)
    guard.observe(0, values(1.0))
    guard.flush()
    guard.observe(1, values(float("inf")))
    with pytest.raises(NonFiniteError, match="Step 1"):
        guard.flush()

"""The comparisons themselves, on the CPU: right kernels pass, wrong ones and failing ones are told apart."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.configs import load_config
from dinov2.layers.attention_backends import attention_backend
from dinov2.train.performance.preflight import (
    CHECKS,
    Check,
    compare_attention,
    compare_compiled,
    compare_updates,
)
from dinov2.train.update.weight_update import WeightUpdate
from tests.helpers.runs import TINY

CPU = torch.device("cpu")
CONFIG = load_config(None, [*TINY, "performance.fp8=all", "debug.compile_backend=eager"])


def problem(name: str, compare: Any = None) -> str | None:
    check = CHECKS[name]
    return replace(check, compare=compare or check.compare).problem(CONFIG, CPU)


class ForgetfulUpdate(WeightUpdate):
    """Leaves the teacher as it is."""

    def apply(self, momentum: float, *args: Any) -> None:
        super().apply(1.0, *args)


def without_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_backend("math")(4 * q, k, v)


def uncompilable(*_: Any, **__: Any) -> Any:
    raise RuntimeError("Failed to find a C compiler.")


def compiled_wrongly(function: Any, **_: Any) -> Any:
    return lambda *args: 1.1 * function(*args)


@pytest.mark.parametrize("name", ["compile", "attention", "fp8"])
def test_what_is_right_passes(name):
    assert problem(name) is None


def test_the_plain_update_equals_itself():
    assert problem("fused_update", partial(compare_updates, update=WeightUpdate)) is None


@pytest.mark.parametrize(
    ("name", "compare"),
    [
        ("compile", partial(compare_compiled, compiler=compiled_wrongly)),
        ("fused_update", partial(compare_updates, update=ForgetfulUpdate)),
        ("attention", partial(compare_attention, attend=without_scale)),
    ],
)
def test_what_differs_is_told_with_the_difference(name, compare):
    assert f"more than {CHECKS[name].tolerance:g}" in problem(name, compare)


def test_what_fails_is_told_with_the_error():
    assert "C compiler" in problem("compile", partial(compare_compiled, compiler=uncompilable))
    assert "CUDA device" in problem("fused_update")


def test_no_number_is_a_difference():
    nothing, number = torch.full((2,), torch.nan), torch.ones(2)
    for pair in ((nothing, number), (number, nothing)):
        assert Check("train.seed", lambda *_, pair=pair: [pair], 1e9, "").problem(CONFIG, CPU)


def test_checks_draw_no_random_numbers_of_the_run():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    problem("attention")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_kernels_of_this_gpu(name):
    config = load_config(None, [*TINY, "performance.fp8=all"])
    assert CHECKS[name].problem(config, torch.device("cuda")) is None

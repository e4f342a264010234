"""Two gloo ranks: figures of the joined batch, and a collapse that rank 0 sees ends both after the same step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dinov2.distributed import get_global_rank
from dinov2.train.health import health_of_tokens, target_figures
from dinov2.train.hooks import CheckpointHook
from tests.helpers.spawn import run_ranks
from tests.helpers.training import make_trainer, tiny_config


def targets_and_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    targets = torch.randn(12, 16, generator=numbers).mul(3).softmax(1)
    return targets, torch.tensor([1.0, 0.0] * 6), torch.randn(12, 8, generator=numbers)


def figures(rows: slice) -> list[float]:
    targets, weight, tokens = targets_and_tokens()
    found = [*target_figures(targets[rows], weight[rows]), *health_of_tokens(tokens[rows]).values()]
    return [value.item() for value in found]


class LastStep:
    """A sink that keeps the step of the newest record."""

    step = 0

    def write(self, record: Mapping[str, Any]) -> None:
        self.step = record["step"]

    def close(self) -> None: ...


def stopped_by_rank_0() -> tuple[int, list[int]]:
    """The step that a run ended after, and its checkpoints; the second record tells rank 0 of a collapse."""
    sink, saved = LastStep(), []
    hooks = [CheckpointHook(2, lambda state: saved.append(state.step), finish=lambda: None)]
    sinks = [sink] if get_global_rank() == 0 else []
    trainer = make_trainer(tiny_config(), sinks=sinks, hooks=hooks, log_period=2, collapsed=lambda: sink.step == 4)
    trainer.fit()
    return trainer.state.step, saved


def everything(rank: int) -> dict[str, Any]:
    return {"figures": figures(slice(6 * rank, 6 * rank + 6)), "stopped": stopped_by_rank_0()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything)


def test_figures_are_those_of_the_joined_batch(ranks: list[dict[str, Any]]):
    for rank in ranks:
        assert rank["figures"] == pytest.approx(figures(slice(None)), rel=1e-5)


def test_both_ranks_end_with_the_record_and_save_nothing_of_it(ranks: list[dict[str, Any]]):
    assert [rank["stopped"] for rank in ranks] == [(4, [2])] * 2

"""Shards on two ranks, some of them empty, are updated as one process updates the whole weights."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2.fsdp import shard
from dinov2.train.update.fused_update import FusedWeightUpdate
from dinov2.train.update.weight_update import WeightUpdate
from tests.helpers.spawn import run_ranks
from tests.helpers.training import whole
from tests.helpers.weight_updates import assert_near

STRATEGIES = ("SHARD_GRAD_OP", "NO_SHARD")
MAX_NORM = 0.1  # below the first norms of both modules


class SmallChunks(FusedWeightUpdate):
    """Of a size that the interpreter walks through quickly."""

    chunk = 512


def network() -> nn.ModuleDict:
    """Rows that two ranks cannot share evenly, and one row that leaves a rank with nothing."""
    backbone = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5))
    return nn.ModuleDict({"backbone": backbone, "dino_head": nn.Linear(5, 1)})


def train(kind: type[WeightUpdate], strategy: str | None) -> dict[str, Tensor]:
    """Weights, moments and norms after five steps on the same data on every rank; None is one process."""
    torch.manual_seed(0)
    student, teacher = network(), network()
    if strategy:
        dtypes = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
        for module in (*student.values(), *teacher.values()):
            shard(module, (), device=torch.device("cpu"), strategy=strategy, **dtypes)
    teacher.requires_grad_(False)  # after sharding, which would not keep a frozen network gathered
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    update = kind(optimizer, student, teacher, MAX_NORM)
    images = torch.randn(16, 6)
    found: dict[str, Tensor] = {}
    for step in range(5):
        optimizer.zero_grad()
        target = teacher["dino_head"](teacher["backbone"](images))  # leaves the teacher gathered
        (student["dino_head"](student["backbone"](images)) - target).square().sum().backward()
        found |= {f"norm.{step}.{name}": norm for name, norm in update.grad_norms().items()}
        update.apply(0.7, torch.tensor(float(step != 2)))
    target = teacher["dino_head"](teacher["backbone"](images))  # gathers what was updated
    for name, parameter in student.named_parameters():
        found |= {f"{key}.{name}": whole(value) for key, value in optimizer.state[parameter].items()}
        found[f"student.{name}"] = whole(parameter)
    return found | {"target": target}


def everything(rank: int) -> dict[Any, dict[str, Tensor]]:
    """All combinations in one process group."""
    os.environ["TRITON_INTERPRET"] = "1"  # of this process; read where the kernel is defined
    kinds = [WeightUpdate, *([SmallChunks] if importlib.util.find_spec("triton") else [])]
    return {(kind.__name__, strategy): train(kind, strategy) for kind in kinds for strategy in STRATEGIES}


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, dict[str, Tensor]]]:
    return run_ranks(everything)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["WeightUpdate", "SmallChunks"])
def test_shards_equal_one_process(ranks: list[dict], kind: str, strategy: str):
    if (kind, strategy) not in ranks[0]:
        pytest.skip("Triton is not installed")
    expected = train(WeightUpdate, None)
    assert min(expected[f"norm.0.{name}"] for name in ("backbone", "dino_head")) > MAX_NORM
    assert expected["step.dino_head.weight"] == 4
    for rank in ranks:
        # Sums in another order, and Adam's division by small second moments: a few units in the sixth digit.
        assert_near(rank[kind, strategy], expected, 1e-5)

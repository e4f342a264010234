"""Four gloo ranks as two nodes of two: steps, gradient norms and checkpoints equal those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.distributed import all_reduce_sum, get_global_rank, get_global_size
from dinov2.fsdp import Checkpointer, full_state_dict, shard
from dinov2.layers import Block
from dinov2.layers.recompute import compiled_and_recomputed
from dinov2.train.update.weight_update import module_norms
from tests.helpers.spawn import run_ranks

RANKS, PER_NODE = 4, 2
IMAGES, TOKENS, D, STEPS, MAX_NORM = 4, 5, 12, 2, 0.01

SETTINGS = [
    {"strategy": "HYBRID_SHARD", "prefetch": 0},
    {"strategy": "HYBRID_SHARD", "prefetch": 1},
    {"strategy": "HYBRID_SHARD", "prefetch": 2, "recompute": "selective"},
    {"strategy": "FULL_SHARD", "prefetch": 0},
    {"strategy": "FULL_SHARD", "prefetch": 1},
    {"strategy": "FULL_SHARD", "prefetch": 2, "recompute": "full"},
    {"strategy": "FULL_SHARD", "prefetch": 1, "recompute": "full", "compile": "eager"},
    {"strategy": "SHARD_GRAD_OP", "prefetch": 1, "recompute": "full"},
]


class Stack(nn.Module):
    """Blocks and what the root gathers: a token and a norm."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(D))
        self.blocks = nn.ModuleList(Block(D, 2, mlp_ratio=2, init_values=1.0) for _ in range(3))
        self.norm = nn.LayerNorm(D)

    def forward(self, images: Tensor) -> Tensor:
        x = (images + self.token).flatten(0, 1)
        for block in self.blocks:
            x = block(x, (images.shape[:2],))
        return self.norm(x)


def student(strategy: str, prefetch: int = 0, recompute: str = "none", compile: str | None = None) -> nn.ModuleDict:
    """Two modules with equal weights on every rank, sharded if there are ranks."""
    torch.manual_seed(0)
    modules = nn.ModuleDict({"backbone": Stack(), "head": nn.Linear(D, 7)}).double()
    compiler = compile and (lambda f: torch.compile(f, backend=compile, fullgraph=True, dynamic=False))
    for block in modules.backbone.blocks:
        block.forward = compiled_and_recomputed(block.forward, recompute, compiler)
    if dist.is_initialized():
        for module, units in ((modules.backbone, modules.backbone.blocks), (modules.head, ())):
            shard(
                module,
                units,
                device=torch.device("cpu"),
                strategy=strategy,
                param_dtype=torch.float64,
                reduce_dtype=torch.float64,
                ranks_per_node=PER_NODE,
                prefetch=prefetch,
            )
    return modules


def whole(modules: nn.ModuleDict) -> dict[str, Tensor]:
    return {f"{n}.{key}": t for n, module in modules.items() for key, t in full_state_dict(module).items()}


def trained(settings: dict[str, Any]) -> dict[str, Any]:
    """Losses, norms before clipping and final weights of a few clipped steps on this rank's share of the images."""
    modules = student(**settings)
    optimizer = torch.optim.SGD(modules.parameters(), lr=1.0, momentum=0.9)
    images = torch.randn(STEPS, IMAGES, TOKENS, D, generator=torch.Generator().manual_seed(1)).double()
    losses, norms = [], []
    for step in images.chunk(get_global_size(), dim=1)[get_global_rank()]:
        optimizer.zero_grad()
        loss = modules.head(modules.backbone(step)).square().mean()
        loss.backward()
        norms.append(module_norms(modules))
        for module in modules.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        optimizer.step()
        losses.append(all_reduce_sum(loss.detach()) / get_global_size())
    return {"losses": losses, "norms": norms, "weights": whole(modules)}


def on_two_nodes(rank: int, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    modules = student("HYBRID_SHARD")
    Checkpointer(folder, keep=1).save(3, {"model": modules.state_dict()}, {"step": 3})
    return [trained(settings) for settings in SETTINGS], loaded(folder, "HYBRID_SHARD")


def loaded(folder: Path, strategy: str) -> dict[str, Tensor]:
    modules = student(strategy)
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.fill_(torch.nan)
    Checkpointer(folder, keep=1).load(3, {"model": modules.state_dict()})
    return whole(modules)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two_nodes")


@pytest.fixture(scope="module")
def of_ranks(folder) -> list[tuple[list[dict[str, Any]], dict[str, Tensor]]]:
    return run_ranks(on_two_nodes, folder, world_size=RANKS)


def test_equals_one_process_on_the_joined_batch(of_ranks):
    expected = trained({"strategy": "NO_SHARD"})
    assert all(norm > 2 * MAX_NORM for norms in expected["norms"] for norm in norms.values())
    for rank, (results, _) in enumerate(of_ranks):
        on_rank = expected if rank == 0 else {**expected, "weights": {}}
        for actual in results:
            torch.testing.assert_close(actual, on_rank, rtol=1e-10, atol=1e-12)


def test_gathering_ahead_changes_no_bit(of_ranks):
    results, _ = of_ranks[0]
    for first, *others in (results[:3], results[3:6]):
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_checkpoint_of_two_nodes(of_ranks, folder):
    expected = whole(student("NO_SHARD"))
    torch.testing.assert_close(of_ranks[0][1], expected, rtol=0, atol=0)
    torch.testing.assert_close(loaded(folder, "NO_SHARD"), expected, rtol=0, atol=0)

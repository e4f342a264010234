"""Layout over ranks, what stays gathered and what is gathered ahead, in one process of a pretended group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinov2.fsdp import reshard, shard
from dinov2.fsdp.wrap import local_world_size

RANKS = 8


@pytest.fixture(autouse=True)
def eight_ranks(monkeypatch):
    """Rank 0 of 8, whose collectives do nothing."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def stack(depth: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(depth)), nn.LayerNorm(16))


def sharded(module: nn.Module, strategy: str, **options) -> nn.Module:
    shard(
        module,
        list(module)[:-1],
        device=torch.device("cpu"),
        strategy=strategy,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        **options,
    )
    return module


def layout(module: nn.Module) -> tuple:
    weight = module[0].weight
    return tuple(weight.device_mesh.shape), weight.placements, weight.to_local().shape[0]


@pytest.mark.parametrize(
    ("strategy", "options", "expected"),
    [
        ("SHARD_GRAD_OP", {}, ((8,), (Shard(0),), 2)),
        ("FULL_SHARD", {}, ((8,), (Shard(0),), 2)),
        ("NO_SHARD", {}, ((8, 1), (Replicate(), Shard(0)), 16)),
        ("HYBRID_SHARD", {}, ((2, 4), (Replicate(), Shard(0)), 4)),
        ("HYBRID_SHARD", {"ranks_per_node": 2}, ((4, 2), (Replicate(), Shard(0)), 8)),
        ("HYBRID_SHARD", {"ranks_per_node": 8}, ((8,), (Shard(0),), 2)),
    ],
)
def test_layout(strategy, options, expected):
    assert layout(sharded(stack(), strategy, **options)) == expected


def test_modules_share_communicators():
    first, second = (sharded(stack(), "HYBRID_SHARD") for _ in range(2))
    assert first[0].weight.device_mesh is second[0].weight.device_mesh


def test_neighbouring_ranks_form_a_node():
    mesh = sharded(stack(), "HYBRID_SHARD")[0].weight.device_mesh
    assert mesh["shard"].mesh.tolist() == [0, 1, 2, 3]
    assert mesh["replicate"].mesh.tolist() == [0, 4]


def test_ranks_that_do_not_fill_the_nodes():
    with pytest.raises(ValueError, match=r"^[^.]*'HYBRID_SHARD' has 8 ranks for nodes of 3; [^.]*\.$"):
        sharded(stack(), "HYBRID_SHARD", ranks_per_node=3)


def test_local_world_size(monkeypatch):
    assert local_world_size() == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert local_world_size() == RANKS


@pytest.mark.parametrize(
    ("strategy", "frozen", "gathered"),
    [
        ("SHARD_GRAD_OP", 0, [True, True, True, True]),
        ("HYBRID_SHARD", 0, [True, True, True, True]),
        ("FULL_SHARD", 0, [False, False, False, True]),
        ("SHARD_GRAD_OP", 2, [False, False, True, True]),
        ("HYBRID_SHARD", 4, [False, False, False, False]),
        ("NO_SHARD", 4, [False, False, False, False]),
    ],
)
def test_what_stays_gathered_after_the_forward(strategy, frozen, gathered):
    module = stack()
    for part in list(module)[:frozen]:
        part.requires_grad_(False)
    sharded(module, strategy)
    module(torch.randn(2, 16))
    assert [not isinstance(part.weight, DTensor) for part in module] == gathered


@pytest.fixture
def orders(monkeypatch) -> dict[str, dict[nn.Module, list[nn.Module]]]:
    """What each module was told to gather ahead."""
    told = {"forward": {}, "backward": {}}
    for direction, lists in told.items():
        name = f"set_modules_to_{direction}_prefetch"
        original = getattr(FSDPModule, name)

        def note(self, modules, lists=lists, original=original):
            lists[self] = list(modules)
            original(self, modules)

        monkeypatch.setattr(FSDPModule, name, note)
    return told


def test_gathers_ahead(orders):
    module = sharded(stack(), "FULL_SHARD", prefetch=2)
    a, b, c, _ = module
    assert orders["forward"] == {module: [a, b], a: [b, c], b: [c], c: []}
    assert orders["backward"] == {module: [c, b], c: [b, a], b: [a], a: []}


def test_frozen_units_are_not_gathered_for_the_backward(orders):
    module = stack()
    module[0].requires_grad_(False)
    a, b, c, _ = sharded(module, "FULL_SHARD", prefetch=1)
    assert orders["forward"] == {module: [a], a: [b], b: [c], c: []}
    assert orders["backward"] == {module: [c], c: [b], b: []}


def test_order_of_fsdp_itself(orders):
    sharded(stack(), "FULL_SHARD", prefetch=0)
    assert orders == {"forward": {}, "backward": {}}


def test_a_network_without_backward_does_not_grow():
    """FSDP remembers each forward of each unit until a backward; a teacher has none."""
    module = sharded(stack().requires_grad_(False), "SHARD_GRAD_OP")
    group = module[0]._get_fsdp_state()._fsdp_param_group
    for _ in range(3):
        module(torch.ones(2, 16))
    assert len(group.comm_ctx.post_forward_order) == 3 * 4  # three linear maps and the root
    reshard(module)
    assert not group.comm_ctx.post_forward_order and not group._post_forward_indices

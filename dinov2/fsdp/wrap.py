"""Shard a module with FSDP2 and move whole state dicts in and out of it."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dinov2.distributed import get_global_size, is_enabled


def shard(
    module: nn.Module,
    units: Iterable[nn.Module],
    *,
    device: torch.device,
    strategy: str,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    ranks_per_node: int | None = None,
    prefetch: int = 0,
) -> None:
    """Shard ``module`` in place; all ranks must call. The parameters stay fp32 between steps.

    What has no trainable parameter when this is called is never kept for a backward, whatever the strategy: it is
    gathered anew each step anyway.

    Args:
        units: submodules gathered one at a time (the transformer blocks), in the order in which they run.
        strategy: ``SHARD_GRAD_OP`` keeps gathered parameters until the backward, ``FULL_SHARD`` gathers those of
            the units again, ``NO_SHARD`` replicates. ``HYBRID_SHARD`` shards among the ranks of a node as
            ``SHARD_GRAD_OP`` and replicates over nodes: only gradients travel between nodes.
        param_dtype: dtype in which parameters are gathered and multiplied. The module's inputs keep theirs: the
            residual stream stays fp32 and autocast rounds at each product.
        reduce_dtype: dtype of the gradient average over ranks.
        ranks_per_node: for ``HYBRID_SHARD``, a divisor of the number of ranks; by default torchrun's.
        prefetch: units gathered ahead of the one that runs, in forward and backward, each holding its gathered
            parameters meanwhile; 0 leaves the order to FSDP, whose host thread gathers one ahead.
    """
    # It warns that views of a module's output must not be changed in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = _mesh(dist.group.WORLD, device.type, _mesh_shape(strategy, ranks_per_node))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    units = list(units)
    for unit in units:
        again = strategy == "FULL_SHARD" or not _is_trainable(unit)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    # The backward begins where the forward ended: the root would be gathered again at once.
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not _is_trainable(module))
    if prefetch:
        # The root and every unit gather the next ones while they run; frozen units see no backward.
        forward, backward = [module, *units], [module, *filter(_is_trainable, reversed(units))]
        for i, unit in enumerate(forward):
            unit.set_modules_to_forward_prefetch(forward[i + 1 : i + 1 + prefetch])
        for i, unit in enumerate(backward):
            unit.set_modules_to_backward_prefetch(backward[i + 1 : i + 1 + prefetch])


def defer_reduction(module: nn.Module, deferred: bool) -> None:
    """Say whether the next backwards of a sharded module only add up gradients, which a later one then averages.

    Meanwhile this rank holds them whole, in the dtype of the average, and keeps what it has gathered for the next
    forward. A plain module is left as it is.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not deferred)
        module.set_reshard_after_backward(not deferred)


def local_world_size() -> int:
    """Return the number of this machine's processes (torchrun's ``LOCAL_WORLD_SIZE``), all without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", get_global_size()))


def _mesh_shape(strategy: str, ranks_per_node: int | None) -> tuple[int, ...]:
    """``(shard,)`` or ``(replicate, shard)``."""
    world = get_global_size()
    if strategy == "NO_SHARD":
        return world, 1
    if strategy != "HYBRID_SHARD":
        return (world,)
    ranks = ranks_per_node or local_world_size()
    if world % ranks:
        raise ValueError(
            f"sharding_strategy = 'HYBRID_SHARD' has {world} ranks for nodes of {ranks}; start equally many on every "
            "node, or choose 'SHARD_GRAD_OP'."
        )
    return (world // ranks, ranks) if ranks < world else (world,)


@functools.lru_cache(maxsize=4)  # a mesh brings communicators of its own, which all modules can share
def _mesh(world: dist.ProcessGroup, device_type: str, shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def reshard(module: nn.Module) -> None:
    """Put the shards back in place of gathered parameters, so that they can be updated and gathered anew.

    A trainable network keeps what it gathered until a backward; one that only runs forward needs this.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
            # FSDP's record of forwards otherwise grows by 2 KB a step: a backward that never comes clears it.
            state = unit._get_fsdp_state()  # no public way in torch 2.11 to 2.15
            getattr(state._comm_ctx, "post_forward_order", []).clear()  # made at the first forward
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            for group in filter(None, groups):
                group._post_forward_indices.clear()


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Whole tensors on the CPU: on rank 0 all of them, elsewhere an empty dict. All ranks must call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy rank 0's whole tensors into every rank's parameters, plain or sharded; all ranks must call."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_enabled(), strict=True)
    set_model_state_dict(module, dict(state), options=options)

"""Shard a module with FSDP2 and move whole state dicts in and out of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
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
) -> None:
    """Shard ``module`` over all ranks in place; all ranks must call. The parameters stay fp32 between steps.

    Args:
        module: root to shard.
        units: submodules gathered one at a time (the transformer blocks).
        device: where the shards live.
        strategy: ``SHARD_GRAD_OP`` keeps gathered parameters until the backward, ``FULL_SHARD`` gathers them
            again, ``NO_SHARD`` replicates.
        param_dtype: dtype in which parameters are gathered and multiplied. The module's inputs keep theirs: the
            residual stream stays fp32 and autocast rounds at each product.
        reduce_dtype: dtype of the gradient average over ranks.
    """
    # It warns that views of a module's output must not be changed in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    world = get_global_size()
    if strategy == "NO_SHARD":
        mesh = init_device_mesh(device.type, (world, 1), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    keep = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": strategy == "FULL_SHARD"}
    for unit in units:
        fully_shard(unit, **keep)
    fully_shard(module, **keep)


def reshard(module: nn.Module) -> None:
    """Put the shards back in place of gathered parameters, so that they can be updated and gathered anew.

    Needed by a network without a backward, which otherwise keeps what its last forward gathered.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Whole tensors on the CPU: on rank 0 all of them, elsewhere an empty dict. All ranks must call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy rank 0's whole tensors into every rank's parameters; all ranks must call.

    Args:
        module: plain or sharded, on its device.
        state: complete on rank 0; ignored elsewhere.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_enabled(), strict=True)
    set_model_state_dict(module, dict(state), options=options)

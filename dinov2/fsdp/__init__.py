"""Sharding over processes with PyTorch's FSDP2, and sharded checkpoints."""

from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.fsdp.wrap import (
    defer_reduction,
    full_state_dict,
    load_full_state_dict,
    local_world_size,
    reshard,
    shard,
)

__all__ = [
    "Checkpointer", "defer_reduction", "full_state_dict", "load_full_state_dict", "local_world_size", "reshard",
    "shard",
]  # fmt: skip

"""CUDA, xFormers and FSDP, on whose presence DINOv2's training code insists, for one process on a CPU.

All is put in place from outside, before the peer's modules are imported: its files stay as they are. The stand-ins
compute what the originals compute; attention over packed sequences is one dense call for each size of crop, which
costs a CPU no more than one call over all.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stay_on_cpu() -> None:
    """Let ``.cuda()`` return what it is called on."""
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = lambda *args: None


class BlockDiagonalMask:
    """Attention within each of several sequences that are packed into one."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths, self._batch_sizes = lengths, None

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> BlockDiagonalMask:
        """For sequences of these lengths."""
        return cls(list(lengths))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """For the rows of tensors (B, N, D), which are returned as one (1, sum of B N, D)."""
        mask = cls([tensor.shape[1] for tensor in tensors for _ in range(len(tensor))])
        mask._batch_sizes = [len(tensor) for tensor in tensors]
        return mask, torch.cat([tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in tensors], dim=1)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Number and length of the sequences of each tensor."""
        groups, first = [], 0
        for size in self._batch_sizes:
            groups.append((size, self._lengths[first]))
            first += size
        return groups

    def split(self, packed: Tensor) -> list[Tensor]:
        """The tensors (B, N, ...) again."""
        parts = packed.squeeze(0).split([size * length for size, length in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask | None = None) -> Tensor:
    """Attention of (B, N, heads, d), within the sequences of a mask if one is given."""
    if attn_bias is None:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    parts = zip(*(attn_bias.split(x) for x in (q, k, v)), strict=True)
    return torch.cat([memory_efficient_attention(*part).flatten(0, 1) for part in parts])[None]


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Selected rows of several matrices, one after the other, flat."""
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(x: Tensor, index: Tensor, source: Tensor, scaling: Tensor, alpha: float) -> Tensor:
    """Add ``alpha * scaling * source`` to selected rows."""
    return x.index_add(0, index, (scaling * source).to(x.dtype), alpha=alpha)


def provide_xformers() -> None:
    """Make ``xformers.ops`` importable, with the functions that have no plain fallback in DINOv2's code."""
    ops = types.ModuleType("xformers.ops")
    ops.fmha = SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    ops.unbind, ops.memory_efficient_attention = torch.unbind, memory_efficient_attention
    ops.index_select_cat, ops.scaled_index_add = index_select_cat, scaled_index_add
    package = types.ModuleType("xformers")
    package.ops = ops
    sys.modules |= {"xformers": package, "xformers.ops": ops}


def unsharded(*_: object, **__: object) -> Callable[[nn.Module], nn.Module]:
    """In place of an FSDP wrapper: the module itself, with FSDP's method of clipping."""

    def wrap(module: nn.Module) -> nn.Module:
        module.clip_grad_norm_ = lambda norm: nn.utils.clip_grad_norm_(module.parameters(), norm)
        return module

    return wrap


def parameter_groups(module: nn.Module) -> list[SimpleNamespace]:
    """In place of the list of FSDP modules: one, which has all parameters."""
    return [SimpleNamespace(params=list(module.parameters()))]


class NoCheckpoints:
    """In place of checkpointers: a run that is never resumed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def resume_or_load(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing was saved."""
        return {}

    def step(self, *_: Any) -> None:
        """Save nothing."""

    save = step

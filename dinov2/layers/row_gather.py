"""Taking rows out of a matrix and adding rows to it, both ways without atomics.

A selection is known by ``rows`` (K,), the row of the large matrix that each row of the small one is, and by its
``inverse`` (T,), the number of each large row among the small ones, K where it is not selected. With both, either
map is the other's derivative and each is a gather: nothing is scattered, so results do not depend on the order in
which threads arrive, and a compiler can fuse each with its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def spread_rows(small: Tensor, inverse: Tensor) -> Tensor:
    """(K, D) to (T, D): row ``inverse[t]`` of ``small`` at t, zeros where that is K."""
    count = len(small)
    return torch.where((inverse < count)[:, None], small[inverse.clamp_max(count - 1)], 0)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return spread_rows(grad, inverse), None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x + spread_rows(update, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return grad, grad.index_select(0, rows), None, None


def take_rows(x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """x[rows], (T, D) to (K, D), of any float dtype, with different int64 ``rows`` and their ``inverse``."""
    return _TakeRows.apply(x, rows, inverse)


def add_rows(x: Tensor, update: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """(T, D) with ``update`` (K, D) added at ``rows``; see `take_rows`."""
    return _AddRows.apply(x, update, rows, inverse)

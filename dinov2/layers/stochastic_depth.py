"""Stochastic depth that computes only what it keeps (DINOv2, arXiv:2304.07193, section 5).

Of the B images of a segment a residual branch f sees k = max(floor(B (1 - p)), 1), drawn without replacement:

    x[kept] <- x[kept] + (B / k) f(x[kept])

The number kept is fixed, so shapes are static and the host never waits for the device. Images are drawn for all
branches of a network at once, outside its blocks: blocks stay pure functions of their inputs, which compilation
and recomputation in the backward pass rely on.

In expectation the branch is scaled by 1 as in the usual form, which draws for each image whether its branch is
multiplied by 0 or by 1 / (1 - p); here the branch of a dropped image is not computed at all, so that at p = 0.4 forty
per cent of the blocks' arithmetic is saved. A student of B images keeps whole images: attention mixes the tokens of an
image, so dropping single tokens would change what the others see.

Rows are moved without atomics. A selection is known by ``rows`` (K,), the row of the large matrix that each row of the
small one is, and by its ``inverse`` (T,), the number of each large row among the small ones, K where it is not
selected. With both, taking and adding rows are each the other's derivative and a gather: nothing is scattered, so
results do not depend on the order in which threads arrive, and a compiler can fuse each with its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2.layers.packing import Segments


def draw_orders(segments: Segments, num_branches: int, device: torch.device) -> list[Tensor]:
    """Draw a random order of the images of every segment for every branch, with torch's generator of the device.

    Per segment int64 (num_branches, 2, B) is returned: a permutation of the images, of which a branch keeps the
    beginning, and each image's rank in it.
    """
    # Sorting noise gives all branches their permutations in one operation; torch.randperm would take one per branch.
    orders = [torch.rand(num_branches, batch, device=device).argsort(dim=1) for batch, _ in segments]
    return [torch.stack([order, order.argsort(dim=1)], dim=1) for order in orders]


@dataclass(frozen=True)
class Kept:
    """The K rows of a packed (T, D) matrix that belong to the images one branch keeps."""

    rows: Tensor  # int64 (K,), their numbers
    inverse: Tensor  # int64 (T,), the number of every row among them, K where it is not kept
    scale: Tensor  # (K, 1), B / k of the row's segment
    segments: Segments  # of the kept rows

    def of(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Number (S,) of rows ``selected`` (S,) of the large matrix among those kept, and the scale (S, 1) of each.

        A row that is not kept has scale 0 and some number.
        """
        number = self.inverse[selected]
        present = number < len(self.rows)
        number = number.clamp_max(len(self.rows) - 1)
        return number, torch.where(present[:, None], self.scale[number], 0)


def kept_rows(segments: Segments, orders: Sequence[Tensor], drop_rate: float, dtype: torch.dtype) -> Kept:
    """The rows of a packed matrix that a branch keeps.

    Args:
        orders: per segment int64 (2, B), one branch's part of `draw_orders`.
        drop_rate: p in [0, 1).
        dtype: of the scale.
    """
    counts = [max(int(batch * (1 - drop_rate)), 1) for batch, _ in segments]
    kept = tuple((count, tokens) for count, (_, tokens) in zip(counts, segments, strict=True))
    total = sum(count * tokens for count, tokens in kept)
    rows, inverse, scales = [], [], []
    # Segments lie one behind the other in the packed matrix (from `start`) and among the kept rows (from `kept_start`),
    # images one behind the other in their segment.
    start = kept_start = 0
    for (batch, tokens), count, (order, rank) in zip(segments, counts, orders, strict=True):
        offsets = torch.arange(tokens, device=order.device)
        rows.append((start + tokens * order[:count, None] + offsets).flatten())
        number = kept_start + tokens * rank[:, None] + offsets
        inverse.append(torch.where(rank[:, None] < count, number, total).flatten())
        scales.append(torch.full((count * tokens, 1), batch / count, dtype=dtype, device=order.device))
        start += batch * tokens
        kept_start += count * tokens
    return Kept(torch.cat(rows), torch.cat(inverse), torch.cat(scales), kept)


def add_branch(
    x: Tensor,
    branch: Callable[[Tensor, Segments], Tensor],
    segments: Segments,
    orders: Sequence[Tensor] | None,
    drop_rate: float,
    inverse_gather: bool = True,
) -> Tensor:
    """Add a residual branch, computed for the kept images alone.

    Args:
        x: residual stream, packed rows (T, D); its dtype is kept.
        branch: maps packed rows and their segments to an update of the same shape.
        orders: see `kept_rows`; None keeps all images.
        drop_rate: p in [0, 1); 0 keeps all images.
        inverse_gather: move rows by gathers alone; False adds them by index, which on a GPU takes
            atomics.
    """
    if orders is None or drop_rate == 0:
        return x + branch(x, segments)
    kept = kept_rows(segments, orders, drop_rate, x.dtype)
    if not inverse_gather:
        update = branch(x.index_select(0, kept.rows), kept.segments)
        return x.index_add(0, kept.rows, kept.scale * update)
    update = branch(take_rows(x, kept.rows, kept.inverse), kept.segments)
    return add_rows(x, kept.scale * update, kept.rows, kept.inverse)


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

"""Stochastic depth that computes only what it keeps (DINOv2, arXiv:2304.07193, section 5).

Of the B images of a segment a residual branch f sees k = max(floor(B (1 - p)), 1), drawn without replacement:

    x[kept] <- x[kept] + (B / k) f(x[kept])

The number kept is fixed, so shapes are static and the host never waits for the device. Images are drawn for all
branches of a network at once, outside its blocks: blocks stay pure functions of their inputs, which compilation
and recomputation in the backward pass rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinov2.layers.packing import Segments


def draw_orders(segments: Segments, num_branches: int, device: torch.device) -> list[Tensor]:
    """Draw a random order of the images of every segment for every branch, with torch's generator of the device.

    Returns:
        Per segment int64 (num_branches, B); each row is a permutation, of which a branch keeps the beginning.
    """
    return [torch.rand(num_branches, batch, device=device).argsort(dim=1) for batch, _ in segments]


def add_branch(
    x: Tensor,
    branch: Callable[[Tensor, Segments], Tensor],
    segments: Segments,
    orders: Sequence[Tensor] | None,
    drop_rate: float,
) -> Tensor:
    """Add a residual branch, computed for the kept images alone.

    Args:
        x: residual stream, packed rows (T, D); its dtype is kept.
        branch: maps packed rows and their segments to an update of the same shape.
        segments: of ``x``.
        orders: per segment a permutation (B,) of its images, from `draw_orders`; None keeps all images.
        drop_rate: p in [0, 1); 0 keeps all images.
    """
    if orders is None or drop_rate == 0:
        return x + branch(x, segments)
    rows, scale, kept = _kept_rows(segments, orders, drop_rate, x.dtype)
    update = branch(x.index_select(0, rows), kept)
    return x.index_add(0, rows, scale * update)


def _kept_rows(
    segments: Segments, orders: Sequence[Tensor], drop_rate: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Segments]:
    """Row numbers (K,) of the kept images, the factor B / k of each row (K, 1), and the kept segments (k, N)."""
    rows, scales, kept, start = [], [], [], 0
    for (batch, tokens), order in zip(segments, orders, strict=True):
        count = max(int(batch * (1 - drop_rate)), 1)
        first = start + tokens * order[:count, None]
        rows.append((first + torch.arange(tokens, device=order.device)).flatten())
        scales.append(torch.full((count * tokens, 1), batch / count, dtype=dtype, device=order.device))
        kept.append((count, tokens))
        start += batch * tokens
    return torch.cat(rows), torch.cat(scales), tuple(kept)

"""Stochastic depth that computes only what it keeps (DINOv2, arXiv:2304.07193, section 5).

Of the B images of a segment a residual branch f sees k = max(floor(B (1 - p)), 1), drawn without replacement:

    x[kept] <- x[kept] + (B / k) f(x[kept])

The number kept is fixed, so shapes are static and the host never waits for the device. Images are drawn for all
branches of a network at once, outside its blocks: blocks stay pure functions of their inputs, which compilation
and recomputation in the backward pass rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2.layers.packing import Segments
from dinov2.layers.row_gather import add_rows, take_rows


def draw_orders(segments: Segments, num_branches: int, device: torch.device) -> list[Tensor]:
    """Draw a random order of the images of every segment for every branch, with torch's generator of the device.

    Returns:
        Per segment int64 (num_branches, 2, B): a permutation of the images, of which a branch keeps the beginning,
        and each image's place in it.
    """
    orders = [torch.rand(num_branches, batch, device=device).argsort(dim=1) for batch, _ in segments]
    return [torch.stack([order, order.argsort(dim=1)], dim=1) for order in orders]


@dataclass(frozen=True)
class Kept:
    """The K rows of a packed (T, D) matrix that belong to the images one branch keeps.

    Attributes:
        rows: int64 (K,), their numbers.
        places: int64 (T,), the place of every row among them, K where it is not kept.
        scale: (K, 1), B / k of the row's segment.
        segments: theirs.
    """

    rows: Tensor
    places: Tensor
    scale: Tensor
    segments: Segments

    def of(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Place (S,) of rows ``wanted`` (S,) of the large matrix among those kept, and the scale (S, 1) of each.

        A row that is not kept has scale 0 and some place.
        """
        place = self.places[wanted]
        present = place < len(self.rows)
        place = place.clamp_max(len(self.rows) - 1)
        return place, torch.where(present[:, None], self.scale[place], 0)


def kept_rows(segments: Segments, orders: Sequence[Tensor], drop_rate: float, dtype: torch.dtype) -> Kept:
    """The rows that a branch keeps.

    Args:
        segments: of the packed matrix.
        orders: per segment int64 (2, B), one branch's share of `draw_orders`.
        drop_rate: p in [0, 1).
        dtype: of the scale.
    """
    counts = [max(int(batch * (1 - drop_rate)), 1) for batch, _ in segments]
    kept = tuple((count, tokens) for count, (_, tokens) in zip(counts, segments, strict=True))
    total = sum(count * tokens for count, tokens in kept)
    rows, places, scales = [], [], []
    start = place = 0
    for (batch, tokens), count, (order, rank) in zip(segments, counts, orders, strict=True):
        offsets = torch.arange(tokens, device=order.device)
        rows.append((start + tokens * order[:count, None] + offsets).flatten())
        first = place + tokens * rank[:, None] + offsets
        places.append(torch.where(rank[:, None] < count, first, total).flatten())
        scales.append(torch.full((count * tokens, 1), batch / count, dtype=dtype, device=order.device))
        start += batch * tokens
        place += count * tokens
    return Kept(torch.cat(rows), torch.cat(places), torch.cat(scales), kept)


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
        segments: of ``x``.
        orders: see `kept_rows`; None keeps all images.
        drop_rate: p in [0, 1); 0 keeps all images.
        inverse_gather: move rows by gathers alone (`row_gather`); False adds them by index, which on a GPU takes
            atomics.
    """
    if orders is None or drop_rate == 0:
        return x + branch(x, segments)
    kept = kept_rows(segments, orders, drop_rate, x.dtype)
    if not inverse_gather:
        update = branch(x.index_select(0, kept.rows), kept.segments)
        return x.index_add(0, kept.rows, kept.scale * update)
    update = branch(take_rows(x, kept.rows, kept.places), kept.segments)
    return add_rows(x, kept.scale * update, kept.rows, kept.places)

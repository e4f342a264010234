"""Images of several sizes as the rows of one matrix.

Norms, projections and feed-forward layers treat every token alike, so tokens of all crop sizes go through them
as one packed matrix (T, D). Only attention has to know which rows form an image; a static list of segments, one
per crop size, says so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Segments = tuple[tuple[int, int], ...]
"""(images B, tokens per image N) of each run of rows in a packed (T, D) matrix; T is the sum of all B * N."""


def pack(parts: Sequence[Tensor]) -> Tensor:
    """One (B, N, D) tensor per segment to packed rows (T, D)."""
    rows = [part.flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def unpack(rows: Tensor, segments: Segments) -> list[Tensor]:
    """Packed rows (T, D) to one (B, N, D) view per segment."""
    parts = rows.split([batch * tokens for batch, tokens in segments])
    return [part.unflatten(0, segment) for part, segment in zip(parts, segments, strict=True)]

"""Position embeddings for a grid of patches other than the one they were made for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Tensor dimensions below: N patches of the grid, D width.


def resample_positions(pos_embed: Tensor, size: tuple[int, int], antialias: bool = True, offset: float = 0.0) -> Tensor:
    """Resample a square position grid bicubically in float32; a grid that has the size already is returned as is.

    Args:
        pos_embed: (1, 1 + N, D), the class token's first; N is a square number.
        size: rows and columns of patches.
        antialias: low-pass filter when shrinking.
        offset: in [0, 1). The grid is resampled by the factor (side + offset) / sqrt(N), which shifts the sampling
            positions a little, as Meta's models without registers do; 0 resamples to the exact sides.

    Returns:
        (1, 1 + rows * columns, D) in the dtype of ``pos_embed``.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if size == (side, side):
        return pos_embed
    grid = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if offset:
        scale = tuple((sides + offset) / side for sides in size)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        grid = F.interpolate(grid, size=size, mode="bicubic", antialias=antialias)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :1], patches], dim=1)

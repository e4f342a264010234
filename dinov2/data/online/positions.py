"""Positions of tiles of one size on a slide, counted beforehand, so that one is drawn evenly and in one go.

A position is a whole pixel (column, row) of the level that is read. Its foreground is the fraction of foreground
cells among the n x n cells nearest to its square, n being the square's side in cells, rounded. *Uniform* means: every
pixel at which the square lies on the slide and whose foreground is at least the least wanted is equally likely.

The positions of one cell row are counted beforehand; a draw then looks at the n rows of cells below it only.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from dinov2.data.slides.tissue import TissueMask


@dataclass(frozen=True)
class Geometry:
    """Reading of tiles of one output resolution from a slide."""

    level: int  # pyramid level that is read
    width: int  # of that level in px
    height: int
    downsample: float  # level-0 px per px of that level
    side: int  # px of that level that a tile spans
    mpp: float  # micrometres per px that the tile has in the end


class Positions:
    """Positions of tiles of one geometry; `ends`, int64 (cell rows,), counts those in each row of cells and above."""

    def __init__(self, geometry: Geometry, ends: np.ndarray, min_foreground: float) -> None:
        self.geometry, self.ends, self._min_foreground = geometry, ends, min_foreground

    @classmethod
    def count(cls, mask: TissueMask, geometry: Geometry, min_foreground: float) -> "Positions":
        """Count, by row of mask cells, the positions whose square holds at least ``min_foreground`` tissue."""
        n, least, columns, rows = _grid(mask, geometry, min_foreground)
        if columns is None or rows is None:
            return cls(geometry, np.zeros(1, np.int64), min_foreground)
        sums = cv2.integral(mask.cells())
        inside = sums[n:, n:] - sums[:-n, n:] - sums[n:, :-n] + sums[:-n, :-n] >= least
        # A row has fewer than 2^24 px, so that float32 counts them exactly, and BLAS is fast.
        across = inside.astype(np.float32) @ np.diff(columns).astype(np.float32)
        return cls(geometry, np.cumsum(across.astype(np.int64) * np.diff(rows)), min_foreground)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def position(self, mask: TissueMask, number: int) -> tuple[int, int]:
        """Column and row of position `number`, of len(self), in px of the level."""
        n, least, columns, rows = _grid(mask, self.geometry, self._min_foreground)
        cell_row = int(np.searchsorted(self.ends, number, side="right"))
        number -= int(self.ends[cell_row - 1]) if cell_row else 0
        sums = np.zeros(mask.columns + 1, np.int64)
        np.cumsum(mask.cells(cell_row, cell_row + n).sum(0), out=sums[1:])
        ends = np.cumsum(np.where(sums[n:] - sums[:-n] >= least, np.diff(columns), 0))
        down, number = divmod(number, int(ends[-1]))
        cell = int(np.searchsorted(ends, number, side="right"))
        number -= int(ends[cell - 1]) if cell else 0
        return int(columns[cell]) + number, int(rows[cell_row]) + down


def _grid(
    mask: TissueMask, geometry: Geometry, min_foreground: float
) -> tuple[int, int, np.ndarray | None, np.ndarray | None]:
    """Side n of a square in cells, its least foreground cells, and `edges` along both sides of the slide."""
    n = max(1, round(geometry.side * geometry.downsample / mask.cell_px))
    least = int(np.ceil(min_foreground * n**2 - 1e-9))  # a fraction of 0 asks for none

    def edges(length: int, cells: int) -> np.ndarray | None:
        """First position whose nearest n cells start at cell k, int64 (cells - n + 2,); None if none fits."""
        positions, starts = length - geometry.side + 1, cells - n + 1
        if positions < 1 or starts < 1:
            return None
        inner = np.ceil((np.arange(1, starts) - 0.5) * mask.cell_px / geometry.downsample).astype(np.int64)
        return np.concatenate([[0], np.minimum(inner, positions), [positions]])

    return n, least, edges(geometry.width, mask.columns), edges(geometry.height, len(mask.packed))

"""Where on a slide patches of one size may lie, and drawing among those places evenly and in one go.

A place is a whole pixel (column, row) of the level that is read. Its foreground is the share of foreground cells
among the n x n cells nearest to its square, n being the square's side in cells, rounded. *Uniform* means: every
pixel at which the square lies on the slide and whose foreground is at least the least wanted is equally likely.

The places of one cell row are counted beforehand; a draw then looks at the n rows of cells below it only.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from dinov2.data.online.tissue_mask import TissueMask


@dataclass(frozen=True)
class Geometry:
    """How patches of one output resolution are read from a slide.

    Attributes:
        level: pyramid level that is read.
        width, height: of that level in px.
        downsample: level-0 px per px of that level.
        side: px of that level that a patch spans.
        mpp: micrometres per px that the patch has in the end.
    """

    level: int
    width: int
    height: int
    downsample: float
    side: int
    mpp: float


class Positions:
    """Places of patches of one geometry.

    Args:
        geometry: of the patches.
        ends: int64 (cell rows,), places in each row of cells and those above it.
        min_foreground: least share of foreground cells.
    """

    def __init__(self, geometry: Geometry, ends: np.ndarray, min_foreground: float) -> None:
        self.geometry, self.ends, self._min_foreground = geometry, ends, min_foreground

    @classmethod
    def count(cls, mask: TissueMask, geometry: Geometry, min_foreground: float) -> "Positions":
        """Count the places, cell row by cell row."""
        columns = _edges(geometry.width, mask.columns, mask.cell_px, geometry)
        rows = _edges(geometry.height, mask.rows, mask.cell_px, geometry)
        if columns is None or rows is None:
            return cls(geometry, np.zeros(1, np.int64), min_foreground)
        n, least = _block(mask.cell_px, geometry), _least(mask.cell_px, geometry, min_foreground)
        sums = cv2.integral(mask.cells())
        inside = sums[n:, n:] - sums[:-n, n:] - sums[n:, :-n] + sums[:-n, :-n] >= least
        # A row has fewer than 2^24 px, so that float32 counts them exactly, and BLAS is fast.
        across = inside.astype(np.float32) @ np.diff(columns).astype(np.float32)
        return cls(geometry, np.cumsum(across.astype(np.int64) * np.diff(rows)), min_foreground)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, mask: TissueMask, number: int) -> tuple[int, int]:
        """Column and row of place `number`, of len(self), in px of the level."""
        geometry = self.geometry
        columns = _edges(geometry.width, mask.columns, mask.cell_px, geometry)
        rows = _edges(geometry.height, mask.rows, mask.cell_px, geometry)
        n, least = _block(mask.cell_px, geometry), _least(mask.cell_px, geometry, self._min_foreground)
        cell_row = int(np.searchsorted(self.ends, number, side="right"))
        number -= int(self.ends[cell_row - 1]) if cell_row else 0
        sums = np.zeros(mask.columns + 1, np.int64)
        np.cumsum(mask.cells(cell_row, cell_row + n).sum(0), out=sums[1:])
        ends = np.cumsum(np.where(sums[n:] - sums[:-n] >= least, np.diff(columns), 0))
        down, number = divmod(number, int(ends[-1]))
        cell = int(np.searchsorted(ends, number, side="right"))
        number -= int(ends[cell - 1]) if cell else 0
        return int(columns[cell]) + number, int(rows[cell_row]) + down


def _block(cell_px: float, geometry: Geometry) -> int:
    return max(1, round(geometry.side * geometry.downsample / cell_px))


def _least(cell_px: float, geometry: Geometry, min_foreground: float) -> int:
    """Foreground cells that a block must hold; a share of 0 asks for none."""
    return int(np.ceil(min_foreground * _block(cell_px, geometry) ** 2 - 1e-9))


def _edges(length: int, cells: int, cell_px: float, geometry: Geometry) -> np.ndarray | None:
    """First place whose nearest block starts at cell k, int64 (blocks + 1,), along one side; None if none fits."""
    places, blocks = length - geometry.side + 1, cells - _block(cell_px, geometry) + 1
    if places < 1 or blocks < 1:
        return None
    inner = np.ceil((np.arange(1, blocks) - 0.5) * cell_px / geometry.downsample).astype(np.int64)
    return np.concatenate([[0], np.minimum(inner, places), [places]])

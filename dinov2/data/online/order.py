"""The order of patches that are drawn without end: sample g is row g % 64 of unit g // 64."""

import numpy as np

from dinov2.data.stream.order import Locations

UNIT_PATCHES = 64
ENDLESS_UNITS = 1 << 24  # 2^30 patches; only then do they come round again


class OnlineOrder:
    """Patches in the order of their numbers; stands in for a `SampleOrder` and holds no arrays.

    Args:
        seed: of the run; the patches are drawn with it, the order itself has nothing random.
        units: units before the first comes round again.

    Attributes:
        num_rows: patches before the first comes round again.
        lanes: 1, since patch follows patch; a process then holds those that it has looked ahead to.
        block_rows: patches of a unit.
    """

    lanes, block_rows = 1, UNIT_PATCHES

    def __init__(self, seed: int, units: int = ENDLESS_UNITS) -> None:
        self.seed, self.num_rows = seed, units * UNIT_PATCHES

    @property
    def parts(self) -> list[tuple[int, "OnlineOrder"]]:
        """First unit and order of each dataset: this one alone, from unit 0."""
        return [(0, self)]

    @property
    def parameters(self) -> dict[str, int]:
        """What fixes the order besides the dataset."""
        return {"seed": self.seed, "lanes": self.lanes, "block_rows": self.block_rows}

    def locate(self, indices: np.ndarray) -> Locations:
        """Find global sample indices, int64 (n,), in any order."""
        epoch, patch = np.divmod(np.asarray(indices, np.int64), self.num_rows)
        unit, row = np.divmod(patch, UNIT_PATCHES)
        return Locations(epoch, unit, np.zeros_like(unit), row)

    def members(self, epoch: int, unit: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Global sample indices of a unit, and the rows they stand for, int64 (64,) each; there is one chunk only."""
        if chunk:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        rows = np.arange(UNIT_PATCHES)
        return epoch * self.num_rows + unit * UNIT_PATCHES + rows, rows

"""The order of samples: a pure function from (seed, global sample index) to a row of the dataset.

Each epoch sorts all units (row groups) by a keyed hash: the *tape*. The tape is cut into V lanes of equal
length, read side by side, one row from each lane in turn; rows are shuffled within blocks of R rows of their
unit. With N rows and global sample index g,

    e, i = divmod(g, N);  v, p = i % V, i // V;  q, r = divmod(N, V)
    t    = v*q + min(v, r) + p                              position on the tape of epoch e
    row  = shuffled(seed, e, unit)[t - start(unit)]         unit = the one that covers t

which is a bijection between [e*N, (e+1)*N) and the rows for any N and V, uneven and empty units included.
Ranks, workers and the point of resumption do not enter.
"""

from typing import NamedTuple

import numpy as np

from dinov2.utils.seeding import hash_words

_TAPES_KEPT = 2  # the look-ahead reaches into the next epoch while the present one is still in use
_LAST = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class Places(NamedTuple):
    """Where samples lie, int64 (n,) each; see `SampleOrder.members` for `piece`."""

    epoch: np.ndarray
    unit: np.ndarray
    piece: np.ndarray
    row: np.ndarray


class _Tape(NamedTuple):
    units: np.ndarray  # unit numbers in tape order
    ends: np.ndarray  # tape position after each unit, in tape order
    starts: np.ndarray  # tape position of each unit's first row, by unit number


def check_parameters(seed: int, lanes: int, block_rows: int) -> None:
    """Refuse parameters that make no order with a ValueError."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"the order's seed is {seed}, but it must lie in [0, 2**64)")
    for name, value in (("lanes", lanes), ("block_rows", block_rows)):
        if value < 1:
            raise ValueError(f"the order's {name} is {value}, but it must be at least 1")


class SampleOrder:
    """Locates any global sample index in O(log units), after one sort of the units per epoch.

    Args:
        unit_rows: Rows of each unit, (U,).
        seed: Any integer in [0, 2**64).
        lanes: V. A multiple of the global batch keeps each lane on one rank, so that ranks share no unit.
        block_rows: R.
    """

    def __init__(self, unit_rows: np.ndarray, *, seed: int, lanes: int, block_rows: int) -> None:
        self._rows = np.asarray(unit_rows, np.int64)
        self.num_rows = int(self._rows.sum())
        if self.num_rows == 0:
            raise ValueError("the dataset holds 0 rows, but an order needs at least 1")
        check_parameters(seed, lanes, block_rows)
        self.seed, self.lanes, self.block_rows = seed, lanes, block_rows
        self._short, self._longer = divmod(self.num_rows, lanes)  # the first `longer` lanes hold one row more
        self._tapes: dict[int, _Tape] = {}

    @property
    def parts(self) -> list[tuple[int, "SampleOrder"]]:
        """First unit and order of each dataset: this one alone, from unit 0."""
        return [(0, self)]

    @property
    def parameters(self) -> dict[str, int]:
        """What fixes the order besides the dataset."""
        return {"seed": self.seed, "lanes": self.lanes, "block_rows": self.block_rows}

    def locate(self, indices: np.ndarray) -> Places:
        """Find global sample indices, int64 (n,), in any order and across epochs."""
        epoch, i = np.divmod(np.asarray(indices, np.int64), self.num_rows)
        t = self._lane_start(i % self.lanes) + i // self.lanes
        unit, piece, row = np.empty_like(t), np.empty_like(t), np.empty_like(t)
        for e in np.unique(epoch):
            here = epoch == e
            tape = self._tape(int(e))
            u = unit[here] = tape.units[np.searchsorted(tape.ends, t[here], side="right")]
            start = tape.starts[u]
            piece[here] = t[here] >= self._next_lane(start)
            row[here] = self._shuffled(e, u, t[here] - start)
        return Places(epoch, unit, piece, row)

    def members(self, epoch: int, unit: int, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """List the samples of one piece of a unit: the rows of it that are in use at the same time.

        Piece 0 is read by the lane that runs into the unit from before, piece 1 by the lanes that begin
        inside it. These begin with the epoch, that one arrives later, so the pieces are fetched apart.

        Returns:
            Global sample indices and the rows they stand for, int64 (n,) each.
        """
        start = self._tape(epoch).starts[unit]
        end = start + self._rows[unit]
        cut = np.minimum(self._next_lane(start), end)
        t = np.arange(cut, end) if piece else np.arange(start, cut)
        lane = self._lane_of(t)
        indices = epoch * self.num_rows + (t - self._lane_start(lane)) * self.lanes + lane
        return indices, self._shuffled(epoch, np.full_like(t, unit), t - start)

    def _lane_start(self, lane: np.ndarray) -> np.ndarray:
        return lane * self._short + np.minimum(lane, self._longer)

    def _lane_of(self, t: np.ndarray) -> np.ndarray:
        shared = self._longer * (self._short + 1)
        after = self._longer + (t - shared) // max(self._short, 1)
        return np.where(t < shared, t // (self._short + 1), after)

    def _next_lane(self, t: np.ndarray) -> np.ndarray:
        """Where the first lane at or after t begins."""
        return self._lane_start(self._lane_of(t - 1) + 1)

    def _tape(self, epoch: int) -> _Tape:
        if epoch not in self._tapes:
            if len(self._tapes) == _TAPES_KEPT:
                del self._tapes[next(iter(self._tapes))]
            units = np.argsort(hash_words(self.seed, epoch, np.arange(len(self._rows))))
            ends = np.cumsum(self._rows[units])
            starts = np.empty_like(ends)
            starts[units] = ends - self._rows[units]
            self._tapes[epoch] = _Tape(units, ends, starts)
        return self._tapes[epoch]

    def _shuffled(self, epoch: int, unit: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Row at each offset of a unit; a block's rows are ordered by hash_words(seed, epoch, unit, row)."""
        if not len(unit):
            return offset
        rows, size = self._rows[unit], self.block_rows
        blocks_per_unit = int(rows.max()) // size + 1
        block, inverse = np.unique(unit * blocks_per_unit + offset // size, return_inverse=True)
        unit_of_block, block = np.divmod(block[:, None], blocks_per_unit)
        row = block * size + np.arange(min(size, int(rows.max())))
        keys = hash_words(self.seed, epoch, unit_of_block, row)
        keys = np.where(row < self._rows[unit_of_block], keys, _LAST)
        ranked = np.take_along_axis(row, np.argsort(keys, axis=1, kind="stable"), axis=1)
        return ranked[inverse, offset % size]

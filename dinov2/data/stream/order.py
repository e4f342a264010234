"""The order of samples: a pure function from (seed, global sample index) to a row of the dataset.

Each epoch permutes all row groups by a keyed hash. The permuted rows are cut into V read streams of equal
length (`lanes`), which are read interleaved, one row of each in turn; rows are shuffled within blocks of R rows of
their row group (`block_rows`). With N rows and global sample index g,

    e, i = divmod(g, N);  v, p = i % V, i // V;  q, r = divmod(N, V)
    t    = v*q + min(v, r) + p                              position in the permutation of epoch e
    row  = shuffled(seed, e, group)[t - start(group)]       group = the one that covers t

which is a bijection between [e*N, (e+1)*N) and the rows for any N and V, uneven and empty row groups included.
Ranks, workers and the point of resumption do not enter.
"""

from typing import Any, NamedTuple

import numpy as np

from dinov2.utils.seeding import hash_words

_PERMUTATIONS_KEPT = 2  # the look-ahead reaches into the next epoch while the present one is still in use
_LAST = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class Locations(NamedTuple):
    """Locations of samples, int64 (n,) each; see `SampleOrder.members` for `chunk`."""

    epoch: np.ndarray
    group: np.ndarray
    chunk: np.ndarray
    row: np.ndarray


class _Permutation(NamedTuple):
    groups: np.ndarray  # row group numbers in the order of the epoch
    ends: np.ndarray  # position after each row group, in the order of the epoch
    starts: np.ndarray  # position of each row group's first row, by row group number


class SampleOrder:
    """Order of one dataset; it locates any global sample index in O(log row groups), after one sort per epoch.

    Args:
        group_rows: rows of each row group, (G,).
        seed: any integer in [0, 2**64).
        lanes: V. A multiple of the global batch keeps each read stream on one rank, so that ranks share no row group.
        block_rows: R.

    `num_rows` counts the rows of all row groups; `parts` are first row group and order of each dataset: this one alone,
    from row group 0. ValueError if there is no row, or a parameter is out of range.
    """

    def __init__(self, group_rows: np.ndarray, *, seed: int, lanes: int, block_rows: int) -> None:
        self._rows = np.asarray(group_rows, np.int64)
        self.num_rows = int(self._rows.sum())
        if self.num_rows == 0:
            raise ValueError("the dataset holds 0 rows, but an order needs at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"the order's seed is {seed}, but it must lie in [0, 2**64)")
        for name, value in (("lanes", lanes), ("block_rows", block_rows)):
            if value < 1:
                raise ValueError(f"the order's {name} is {value}, but it must be at least 1")
        self.parts: list[tuple[int, SampleOrder]] = [(0, self)]
        self.seed, self.lanes, self.block_rows = seed, lanes, block_rows
        self._short, self._longer = divmod(self.num_rows, lanes)  # the first `longer` streams hold one row more
        self._permutations: dict[int, _Permutation] = {}

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters that fix the order besides the dataset."""
        return {"seed": self.seed, "lanes": self.lanes, "block_rows": self.block_rows}

    def locate(self, indices: np.ndarray) -> Locations:
        """Find global sample indices, int64 (n,), in any order and across epochs."""
        epoch, i = np.divmod(np.asarray(indices, np.int64), self.num_rows)
        t = self._stream_start(i % self.lanes) + i // self.lanes
        group, chunk, row = np.empty_like(t), np.empty_like(t), np.empty_like(t)
        for e in np.unique(epoch):
            here = epoch == e
            permutation = self._permutation(int(e))
            u = group[here] = permutation.groups[np.searchsorted(permutation.ends, t[here], side="right")]
            start = permutation.starts[u]
            chunk[here] = t[here] >= self._next_stream(start)
            row[here] = self._shuffled(e, u, t[here] - start)
        return Locations(epoch, group, chunk, row)

    def members(self, epoch: int, group: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """List the samples of one chunk of a row group: the rows of it that are in use at the same time.

        A read stream that has begun in an earlier row group runs into this one late in the epoch: its rows are chunk 0.
        Streams that begin inside the row group do so with the epoch: theirs are chunk 1. Fetched as one, the rows of
        chunk 0 would lie in memory for the length of a stream; fetched apart, each is read when its turn comes.
        Gives global sample indices and the rows they stand for, int64 (n,) each.
        """
        start = self._permutation(epoch).starts[group]
        end = start + self._rows[group]
        cut = np.minimum(self._next_stream(start), end)
        t = np.arange(cut, end) if chunk else np.arange(start, cut)
        stream = self._stream_of(t)
        indices = epoch * self.num_rows + (t - self._stream_start(stream)) * self.lanes + stream
        return indices, self._shuffled(epoch, np.full_like(t, group), t - start)

    def _stream_start(self, stream: np.ndarray) -> np.ndarray:
        return stream * self._short + np.minimum(stream, self._longer)

    def _stream_of(self, t: np.ndarray) -> np.ndarray:
        """Invert `_stream_start`: the read stream that holds each position; there may be more streams than rows."""
        in_longer = self._longer * (self._short + 1)
        after = self._longer + (t - in_longer) // max(self._short, 1)
        return np.where(t < in_longer, t // (self._short + 1), after)

    def _next_stream(self, t: np.ndarray) -> np.ndarray:
        """Find where the first read stream at or after t begins."""
        return self._stream_start(self._stream_of(t - 1) + 1)

    def _permutation(self, epoch: int) -> _Permutation:
        if epoch not in self._permutations:
            if len(self._permutations) == _PERMUTATIONS_KEPT:
                del self._permutations[next(iter(self._permutations))]
            # Hashes of one epoch never collide (see hash_words), so the sort needs no tie-break.
            groups = np.argsort(hash_words(self.seed, epoch, np.arange(len(self._rows))))
            ends = np.cumsum(self._rows[groups])
            starts = np.empty_like(ends)
            starts[groups] = ends - self._rows[groups]
            self._permutations[epoch] = _Permutation(groups, ends, starts)
        return self._permutations[epoch]

    def _shuffled(self, epoch: int, group: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Find the row at each offset of its group; a block's rows are ordered by hash_words(seed, epoch, group, row).

        Only the blocks that are asked for are sorted, all in one go: row k of the arrays below is the k-th of them.
        """
        if not len(group):
            return offset
        rows, size = self._rows[group], self.block_rows
        blocks_per_group = int(rows.max()) // size + 1
        block, inverse = np.unique(group * blocks_per_group + offset // size, return_inverse=True)
        group_of_block, block = np.divmod(block[:, None], blocks_per_group)
        row = block * size + np.arange(min(size, int(rows.max())))
        keys = hash_words(self.seed, epoch, group_of_block, row)
        # The last block may be short: what lies beyond the row group's end is sorted to the end, and never asked for.
        keys = np.where(row < self._rows[group_of_block], keys, _LAST)
        ranked = np.take_along_axis(row, np.argsort(keys, axis=1, kind="stable"), axis=1)
        return ranked[inverse, offset % size]

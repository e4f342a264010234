"""Sources made of others: some rows of one, or several as one."""

import bisect
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from dinov2.data.source import EncodedSample, Source
from dinov2.utils.seeding import sample_rng

_STREAM = 1 << 34  # of the draw of tiles; others of the same key belong to tiles of slides, augmentation and masks


class DerivedSource(ABC):
    """A source each of whose rows is a row of another one; see `dinov2.data.source.Source`."""

    group_rows: np.ndarray

    @abstractmethod
    def _stored(self, group: int, rows: Sequence[int]) -> tuple[Source, int, list[int]]:
        """Find some rows of a row group: their source, and row group and rows in it."""

    def read(self, group: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the slide name and stored bytes of some rows of a row group, in the order asked for."""
        source, group, rows = self._stored(group, rows)
        return source.read(group, rows)

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Turn a sample's bytes into uint8 (H, W, 3) RGB; raises DecodeError where they are no image."""
        source, group, (row,) = self._stored(sample.group, [sample.row])
        return source.decode(dataclasses.replace(sample, group=group, row=row))

    def describe(self, group: int, row: int | None = None) -> str:
        """Name a row group, or a row of it, for a message to the user."""
        source, group, rows = self._stored(group, [] if row is None else [row])
        return source.describe(group, *rows)

    def slides(self, group: int) -> list[str]:
        """Name the slide of every row of a row group."""
        source, own, rows = self._stored(group, range(self.group_rows[group]))
        names = source.slides(own) if rows else []
        return [names[row] for row in rows]


class SubsetSource(DerivedSource):
    """A source without some of its rows; row groups keep their numbers, and those of which nothing is left have 0 rows.

    Rows are numbered anew within each row group, so that an order visits the remaining ones only; messages give the
    stored row. The fingerprint depends on the source and on which rows remain, not on why.

    Args:
        whole: which row groups of the source remain whole, bool (G,).
        rows: of row groups that remain in part: the stored rows that do, ascending.
    """

    def __init__(self, source: Source, whole: np.ndarray, rows: Mapping[int, np.ndarray]) -> None:
        self._source, self.is_remote = source, source.is_remote
        groups = np.array(sorted(rows), np.int64)
        counts = np.array([len(rows[group]) for group in groups], np.int64)
        self.group_rows = np.where(whole, source.group_rows, 0)
        self.group_rows[groups] = counts
        self.num_rows = int(self.group_rows.sum())
        self.group_bytes = -(-source.group_bytes * self.group_rows // np.maximum(source.group_rows, 1))
        self._first = np.full(len(whole), -1)
        self._first[groups] = np.cumsum(counts) - counts
        kept = [np.asarray(rows[group], np.int32) for group in groups]
        self._rows = np.concatenate([np.empty(0, np.int32), *kept])
        digest = hashlib.blake2b(source.fingerprint.encode(), digest_size=16)
        digest.update(self.group_rows.astype("<i8").tobytes())
        digest.update(self._rows.astype("<i4").tobytes())
        self.fingerprint = digest.hexdigest()

    def _stored(self, group: int, rows: Sequence[int]) -> tuple[Source, int, list[int]]:
        first = self._first[group]
        return self._source, group, list(rows) if first < 0 else [int(self._rows[first + row]) for row in rows]


class MixedSource(DerivedSource):
    """Several sources as one; row groups are numbered through."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._parts = list(zip(first_groups([source.group_rows for source in sources]), sources, strict=True))
        self.group_rows = np.concatenate([source.group_rows for source in sources])
        self.group_bytes = np.concatenate([source.group_bytes for source in sources])
        self.num_rows = sum(source.num_rows for source in sources)
        self.is_remote = any(source.is_remote for source in sources)
        fingerprints = "\n".join(source.fingerprint for source in sources)
        self.fingerprint = hashlib.blake2b(fingerprints.encode(), digest_size=16).hexdigest()

    def _stored(self, group: int, rows: Sequence[int]) -> tuple[Source, int, list[int]]:
        first, source = self._parts[part_of(self._parts, group)]
        return source, group - first, list(rows)


def take_tiles(source: Source, count: int, seed: int) -> Source:
    """Some rows of a source, drawn uniformly without replacement; all of one that has no more than ``count``.

    The rows of a smaller count are among those of a larger one with the same seed.
    """
    if count >= source.num_rows:
        return source
    rows = np.sort(sample_rng(seed, 0, _STREAM).permutation(source.num_rows)[:count])
    ends = np.cumsum(source.group_rows)
    groups = np.searchsorted(ends, rows, side="right")
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    rows -= (ends - source.group_rows)[groups]
    parts = zip(groups[starts].tolist(), np.split(rows, starts[1:]), strict=True)
    return SubsetSource(source, np.zeros(len(ends), bool), dict(parts))


def make_source(sources: Sequence[Source]) -> Source:
    """Join datasets into one source; a single one stays as it is."""
    return sources[0] if len(sources) == 1 else MixedSource(sources)


def first_groups(group_rows: Sequence[np.ndarray]) -> list[int]:
    """First row group of each dataset, where those of several are numbered through."""
    return list(accumulate(map(len, group_rows[:-1]), initial=0))


def part_of(parts: Sequence[tuple[int, Any]], group: int) -> int:
    """Number of the part, of pairs that begin with their first row group, to which a row group belongs."""
    return bisect.bisect_right(parts, group, key=lambda part: part[0]) - 1

"""Sources made of others: some rows of one, or several as one."""

import bisect
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov2.data.source import EncodedSample, Source


class DerivedSource(ABC):
    """A source each of whose rows is a row of another one; see `dinov2.data.source.Source`."""

    unit_rows: np.ndarray

    @abstractmethod
    def _stored(self, unit: int, rows: Sequence[int]) -> tuple[Source, int, list[int]]:
        """Find some rows of a unit: their source, and unit and rows in it."""

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the slide name and stored bytes of some rows of a unit, in the order asked for."""
        source, unit, rows = self._stored(unit, rows)
        return source.read(unit, rows)

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Turn a sample's bytes into uint8 (H, W, 3) RGB; raises DecodeError where they are no image."""
        source, unit, (row,) = self._stored(sample.unit, [sample.row])
        return source.decode(dataclasses.replace(sample, unit=unit, row=row))

    def describe(self, unit: int, row: int | None = None) -> str:
        """Name a unit, or a row of it, for a message to the user."""
        source, unit, rows = self._stored(unit, [] if row is None else [row])
        return source.describe(unit, *rows)

    def slides(self, unit: int) -> list[str]:
        """Name the slide of every row of a unit."""
        source, own, rows = self._stored(unit, range(self.unit_rows[unit]))
        names = source.slides(own) if rows else []
        return [names[row] for row in rows]


class SubsetSource(DerivedSource):
    """A source without some of its rows; units keep their numbers, and those of which nothing is left have 0 rows.

    Rows are numbered anew within each unit, so that an order visits the remaining ones only; messages give the
    stored row. The fingerprint depends on the source and on which rows remain, not on why.

    Args:
        source: where the rows are.
        whole: which units remain whole, bool (U,).
        rows: of units that remain in part: the stored rows that do, ascending.
    """

    def __init__(self, source: Source, whole: np.ndarray, rows: Mapping[int, np.ndarray]) -> None:
        self._source, self.is_remote = source, source.is_remote
        units = np.array(sorted(rows), np.int64)
        counts = np.array([len(rows[unit]) for unit in units], np.int64)
        self.unit_rows = np.where(whole, source.unit_rows, 0)
        self.unit_rows[units] = counts
        self.num_rows = int(self.unit_rows.sum())
        self.unit_bytes = -(-source.unit_bytes * self.unit_rows // np.maximum(source.unit_rows, 1))
        self._first = np.full(len(whole), -1)
        self._first[units] = np.cumsum(counts) - counts
        kept = [np.asarray(rows[unit], np.int32) for unit in units]
        self._rows = np.concatenate([np.empty(0, np.int32), *kept])
        digest = hashlib.blake2b(source.fingerprint.encode(), digest_size=16)
        digest.update(self.unit_rows.astype("<i8").tobytes())
        digest.update(self._rows.astype("<i4").tobytes())
        self.fingerprint = digest.hexdigest()

    def _stored(self, unit: int, rows: Sequence[int]) -> tuple[Source, int, list[int]]:
        first = self._first[unit]
        return self._source, unit, list(rows) if first < 0 else [int(self._rows[first + row]) for row in rows]


class MixedSource(DerivedSource):
    """Several sources as one; units are numbered through."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._parts = list(zip(first_units([source.unit_rows for source in sources]), sources, strict=True))
        self.unit_rows = np.concatenate([source.unit_rows for source in sources])
        self.unit_bytes = np.concatenate([source.unit_bytes for source in sources])
        self.num_rows = sum(source.num_rows for source in sources)
        self.is_remote = any(source.is_remote for source in sources)
        fingerprints = "\n".join(source.fingerprint for source in sources)
        self.fingerprint = hashlib.blake2b(fingerprints.encode(), digest_size=16).hexdigest()

    def _stored(self, unit: int, rows: Sequence[int]) -> tuple[Source, int, list[int]]:
        first, source = self._parts[part_of(self._parts, unit)]
        return source, unit - first, list(rows)


def make_source(sources: Sequence[Source]) -> Source:
    """Join datasets into one source; a single one stays as it is."""
    return sources[0] if len(sources) == 1 else MixedSource(sources)


def first_units(unit_rows: Sequence[np.ndarray]) -> list[int]:
    """First unit of each dataset, where those of several are numbered through."""
    lengths = [len(rows) for rows in unit_rows]
    return [sum(lengths[:d]) for d in range(len(lengths))]


def part_of(parts: Sequence[tuple[int, Any]], unit: int) -> int:
    """Number of the part, of pairs that begin with their first unit, to which a unit belongs."""
    return bisect.bisect_right(parts, unit, key=lambda part: part[0]) - 1

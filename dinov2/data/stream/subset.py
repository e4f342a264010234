"""Some rows of a source, as a source of their own."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from dinov2.data.source import EncodedSample, Source


class SubsetSource:
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
        self._stored = np.concatenate([np.empty(0, np.int32), *kept])
        digest = hashlib.blake2b(source.fingerprint.encode(), digest_size=16)
        digest.update(self.unit_rows.astype("<i8").tobytes())
        digest.update(self._stored.astype("<i4").tobytes())
        self.fingerprint = digest.hexdigest()

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the slide name and stored bytes of some rows of a unit, in the order asked for."""
        return self._source.read(unit, [self._stored_row(unit, row) for row in rows])

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Turn a sample's bytes into uint8 (H, W, 3) RGB; raises DecodeError where they are no image."""
        row = self._stored_row(sample.unit, sample.row)
        return self._source.decode(sample if row == sample.row else dataclasses.replace(sample, row=row))

    def describe(self, unit: int, row: int | None = None) -> str:
        """Name a unit, or a row of it, for a message to the user."""
        return self._source.describe(unit, None if row is None else self._stored_row(unit, row))

    def slides(self, unit: int) -> list[str]:
        """Name the slide of every row of a unit."""
        if not self.unit_rows[unit]:
            return []
        names = self._source.slides(unit)
        return [names[self._stored_row(unit, row)] for row in range(self.unit_rows[unit])]

    def _stored_row(self, unit: int, row: int) -> int:
        first = self._first[unit]
        return int(row if first < 0 else self._stored[first + row])

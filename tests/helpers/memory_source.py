"""A source in memory whose rows say where they lie."""

from collections.abc import Collection, Sequence

import numpy as np

from dinov2.data.source import DecodeError, EncodedSample


class MemorySource:
    """Units given as the slide of each row; the bytes of a row are b"name:unit:row".

    `looked_up` and `reads` list the units that were asked for.
    """

    is_remote = False

    def __init__(
        self,
        units: Sequence[Sequence[str]],
        name: str = "tiles",
        damaged: Collection[tuple[int, int]] = (),
        row_bytes: int = 1000,
    ) -> None:
        self._units, self._name, self._damaged = units, name, damaged
        self.unit_rows = np.array([len(unit) for unit in units], np.int64)
        self.unit_bytes = self.unit_rows * row_bytes
        self.num_rows = int(self.unit_rows.sum())
        self.fingerprint = f"{name} {self.unit_rows.tolist()}"
        self.looked_up: list[int] = []
        self.reads: list[int] = []

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        self.reads.append(unit)
        return [(self._units[unit][row], b"%s:%d:%d" % (self._name.encode(), unit, row)) for row in rows]

    def decode(self, sample: EncodedSample) -> np.ndarray:
        assert sample.data == b"%s:%d:%d" % (self._name.encode(), sample.unit, sample.row)
        if (sample.unit, sample.row) in self._damaged:
            raise DecodeError("no image")
        return np.array([[[sample.unit, sample.row, 0]]], np.uint8)

    def describe(self, unit: int, row: int | None = None) -> str:
        place = f"unit {unit} of {self._name}"
        return place if row is None else f"row {row} of {place}"

    def slides(self, unit: int) -> list[str]:
        self.looked_up.append(unit)
        return list(self._units[unit])

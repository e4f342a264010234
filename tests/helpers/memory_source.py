"""A source in memory whose rows say where they lie."""

from collections.abc import Collection, Sequence

import numpy as np

from dinov2.data.source import DecodeError, EncodedSample


class MemorySource:
    """Row groups given as the slide of each row; the bytes of a row are b"name:row group:row".

    `looked_up` and `reads` list the row groups that were asked for.
    """

    is_remote = False

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        name: str = "tiles",
        corrupt: Collection[tuple[int, int]] = (),
        row_bytes: int = 1000,
    ) -> None:
        self._groups, self._name, self._corrupt = groups, name, corrupt
        self.group_rows = np.array([len(group) for group in groups], np.int64)
        self.group_bytes = self.group_rows * row_bytes
        self.num_rows = int(self.group_rows.sum())
        self.fingerprint = f"{name} {self.group_rows.tolist()}"
        self.looked_up: list[int] = []
        self.reads: list[int] = []

    def read(self, group: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        self.reads.append(group)
        return [(self._groups[group][row], b"%s:%d:%d" % (self._name.encode(), group, row)) for row in rows]

    def decode(self, sample: EncodedSample) -> np.ndarray:
        assert sample.data == b"%s:%d:%d" % (self._name.encode(), sample.group, sample.row)
        if (sample.group, sample.row) in self._corrupt:
            raise DecodeError("no image")
        return np.array([[[sample.group, sample.row, 0]]], np.uint8)

    def describe(self, group: int, row: int | None = None) -> str:
        location = f"row group {group} of {self._name}"
        return location if row is None else f"row {row} of {location}"

    def slides(self, group: int) -> list[str]:
        self.looked_up.append(group)
        return list(self._groups[group])

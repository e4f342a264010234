"""Rows of a Parquet dataset as parts of equal length, with the coordinates that it stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet.index import load_index
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import DecodeError, EncodedSample, Source
from dinov2.data.storage.base import RangedFile
from dinov2.data.storage.locate import open_storage
from dinov2.eval.datasets.images import UnreadableImage

_COPIED = ("x", "y", "level", "mpp", "tile_size")
_FETCHES = 8  # row groups at a time


class ParquetRows:
    """Rows of a Parquet dataset in stored order, a few thousand to a part.

    Args:
        dataset: see `dinov2.data.storage.locate.open_storage`.
        rows_per_part: rows of every part but the last.

    Raises:
        FileNotFoundError, OSError, ValueError: as `ParquetSource`.
    """

    kind = "parquet"

    def __init__(self, dataset: str, rows_per_part: int) -> None:
        self._storage = open_storage(dataset)
        with TemporaryDirectory() as folder:  # so that footers are read once
            sidecar = Path(folder, "index")
            index = load_index(self._storage, sidecar)
            self._source = ParquetSource.from_storage(self._storage, sidecar)
        self._shards, self._sizes = index["name"].to_pylist(), index["size"].to_pylist()
        self._shard_ends = np.cumsum([sum(rows) for rows in index["group_rows"].to_pylist()])
        self._unit_ends = np.cumsum(self._source.unit_rows)
        self._total, self._step = self._source.num_rows, rows_per_part
        self.fingerprint = self._source.fingerprint
        starts = range(0, self._total, rows_per_part)
        self.parts = [f"part-{number:06d}" for number in range(len(starts))]
        self.part_rows = [min(rows_per_part, self._total - start) for start in starts]

    def open(self, number: int) -> ParquetPart:
        """Fetch the stored images of a part, each row group once, and what is stored beside them.

        Raises:
            UnreadableImage: the columns of the coordinates are damaged.
            OSError: a shard cannot be read.
        """
        first = number * self._step
        stop = min(first + self._step, self._total)
        columns: dict[str, list[Any]] = {}
        for shard, begin, end in _pieces(self._shard_ends, first, stop):
            for name, values in self._stored(shard, begin, end).items():
                columns.setdefault(name, []).extend(values)
        with ThreadPoolExecutor(_FETCHES) as pool:
            fetched = list(pool.map(self._fetch, _pieces(self._unit_ends, first, stop)))
        samples = [sample for unit in fetched for sample in unit]
        columns["slide"] = [sample.slide for sample in samples]
        return ParquetPart(self._source, samples, columns)

    def _fetch(self, piece: tuple[int, int, int]) -> list[EncodedSample]:
        unit, begin, end = piece
        read = self._source.read(unit, range(begin, end))
        return [
            EncodedSample(0, unit, row, *stored) for row, stored in zip(range(begin, end), read, strict=True)
        ]

    def _stored(self, shard: int, begin: int, end: int) -> dict[str, list[Any]]:
        """A name for some rows of a shard, and their values in columns that tell places, null where there is none."""
        name, rows = self._shards[shard], end - begin
        found = {column: [None] * rows for column in _COPIED}
        found["name"] = [f"{name}:{row}" for row in range(begin, end)]
        try:
            file = pq.ParquetFile(RangedFile(self._storage, name, self._sizes[shard]))
            stored = set(file.schema_arrow.names)
            wanted = [
                column for column in (*_COPIED, *(["path"] if "jpeg" in stored else [])) if column in stored
            ]
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            groups = list(_pieces(np.cumsum(counts), begin, end))
            if wanted:
                table = file.read_row_groups([group for group, _, _ in groups], wanted)
                found |= table.slice(groups[0][1], rows).to_pydict()
        except pa.ArrowException as error:
            raise UnreadableImage(f"Shard '{self._storage.locate(name)}' cannot be read: {error}.") from error
        return found | {"name": found.pop("path", found["name"])}


class ParquetPart:
    """Some rows of a dataset, as stored; see `dinov2.eval.embed.inputs.OpenPart`."""

    def __init__(self, source: Source, samples: Sequence[EncodedSample], columns: dict[str, Any]) -> None:
        self._source, self._samples, self.columns = source, samples, columns
        self.about: dict[str, Any] = {"rows": f"{columns['name'][0]} to {columns['name'][-1]}"}

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """The row as it is stored."""
        return self._source.describe(self._samples[index].unit, self._samples[index].row)

    def read(self, index: int) -> np.ndarray:
        """Decode one row."""
        try:
            return self._source.decode(self._samples[index])
        except DecodeError as error:
            raise UnreadableImage(f"Image in {self.name(index)} cannot be read: {error}.") from error

    def close(self) -> None:
        """Nothing is held open."""


def _pieces(ends: np.ndarray, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Units, and which of their rows, that rows first to stop - 1 of all are; `ends` are the units' ends."""
    while first < stop:
        unit = int(np.searchsorted(ends, first, side="right"))
        start = int(ends[unit - 1]) if unit else 0
        end = min(stop, int(ends[unit]))
        yield unit, first - start, end - start
        first = end

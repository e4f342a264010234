"""A Parquet dataset, wherever it is stored, as a source of encoded rows."""

import math
import os
import re
import shlex
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet import footer
from dinov2.data.parquet.index import fingerprint, flatten, in_one, load_index
from dinov2.data.source import DecodeError, EncodedSample, Origin, as_origins, decode_image
from dinov2.data.storage.base import LocalStorage, RangedFile, Storage
from dinov2.data.storage.locate import open_storage

GROUP_ROWS = 64  # rows of a row group after repacking
OVERSIZED = 1 << 25  # bytes of images in a row group; 64 PNG tiles of 224 px take a fifth
_REPACK_SPEED = 1.0e8, 1.6e8  # bytes per second and core, of slow and fast machines
_BATCH_ROWS = 64  # that pyarrow decodes at a time; a whole oversized row group would take three times its size
_GAP = 1 << 18  # bytes between two column chunks that cost less than a second request
_WINDOW = 1 << 23  # bytes at a time of column chunks that are too long to be fetched whole
_FOOTERS_KEPT = 16  # of each process; matters for datasets of few large files, whose footers are long


class ParquetSource:
    """Rows of Parquet shards with a column of images, see `footer.image_column`; see `Source`.

    Row groups are numbered shard by shard. ``dataset`` is as for `open_storage`, or a storage; ``sidecar`` is where to
    keep the index for the next start, and ``image_column`` a further name of that column, see `load_index`.
    """

    def __init__(self, dataset: str | Storage, sidecar: Path | None = None, image_column: str = "") -> None:
        storage = open_storage(dataset) if isinstance(dataset, str) else dataset
        index = load_index(storage, sidecar, image_column)
        self.location, self.is_remote = storage.location, not isinstance(storage, LocalStorage)  # with a hub's commit
        self._storage, self._named = storage, image_column
        self._names, self._sizes = index["name"].to_pylist(), index["size"].to_pylist()
        self._footer_sizes, self._footers = index["footer_size"].to_pylist(), in_one(index["packed_footer"])
        self._raw_sizes, self._images = index["raw_size"].to_pylist(), index["image_column"].to_pylist()
        self._slide_columns = index["slide_column"].to_pylist()
        self._origin_columns = index["origin_columns"].to_pylist()
        # Where each shard's row groups and slides begin.
        first = (np.from_dlpack(in_one(index[name]).offsets)[:-1] for name in ("group_rows", "slides"))
        self._first_group, self._first_slide = first
        self._slides = in_one(index["slides"]).flatten()
        self._group_slide = flatten(index["group_slide"])
        self.group_rows, self.group_bytes = flatten(index["group_rows"]), flatten(index["group_bytes"])
        self.num_rows = int(self.group_rows.sum())
        self.fingerprint = fingerprint(index, self.group_rows)

    def read(self, group: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """As in `Source`; nulls, and rows that corruption hides, come as empty bytes."""
        slide, named, image = self._slide_and_image(group)
        if slide is not None:
            return [(slide, data) for data in self._columns(group, rows, [image])[0]]
        names, images = self._columns(group, rows, [named, image])
        return list(zip(_slide_names(names, image), images, strict=True))

    def slides(self, group: int) -> list[str]:
        """Name the slide of every row of a row group."""
        (slide, named, image), rows = self._slide_and_image(group), range(int(self.group_rows[group]))
        if slide is not None:
            return [slide] * len(rows)
        return _slide_names(self._columns(group, rows, [named])[0], image)

    def origins(self, group: int) -> list[Origin]:
        """Slide, and patient and site where the shard has such columns, of every row of a row group.

        Statistics tell what fills a row group by itself; otherwise the column is read, images never. Nulls, and rows
        that corruption hides, come as empty texts. ValueError if a column holds neither text nor whole numbers.
        """
        shard = self._find(group)[0]
        if not self._origin_columns[shard]:
            return as_origins(self.slides(group))
        leaves, stored = _origin_leaves(self, shard), self._row_group(group)
        slide, named, image = self._slide_and_image(group)
        only = {named: slide} | dict.fromkeys(footer.ORIGIN_COLUMNS, "")
        only |= {name: footer.only_value(stored.column(leaf)) for name, leaf in leaves.items()}
        unknown, rows = [name for name, value in only.items() if value is None], range(stored.num_rows)
        if not unknown:
            return [Origin(*only.values())] * len(rows)
        columns = {name: [value or ""] * len(rows) for name, value in only.items()}
        for name, values in zip(unknown, self._columns(group, rows, unknown), strict=True):
            columns[name] = _slide_names(values, image) if name == named else _texts(values)
        return as_origins(*columns.values())

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Turn stored bytes into uint8 (H, W, 3) RGB; see `decode_image`."""
        if not sample.data:
            raise DecodeError("nothing is stored there (a null, or a corrupt page of the shard)")
        return decode_image(sample.data, self._raw_sizes[self._find(sample.group)[0]])

    def describe(self, group: int, row: int | None = None) -> str:
        """Name a row group, or one of its rows, for a message to the user."""
        shard, number = self._find(group)
        named = f"row group {number} of shard '{self._storage.locate(self._names[shard])}'"
        return named if row is None else f"row {row} of {named}"

    def repack_advice(self) -> str:
        """See `repack_advice`."""
        return repack_advice(self._storage, self.group_rows, self.group_bytes, self._named)

    def _find(self, group: int) -> tuple[int, int]:
        """The shard of a row group, and its number there."""
        shard = int(np.searchsorted(self._first_group, group, side="right")) - 1
        return shard, int(group - self._first_group[shard])

    def _slide_and_image(self, group: int) -> tuple[str | None, str, str]:
        """The only slide of a row group, or None where its column must be read, that column, and that of images."""
        shard, number = self._find(group)[0], int(self._group_slide[group])
        slide = self._slides[int(self._first_slide[shard]) + number].as_py() if number >= 0 else None
        return slide, self._slide_columns[shard], self._images[shard]

    def _row_group(self, group: int) -> pq.RowGroupMetaData:
        shard, number = self._find(group)
        try:
            stored = _read_metadata(self, shard).row_group(number)
            changed = stored.num_rows != self.group_rows[group]
        except (footer.CorruptShard, IndexError):
            changed = True
        if changed:
            raise OSError(f"{self.describe(group)} is not what it was when the dataset was opened")
        return stored

    def _columns(self, group: int, rows: Sequence[int], columns: Sequence[str]) -> list[list[bytes]]:
        """Read some rows of one column or a few, with one request where the columns lie close together."""
        (shard, number), stored = self._find(group), self._row_group(group)
        chunks = (stored.column(leaf) for leaf in range(stored.num_columns))
        extents = [footer.extent(chunk) for chunk in chunks if chunk.path_in_schema in columns]
        file = _ShardFile(self._storage, self._names[shard], self._sizes[shard], extents)
        options = {"buffer_size": file.buffer_size, "pre_buffer": False}
        with pq.ParquetFile(file, metadata=_read_metadata(self, shard), **options) as opened:
            return [_read_rows(file, opened, number, column, rows) for column in columns]


def repack_advice(storage: Storage, rows: np.ndarray, sizes: np.ndarray, named: str = "") -> str:
    """Say what oversized row groups cost, and the command that makes them small and how long it takes.

    Of a dataset's G row groups it takes the rows and the bytes of images, int64 (G,), and ``named`` is as for
    `ParquetSource`; empty if none is oversized.
    """
    oversized = (sizes > OVERSIZED) & (rows > GROUP_ROWS)
    if not oversized.any():
        return ""
    source = getattr(storage, "pattern", storage.location)
    name = source if isinstance(storage, LocalStorage) else re.split("[@?]", source.rpartition("/")[2])[0]
    target = re.split(r"[*?\[]", name)[0].rstrip("/").removesuffix(".parquet") or "tiles"
    cores = os.cpu_count() or 1
    slowest, fastest = (math.ceil(sizes.sum() / speed / cores / 60) for speed in _REPACK_SPEED)
    minutes = f"{fastest} to {slowest} minutes" if fastest < slowest else f"{slowest} min"
    held = f"row groups hold up to {sizes[oversized].max() / 1e6:.0f} MB of images, and each is fetched and held whole"
    option = f" --image-column {shlex.quote(named)}" if named else ""
    command = f"python -m dinov2.data.repack {shlex.quote(source)} {shlex.quote(target + '-repacked')}{option}"
    return f"{held}; {command} rewrites them to {GROUP_ROWS} rows in about {minutes} on {cores} cores"


@lru_cache(_FOOTERS_KEPT)
def _read_metadata(source: ParquetSource, shard: int) -> pq.FileMetaData:
    packed = source._footers[shard].as_py()
    if packed is not None:
        return footer.parse_footer(zlib.decompress(packed))
    name, length = source._names[shard], source._footer_sizes[shard]
    return footer.parse_footer(source._storage.read_range(name, source._sizes[shard] - length, length))


@lru_cache(_FOOTERS_KEPT)
def _origin_leaves(source: ParquetSource, shard: int) -> dict[str, int]:
    """Number of each of a shard's columns of patients and sites; ValueError where one is of another type."""
    schema = _read_metadata(source, shard).schema
    path, fields = source._storage.locate(source._names[shard]), schema.to_arrow_schema()
    for name in source._origin_columns[shard]:
        if not pa.types.is_integer(fields.field(name).type):
            footer.require_type(path, fields.field(name), "string")
    paths = [schema.column(leaf).path for leaf in range(len(schema))]
    return {name: paths.index(name) for name in source._origin_columns[shard]}


def _slide_names(values: Iterable[bytes], image: str) -> list[str]:
    return [footer.slide_of(text, image) for text in _texts(values)]


def _texts(values: Iterable[bytes]) -> list[str]:
    return [value.decode(errors="replace") for value in values]


class _ShardFile(RangedFile):
    """A shard as pyarrow sees it while one row group is read.

    What is needed is fetched here and beforehand: pyarrow's own `pre_buffer` fetches in threads of its own, of which
    there are fewer than readers and whose pauses cannot be interrupted. Column chunks that are too long for that are
    read in windows. Corruption is told from a storage that fails, both of which pyarrow reports as OSError.
    """

    def __init__(self, storage: Storage, name: str, size: int, extents: Sequence[tuple[int, int]]) -> None:
        super().__init__(storage, name, size)
        self.failure: OSError | None = None
        spans = sorted((start, start + length) for start, length in extents)
        if spans[-1][0] - spans[0][1] <= _GAP:
            spans = [(spans[0][0], max(end for _, end in spans))]
        short = [(start, end - start) for start, end in spans if end - start <= OVERSIZED]
        self._spans = [(start, memoryview(storage.read_range(name, start, length))) for start, length in short]
        self.buffer_size = _WINDOW if len(short) < len(spans) else 0

    def read(self, size: int = -1) -> bytes | memoryview:
        """Give the next bytes, without a copy where they were fetched before."""
        for start, data in self._spans:
            first = self._position - start
            if size >= 0 and first >= 0 and first + size <= len(data):
                self._position += size
                return data[first : first + size]
        return super().read(size)

    def readinto(self, buffer: memoryview) -> int:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.failure = error
            raise


def _read_rows(file: _ShardFile, opened: pq.ParquetFile, group: int, column: str, rows: Sequence[int]) -> list[bytes]:
    """Decode some rows of a column of a row group; nulls, and rows that corruption hides, come as empty bytes."""
    found, first = dict.fromkeys(rows, b""), 0
    try:
        for batch in opened.iter_batches(_BATCH_ROWS, [group], [column], use_threads=False):
            values = footer.image_values(batch, column)
            values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
            if pa.types.is_integer(values.type):
                values = values.cast(pa.string())
            if not pa.types.is_binary(values.type):
                values = values.cast(pa.large_binary())  # text need not be UTF-8
            for row in found.keys() & range(first, first + len(batch)):
                found[row] = values[row - first].as_py() or b""
            first += len(batch)
    except (pa.ArrowException, OSError, MemoryError):
        if file.failure:
            raise file.failure from None
    else:
        if first != opened.metadata.row_group(group).num_rows:  # a wrong count shifts rows unnoticed
            return [b""] * len(rows)
    return [found[row] for row in rows]

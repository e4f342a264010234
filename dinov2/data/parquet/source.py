"""A Parquet dataset, wherever it is stored, as a source of encoded rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet.chunk_bytes import takes
from dinov2.data.parquet.footer import SLIDE_COLUMN, slide_of
from dinov2.data.parquet.giant import GiantChunk, GiantReader
from dinov2.data.parquet.index import fingerprint, first_items, flatten, in_one, load_index
from dinov2.data.parquet.pages import Column, read_rows
from dinov2.data.source import DecodeError, EncodedSample, decode_image
from dinov2.data.storage.base import LocalStorage, RangedFile, Storage
from dinov2.data.storage.locate import open_storage

_BATCH_ROWS = 64  # that pyarrow decodes at a time; a whole giant row group would take three times its size
_CUT_ROWS = 64  # of a unit of a giant row group, as many as repacking gives
_GIANT_ROWS = 4 * _CUT_ROWS  # groups up to this many rows mix well enough whole ...
_GIANT_BYTES = 1 << 25  # ... and up to this size are read at once without much memory


class ParquetSource:
    """Rows of Parquet shards, in the published (`image_bytes`) or the nanopath (`jpeg`) schema.

    One unit is one row group; units are numbered shard by shard. Giant row groups of local files are cut into
    units of 64 rows. Holds no open file and no lock, so it may be forked, pickled and used from several threads.

    Attributes:
        place: The dataset as a path or URL, with the commit where there is one.

    Args:
        dataset: A folder (searched with its subfolders), a glob, one Parquet file, a URL or a hub dataset.
        sidecar: Where to keep the index for the next start; None reads all footers every time.
        revision: Branch, tag or commit of a hub dataset; empty takes the newest.
        attempts: How often a remote read is tried.

    Raises:
        FileNotFoundError: If there is no shard.
        OSError: If a shard cannot be read.
        ValueError: If a shard has the wrong schema, no shard can be read or all are empty.
    """

    def __init__(
        self, dataset: str, sidecar: Path | None = None, revision: str = "", attempts: int = 8
    ) -> None:
        self._open(open_storage(dataset, revision, attempts), sidecar)

    @classmethod
    def from_storage(cls, storage: Storage, sidecar: Path | None = None) -> "ParquetSource":
        """Open the dataset of a storage."""
        source = cls.__new__(cls)
        source._open(storage, sidecar)
        return source

    def _open(self, storage: Storage, sidecar: Path | None) -> None:
        index = load_index(storage, sidecar)
        self.place, self.is_remote = storage.place, not isinstance(storage, LocalStorage)
        self._storage, self._giants = storage, GiantReader()
        self._names, self._sizes = index["name"].to_pylist(), index["size"].to_pylist()
        self._raw_sizes, self._images = index["raw_size"].to_pylist(), index["image_column"].to_pylist()
        self._columns = {kind: _columns(index, kind) for kind in ("image", "slide")}
        self._starts = {kind: flatten(index[f"{kind}_start"]) for kind in ("image", "slide")}
        self._lengths = {kind: flatten(index[f"{kind}_length"]) for kind in ("image", "slide")}
        self._first_group, self._first_slide = first_items(index["group_rows"]), first_items(index["slides"])
        self._slides = in_one(index["slides"]).flatten()
        self._group_slide = flatten(index["group_slide"])
        self._cut(flatten(index["group_rows"]), flatten(index["group_bytes"]))
        self.num_rows = int(self.unit_rows.sum())
        self.fingerprint = fingerprint(index, self.unit_rows)

    def _cut(self, rows: np.ndarray, sizes: np.ndarray) -> None:
        """Make units of the row groups."""
        self._group_rows, self.unit_rows, self.unit_bytes = rows, rows, sizes
        giant = np.flatnonzero((sizes > _GIANT_BYTES) & (rows > _GIANT_ROWS) & (not self.is_remote))
        pieces = np.ones_like(rows)
        pieces[giant] = -(-rows[giant] // _CUT_ROWS)
        self._first_unit = np.cumsum(pieces) - pieces
        if len(giant):
            self.unit_rows = np.repeat(np.where(pieces > 1, _CUT_ROWS, rows), pieces)
            last = self._first_unit[giant] + pieces[giant] - 1
            self.unit_rows[last] = rows[giant] - (pieces[giant] - 1) * _CUT_ROWS
            group = np.repeat(np.arange(len(rows)), pieces)
            self.unit_bytes = -(-sizes[group] * self.unit_rows // np.maximum(rows, 1)[group])

    def _find(self, unit: int) -> tuple[int, int, int]:
        """Find the shard and the row group of a unit, and where in it the unit begins."""
        group = int(np.searchsorted(self._first_unit, unit, side="right")) - 1
        shard = int(np.searchsorted(self._first_group, group, side="right")) - 1
        return shard, group, (int(unit) - int(self._first_unit[group])) * _CUT_ROWS

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the slide name and stored bytes of some rows of a unit, in the order asked for.

        Nulls, and rows that damage hides, come as empty bytes.

        Raises:
            OSError: If the shard cannot be read, or is shorter than it was.
        """
        slide = self._known_slide(unit)
        if slide is not None:
            return [(slide, image) for image in self._values(unit, rows, ["image"])[0]]
        images, names = self._values(unit, rows, ["image", "slide"])
        return list(zip(self._slide_names(unit, names), images, strict=True))

    def slides(self, unit: int) -> list[str]:
        """Name the slide of every row of a unit, without reading images."""
        slide, count = self._known_slide(unit), int(self.unit_rows[unit])
        if slide is not None:
            return [slide] * count
        return self._slide_names(unit, self._values(unit, range(count), ["slide"])[0])

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Decode to uint8 (H, W, 3) RGB; raises DecodeError where the bytes are no image."""
        if not sample.data:
            raise DecodeError("nothing is stored there (a null, or a damaged page of the shard)")
        return decode_image(sample.data, self._raw_sizes[self._find(sample.unit)[0]])

    def describe(self, unit: int, row: int | None = None) -> str:
        """Name a unit, or one of its rows as it is stored, for a message to the user."""
        shard, group, first = self._find(unit)
        path = self._storage.locate(self._names[shard])
        named = f"row group {group - self._first_group[shard]} of shard '{path}'"
        if row is not None:
            return f"row {first + row} of {named}"
        rows = int(self.unit_rows[unit])
        return named if rows == self._group_rows[group] else f"rows {first} to {first + rows - 1} of {named}"

    def _known_slide(self, unit: int) -> str | None:
        shard, group, _ = self._find(unit)
        number = int(self._group_slide[group])
        return self._slides[int(self._first_slide[shard]) + number].as_py() if number >= 0 else None

    def _slide_names(self, unit: int, values: list[bytes]) -> list[str]:
        image = self._images[self._find(unit)[0]]
        return [slide_of(value.decode(errors="replace"), image) for value in values]

    def _values(self, unit: int, rows: Sequence[int], kinds: list[str]) -> list[list[bytes]]:
        """Read some rows of the image or slide columns."""
        shard, group, first = self._find(unit)
        name, num_rows = self._names[shard], int(self._group_rows[group])
        rows = [first + row for row in rows]
        columns = {kind: self._columns[kind][shard] for kind in kinds}
        extents = {
            kind: (int(self._starts[kind][group]), int(self._lengths[kind][group]))
            for kind in kinds
            if columns[kind]
        }
        found = {kind: self._read_by_arrow(shard, group, kind, rows) for kind in kinds if not columns[kind]}
        if self.unit_rows[unit] < num_rows:
            for kind, (start, length) in extents.items():
                chunk = GiantChunk(self._storage.locate(name), start, length, num_rows, columns[kind])
                found[kind] = self._giants.read_rows(chunk, rows)
        else:
            for kind, take in takes(self._storage, name, extents).items():
                found[kind] = read_rows(take, extents[kind][1], num_rows, rows, columns[kind])
        return [found[kind] for kind in kinds]

    def _read_by_arrow(self, shard: int, group: int, kind: str, rows: list[int]) -> list[bytes]:
        """Read rows of a column with encodings of which `parquet_pages` knows nothing."""
        column = self._images[shard] if kind == "image" else SLIDE_COLUMN[self._images[shard]]
        file = _WatchedFile(self._storage, self._names[shard], self._sizes[shard])
        found, first = dict.fromkeys(rows, b""), 0
        try:
            with pq.ParquetFile(file, pre_buffer=False) as opened:
                number = int(group - self._first_group[shard])
                for batch in opened.iter_batches(_BATCH_ROWS, [number], [column], use_threads=False):
                    for row in found.keys() & range(first, first + len(batch)):
                        value = batch[0][row - first].as_py() or b""
                        found[row] = value.encode() if isinstance(value, str) else value
                    first += len(batch)
                    if first > max(rows):
                        break
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            if file.failure:
                raise file.failure from None
        return [found[row] for row in rows]


class _WatchedFile(RangedFile):
    """Tells a storage that fails from damage, both of which pyarrow reports as OSError."""

    failure: OSError | None = None

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer as far as the file goes and return how far that is."""
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.failure = error
            raise


def _columns(index: pa.Table, kind: str) -> list[Column | None]:
    stored = zip(index[f"{kind}_codec"].to_pylist(), index[f"{kind}_optional"].to_pylist(), strict=True)
    known: dict[tuple[str, bool], Column] = {}  # one object for each of the few ways
    return [known.setdefault(how, Column(*how)) if how[0] else None for how in stored]

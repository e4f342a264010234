"""A local Parquet dataset as a source of encoded rows."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dinov2.data.decode import decode_image
from dinov2.data.parquet_index import SLIDE_COLUMN, fingerprint, flatten, load_index
from dinov2.data.sample import EncodedSample

_BATCH_ROWS = 64  # rows decoded at a time; a whole giant row group would take three times its size


class ParquetSource:
    """Rows of local Parquet shards, in the published (`image_bytes`) or the nanopath (`jpeg`) schema.

    One unit is one row group; units are numbered shard by shard. Holds no open file and no lock, so it may be
    forked, pickled and used from several threads.

    Args:
        pattern: A folder (searched with its subfolders), a glob or one Parquet file.
        sidecar: Where to keep the index for the next start; None reads all footers every time.

    Raises:
        FileNotFoundError: If there is no shard.
        ValueError: If a shard has the wrong schema, no shard can be read or all are empty.
    """

    def __init__(self, pattern: str, sidecar: Path | None = None) -> None:
        self._root, index = load_index(pattern, sidecar)
        self.fingerprint = fingerprint(index)
        self._names = index["name"].to_pylist()
        self._image_columns = index["image_column"].to_pylist()
        self._raw_sizes = index["raw_size"].to_pylist()
        groups = pc.list_value_length(index["group_rows"]).to_numpy()
        self._shard = np.repeat(np.arange(len(groups)), groups)
        self._first_unit = np.cumsum(groups) - groups
        self.unit_rows = flatten(index["group_rows"])
        self.unit_bytes = flatten(index["group_bytes"])
        self.num_rows = int(self.unit_rows.sum())

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the slide name and stored bytes of some rows of a unit, in the order asked for.

        Raises:
            ValueError: If the row group cannot be read, though the footer could.
        """
        shard = self._shard[unit]
        image, fallback = self._image_columns[shard], self._names[shard]  # most shards are one slide
        named = SLIDE_COLUMN[image]
        wanted, found, first = set(rows), {}, 0
        try:
            with pq.ParquetFile(self._path(shard), pre_buffer=False) as file:
                group = unit - self._first_unit[shard]
                for batch in file.iter_batches(_BATCH_ROWS, [group], [image, named], use_threads=False):
                    images = batch[image]
                    slides = batch[named] if named in batch.schema.names else None
                    for row in wanted.intersection(range(first, first + len(batch))):
                        slide = _slide(slides[row - first].as_py(), image) if slides is not None else fallback
                        found[row] = slide, images[row - first].as_py() or b""
                    first += len(batch)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.describe(unit)} cannot be read ({reason}); restore the shard") from error
        return [found[row] for row in rows]

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Decode to uint8 (H, W, 3) RGB; raises DecodeError where the bytes are no image."""
        return decode_image(sample.data, self._raw_sizes[self._shard[sample.unit]])

    def describe(self, unit: int) -> str:
        """Name a unit for a message to the user."""
        shard = self._shard[unit]
        return f"row group {unit - self._first_unit[shard]} of shard '{self._path(shard)}'"

    def _path(self, shard: int) -> str:
        return os.path.join(self._root, self._names[shard])


def _slide(name: str | None, image_column: str) -> str:
    """The published schema names the slide itself, nanopath's a tile below it: slide/x_y_level.jpg."""
    name = name or ""
    return name.rpartition("/")[0] if image_column == "jpeg" else name

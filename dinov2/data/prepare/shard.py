"""Parquet shards of the published schema: row groups of 64, a name only when whole."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.prepare.cut import IMAGE_COLUMN, REASON, ROWS_AT_ONCE, Cutting, Patches, cut_patches
from dinov2.utils.files import commit, unfinished

ROWS_PER_GROUP = 64
SCHEMA = pa.schema(
    [
        ("task_id", pa.string()),
        ("slide_path", pa.string()),
        ("x", pa.int32()),
        ("y", pa.int32()),
        ("level", pa.int32()),
        ("tile_size", pa.int32()),
        ("level_downsample", pa.float32()),
        ("image_dtype", pa.string()),
        (IMAGE_COLUMN, pa.binary()),
        ("slide_id", pa.string()),
        ("mpp", pa.float32()),  # of the patch, null when unknown
        ("mpp_source", pa.string()),
        ("read_size", pa.int32()),  # px of the level that became tile_size px
        ("tissue_frac", pa.float32()),
    ]
)


@dataclass(frozen=True)
class ShardJob:
    """One shard to write, its key-values, its patches and how to cut them."""

    shard: Path
    metadata: dict[str, str]
    patches: Patches
    cutting: Cutting


def build_shard(job: ShardJob) -> list[dict[str, Any]]:
    """Write one shard, unless no patch can be read, and return the failures, which the shard also keeps.

    Raises:
        OSError: if the shard cannot be written.
    """
    with new_shard(job.shard, job.metadata) as writer:
        for rows in cut_patches(job.patches, job.cutting, ROWS_AT_ONCE):
            for row in rows:
                writer.add(row)
    return writer.failures


class ShardWriter:
    """Collects rows into row groups, and the failures among them into the footer."""

    def __init__(self, writer: pq.ParquetWriter, task_id: str) -> None:
        self._writer, self._task_id = writer, task_id
        self._waiting: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []  # slide_path, x, y, level and reason of the rows without an image
        self.num_rows = 0  # of those with one

    def add(self, row: dict[str, Any]) -> None:
        """Append a row without `task_id`, or note why there is none."""
        if row.get(REASON) is not None:
            self.failures.append({name: row[name] for name in ("slide_path", "x", "y", "level", REASON)})
            return
        self.num_rows += 1
        self._waiting.append(row | {"task_id": self._task_id})
        if len(self._waiting) == ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait as a row group."""
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, SCHEMA))
        self._waiting = []


@contextmanager
def new_shard(shard: Path, metadata: dict[str, str]) -> Iterator[ShardWriter]:
    """Write `shard`, which appears when the block ends well and holds at least one row."""
    plain = [name for name in SCHEMA.names if name != IMAGE_COLUMN]
    options = {"compression": "none", "use_dictionary": plain, "write_statistics": plain}
    with unfinished(shard) as partial:
        with pq.ParquetWriter(partial, SCHEMA.with_metadata(metadata), **options) as writer:
            rows = ShardWriter(writer, shard.stem)
            yield rows
            rows.flush()
            writer.add_key_value_metadata({"failures": json.dumps(rows.failures)})
        if rows.num_rows:
            commit(partial, shard)

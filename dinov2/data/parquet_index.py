"""Which shards and row groups a Parquet dataset has, known without opening a single data page.

The index is one Arrow table with a row per shard and a list item per row group, kept as a Parquet file (the
sidecar) so that later starts need no footers. It holds where column chunks lie, so that reading needs none.
"""

import hashlib
import json
import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dinov2.data.parquet_footer import SLIDE_COLUMN as SLIDE_COLUMN
from dinov2.data.parquet_footer import read_footer
from dinov2.data.storage import Storage, StoredFile

logger = logging.getLogger(__name__)

_PER_GROUP = pa.list_(pa.int64())
_LISTING = pa.schema([("name", pa.string()), ("size", pa.int64()), ("version", pa.string())])
_SCHEMA = pa.schema(
    [
        *_LISTING,
        ("error", pa.string()),  # why the footer cannot be read; null where it can
        ("footer", pa.string()),  # digest of its bytes
        ("raw_size", pa.int32()),  # tile side in pixels where images are raw, else 0
        ("image_column", pa.string()),
        ("image_codec", pa.string()),  # null where only pyarrow can read the column; so for slides
        ("image_optional", pa.bool_()),
        ("slide_codec", pa.string()),
        ("slide_optional", pa.bool_()),
        ("slides", pa.list_(pa.string())),  # that fill row groups by themselves
        ("group_rows", _PER_GROUP),
        ("group_bytes", _PER_GROUP),  # of the image column, uncompressed
        ("image_start", _PER_GROUP),  # of the column chunk in the file
        ("image_length", _PER_GROUP),
        ("slide_start", _PER_GROUP),
        ("slide_length", _PER_GROUP),
        ("group_slide", _PER_GROUP),  # number in `slides`; -1 where the column must be read
    ]
)
_NO_GROUPS = {field.name: [] for field in _SCHEMA if pa.types.is_list(field.type)}
_FORMAT = {b"format": b"dinov2 shard index 2"}
_PINNED = re.compile("@[0-9a-f]{40}(/|$)")  # in a place: a commit, whose files never change
_FOOTER_THREADS = 32
_REPORT_EVERY = 10.0  # seconds


def load_index(storage: Storage, sidecar: Path | None = None) -> pa.Table:
    """Index a dataset, from the sidecar if the listing, or the commit that the place names, is still the same.

    Args:
        storage: Where the shards are.
        sidecar: Where the index is kept between runs (in the run's output folder); None keeps nothing. With
            several processes, let one write it before the others call.

    Returns:
        One row per shard, sorted by name (`_SCHEMA`).

    Raises:
        FileNotFoundError: If there is no shard.
        OSError: If a shard cannot be read.
        ValueError: If a shard has the wrong schema, no shard can be read or all are empty.
    """
    kept = _load_sidecar(sidecar) if sidecar else None
    place = storage.place.encode()
    if kept is None or not _PINNED.search(storage.place) or kept.schema.metadata.get(b"place") != place:
        files = storage.list_files()
        listing = pa.Table.from_pylist([file._asdict() for file in files], schema=_LISTING)
        if kept is None or not kept.select(_LISTING.names).equals(listing):
            records = _read_footers(storage, files)
            kept = pa.Table.from_pylist(records, _SCHEMA.with_metadata(_FORMAT | {b"place": place}))
            _refuse_unusable(storage.place, kept)
            if sidecar:
                _write_sidecar(sidecar, kept)
    dropped = kept.select(["name", "error"]).filter(kept["error"].is_valid()).to_pylist()
    if dropped:
        named = "; ".join(f"{shard['name']} ({shard['error']})" for shard in dropped)
        logger.warning("left out %d of %d shards with unreadable footers: %s", len(dropped), len(kept), named)
    return kept


def fingerprint(index: pa.Table, unit_rows: np.ndarray) -> str:
    """Digest of all that the sample order depends on: shard names, sizes, footers, which are left out, units.

    Places, modification times and versions are not part of it, so a dataset that was moved or copied still
    resumes; a shard that was rewritten, added, removed or damaged does not.
    """
    shards = index.select(["name", "size", "footer"]).to_pydict()  # a left out shard has no footer digest
    digest = hashlib.blake2b(json.dumps(shards).encode(), digest_size=16)
    digest.update(unit_rows.astype("<i8").tobytes())
    return digest.hexdigest()


def flatten(column: pa.ChunkedArray) -> np.ndarray:
    """Join a column of integer lists, one per shard, into one int64 array with a value per row group."""
    return np.from_dlpack(column.combine_chunks().flatten())  # other ways out of Arrow import pandas


def lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Count the items of each shard's list, int64 (shards,)."""
    return np.from_dlpack(pc.list_value_length(column.combine_chunks())).astype(np.int64)


def _read_footers(storage: Storage, files: list[StoredFile]) -> list[dict[str, Any]]:
    records, reported = [], time.monotonic()
    pool = ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="dinov2-index")
    try:
        for file, footer in zip(files, pool.map(lambda file: read_footer(storage, file), files), strict=True):
            records.append(_NO_GROUPS | file._asdict() | footer)
            if time.monotonic() - reported > _REPORT_EVERY:
                reported = time.monotonic()
                logger.info("indexed %d of %d shards of '%s'", len(records), len(files), storage.place)
    finally:
        pool.shutdown(cancel_futures=True)
    return records


def _refuse_unusable(place: str, index: pa.Table) -> None:
    errors = index["error"].drop_null().to_pylist()
    if len(errors) == len(index):
        raise ValueError(
            f"none of the {len(index)} Parquet files of dataset '{place}' has a readable footer "
            f"({errors[0]}); at least one is expected"
        )
    if not flatten(index["group_rows"]).any():
        raise ValueError(f"dataset '{place}' holds 0 rows in {len(index)} shards; at least 1 is expected")


def _load_sidecar(sidecar: Path) -> pa.Table | None:
    try:
        if not sidecar.is_file():
            return None
        with pq.ParquetFile(sidecar) as file:
            index = file.read()
    except (pa.ArrowException, OSError):
        return None
    known = index.schema.equals(_SCHEMA) and _FORMAT.items() <= (index.schema.metadata or {}).items()
    return index if known else None


def _write_sidecar(sidecar: Path, index: pa.Table) -> None:
    beside = sidecar.with_name(f"{sidecar.name}.{os.getpid()}.tmp")
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(index, beside, compression="zstd")
            os.replace(beside, sidecar)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the index of the dataset is not kept for the next start (%s)", error)

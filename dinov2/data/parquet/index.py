"""The index of a Parquet dataset: its shards and row groups, known without opening a single data page.

It is one Arrow table with a row per shard and a list item per row group, kept as an Arrow file (the sidecar; a
Parquet file takes several times as long to read) so that later starts need no footers.
"""

import hashlib
import json
import logging
import re
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dinov2.data.parquet.footer import ORIGIN_COLUMNS, THREADS, CorruptShard, NoImages, describe_shard, read_footer
from dinov2.data.storage.base import LocalStorage, Storage, StoredFile
from dinov2.data.storage.sidecar import load_sidecar, write_sidecar
from dinov2.utils.secrets import public_text

logger = logging.getLogger(__name__)
_PER_GROUP = pa.list_(pa.int64())
_LISTING = pa.schema([("name", pa.string()), ("size", pa.int64()), ("version", pa.string())])
_SCHEMA = pa.schema([
    *_LISTING,
    ("error", pa.string()),  # why the file is left out; null where it is not
    ("footer", pa.string()), ("footer_size", pa.int64()),  # digest of its bytes, and how many
    ("packed_footer", pa.binary()),  # the bytes, by zlib; null for local files, where they are at hand
    ("raw_size", pa.int32()),  # tile side in pixels where images are raw, else 0
    ("image_column", pa.string()),  # its path; empty where a file is no shard
    ("slide_column", pa.string()),  # null where there is none
    ("origin_columns", pa.list_(pa.string())),  # those of `ORIGIN_COLUMNS` that hold anything
    ("slides", pa.list_(pa.string())),  # that fill row groups by themselves
    ("group_rows", _PER_GROUP), ("group_bytes", _PER_GROUP),  # of the image column, uncompressed
    ("group_slide", _PER_GROUP),  # number in `slides`; -1 where the column must be read
])  # fmt: skip
_NO_GROUPS = {field.name: [] for field in _SCHEMA if pa.types.is_list(field.type)}
_FORMAT = {b"format": b"dinov2 shard index 5"}
_PINNED = re.compile("@[0-9a-f]{40}(/|$)")  # in a location: a commit, whose files never change
_REPORT_EVERY = 10.0  # seconds


def load_index(storage: Storage, sidecar: Path | None = None, image_column: str = "") -> pa.Table:
    """Index a dataset, from the sidecar if the listing, or the commit that the location names, is still the same.

    The sidecar keeps it between runs; None keeps nothing. With several processes, let one write it before the others
    call. ``image_column`` is a name that images may have besides the known ones; files without any are left out. Gives
    one row per file, sorted by name (`_SCHEMA`); OSError if a shard cannot be read or there is none, ValueError if one
    has the wrong schema, no footer is readable, no file has images or all shards are empty.
    """
    kept = load_sidecar(sidecar, _SCHEMA, _FORMAT) if sidecar else None
    location = {b"location": public_text(storage.location).encode()}
    named = {b"image_column": image_column.encode()}
    if kept is not None and not named.items() <= kept.schema.metadata.items():
        kept = None
    if kept is None or not _PINNED.search(storage.location) or not location.items() <= kept.schema.metadata.items():
        files = storage.list_files()
        listing = pa.Table.from_pylist([file._asdict() for file in files], schema=_LISTING)
        if kept is None or not kept.select(_LISTING.names).equals(listing):
            kept = _build(storage, files, image_column).replace_schema_metadata(_FORMAT | location | named)
            if sidecar:
                write_sidecar(sidecar, kept)
    dropped = kept.select(["name", "error", "image_column"]).filter(kept["error"].is_valid()).to_pylist()
    if foreign := [file["name"] for file in dropped if file["image_column"] == ""]:
        logger.warning("left out %d of %d files, which hold no images: %s", len(foreign), len(kept), ", ".join(foreign))
    if dropped := [file for file in dropped if file["image_column"] is None]:
        named = "; ".join(f"{shard['name']} ({shard['error']})" for shard in dropped)
        logger.warning("left out %d of %d shards with unreadable footers: %s", len(dropped), len(kept), named)
    return kept


def fingerprint(index: pa.Table, group_rows: np.ndarray) -> str:
    """Digest of all that the sample order depends on: shard names, sizes, footers, which are left out, row groups.

    Locations, modification times and versions are not part of it, so a dataset that was moved or copied still
    resumes; one of which a shard was rewritten, added, removed or corrupted does not.
    """
    images = index["image_column"].to_pylist()
    kept = [number for number, image in enumerate(images) if image != ""]  # without what is no shard
    shards = index.select(["name", "size", "footer"]).take(kept).to_pydict()  # a left out shard has no footer digest
    digest = hashlib.blake2b(json.dumps(shards).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(group_rows, "<i8"))
    return digest.hexdigest()


def flatten(column: pa.ChunkedArray) -> np.ndarray:
    """Join a column of integer lists, one per shard, into one int64 array with a value per row group."""
    return np.from_dlpack(in_one(column).flatten())  # other ways out of Arrow import pandas


def in_one(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, copied only where it is in several."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _build(storage: Storage, files: list[StoredFile], image_column: str) -> pa.Table:
    def describe(file: StoredFile) -> dict[str, Any]:
        try:
            footer = read_footer(storage, file)
            shard = describe_shard(storage, file, footer, image_column)
        except CorruptShard as error:
            return _NO_GROUPS | file._asdict() | {"error": str(error)}
        except NoImages as error:
            return _NO_GROUPS | file._asdict() | {"error": str(error), "image_column": ""}
        slides = list(dict.fromkeys(name for name in shard.slides if name is not None))
        numbers = {name: number for number, name in enumerate(slides)} | {None: -1}
        packed = None if isinstance(storage, LocalStorage) else zlib.compress(footer.data)
        record = {"footer": footer.digest, "footer_size": len(footer.data), "packed_footer": packed, "slides": slides}
        record |= {"raw_size": shard.raw_size, "group_rows": shard.rows}
        record |= {"image_column": shard.image, "slide_column": shard.slide}
        record["origin_columns"] = [name for name in ORIGIN_COLUMNS if shard.columns.get(name, "null") != "null"]
        record |= {"group_bytes": shard.plain_sizes, "group_slide": [numbers[name] for name in shard.slides]}
        return file._asdict() | record

    records, reported = [], time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for record in pool.map(describe, files):
            records.append(record)
            if time.monotonic() - reported > _REPORT_EVERY:
                reported = time.monotonic()
                logger.info("indexed %d of %d shards of '%s'", len(records), len(files), storage.location)
    index = pa.Table.from_pylist(records, _SCHEMA)
    errors = index["error"].drop_null().to_pylist()
    if len(errors) == len(index):
        if foreign := [record["error"] for record in records if record.get("image_column") == ""]:
            raise ValueError(foreign[0])
        none = f"none of the {len(index)} Parquet files of dataset '{storage.location}' has a readable footer"
        raise ValueError(f"{none} ({errors[0]}); at least one is expected")
    if not flatten(index["group_rows"]).any():
        raise ValueError(f"dataset '{storage.location}' holds 0 rows in {len(index)} shards; at least 1 is expected")
    return index

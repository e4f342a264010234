"""The index of a collection of images: its files, and in those that are containers every image.

It is one Arrow table with a row per file and a list item per image, kept in a sidecar as that of Parquet shards is. Of
loose files, each of them an image, the listing is all there is to know, and nothing is kept.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from dinov2.data.images.container import Container, Member, as_columns
from dinov2.data.storage.base import LocalStorage, Storage, StoredFile
from dinov2.data.storage.retry import RemoteError
from dinov2.data.storage.sidecar import load_sidecar, write_sidecar

logger = logging.getLogger(__name__)

_LISTING = pa.schema([("name", pa.large_binary()), ("size", pa.int64()), ("version", pa.string())])
_MEMBERS = {name: pa.large_binary() if name == "name" else pa.int64() for name in Member._fields}
SCHEMA = pa.schema([
    *_LISTING,
    ("error", pa.string()),  # why the file is left out, or where it is cut short; null where it is whole
    *((f"member_{name}", pa.large_list(kind)) for name, kind in _MEMBERS.items()),
])  # fmt: skip
_FORMAT = {b"format": b"dinov2 image index 1"}
_THREADS = 16  # that index containers
_REPORT_EVERY = 10.0  # seconds


def load_index(
    storage: Storage,
    container: Container | None,
    files: Sequence[StoredFile],
    sidecar: Path | None = None,
    options: str = "",
) -> pa.Table:
    """Index a collection: one row per file, in their order; those that cannot be read are logged and left out.

    Containers whose name, size and version are those of the sidecar are not read again; ``options`` tells apart what
    else decides over their contents. ValueError if no file holds an image.
    """
    listing = _listing(files)
    if container is None:
        return listing
    metadata = _FORMAT | {b"type": f"{type(container).__name__} {options}".encode()}
    kept = load_sidecar(sidecar, SCHEMA, metadata) if sidecar else None
    if kept is not None and kept.select(_LISTING.names).equals(listing):
        index = kept
    else:
        index = _build(storage, container, files, listing, kept).replace_schema_metadata(metadata)
        if sidecar:
            write_sidecar(sidecar, index)
    faulty = index.select(["name", "error"]).filter(index["error"].is_valid()).to_pylist()
    if faulty:
        named = "; ".join(f"{row['name'].decode(errors='replace')} ({row['error']})" for row in faulty)
        words = "%d of %d %s files are unreadable or cut short, and what is lost of them is left out: %s"
        logger.warning(words, len(faulty), len(files), container.files.what, named)
    if not any(len(chunk.flatten()) for chunk in index["member_size"].chunks):
        reason = f" ({faulty[0]['error']})" if faulty else ""
        found = f"none of the {len(files)} {container.files.what} files of dataset '{storage.location}' holds an image"
        raise ValueError(f"{found}{reason}; at least one is expected")
    return index


def _listing(files: Sequence[StoredFile]) -> pa.Table:
    names = pa.array([file.name.encode(errors="surrogateescape") for file in files], pa.large_binary())
    columns = [names, pa.array([file.size for file in files], pa.int64()), pa.array([file.version for file in files])]
    return pa.table(columns, schema=_LISTING)


def _build(
    storage: Storage, container: Container, files: Sequence[StoredFile], listing: pa.Table, kept: pa.Table | None
) -> pa.Table:
    """Index those files that an earlier index does not know as they are, and take the others from it."""
    rows = [] if kept is None else kept.select(_LISTING.names).to_pylist()
    known: dict[tuple[Any, ...], int] = {tuple(row.values()): number for number, row in enumerate(rows)}

    def describe(job: tuple[int, StoredFile]) -> pa.Table:
        number, file = job
        before = known.get(tuple(column[number].as_py() for column in listing.columns))
        if before is not None:
            return kept.slice(before, 1)
        members, error = [], None
        try:
            members, error = container.contents(storage, file)
        except RemoteError:
            raise
        except (ValueError, OSError) as raised:
            error = " ".join(str(raised).split())
        columns = as_columns(members)
        lists = [
            pa.LargeListArray.from_arrays(pa.array([0, len(members)], pa.int64()), columns[name]) for name in _MEMBERS
        ]
        return pa.table(
            [*listing.slice(number, 1).columns, pa.array([error or None], pa.string()), *lists], schema=SCHEMA
        )

    tables, reported = [], time.monotonic()
    with ThreadPoolExecutor(1 if isinstance(storage, LocalStorage) else _THREADS) as pool:
        for table in pool.map(describe, enumerate(files)):
            tables.append(table.replace_schema_metadata(None))
            if time.monotonic() - reported > _REPORT_EVERY:
                reported = time.monotonic()
                logger.info("indexed %d of %d files of '%s'", len(tables), len(files), storage.location)
    return pa.concat_tables(tables).combine_chunks()

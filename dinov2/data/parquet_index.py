"""Which shards and row groups a local Parquet dataset has, known without opening a single data page.

The index is one Arrow table with a row per shard, kept as a Parquet file (the sidecar) so that later starts
need no footers.
"""

import glob
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

SLIDE_COLUMN = {"image_bytes": "slide_path", "jpeg": "path"}  # image column: column that names the slide
_STAT = pa.schema([("name", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64())])
_SCHEMA = pa.schema(
    [
        *_STAT,
        ("error", pa.string()),  # why the footer cannot be read; null where it can
        ("image_column", pa.string()),
        ("raw_size", pa.int32()),  # tile side in pixels where images are raw, else 0
        ("group_rows", pa.list_(pa.int64())),
        ("group_bytes", pa.list_(pa.int64())),  # of the image column, uncompressed
    ],
    metadata={"format": "dinov2 shard index 1"},
)
_FOOTER_THREADS = 16


def find_shards(pattern: str) -> tuple[str, list[str]]:
    """List the Parquet files of a folder (with its subfolders), a glob or one file; hidden ones are left out.

    Returns:
        A folder and the sorted names of the files relative to it.

    Raises:
        FileNotFoundError: If there is no such place, or no Parquet file in it.
    """
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        root, inside = path, "**/*.parquet"
    elif os.path.isfile(path):
        root, inside = os.path.dirname(path), glob.escape(os.path.basename(path))
    elif glob.has_magic(path):
        root = next(str(parent) for parent in Path(path).parents if not glob.has_magic(str(parent)))
        inside = os.path.relpath(path, root)
    else:
        raise FileNotFoundError(
            f"dataset '{pattern}' does not exist; give a folder of .parquet files, a glob or one file"
        )
    found = glob.iglob(inside, root_dir=root or ".", recursive=True)
    names = sorted(name for name in found if os.path.isfile(os.path.join(root, name)))
    if not names:
        raise FileNotFoundError(f"dataset '{pattern}' holds no Parquet file; at least one is expected")
    return root, names


def load_index(pattern: str, sidecar: Path | None = None) -> tuple[str, pa.Table]:
    """Index a local dataset, from the sidecar if sizes and modification times still match it.

    Args:
        pattern: Folder, glob or file.
        sidecar: Where the index is kept between runs (in the run's output folder); None keeps nothing. With
            several processes, let one write it before the others call.

    Returns:
        The folder that shard names are relative to, and the index (one row per shard, `_SCHEMA`).

    Raises:
        FileNotFoundError: If there is no shard.
        ValueError: If a shard has the wrong schema, no shard can be read or all are empty.
    """
    root, names = find_shards(pattern)
    paths = [os.path.join(root, name) for name in names]
    stats = [os.stat(path) for path in paths]
    sizes, times = [stat.st_size for stat in stats], [stat.st_mtime_ns for stat in stats]
    listing = pa.table([names, sizes, times], schema=_STAT)
    index = _load_sidecar(sidecar, listing) if sidecar else None
    if index is None:
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            footers = list(pool.map(_read_footer, paths))
        records = [stat | footer for stat, footer in zip(listing.to_pylist(), footers, strict=True)]
        index = pa.Table.from_pylist(records, schema=_SCHEMA)
        _refuse_unusable(pattern, index)
        if sidecar:
            _write_sidecar(sidecar, index)
    dropped = index.filter(index["error"].is_valid()).to_pylist()
    if dropped:
        named = "; ".join(f"{shard['name']} ({shard['error']})" for shard in dropped)
        logger.warning(
            "left out %d of %d shards with unreadable footers: %s", len(dropped), len(index), named
        )
    return root, index


def fingerprint(index: pa.Table) -> str:
    """Digest of all that the sample order depends on: shard names, sizes, row groups, and which are left out.

    Absolute paths and modification times are not part of it, so a dataset that was moved or copied still
    resumes; a shard that was rewritten, added, removed or damaged does not.
    """
    shards = {
        "names": index["name"].to_pylist(),
        "sizes": index["size"].to_pylist(),
        "groups": pc.list_value_length(index["group_rows"]).to_pylist(),
        "readable": index["error"].is_null().to_pylist(),
    }
    digest = hashlib.blake2b(json.dumps(shards).encode(), digest_size=16)
    digest.update(flatten(index["group_rows"]).astype("<i8").tobytes())
    return digest.hexdigest()


def flatten(column: pa.ChunkedArray) -> np.ndarray:
    """Join a column of integer lists, one per shard, into one int64 array with a value per row group."""
    return np.asarray(column.combine_chunks().flatten(), np.int64)


def _read_footer(path: str) -> dict[str, Any]:
    nothing = {"image_column": None, "raw_size": 0, "group_rows": [], "group_bytes": []}
    with open(path, "rb") as file:
        try:
            footer = pq.read_metadata(file)
            schema = footer.schema.to_arrow_schema()
            names = schema.names
            metadata = {key.decode(): value.decode() for key, value in (footer.metadata or {}).items()}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None):  # the file system failed, which says nothing about the shard
                raise
            return {"error": " ".join(str(error).split())} | nothing
    image = next((name for name in SLIDE_COLUMN if name in names), None)
    if image is None:
        columns = ", ".join(names) or "none"
        raise ValueError(f"shard '{path}' has columns {columns}; 'image_bytes' or 'jpeg' is expected")
    kind = schema.field(image).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(f"column '{image}' of shard '{path}' has type {kind}; binary is expected")
    named = SLIDE_COLUMN[image]
    if named in names and not _is_text(schema.field(named).type):
        raise ValueError(
            f"column '{named}' of shard '{path}' has type {schema.field(named).type}; string is expected"
        )
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    leaf = footer.schema.names.index(image)
    return {
        "error": None,
        "image_column": image,
        "raw_size": _raw_size(path, metadata),
        "group_rows": [group.num_rows for group in groups],
        "group_bytes": [group.column(leaf).total_uncompressed_size for group in groups],
    }


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in is_text)


def _raw_size(path: str, metadata: dict[str, str]) -> int:
    """Read the tile side of a shard of raw pixels from its schema metadata; 0 for PNG and JPEG shards."""
    encoding = metadata.get("image_encoding", "png")
    if encoding in ("png", "jpeg"):
        return 0
    if encoding != "raw":
        raise ValueError(f"shard '{path}' has image_encoding '{encoding}'; png, jpeg or raw is expected")
    size, dtype = metadata.get("tile_size", ""), metadata.get("image_dtype", "uint8")
    if not size.isdecimal() or int(size) == 0 or dtype != "uint8":
        raise ValueError(
            f"raw shard '{path}' has tile_size '{size}' and image_dtype '{dtype}' in its schema metadata; "
            "a positive integer and uint8 are expected"
        )
    return int(size)


def _refuse_unusable(pattern: str, index: pa.Table) -> None:
    errors = index["error"].drop_null().to_pylist()
    if len(errors) == len(index):
        raise ValueError(
            f"none of the {len(index)} Parquet files of dataset '{pattern}' has a readable footer "
            f"({errors[0]}); at least one is expected"
        )
    if not any(map(any, index["group_rows"].to_pylist())):
        raise ValueError(f"dataset '{pattern}' holds 0 rows in {len(index)} shards; at least 1 is expected")


def _load_sidecar(sidecar: Path, listing: pa.Table) -> pa.Table | None:
    if not sidecar.is_file():
        return None
    try:
        index = pq.read_table(sidecar)
    except (pa.ArrowException, OSError):
        return None
    if index.schema.metadata != _SCHEMA.metadata:
        return None
    return index if index.select(_STAT.names).cast(_STAT).equals(listing) else None


def _write_sidecar(sidecar: Path, index: pa.Table) -> None:
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    beside = sidecar.with_name(f"{sidecar.name}.{os.getpid()}.tmp")
    pq.write_table(index, beside)
    os.replace(beside, sidecar)

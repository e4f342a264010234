"""Footers of many Parquet files, read by ranges and in parallel; what is damaged is named, not raised."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet_footer import SLIDE_COLUMN
from dinov2.data.retrying import RemoteError
from dinov2.data.storage import LocalStorage, RangedFile, Storage, StoredFile

_THREADS = 16
_FIRST_READ = 1 << 16  # most footers fit, so most files take one request
PAGE_BUFFER = 1 << 20  # pyarrow then reads page by page, not whole column chunks
_REMOTE_PAGE_BUFFER = 1 << 24  # the same in fewer requests

Summary = TypeVar("Summary")


class Footer(NamedTuple):
    """A file's metadata and the digest of the bytes that it was read from."""

    metadata: pq.FileMetaData
    digest: str


class Unreadable(NamedTuple):
    """A file that cannot be used, and why."""

    name: str
    reason: str


def read_footer(storage: Storage, file: StoredFile) -> Footer:
    """Read the footer of one file, in two requests at most.

    Raises:
        pa.ArrowException, OSError: It is damaged or cannot be had.
    """
    tail = _read_tail(storage, file, _FIRST_READ)
    length = int.from_bytes(tail[-8:-4], "little") + 8 if tail.endswith(b"PAR1") else len(tail)
    if length > file.size:
        raise OSError(f"a footer of {length} bytes is announced in a file of {file.size} bytes")
    if length > len(tail):
        tail = _read_tail(storage, file, length)
    metadata = pq.read_metadata(pa.BufferReader(tail))
    return Footer(metadata, hashlib.blake2b(tail[len(tail) - length :], digest_size=16).hexdigest())


def read_footers(
    storage: Storage, files: Sequence[StoredFile], summarise: Callable[[StoredFile, Footer], Summary]
) -> list[Summary | Unreadable]:
    """Read all footers by threads, under a progress bar, and keep a summary of each.

    Args:
        storage: where the files are.
        files: as listed by it.
        summarise: what to keep, so that not all footers stay in memory.

    Raises:
        RemoteError: A server does not answer.
    """
    from tqdm import tqdm

    def one(file: StoredFile) -> Summary | Unreadable:
        try:
            return summarise(file, read_footer(storage, file))
        except RemoteError:
            raise
        except (pa.ArrowException, OSError) as error:
            return Unreadable(file.name, in_one_line(error))

    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(one, files)
        return list(tqdm(results, total=len(files), desc="footers", unit="file", disable=None, leave=False))


def open_shard(storage: Storage, file: StoredFile) -> pq.ParquetFile:
    """Open a file so that pages, not row groups, are what is held in memory."""
    if isinstance(storage, LocalStorage):
        return pq.ParquetFile(storage.locate(file.name), pre_buffer=False, buffer_size=PAGE_BUFFER)
    ranged = RangedFile(storage, file.name, file.size)
    return pq.ParquetFile(ranged, pre_buffer=False, buffer_size=_REMOTE_PAGE_BUFFER)


def image_column(schema: pa.Schema) -> str:
    """Name the column that holds the images; ValueError where there is none or it is not binary."""
    name = next((name for name in SLIDE_COLUMN if name in schema.names), None)
    if name is None:
        columns = ", ".join(schema.names) or "none"
        raise ValueError(f"its columns are {columns}, but 'image_bytes' or 'jpeg' is expected")
    _require_type(schema, name, "binary")
    return name


def slide_column(schema: pa.Schema, image: str) -> str:
    """Name the column that tells the slide, "" where there is none; ValueError where it is not text."""
    name = SLIDE_COLUMN[image]
    if name not in schema.names or pa.types.is_null(schema.field(name).type):
        return ""
    _require_type(schema, name, "string")
    return name


def _require_type(schema: pa.Schema, name: str, wanted: str) -> None:
    kind = schema.field(name).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(inner) not in (wanted, f"large_{wanted}", f"{wanted}_view"):
        raise ValueError(f"its column '{name}' has type {kind}, but {wanted} is expected")


def in_one_line(error: Exception) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


def _read_tail(storage: Storage, file: StoredFile, length: int) -> bytes:
    length = min(length, file.size)
    return storage.read_range(file.name, file.size - length, length)

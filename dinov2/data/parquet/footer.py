"""What the footer of one Parquet shard says, and which of its columns are images and slides."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.storage.base import Storage, StoredFile

SLIDE_COLUMN = {"image_bytes": "slide_path", "jpeg": "path"}  # image column: column that names the slide
_THREADS = 32
_TAIL = 1 << 16  # bytes read from the end of a shard; a longer footer takes a second read
_TILE_SUFFIXES = (".jpg", ".jpeg", ".png")

Result = TypeVar("Result")


class DamagedFooter(Exception):
    """A file that has no readable footer, said in one line."""


class Footer(NamedTuple):
    """A file's metadata, their schema, and the digest of the bytes that they were read from."""

    metadata: pq.FileMetaData
    schema: pa.Schema
    digest: str


class Chunks(NamedTuple):
    """One column in G row groups: where it begins, its bytes, those before compression (int64), how it is stored."""

    starts: np.ndarray
    sizes: np.ndarray
    plain_sizes: np.ndarray
    encodings: list[frozenset[str]]
    codecs: list[str]
    has_dictionary: list[bool]
    has_page_index: list[bool]


class Shard(NamedTuple):
    """What the footer of a shard tells.

    Attributes:
        file: Its name and size.
        columns: Type of each column.
        image: Name of the image column.
        slide: Name of the column that tells the slide; None if there is none or it is all null.
        raw_size: Side in pixels of raw tiles, 0 for PNG and JPEG.
        rows: Rows of each row group, int64 (G,).
        images: The image column.
        names: The slide column; None if there is none.
        slides: The only slide of each row group; None where it holds several, or the footer does not tell.
    """

    file: StoredFile
    columns: dict[str, str]
    image: str
    slide: str | None
    raw_size: int
    rows: np.ndarray
    images: Chunks
    names: Chunks | None
    slides: list[str | None]


@contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedFooter(in_one_line(error)) from error


def for_each_file(files: Sequence[StoredFile], work: Callable[[StoredFile], Result]) -> Iterator[Result]:
    """Do something with each file, in parallel, and give the results in order; the first exception ends it."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="dinov2-footers")
    try:
        yield from pool.map(work, files)
    finally:
        pool.shutdown(cancel_futures=True)


def read_footer(storage: Storage, file: StoredFile) -> Footer:
    """Read the footer of one file, in two requests at most.

    Raises:
        DamagedFooter: If there is none that can be read.
        OSError: If the storage fails.
    """
    length = min(_TAIL, file.size)
    tail = storage.read_range(file.name, file.size - length, length) if length else b""
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if tail.endswith(b"PAR1") and length < needed <= file.size:
        tail = storage.read_range(file.name, file.size - needed, needed - length) + tail
    with _damage_told():
        metadata = pq.read_metadata(pa.BufferReader(tail))
        schema = metadata.schema.to_arrow_schema()
    return Footer(metadata, schema, hashlib.blake2b(tail[-needed:], digest_size=16).hexdigest())


@_damage_told()
def describe_shard(storage: Storage, file: StoredFile, footer: Footer) -> Shard:
    """Find the columns of a shard and what they hold.

    Raises:
        DamagedFooter: If the footer contradicts itself.
        ValueError: If columns are missing or have another type, or raw tiles have no size.
    """
    path, metadata = storage.locate(file.name), footer.metadata
    image = image_column(path, footer.schema)
    slide = slide_column(path, footer.schema, image)
    size = raw_size(path, metadata.metadata or {})
    leaves = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    names = [group.column(leaves.index(slide)) for group in groups] if slide else []
    # A shard without the column is one slide; nulls are of one that has no name.
    alone = "" if SLIDE_COLUMN[image] in leaves else file.name
    return Shard(
        file,
        {field.name: str(field.type) for field in footer.schema},
        image,
        slide,
        size,
        np.array([group.num_rows for group in groups], np.int64),
        _chunks([group.column(leaves.index(image)) for group in groups]),
        _chunks(names) if slide else None,
        [_single_slide(chunk, image) for chunk in names] if slide else [alone] * len(groups),
    )


def image_column(path: str, schema: pa.Schema) -> str:
    """Name the column that holds the images; ValueError where there is none or it is not binary."""
    image = next((name for name in SLIDE_COLUMN if name in schema.names), None)
    if image is None:
        columns = ", ".join(schema.names) or "none"
        raise ValueError(f"shard '{path}' has columns {columns}; 'image_bytes' or 'jpeg' is expected")
    _require_type(path, schema.field(image), "binary", ", an image file in each row")
    return image


def slide_column(path: str, schema: pa.Schema, image: str) -> str | None:
    """Name the column that tells the slide, None where there is none; ValueError where it is not text."""
    name = SLIDE_COLUMN[image]
    if name not in schema.names or pa.types.is_null(schema.field(name).type):
        return None
    _require_type(path, schema.field(name), "string")
    return name


def raw_size(path: str, metadata: dict[bytes, bytes]) -> int:
    """Read the tile side of a shard of raw pixels from its schema metadata; 0 for PNG and JPEG shards."""
    texts = {key: value.decode(errors="replace") for key, value in metadata.items()}
    encoding = texts.get(b"image_encoding", "png")
    if encoding in ("png", "jpeg"):
        return 0
    if encoding != "raw":
        raise ValueError(f"shard '{path}' has image_encoding '{encoding}'; png, jpeg or raw is expected")
    size, dtype = texts.get(b"tile_size", ""), texts.get(b"image_dtype", "uint8")
    if not size.isdecimal() or int(size) == 0 or dtype != "uint8":
        raise ValueError(
            f"raw shard '{path}' has tile_size '{size}' and image_dtype '{dtype}' in its schema metadata; "
            "a positive integer and uint8 are expected"
        )
    return int(size)


def slide_of(name: str, image: str) -> str:
    """The slide of a row: the name in the published schema, the folder of slide/x_y_level.jpg in nanopath's."""
    return name.rpartition("/")[0] if image == "jpeg" else name


def in_one_line(error: Exception) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


def _chunks(chunks: Sequence[pq.ColumnChunkMetaData]) -> Chunks:
    first_pages = [
        (c.dictionary_page_offset if c.has_dictionary_page else 0, c.data_page_offset) for c in chunks
    ]
    return Chunks(
        np.array([first if 0 < first < data else data for first, data in first_pages], np.int64),
        np.array([chunk.total_compressed_size for chunk in chunks], np.int64),
        np.array([chunk.total_uncompressed_size for chunk in chunks], np.int64),
        [frozenset(chunk.encodings) for chunk in chunks],
        [chunk.compression for chunk in chunks],
        [chunk.has_dictionary_page for chunk in chunks],
        [chunk.has_offset_index for chunk in chunks],
    )


def _require_type(path: str, field: pa.Field, wanted: str, meaning: str = "") -> None:
    inner = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if str(inner) not in (wanted, f"large_{wanted}", f"{wanted}_view"):
        raise ValueError(
            f"column '{field.name}' of shard '{path}' has type {field.type}; {wanted} is expected{meaning}"
        )


def _single_slide(column: pq.ColumnChunkMetaData, image: str) -> str | None:
    """Name the slide of a row group if the statistics of the column prove that there is one only."""
    known = column.statistics
    if not known or not known.has_min_max or not known.has_null_count or known.null_count:
        return None
    try:
        ends = known.min, known.max
    except UnicodeDecodeError:
        return None
    # Some writers shorten bounds, which may cut off a tile's name and part of its slide's.
    if image == "jpeg" and not all(end.lower().endswith(_TILE_SUFFIXES) for end in ends):
        return None
    first, last = (slide_of(end, image) for end in ends)
    return first if first == last else None

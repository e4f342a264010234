"""Footers of Parquet shards: their row groups, and which of their columns are images and slides."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dinov2.data.storage.base import LocalStorage, RangedFile, Storage, StoredFile
from dinov2.data.storage.retry import RemoteError

PUBLISHED, NANOPATH = "image_bytes", "jpeg"  # image columns that tell the two schemas
IMAGE_COLUMNS = (PUBLISHED, NANOPATH, "image", "bytes", "jpg", "png", "img_bytes")
SLIDE_COLUMNS = ("slide_path", "slide", "slide_id")
ORIGIN_COLUMNS = ("patient", "site")  # that tell it apart from the slide's name, where a shard has them
PAGE_BUFFER = 1 << 20  # pyarrow then reads page by page, not whole column chunks ...
_REMOTE_PAGE_BUFFER = 1 << 24  # ... and so over a network, in fewer requests
THREADS = 32  # that read footers
_TAIL = 1 << 16  # bytes read from the end of a shard; a longer footer takes a second read
_ENCODINGS = ("png", "jpeg", "jpg", "tiff", "tif", "webp", "bmp", "jp2", "jpeg2000")  # each row's bytes tell which
_TILE_SUFFIXES = (".jpg", ".jpeg", ".png")
Result = TypeVar("Result")


class CorruptShard(Exception):
    """A file of which the footer, or what was asked for, cannot be read; said in one line."""


class Unusable(NamedTuple):
    """A file that cannot be read, and why."""

    name: str
    reason: str


class WrongSchema(Unusable):
    """A readable file that training refuses, and why."""


class NoImages(ValueError):
    """A readable file has no column that could hold images, so that it is no shard."""


class Foreign(WrongSchema):
    """A readable file that is no shard, and why."""


class Footer(NamedTuple):
    """The last bytes of a file, their digest, and what they say."""

    data: bytes
    digest: str
    metadata: pq.FileMetaData
    schema: pa.Schema


class Shard(NamedTuple):
    """Contents of a shard with G row groups, by its footer."""

    file: StoredFile
    columns: dict[str, str]  # type of each
    image: str  # path of the image column: its name, or name.bytes in a struct
    slide: str | None  # name of the column that tells the slide; None if there is none or it is all null
    raw_size: int  # side in pixels of raw tiles, 0 for PNG and JPEG
    rows: np.ndarray  # of each row group, int64 (G,)
    slides: list[str | None]  # the only one of each row group; None where there are several or the footer is silent
    sizes: np.ndarray  # bytes of the images in each row group, int64 (G,) ...
    plain_sizes: np.ndarray  # ... and before compression
    encodings: Counter[str]  # of the images; row groups of each, as below
    codecs: Counter[str]
    with_dictionary: int
    with_page_index: int


def read_footer(storage: Storage, file: StoredFile) -> Footer:
    """Read the footer of one file, in two requests at most; CorruptShard if there is none, OSError by the storage."""
    length = min(_TAIL, file.size)
    tail = storage.read_range(file.name, file.size - length, length) if length else b""
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if tail.endswith(b"PAR1") and length < needed <= file.size:
        tail = storage.read_range(file.name, file.size - needed, needed - length) + tail
    data = tail[-needed:]
    metadata = parse_footer(data)
    with as_corruption():
        schema = metadata.schema.to_arrow_schema()
    return Footer(data, hashlib.blake2b(data, digest_size=16).hexdigest(), metadata, schema)


def read_footers(
    storage: Storage, files: Sequence[StoredFile], summarise: Callable[[StoredFile, Footer], Result]
) -> list[Result | Unusable]:
    """Read all footers by threads, under a progress bar, and keep a summary of each; not all fit into memory.

    A file that is corrupt, or of which `summarise` raises ValueError, is named in place of its summary.
    """
    from tqdm import tqdm

    def one(file: StoredFile) -> Result | Unusable:
        try:
            return summarise(file, read_footer(storage, file))
        except RemoteError:
            raise
        except (CorruptShard, OSError) as error:
            return Unusable(file.name, _in_one_line(error))
        except NoImages as error:
            return Foreign(file.name, _in_one_line(error))
        except ValueError as error:
            return WrongSchema(file.name, _in_one_line(error))

    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(one, files)
        return list(tqdm(results, total=len(files), desc="footers", unit="file", disable=None, leave=False))


def parse_footer(data: bytes) -> pq.FileMetaData:
    """Parse the last bytes of a file; CorruptShard if they are no footer."""
    with as_corruption():
        return pq.read_metadata(pa.BufferReader(data))


def describe_shard(storage: Storage, file: StoredFile, footer: Footer, named: str = "") -> Shard:
    """Find the columns of a shard; CorruptShard where its footer is wrong, ValueError where columns or types are.

    ``named`` is a name of the image column besides `IMAGE_COLUMNS`, see `image_column`.
    """
    path, metadata, schema = storage.locate(file.name), footer.metadata, footer.schema
    image = image_column(path, schema, named)
    slide = _slide_column(path, schema, image)
    raw_size = _raw_size(path, metadata.metadata or {})
    with as_corruption():
        leaves = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        images = [group.column(leaves.index(image)) for group in groups]
        names = [group.column(leaves.index(slide)) for group in groups] if slide else []
        column = image.removesuffix(".bytes")
        is_known = image != column and f"{column}.path" in leaves
        paths = [group.column(leaves.index(f"{column}.path")) for group in groups] if is_known else []
        paths = [path for path in paths if only_value(path) != ""]
    if paths and all(only_value(chunk) == "" for chunk in images):
        raise ValueError(
            f"shard '{path}' has paths of images in its column '{column}', and no images; shards that hold them are "
            "expected, or a CSV file of the paths"
        )
    with as_corruption():
        # A shard without the column is one slide; nulls are of one that has no name.
        nulls = (name for name in leaves if name in _slide_columns(image) and pa.types.is_null(schema.field(name).type))
        alone = "" if any(nulls) else file.name
        slides = [_single_slide(chunk, image) for chunk in names] if slide else [alone] * len(groups)
        for chunk in (*images, *names):
            start, length = extent(chunk)
            if chunk.num_values and length and not (4 <= start <= file.size - length and length > 0):
                raise CorruptShard(f"it places {length} bytes at {start}, but {file.size} are there")
    columns = {field.name: str(field.type) for field in schema}
    rows = np.array([group.num_rows for group in groups], np.int64)
    return Shard(
        *(file, columns, image, slide, raw_size, rows, slides),
        sizes=np.array([chunk.total_compressed_size for chunk in images], np.int64),
        plain_sizes=np.array([chunk.total_uncompressed_size for chunk in images], np.int64),
        encodings=Counter("+".join(sorted(set(chunk.encodings))) for chunk in images),
        codecs=Counter(chunk.compression for chunk in images),
        with_dictionary=sum(chunk.has_dictionary_page for chunk in images),
        with_page_index=sum(chunk.has_offset_index for chunk in images),
    )


def extent(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """First byte of a column chunk in its file, and its length."""
    first = chunk.dictionary_page_offset if chunk.has_dictionary_page else 0
    data = chunk.data_page_offset
    return (first if first and 0 < first < data else data), chunk.total_compressed_size


def image_column(path: str, schema: pa.Schema, named: str = "") -> str:
    """Path of the column that holds the images: ``named``, where a shard has it, or the first of `IMAGE_COLUMNS`.

    It is binary, or a struct whose field ``bytes`` is, as `datasets` has them. NoImages where nothing of the kind is
    there, ValueError where it has an unknown name, or one of the two published names and another type.
    """
    known = [name for name in dict.fromkeys((named, *IMAGE_COLUMNS)) if name in schema.names]
    for name in known:
        if schema.names.count(name) > 1:
            raise ValueError(f"shard '{path}' has two columns '{name}'; one is expected")
        if image := _image_path(schema.field(name)):
            return image
        if name in (named, PUBLISHED, NANOPATH):
            require_type(path, schema.field(name), "binary", ", an image file in each row")
    columns = [f"{field.name} ({field.type})" if field.name in known else field.name for field in schema]
    found = f"shard '{path}' has columns {', '.join(columns) or 'none'}"
    expected = f"a binary column of images ({', '.join(filter(None, (named, *IMAGE_COLUMNS)))}) is expected"
    if others := [field.name for field in schema if _image_path(field)]:
        raise ValueError(f"{found}; {expected}, or another's name as data.image_column, perhaps '{others[0]}'")
    raise NoImages(f"{found}; {expected}")


def image_values(table: pa.RecordBatch | pa.Table, image: str) -> pa.Array | pa.ChunkedArray:
    """The column with the path ``image``, which may lie in a struct."""
    if image in table.schema.names:
        return table[image]
    return pc.struct_field(table[image.rpartition(".")[0]], "bytes")


def slide_of(name: str, image: str) -> str:
    """The slide of a row: the name as it is stored, or the folder of slide/x_y_level.jpg in nanopath's schema."""
    return name.rpartition("/")[0] if image == NANOPATH else name


def _image_path(field: pa.Field) -> str:
    """Path of the images of a column of bytes; empty where it has none."""
    if _is_of(field.type, "binary"):
        return field.name
    inside = field.type.get_field_index("bytes") if pa.types.is_struct(field.type) else -1
    return f"{field.name}.bytes" if inside >= 0 and _is_of(field.type.field(inside).type, "binary") else ""


def _slide_columns(image: str) -> tuple[str, ...]:
    return ("path",) if image == NANOPATH else SLIDE_COLUMNS


def _slide_column(path: str, schema: pa.Schema, image: str) -> str | None:
    """Name of the column that tells the slide; None if there is none or it is all null."""
    for name in _slide_columns(image):
        if name in schema.names and not pa.types.is_null(schema.field(name).type):
            if name == _slide_columns(image)[0]:
                require_type(path, schema.field(name), "string")
            if _is_of(schema.field(name).type, "string"):
                return name
    return None


def open_shard(storage: Storage, file: StoredFile) -> pq.ParquetFile:
    """Open a file so that pages, not row groups, are what is held in memory."""
    local = isinstance(storage, LocalStorage)
    opened = storage.locate(file.name) if local else RangedFile(storage, file.name, file.size)
    return pq.ParquetFile(opened, pre_buffer=False, buffer_size=PAGE_BUFFER if local else _REMOTE_PAGE_BUFFER)


@contextmanager
def as_corruption() -> Iterator[None]:
    """Turn what pyarrow raises into CorruptShard, but not what a server does: that says nothing about the file."""
    try:
        yield
    except RemoteError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptShard(_in_one_line(error)) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _raw_size(path: str, metadata: dict[bytes, bytes]) -> int:
    """Read the tile side of a shard of raw pixels from its schema metadata; 0 for PNG and JPEG shards."""
    texts = {key: value.decode(errors="replace") for key, value in metadata.items()}
    encoding = texts.get(b"image_encoding", "png")
    if encoding.lower() in _ENCODINGS:
        return 0
    if encoding != "raw":
        raise ValueError(f"shard '{path}' has image_encoding '{encoding}'; {', '.join(_ENCODINGS)} or raw is expected")
    size, dtype = texts.get(b"tile_size", ""), texts.get(b"image_dtype", "uint8")
    if not size.isdecimal() or int(size) == 0 or dtype != "uint8":
        found = f"raw shard '{path}' has tile_size '{size}' and image_dtype '{dtype}' in its schema metadata"
        raise ValueError(f"{found}; a positive integer and uint8 are expected")
    return int(size)


def require_type(path: str, field: pa.Field, kind: str, meaning: str = "") -> None:
    """Raise ValueError where a column, dictionary-encoded or not, is not of a kind: string or binary."""
    if not _is_of(field.type, kind):
        raise ValueError(f"column '{field.name}' of shard '{path}' has type {field.type}; {kind} is expected{meaning}")


def _is_of(kind: pa.DataType, name: str) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(inner) in (name, f"large_{name}", f"{name}_view")


def only_value(column: pq.ColumnChunkMetaData) -> str | None:
    """The value of all rows of a column chunk as text, empty for nulls, if its statistics prove that there is one."""
    known = column.statistics
    if known and known.has_null_count and known.null_count == column.num_values:
        return ""
    ends = _bounds(column)
    return str(ends[0]) if ends and ends[0] == ends[1] else None


def _single_slide(column: pq.ColumnChunkMetaData, image: str) -> str | None:
    """Name the slide of a row group if the statistics of the column prove that there is one only."""
    ends = _bounds(column)
    # Some writers shorten bounds, which may cut off a tile's name and part of its slide's.
    if not ends or (image == NANOPATH and not all(end.lower().endswith(_TILE_SUFFIXES) for end in ends)):
        return None
    first, last = (slide_of(end, image) for end in ends)
    return first if first == last else None


def _bounds(column: pq.ColumnChunkMetaData) -> tuple[Any, Any] | None:
    """Lowest and highest value of a column chunk, if its statistics tell them and that there are no nulls."""
    known = column.statistics
    if not known or not known.has_min_max or not known.has_null_count or known.null_count:
        return None
    try:
        return known.min, known.max
    except UnicodeDecodeError:
        return None

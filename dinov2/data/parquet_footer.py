"""What the footer of one shard says about its columns and row groups."""

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet_pages import CODECS, ENCODINGS
from dinov2.data.storage import Storage, StoredFile

SLIDE_COLUMN = {"image_bytes": "slide_path", "jpeg": "path"}  # image column: column that names the slide
_TAIL = 1 << 16  # bytes read from the end of a shard; a longer footer takes a second read
_IS_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_TILE_SUFFIXES = (".jpg", ".jpeg", ".png")
_EXTENTS = ("group_rows", "image_start", "image_length", "slide_start", "slide_length")


def read_footer(storage: Storage, file: StoredFile) -> dict[str, Any]:
    """Describe a shard by its footer, as the index does; only by an "error" if the footer cannot be read.

    Raises:
        OSError: If the storage fails.
        ValueError: If columns are missing or have another type.
    """
    path = storage.locate(file.name)
    length = min(_TAIL, file.size)
    tail = storage.read_range(file.name, file.size - length, length) if length else b""
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if tail.endswith(b"PAR1") and length < needed <= file.size:
        tail = storage.read_range(file.name, file.size - needed, needed - length) + tail
    try:
        footer = pq.read_metadata(pa.BufferReader(tail))
        schema = footer.schema.to_arrow_schema()
        metadata = {key.decode(): value.decode() for key, value in (footer.metadata or {}).items()}
        image, named = _find_columns(path, schema)
        layout = _layout(footer, image, named, file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        return {"error": " ".join(str(error).split())}
    return {
        "footer": hashlib.blake2b(tail[-needed:], digest_size=16).hexdigest(),
        "raw_size": _raw_size(path, metadata),
        "image_column": image,
        **layout,
    }


def _find_columns(path: str, schema: pa.Schema) -> tuple[str, str | None]:
    """Name the image column, and the one that names slides unless there is none or it is all null."""
    image = next((name for name in SLIDE_COLUMN if name in schema.names), None)
    if image is None:
        columns = ", ".join(schema.names) or "none"
        raise ValueError(f"shard '{path}' has columns {columns}; 'image_bytes' or 'jpeg' is expected")
    kind = schema.field(image).type
    if not any(test(_unwrapped(kind)) for test in _IS_BINARY):
        raise ValueError(
            f"column '{image}' of shard '{path}' has type {kind}; binary is expected, an image file in each row"
        )
    named = SLIDE_COLUMN[image]
    if named not in schema.names:
        return image, None
    kind = schema.field(named).type
    if not pa.types.is_null(kind) and not any(test(_unwrapped(kind)) for test in _IS_TEXT):
        raise ValueError(f"column '{named}' of shard '{path}' has type {kind}; string is expected")
    return image, None if pa.types.is_null(kind) else named


def _unwrapped(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _layout(footer: pq.FileMetaData, image: str, named: str | None, file: StoredFile) -> dict[str, Any]:
    """Where the row groups of a shard are; ArrowInvalid if that is not within the file."""
    paths = [footer.schema.column(leaf).path for leaf in range(footer.num_columns)]
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    images = [group.column(paths.index(image)) for group in groups]
    layout = {
        "group_rows": [group.num_rows for group in groups],
        "group_bytes": [column.total_uncompressed_size for column in images],
        "slides": [file.name],  # most shards are one slide
        "group_slide": [0] * len(groups),
        "slide_start": [0] * len(groups),
        "slide_length": [0] * len(groups),
        **_chunks("image", footer.schema.column(paths.index(image)), images),
    }
    if named in paths:
        columns = [group.column(paths.index(named)) for group in groups]
        proven = [_single_slide(column, image) for column in columns]
        slides = list(dict.fromkeys(name for name in proven if name is not None))
        numbers = {name: number for number, name in enumerate(slides)} | {None: -1}
        layout |= {"slides": slides, "group_slide": [numbers[name] for name in proven]}
        layout |= _chunks("slide", footer.schema.column(paths.index(named)), columns)
    elif SLIDE_COLUMN[image] in paths:
        layout["slides"] = [""]
    for rows, *extents in zip(*(layout[key] for key in _EXTENTS), strict=True):
        for start, length in (extents[:2], extents[2:]):
            if rows and length and not 4 <= start <= start + length <= file.size:
                raise pa.ArrowInvalid(f"it places {length} bytes at {start}, but {file.size} are there")
    return layout


def _chunks(
    kind: str, leaf: pq.ColumnSchema, columns: list[pq.ColumnChunkMetaData]
) -> dict[str, str | bool | list[int] | None]:
    codecs = {column.compression for column in columns}
    flat = leaf.physical_type == "BYTE_ARRAY" and leaf.max_repetition_level == 0
    plain = all(ENCODINGS.issuperset(column.encodings) for column in columns)
    known = flat and leaf.max_definition_level <= 1 and plain and len(codecs) == 1 and codecs <= CODECS.keys()
    starts = [
        column.dictionary_page_offset
        if column.has_dictionary_page and 0 < column.dictionary_page_offset < column.data_page_offset
        else column.data_page_offset
        for column in columns
    ]
    return {
        f"{kind}_codec": codecs.pop() if known else None,
        f"{kind}_optional": leaf.max_definition_level > 0,
        f"{kind}_start": starts,
        f"{kind}_length": [column.total_compressed_size for column in columns],
    }


def _single_slide(column: pq.ColumnChunkMetaData, image: str) -> str | None:
    """Name the slide of a row group if the statistics of the column prove that there is one only."""
    known = column.statistics
    if not known or not known.has_min_max or not known.has_null_count or known.null_count:
        return None
    try:
        ends = known.min, known.max
    except UnicodeDecodeError:
        return None
    if image == "jpeg":
        # Some writers shorten bounds, which may cut off a tile's name and part of its slide's.
        if not all(name.lower().endswith(_TILE_SUFFIXES) for name in ends):
            return None
        ends = tuple(name.rpartition("/")[0] for name in ends)
    return ends[0] if ends[0] == ends[1] else None


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

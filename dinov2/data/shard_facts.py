"""What the footer of one Parquet shard says about its layout, its images and its slides."""

from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from dinov2.data.parquet_footer import SLIDE_COLUMN
from dinov2.data.shard_footers import Footer, image_column, slide_column
from dinov2.data.storage import StoredFile

_TILE_SUFFIXES = (".jpg", ".jpeg", ".png")


class WrongShard(NamedTuple):
    """A readable file that training refuses, and why."""

    name: str
    reason: str


class ShardFacts(NamedTuple):
    """One readable shard.

    Attributes:
        file: Its name and size.
        columns: Type of each column.
        image: Name of the image column.
        slide: Name of the column that tells the slide; empty if there is none and the shard is the slide.
        raw_size: Side in pixels of raw tiles, 0 for PNG and JPEG.
        rows: Of each row group, int64 (G,).
        sizes: Bytes of the images of each row group, encoded by Parquet and compressed, int64 (G,).
        plain_sizes: The same before compression, int64 (G,).
        encodings: Encodings of the image column in each row group, joined.
        codecs: Its compression in each row group.
        has_dictionary: Whether each row group keeps images in a dictionary page.
        has_page_index: Whether each row group has an offset index of its image pages.
        slides: The only slide of each row group; None where it holds several, or the footer does not tell.
    """

    file: StoredFile
    columns: dict[str, str]
    image: str
    slide: str
    raw_size: int
    rows: np.ndarray
    sizes: np.ndarray
    plain_sizes: np.ndarray
    encodings: list[str]
    codecs: list[str]
    has_dictionary: list[bool]
    has_page_index: list[bool]
    slides: list[str | None]


def shard_facts(file: StoredFile, footer: Footer) -> ShardFacts | WrongShard:
    """Summarise a footer."""
    metadata = footer.metadata
    schema = metadata.schema.to_arrow_schema()
    try:
        image = image_column(schema)
        slide = slide_column(schema, image)
        raw_size = _raw_size(metadata.metadata or {})
    except ValueError as error:
        return WrongShard(file.name, str(error))
    leaves = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(leaves.index(image)) for group in groups]
    if slide:
        slides = [_only_slide(group.column(leaves.index(slide)), image) for group in groups]
    else:
        slides = ["" if SLIDE_COLUMN[image] in leaves else file.name] * len(groups)
    return ShardFacts(
        file,
        {field.name: str(field.type) for field in schema},
        image,
        slide,
        raw_size,
        np.array([group.num_rows for group in groups], np.int64),
        np.array([chunk.total_compressed_size for chunk in chunks], np.int64),
        np.array([chunk.total_uncompressed_size for chunk in chunks], np.int64),
        ["+".join(sorted(set(chunk.encodings))) for chunk in chunks],
        [chunk.compression for chunk in chunks],
        [chunk.has_dictionary_page for chunk in chunks],
        [chunk.has_offset_index for chunk in chunks],
        slides,
    )


def slide_of(name: str | None, image: str) -> str:
    """Slide that a row belongs to: named by the published schema; the folder of a tile's path in nanopath's."""
    name = name or ""
    return name.rpartition("/")[0] if image == "jpeg" else name


def _only_slide(chunk: pq.ColumnChunkMetaData, image: str) -> str | None:
    """The slide if the smallest and the largest name of the column give the same one."""
    statistics = chunk.statistics
    if statistics is None or not statistics.has_min_max or statistics.null_count:
        return None
    ends = str(statistics.min), str(statistics.max)
    if image == "jpeg" and not all(end.lower().endswith(_TILE_SUFFIXES) for end in ends):
        return None  # some writers shorten the bounds, perhaps by a part of the slide's name
    first, last = (slide_of(end, image) for end in ends)
    return first if first == last else None


def _raw_size(metadata: dict[bytes, bytes]) -> int:
    encoding = metadata.get(b"image_encoding", b"png").decode(errors="replace")
    if encoding in ("png", "jpeg"):
        return 0
    size = metadata.get(b"tile_size", b"").decode(errors="replace")
    dtype = metadata.get(b"image_dtype", b"uint8").decode(errors="replace")
    if encoding != "raw" or not size.isdecimal() or int(size) == 0 or dtype != "uint8":
        raise ValueError(
            f"its metadata has image_encoding '{encoding}', tile_size '{size}' and image_dtype '{dtype}', but png "
            "or jpeg, or raw with a positive tile_size and uint8, is expected"
        )
    return int(size)

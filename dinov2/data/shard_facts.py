"""What a report on a dataset says about one Parquet shard."""

from typing import NamedTuple

import numpy as np

from dinov2.data.parquet_footer import Footer, describe_shard
from dinov2.data.storage import Storage, StoredFile


class ShardFacts(NamedTuple):
    """One readable shard.

    Attributes:
        file: Its name and size.
        columns: Type of each column.
        image: Name of the image column.
        slide: Name of the column that tells the slide, if there is one.
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
    slide: str | None
    raw_size: int
    rows: np.ndarray
    sizes: np.ndarray
    plain_sizes: np.ndarray
    encodings: list[str]
    codecs: list[str]
    has_dictionary: list[bool]
    has_page_index: list[bool]
    slides: list[str | None]


def shard_facts(storage: Storage, file: StoredFile, footer: Footer) -> ShardFacts:
    """Summarise a footer; raises as `describe_shard` does."""
    shard = describe_shard(storage, file, footer)
    return ShardFacts(
        file,
        {field.name: str(field.type) for field in footer.schema},
        shard.image,
        shard.slide,
        shard.raw_size,
        np.array(shard.rows, np.int64),
        np.array([chunk.total_compressed_size for chunk in shard.images], np.int64),
        np.array([chunk.total_uncompressed_size for chunk in shard.images], np.int64),
        ["+".join(sorted(set(chunk.encodings))) for chunk in shard.images],
        [chunk.compression for chunk in shard.images],
        [chunk.has_dictionary_page for chunk in shard.images],
        [chunk.has_offset_index for chunk in shard.images],
        shard.slides,
    )

"""Values of a flat BYTE_ARRAY column, cut straight out of the stored bytes of one column chunk.

pyarrow would want the footer again and build a table first; here one ranged read is enough, and damage costs
the rows of a page instead of the whole chunk. Data pages v1 and v2, PLAIN and dictionary encoding, and RLE
definition levels are understood.
"""

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dinov2.data.parquet.header import (
    DATA_PAGE,
    DATA_PAGE_V2,
    DICTIONARY_PAGE,
    DamagedPage,
    PageHeader,
    parse_page_header,
    varint,
)

PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
CODECS = {  # name in a footer: name of pyarrow's codec
    "UNCOMPRESSED": "",
    "SNAPPY": "snappy",
    "GZIP": "gzip",
    "BROTLI": "brotli",
    "ZSTD": "zstd",
    "LZ4": "lz4_raw",
}
ENCODINGS = frozenset({"PLAIN", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "RLE", "BIT_PACKED"})
# What decoding a page that is in memory may raise.
DAMAGE = (ValueError, IndexError, struct.error, pa.ArrowException, OSError, MemoryError)
_HEADER = 1 << 16  # bytes read for a header; longer ones hold statistics
_WIDEST = 32  # bits of a dictionary index
_LENGTH = struct.Struct("<I")

Take = Callable[[int, int], memoryview]  # position in the chunk, bytes
Cut = Callable[[int], bytes]  # copies the value of a number; empty for -1, a null, and where damage hides it


class Column(NamedTuple):
    """How a column is stored: its codec (a key of `CODECS`) and whether values may be null."""

    codec: str
    optional: bool


class Spans(NamedTuple):
    """Values within the bytes of a page: where each begins and ends."""

    data: memoryview
    bounds: list[tuple[int, int]]

    def cut(self, number: int) -> bytes:
        """Copy one value, as `Cut` does."""
        if not 0 <= number < len(self.bounds):
            return b""
        begin, end = self.bounds[number]
        return bytes(self.data[begin:end])


NOTHING = Spans(memoryview(b""), [])


def read_rows(take: Take, length: int, num_rows: int, rows: Sequence[int], column: Column) -> list[bytes]:
    """Read some rows of a column chunk; nulls, and rows that damage hides, come as empty bytes.

    Repeated values of a dictionary come as one object.

    Args:
        take: Gives bytes of the chunk.
        length: Bytes of the chunk.
        num_rows: Rows of its row group.
        rows: Which ones, in any order.
        column: How it is stored.
    """
    found = dict.fromkeys(rows, b"")
    order = sorted(found)
    dictionary, first = NOTHING.cut, 0
    try:
        for header in page_headers(take, length):
            here = order[bisect_left(order, first) : bisect_left(order, first + header.values)]
            if header.kind == DICTIONARY_PAGE:
                dictionary = cache(dictionary_spans(take(header.body, header.stored), header, column).cut)
            elif header.kind in (DATA_PAGE, DATA_PAGE_V2):
                if first + header.values > num_rows:
                    return [b""] * len(rows)
                if here:
                    local = [row - first for row in here]
                    values = page_rows(take(header.body, header.stored), header, local, column, dictionary)
                    found.update(zip(here, values, strict=True))
                first += header.values
    except DamagedPage:  # of the header: where the next page begins is unknown
        return [found[row] for row in rows]
    return [found[row] if first == num_rows else b"" for row in rows]  # a wrong count shifts rows unnoticed


def page_headers(take: Take, length: int) -> Iterator[PageHeader]:
    """Walk the headers of a chunk; DamagedPage where one is none or its page runs past the chunk."""
    position = 0
    while position < length:
        step = _HEADER
        while True:
            try:
                header = parse_page_header(take(position, min(step, length - position)), 0)
                break
            except IndexError:
                if position + step >= length:
                    raise DamagedPage("a page header is cut short") from None
                step *= 16
        header = header._replace(body=position + header.body)
        if header.end > length:
            raise DamagedPage("a page is longer than its column chunk")
        yield header
        position = header.end


def decompress(data: memoryview, size: int, codec: str) -> memoryview:
    """Undo a codec (a key of `CODECS`) on bytes that become `size` bytes."""
    if codec == "UNCOMPRESSED" or not size:
        return data[:size]
    return memoryview(pa.Codec(CODECS[codec]).decompress(data, size)).cast("B")


def open_page(body: memoryview, header: PageHeader, column: Column) -> tuple[memoryview, np.ndarray | None]:
    """Undo compression and split off the definition levels of a data page.

    Returns:
        The encoded values, and which rows have one: bool (rows,), or None if all do.
    """
    levels, data = body[: header.levels], body[header.levels :]
    if header.compressed:
        data = decompress(data, header.size - header.levels, column.codec)
    if not column.optional:
        return data, None
    if header.kind == DATA_PAGE:
        (size,) = _LENGTH.unpack_from(data)
        levels, data = data[4 : 4 + size], data[4 + size :]
    present = hybrid(levels, 1, header.values) == 1
    return data, None if present.all() else present


def ranks_of(rows: Sequence[int], present: np.ndarray | None) -> list[int]:
    """Number the stored values of some rows of a page; -1 for nulls."""
    if present is None:
        return list(rows)
    return np.where(present, np.cumsum(present) - 1, -1)[rows].tolist()


def plain_spans(data: memoryview, count: int) -> Spans:
    """Find the first `count` values of PLAIN encoding, as far as they lie within the data."""
    bounds: list[tuple[int, int]] = []
    position, last, length_at = 0, len(data) - 4, _LENGTH.unpack_from
    while position <= last and len(bounds) < count:
        begin = position + 4
        position = begin + length_at(data, position)[0]
        if position > len(data):
            break
        bounds.append((begin, position))
    return Spans(data, bounds)


def hybrid(data: memoryview, width: int, count: int) -> np.ndarray:
    """Decode the first `count` integers, int64 (count,), of the hybrid of run lengths and packed bits."""
    if width > _WIDEST:
        raise DamagedPage(f"an integer has {width} bits")
    values, filled, position = np.zeros(count, np.int64), 0, 0
    while width and filled < count:
        header, position = varint(data, position)
        if header & 1:
            end = position + (header >> 1) * width  # 8 integers take `width` bytes
            bits = np.unpackbits(np.frombuffer(data[position:end], np.uint8), bitorder="little")
            run = bits[: len(bits) // width * width].reshape(-1, width) @ (1 << np.arange(width))
            run = run[: count - filled]
            length = len(run)
        else:
            end = position + (width + 7) // 8
            length, run = header >> 1, int.from_bytes(data[position:end], "little")
        if not length or (end > len(data) and filled + length < count):
            raise DamagedPage("a run is empty")
        values[filled : filled + length] = run
        filled, position = filled + length, end
    return values


def index_values(data: memoryview, count: int) -> np.ndarray:
    """Decode the first `count` dictionary indices of a data page: their bits in a byte, then a hybrid."""
    return hybrid(data[1:], data[0], count) if count else np.zeros(0, np.int64)


def dictionary_spans(body: memoryview, header: PageHeader, column: Column) -> Spans:
    """Find the values of a dictionary page, none if it is damaged."""
    try:
        return plain_spans(decompress(body, header.size, column.codec), header.values)
    except DAMAGE:
        return NOTHING


def page_rows(
    body: memoryview, header: PageHeader, rows: Sequence[int], column: Column, dictionary: Cut
) -> list[bytes]:
    """Read some rows of a data page; nulls, and rows that damage hides, come as empty bytes."""
    try:
        data, present = open_page(body, header, column)
        ranks = ranks_of(rows, present)
        count = max(ranks) + 1
        if header.encoding == PLAIN:
            cut, numbers = plain_spans(data, count).cut, ranks
        elif header.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
            indices = index_values(data, count).tolist()
            cut, numbers = dictionary, [indices[rank] if rank >= 0 else -1 for rank in ranks]
        else:
            return [b""] * len(rows)
    except DAMAGE:
        return [b""] * len(rows)
    return [cut(number) for number in numbers]  # a dictionary may be read from a file, which may fail

"""Rows from the middle of a giant row group of a local file, without reading what lies around them.

A page of a row group that was written in one go may hold a hundred megabytes. Without compression a value is
read from where it lies. Snappy leaves images nearly as they are and codes each 64 KB apart, so that the blocks
around a value are enough. Other large pages are read whole.
"""

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from dinov2.data.parquet.header import (
    DATA_PAGE,
    DATA_PAGE_V2,
    DICTIONARY_PAGE,
    DamagedPage,
    PageHeader,
    varint,
)
from dinov2.data.parquet.pages import (
    DAMAGE,
    NOTHING,
    PLAIN,
    Column,
    Cut,
    decompress,
    dictionary_spans,
    hybrid,
    page_headers,
    page_rows,
    ranks_of,
)

_BLOCK = 1 << 16  # bytes that snappy codes apart
_LITERAL = b"\xf4\xff\xff"  # what a block without repetitions begins with: 64 KB follow as they are
_SMALL_PAGE = 1 << 22  # pages up to this size are read whole: they hold few rows besides those wanted
_ELEMENT = 256  # bytes; a walk over elements that are shorter on average takes longer than decompression
_NEAR = 64  # bytes read at an element
_CHUNKS_KEPT, _LAYOUTS_KEPT = 4096, 8192  # about 1 KB and 10 KB each


class GiantChunk(NamedTuple):
    """One column chunk of a local file."""

    path: str
    start: int
    length: int
    num_rows: int
    column: Column


class _Pages(NamedTuple):
    headers: np.ndarray  # int64 (pages, 8): data pages in order
    ends: np.ndarray  # row of the group after each
    dictionary: PageHeader | None


class _Layout(NamedTuple):
    present: np.ndarray | None  # which rows have a value; None if all do
    starts: np.ndarray  # uint32 (values + 1,): where each begins in the page without compression, and the end
    blocks: np.ndarray | None  # uint32 (blocks + 1,): where each begins in the compressed part; None without


class GiantReader:
    """Reads rows of giant chunks and remembers where pages and values lie.

    May be pickled, forgetting that, and used from several threads.
    """

    def __init__(self) -> None:
        self._pages = lru_cache(_CHUNKS_KEPT)(_list_pages)
        self._layouts = lru_cache(_LAYOUTS_KEPT)(_make_layout)

    def __reduce__(self) -> tuple[type, tuple]:
        return GiantReader, ()

    def read_rows(self, chunk: GiantChunk, rows: Sequence[int]) -> list[bytes]:
        """Read some rows; nulls, and rows that damage hides, come as empty bytes.

        Raises:
            OSError: If the file cannot be read, or is shorter than it was.
        """
        pages = self._pages(chunk)
        wanted = np.unique(rows)
        page_of = np.searchsorted(pages.ends, wanted, side="right")
        found = dict.fromkeys(rows, b"")
        dictionary: Cut | None = None
        with _LocalFile(chunk.path, chunk.start) as file:
            for number in np.unique(page_of[page_of < len(pages.ends)]).tolist():
                header = PageHeader(*pages.headers[number].tolist())
                if header.encoding != PLAIN and dictionary is None:
                    dictionary = cache(self._dictionary(file, chunk, pages.dictionary))
                here = wanted[page_of == number]
                local = (here - (pages.ends[number] - header.values)).tolist()
                values = self._page_rows(file, chunk, header, local, dictionary)
                found.update(zip(here.tolist(), values, strict=True))
        return [found[row] for row in rows]

    def _page_rows(
        self,
        file: "_LocalFile",
        chunk: GiantChunk,
        header: PageHeader,
        rows: list[int],
        dictionary: Cut | None,
    ) -> list[bytes]:
        layout = self._layouts(chunk, header) if header.encoding == PLAIN else None
        if layout:
            page = _SeekablePage(file, header, layout)
            return [page.cut(rank) for rank in ranks_of(rows, layout.present)]
        return page_rows(file.take(header.body, header.stored), header, rows, chunk.column, dictionary)

    def _dictionary(self, file: "_LocalFile", chunk: GiantChunk, header: PageHeader | None) -> Cut:
        if header is None:
            return NOTHING.cut
        layout = self._layouts(chunk, header)
        if layout:
            return _SeekablePage(file, header, layout).cut
        return dictionary_spans(file.take(header.body, header.stored), header, chunk.column).cut


class _LocalFile:
    """The bytes of a column chunk, read without a shared position."""

    def __init__(self, path: str, start: int) -> None:
        self._path, self._start = path, start

    def __enter__(self) -> "_LocalFile":
        self._descriptor = os.open(self._path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def take(self, position: int, length: int) -> memoryview:
        """Read bytes of the chunk; OSError if the file ends before."""
        data = os.pread(self._descriptor, length, self._start + position)
        if len(data) < length:
            end = self._start + position + length
            raise OSError(f"'{self._path}' ends before byte {end}, which it had when it was indexed")
        return memoryview(data)


class _SeekablePage:
    """Values of a page that are read one by one."""

    def __init__(self, file: _LocalFile, header: PageHeader, layout: _Layout) -> None:
        self._file, self._body = file, header.body + header.levels
        self._starts, self._blocks = layout.starts, layout.blocks
        self.size = (header.size if self._blocks is not None else header.stored) - header.levels
        self._last: tuple[int, int, memoryview] | None = None

    def cut(self, number: int) -> bytes:
        """Copy one value, as `Cut` does."""
        if not 0 <= number < len(self._starts) - 1:
            return b""
        begin, end = self._starts[number : number + 2].tolist()
        try:
            return bytes(self.read(begin + 4, end))
        except DamagedPage:
            return b""

    def read(self, begin: int, end: int) -> memoryview:
        """Read a range of the page as it is without compression; DamagedPage if that cannot be."""
        if end > self.size:
            raise DamagedPage("a value is longer than its page")
        if self._blocks is None or begin >= end:
            return self._file.take(self._body + begin, end - begin)
        first, last = begin // _BLOCK, -(-end // _BLOCK)
        at, after = self._blocks[[first, last]].tolist()
        if last == first + 1 and self._file.take(self._body + at, 3) == _LITERAL:
            return self._file.take(self._body + at + 3 + begin % _BLOCK, end - begin)
        if not self._last or self._last[:2] != (first, last):
            size = min(last * _BLOCK, self.size) - first * _BLOCK
            data = _varint_bytes(size) + bytes(self._file.take(self._body + at, after - at))
            try:
                self._last = first, last, decompress(memoryview(data), size, "SNAPPY")
            except DAMAGE as error:
                raise DamagedPage("snappy cannot decode a block") from error
        start = begin - first * _BLOCK
        return self._last[2][start : start + end - begin]


def _list_pages(chunk: GiantChunk) -> _Pages:
    headers, dictionary, rows = [], None, 0
    with _LocalFile(chunk.path, chunk.start) as file:
        try:
            for header in page_headers(file.take, chunk.length):
                if header.kind == DICTIONARY_PAGE:
                    dictionary = header
                elif header.kind in (DATA_PAGE, DATA_PAGE_V2):
                    headers.append(header)
                    rows += header.values
            headers = headers if rows == chunk.num_rows else []  # a wrong count shifts rows unnoticed
        except DamagedPage:  # of the header: where the next page begins is unknown
            headers = headers if rows <= chunk.num_rows else []
    table = np.array(headers, np.int64).reshape(-1, len(PageHeader._fields))
    return _Pages(table, np.cumsum(table[:, PageHeader._fields.index("values")]), dictionary)


def _make_layout(chunk: GiantChunk, header: PageHeader) -> _Layout | None:
    """Find the values of a PLAIN page; None if it is better read whole."""
    compressed = header.compressed and chunk.column.codec != "UNCOMPRESSED"
    if header.size <= _SMALL_PAGE or (compressed and chunk.column.codec != "SNAPPY"):
        return None
    with _LocalFile(chunk.path, chunk.start) as file:
        try:
            blocks = _snappy_blocks(file, header) if compressed else None
            if compressed and blocks is None:
                return None
            page = _SeekablePage(file, header, _Layout(None, np.zeros(1, np.uint32), blocks))
            position, levels, present = 0, file.take(header.body, header.levels), None
            if chunk.column.optional and header.kind != DICTIONARY_PAGE:
                if header.kind == DATA_PAGE:
                    position = 4 + int.from_bytes(page.read(0, 4), "little")
                    levels = page.read(4, position)
                present = hybrid(levels, 1, header.values) == 1
            starts = _value_starts(page, position, header.values if present is None else present.sum())
        except (ValueError, IndexError):
            return None
    return _Layout(None if present is None or present.all() else present, starts, blocks)


def _value_starts(page: _SeekablePage, position: int, count: int) -> np.ndarray:
    starts = [position]
    try:
        while len(starts) <= count and position + 4 <= page.size:
            position += 4 + int.from_bytes(page.read(position, position + 4), "little")
            if position > page.size:
                break
            starts.append(position)
    except DamagedPage:  # the lengths behind it are lost
        pass
    return np.array(starts, np.uint32)


def _snappy_blocks(file: _LocalFile, header: PageHeader) -> np.ndarray | None:
    """Find where each 64 KB of a snappy stream begin, counted from its start, and its end.

    None if the elements are short, or the stream is not made of blocks that can be decoded apart.
    """
    body, stored = header.body + header.levels, header.stored - header.levels
    near, at = file.take(body, min(_NEAR, stored)), 0
    total, position = varint(near, 0)
    blocks, written, elements = [], 0, 0
    while position < stored:
        if written >= len(blocks) * _BLOCK:
            if written > len(blocks) * _BLOCK or elements > 1000 + written // _ELEMENT:
                return None
            blocks.append(position)
        if position + 5 > at + len(near) and at + len(near) < stored:
            near, at = file.take(body + position, min(_NEAR, stored - position)), position
        length, taken, back = _snappy_element(near, position - at)
        if back > written % _BLOCK:
            return None
        position, written, elements = position + taken, written + length, elements + 1
    return np.array([*blocks, stored], np.uint32) if total == written == header.size - header.levels else None


def _snappy_element(data: memoryview, position: int) -> tuple[int, int, int]:
    """Decode one tag: bytes that its element becomes, bytes it takes, and how far back a copy reaches."""
    tag = data[position]
    if tag & 3 == 0:
        extra = max(0, (tag >> 2) - 59)
        value = int.from_bytes(data[position + 1 : position + 1 + extra], "little") if extra else tag >> 2
        return value + 1, 1 + extra + value + 1, 0
    if tag & 3 == 1:
        return (tag >> 2 & 7) + 4, 2, tag >> 5 << 8 | data[position + 1]
    width = 2 if tag & 3 == 2 else 4
    return (tag >> 2) + 1, 1 + width, int.from_bytes(data[position + 1 : position + 1 + width], "little")


def _varint_bytes(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])

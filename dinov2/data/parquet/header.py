"""Headers of Parquet pages: Thrift structs in the compact protocol."""

from collections.abc import Sequence
from typing import Any, NamedTuple

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
_DETAILS = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}  # kind of page: field of PageHeader about it
_MOST_BYTES = 10  # of a 64-bit integer, 7 bits in each
_DEEPEST = 8  # nested structs; a page header has two levels

Bytes = Sequence[int]  # bytes, bytearray or a memoryview of unsigned bytes


class DamagedPage(ValueError):
    """Bytes that are no page, or no page of the kind that is expected."""


class PageHeader(NamedTuple):
    """What is needed of the header of one page of a flat column.

    Attributes:
        kind: DATA_PAGE, DICTIONARY_PAGE or DATA_PAGE_V2; another one holds no values.
        body: Where the page itself begins.
        stored: Bytes of the page as stored, without its header.
        size: Bytes of the page without compression.
        values: Rows of a data page, nulls included, or values of a dictionary page.
        encoding: Of the values, as numbered in the Parquet format.
        levels: Bytes of definition levels in front of the compressed part of a v2 page; 0 for others.
        compressed: Whether the codec of the column was applied.
    """

    kind: int
    body: int
    stored: int
    size: int
    values: int
    encoding: int
    levels: int
    compressed: bool

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.body + self.stored


def parse_page_header(data: Bytes, position: int) -> PageHeader:
    """Parse the header at a position, which `body` then counts from the same zero.

    Raises:
        DamagedPage: If there is no header.
        IndexError: If the data end within it.
    """
    fields, body = _struct(data, position, 0)
    try:
        kind, size, stored = fields[1], fields[2], fields[3]
        details = fields[_DETAILS[kind]] if kind in _DETAILS else {1: 0, 2: 0}
        encoding, levels, compressed = details[2], 0, True
        if kind == DATA_PAGE_V2:
            encoding, levels, compressed = details[4], details[5] + details[6], details.get(7, True)
        header = PageHeader(kind, body, stored, size, details[1], encoding, levels, compressed)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedPage("a page header lacks a field") from error
    if not all(isinstance(value, int) and value >= 0 for value in header) or levels > min(size, stored):
        raise DamagedPage("a page header holds values that cannot be")
    return header


def varint(data: Bytes, position: int) -> tuple[int, int]:
    """Decode an unsigned integer of 7 bits per byte; return it and the position after it."""
    value = 0
    for shift in range(0, 7 * _MOST_BYTES, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise DamagedPage(f"an integer takes more than {_MOST_BYTES} bytes")


def _struct(data: Bytes, position: int, depth: int) -> tuple[dict[int, Any], int]:
    """Decode a struct to {field number: value}."""
    if depth > _DEEPEST:
        raise DamagedPage(f"structs are nested more than {_DEEPEST} deep")
    fields: dict[int, Any] = {}
    number = 0
    while byte := data[position]:
        position += 1
        if byte >> 4:
            number += byte >> 4
        else:
            number, position = _signed(data, position)
        kind = byte & 15
        if kind <= 2:  # the type of a boolean field is its value
            fields[number] = kind == 1
        else:
            fields[number], position = _value(data, position, kind, depth)
    return fields, position + 1


def _value(data: Bytes, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        return _signed(data, position)
    if kind == 12:
        return _struct(data, position, depth + 1)
    if kind in (3, 7, 8):  # of no use here: a byte, a double, bytes
        if kind == 8:
            length, position = varint(data, position)
        else:
            length = 8 if kind == 7 else 1
        return None, position + length
    raise DamagedPage(f"a page header has a field of type {kind}")


def _signed(data: Bytes, position: int) -> tuple[int, int]:
    value, position = varint(data, position)
    return (value >> 1) ^ -(value & 1), position

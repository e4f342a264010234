"""The tile indexes of a collection of slides in one file, mapped into memory when used.

Layout: 8 bytes that name the format; a record for each slide; a JSON object of the records' first bytes by slide
path; its length (8 bytes, little-endian); the same 8 bytes again. A record is the CRC-32 of what follows it (8
bytes), the length of its JSON description (8 bytes) and of its arrays (8 bytes), the description, and for each level
offsets (int64) and lengths (int32); every part starts at a multiple of 8 bytes.
"""

import json
import mmap
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dinov2.data.slides.blocks import TileIndex, TileLevel

MAGIC = b"PFTILES1"
_HEADER = struct.Struct("<QQQ")
_PLAIN = ("width", "height", "tile_width", "tile_height", "compression", "photometric")


def start_records(file: BinaryIO) -> None:
    """Begin an empty file."""
    file.write(MAGIC)


def append_record(file: BinaryIO, index: TileIndex) -> int:
    """Append a slide to a file opened at its end; returns the record's first byte."""
    levels = [
        {**{name: getattr(level, name) for name in _PLAIN}, "shape": level.offsets.shape}
        | {"jpeg_tables": level.jpeg_tables.hex()}
        for level in index.levels
    ]
    said = {name: getattr(index, name) for name in ("path", "size", "downsamples", "mpp", "mpp_source")}
    words = _json(said | {"levels": levels})
    arrays = b"".join(
        _padded(np.ascontiguousarray(level.offsets, "<i8").tobytes())
        + _padded(np.ascontiguousarray(level.lengths, "<i4").tobytes())
        for level in index.levels
    )
    start = file.tell()
    file.write(_HEADER.pack(zlib.crc32(arrays, zlib.crc32(words)), len(words), len(arrays)) + words + arrays)
    file.flush()
    return start


def finish_records(file: BinaryIO, starts: Mapping[str, int]) -> None:
    """Append the directory of the records' first bytes by slide path."""
    words = _json(starts)
    file.write(words + struct.pack("<Q", len(words)) + MAGIC)


def whole_records(path: Path) -> Iterator[tuple[int, int, TileIndex]]:
    """First byte, end and index of the undamaged records at the beginning of a file, finished or not."""
    if not path.is_file() or path.stat().st_size < len(MAGIC):
        return
    data = np.memmap(path, np.uint8, "r")
    place = len(MAGIC)
    while bytes(data[: len(MAGIC)]) == MAGIC and place + _HEADER.size <= len(data):
        crc, *lengths = _HEADER.unpack(data[place : place + _HEADER.size])
        end = place + _HEADER.size + sum(lengths)
        if end > len(data) or zlib.crc32(data[place + _HEADER.size : end]) != crc:
            return
        yield place, end, _index_at(data, place)
        place = end


class TileIndexes(Mapping[str, TileIndex]):
    """Tile indexes by slide path, made when asked for; their arrays stay in the file.

    Picklable and fork-safe: the file is read-only.

    Args:
        path: file written by `index_slides.py`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, or not finished.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"There is no tile index '{path}'; index_slides.py writes one.")
        self._data = self._mapped()
        tail = len(self._data) - 16
        length = int.from_bytes(self._data[tail : tail + 8].tobytes(), "little") if tail >= 8 else 0
        if not 0 < length <= tail or self._data[:8].tobytes() != MAGIC or self._data[-8:].tobytes() != MAGIC:
            raise ValueError(f"'{path}' is not a finished tile index; index_slides.py writes one.")
        self._starts: dict[str, int] = json.loads(self._data[tail - length : tail].tobytes())

    def __getitem__(self, slide: str | Path) -> TileIndex:
        return _index_at(self._data, self._starts[str(slide)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._path,)

    def _mapped(self) -> np.ndarray:
        if not self._path.stat().st_size:
            return np.empty(0, np.uint8)
        with self._path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def load_tile_indexes(path: str | Path) -> TileIndexes:
    """Open the tile indexes of a collection; see `TileIndexes`."""
    return TileIndexes(path)


def _index_at(data: np.ndarray, start: int) -> TileIndex:
    _, length, _ = _HEADER.unpack(data[start : start + _HEADER.size])
    place = start + _HEADER.size
    said = json.loads(data[place : place + length].tobytes())
    place += length
    levels = []
    for level in said.pop("levels"):
        shape = level.pop("shape")
        offsets, place = _array(data, place, shape, "<i8")
        lengths, place = _array(data, place, shape, "<i4")
        tables = bytes.fromhex(level.pop("jpeg_tables"))
        levels.append(TileLevel(**level, offsets=offsets, lengths=lengths, jpeg_tables=tables))
    said["downsamples"] = tuple(said["downsamples"])
    return TileIndex(**said, levels=tuple(levels))


def _array(data: np.ndarray, place: int, shape: Sequence[int], kind: str) -> tuple[np.ndarray, int]:
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return data[place : place + size].view(kind).reshape(shape), place + size + -size % 8


def _json(value: Mapping[str, Any]) -> bytes:
    words = json.dumps(value).encode()
    return words + b" " * (-len(words) % 8)


def _padded(array: bytes) -> bytes:
    return array + bytes(-len(array) % 8)

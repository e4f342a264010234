"""Bytes of column chunks, fetched with few ranged reads and little memory."""

from dinov2.data.parquet.pages import Take
from dinov2.data.storage.base import Storage

_GAP = 1 << 18  # bytes between two chunks that cost less than a second request
_WHOLE = 1 << 25  # bytes; a longer chunk is read in windows
_WINDOW = 1 << 23


def takes(storage: Storage, name: str, extents: dict[str, tuple[int, int]]) -> dict[str, Take]:
    """Fetch up to two column chunks of a file: in one read if they are small and near each other.

    Args:
        storage: Where the file is.
        name: Of the file.
        extents: Where each chunk begins and how many bytes it has.

    Returns:
        For each chunk, a function that gives `length` bytes from a position in it; reading on from where a
        long chunk was read last is cheap.
    """
    if len(extents) == 2:
        (first, size), (second, _) = sorted(extents.values())
        end = max(start + length for start, length in extents.values())
        if second - first - size <= _GAP and end - first <= _WHOLE:
            data = memoryview(storage.read_range(name, first, end - first))
            return {
                kind: _slices(data[start - first :][:length]) for kind, (start, length) in extents.items()
            }
    return {kind: _take(storage, name, start, length) for kind, (start, length) in extents.items()}


def _take(storage: Storage, name: str, start: int, length: int) -> Take:
    if length > _WHOLE:
        return _Windows(storage, name, start, length).take
    return _slices(memoryview(storage.read_range(name, start, length)))


def _slices(data: memoryview) -> Take:
    return lambda position, length: data[position : position + length]


class _Windows:
    """A long chunk of which one window is held: a few megabytes, or a page if that is longer."""

    def __init__(self, storage: Storage, name: str, start: int, length: int) -> None:
        self._storage, self._name, self._start, self._length = storage, name, start, length
        self._first, self._data = 0, memoryview(b"")

    def take(self, position: int, length: int) -> memoryview:
        """Give bytes of the chunk."""
        if not self._first <= position <= position + length <= self._first + len(self._data):
            size = max(length, min(_WINDOW, self._length - position))
            self._data = memoryview(b"")  # freed before the next one comes
            self._data = memoryview(self._storage.read_range(self._name, self._start + position, size))
            self._first = position
        return self._data[position - self._first :][:length]

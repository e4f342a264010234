"""Files that hold many images: what is known of each image, and the protocol by which they are read."""

import io
from collections.abc import Iterable, Sequence
from typing import IO, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from dinov2.data.storage.base import FileType, LocalStorage, RangedFile, Storage, StoredFile

_WINDOW = 1 << 22  # bytes of a remote file that are fetched at a time while it is indexed
_GAP = 1 << 18  # bytes between two images that cost less than a second request
_LONGEST = 1 << 25  # bytes of one request, unless a single image is longer


class Member(NamedTuple):
    """One image in a container."""

    name: str
    start: int  # where it can be found: first byte, or row
    length: int  # bytes to fetch from there
    size: int  # bytes in memory
    check: int = 0  # what the container needs besides


class Contents(NamedTuple):
    """The images of a container in the order in which they are stored."""

    members: list[Member]
    fault: str = ""  # why there may be more, in a file that is cut short


class Container(Protocol):
    """A type of file that holds images; may be pickled, forked and used from several threads."""

    files: FileType

    def contents(self, storage: Storage, file: StoredFile) -> Contents:
        """List the images; ValueError says why a file cannot be read, OSError that the storage fails."""

    def read(self, storage: Storage, file: StoredFile, members: Sequence[Member]) -> list[bytes]:
        """Read the bytes of images, or a tile in NumPy's format; empty ones where they are corrupt."""


def open_stored(storage: Storage, file: StoredFile) -> IO[bytes]:
    """Open a file for reading here and there."""
    if isinstance(storage, LocalStorage):
        return open(storage.locate(file.name), "rb")
    return io.BufferedReader(RangedFile(storage, file.name, file.size), _WINDOW)


def read_members(storage: Storage, file: StoredFile, members: Sequence[Member]) -> list[memoryview]:
    """Read the stored bytes of some members, with one request for those that lie close together."""
    found: dict[int, memoryview] = {}
    spans: list[list[int]] = []
    for start, end in sorted((member.start, member.start + member.length) for member in members):
        if spans and start - spans[-1][1] <= _GAP and end - spans[-1][0] <= _LONGEST:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    waiting = sorted(members, key=lambda member: member.start)
    for first, end in spans:
        data = memoryview(storage.read_range(file.name, first, end - first))
        while waiting and waiting[0].start + waiting[0].length <= end:
            member = waiting.pop(0)
            found[member.start] = data[member.start - first :][: member.length]
    return [found[member.start] for member in members]


def as_columns(members: Iterable[Member]) -> dict[str, pa.Array]:
    """The fields of members as Arrow columns, names as bytes since they need not be UTF-8."""
    rows = list(members)
    names = [row.name.encode(errors="surrogateescape") for row in rows]
    numbers = np.array([row[1:] for row in rows], np.int64).reshape(-1, 4)
    columns = dict(zip(Member._fields[1:], map(pa.array, np.ascontiguousarray(numbers.T)), strict=True))
    return {"name": pa.array(names, pa.large_binary()), **columns}

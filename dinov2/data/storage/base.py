"""Storages: the files of a dataset, read by ranges wherever they lie."""

import glob
import io
import os
import re
from pathlib import Path
from typing import NamedTuple, Protocol

from dinov2.data.storage.train_split import CARD, find_train_files


class StoredFile(NamedTuple):
    """One file of a dataset: its name below the dataset's location, its bytes, and what changes when they do."""

    name: str
    size: int
    version: str


def is_shard(name: str) -> bool:
    """Whether a file is a Parquet one by its name."""
    return name.lower().endswith((".parquet", ".pq"))


class Storage(Protocol):
    """The Parquet files of one dataset; may be pickled, forked and used from several threads."""

    location: str  # the dataset as a path or URL, with the commit where there is one; equal ones hold equal names

    def list_files(self) -> list[StoredFile]:
        """List the Parquet files by name, sorted; FileNotFoundError if there is none."""

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read exactly `length` bytes of a file from byte `start` on; OSError where they cannot be had."""

    def locate(self, name: str) -> str:
        """Give the path or URL of a file, for messages."""


class LocalStorage:
    """The Parquet files of a folder (with its subfolders), of a glob, or one file, as a `Storage`; no hidden ones.

    With ``train_only`` a folder's are those of its training split, as `find_train_files` tells them.
    """

    def __init__(self, pattern: str, train_only: bool = False) -> None:
        self.pattern = pattern  # as the user named it
        path = os.path.expanduser(pattern)
        self._is_folder = os.path.isdir(path)
        self._train_only = train_only and self._is_folder
        if self._is_folder:
            self.location, self._inside = path, "**/*"
        elif os.path.isfile(path):
            self.location, self._inside = os.path.dirname(path), glob.escape(os.path.basename(path))
        elif glob.has_magic(path):
            self.location = next(str(parent) for parent in Path(path).parents if not glob.has_magic(str(parent)))
            self._inside = os.path.relpath(path, self.location)
        else:
            expected = "give a folder of .parquet files, a glob or one file"
            raise FileNotFoundError(f"dataset '{pattern}' does not exist; {expected}")

    def list_files(self) -> list[StoredFile]:
        """List files by name; see `Storage`."""
        found = glob.iglob(self._inside, root_dir=self.location or ".", recursive=True)
        shards = filter(is_shard, found) if self._is_folder else found
        names = sorted(name for name in shards if os.path.isfile(self.locate(name)))
        if self._train_only:
            card = Path(self.locate(CARD))
            text = card.read_text(errors="replace") if card.is_file() else ""
            names = find_train_files(self.pattern, names, text, f"{self.pattern}/**/*.parquet")
        if not names:
            raise no_files(self.pattern)
        stats = [os.stat(self.locate(name)) for name in names]
        return [StoredFile(n, s.st_size, str(s.st_mtime_ns)) for n, s in zip(names, stats, strict=True)]

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read from the disk; see `Storage`."""
        path = self.locate(name)
        # Long reads pass the buffer by; without any, a read would end after 2 GiB. The default is 4 MiB on Lustre.
        with open(path, "rb", buffering=1 << 13) as file:
            file.seek(start)
            data = file.read(length)
        if len(data) < length:
            raise OSError(f"'{path}' ends at byte {start + len(data)}; {start + length} are expected")
        return data

    def locate(self, name: str) -> str:
        """Return the path of a file."""
        return os.path.join(self.location, name)


def no_files(dataset: str) -> FileNotFoundError:
    """The error of a dataset without files."""
    return FileNotFoundError(f"dataset '{dataset}' holds no Parquet file; at least one is expected")


def public_name(path: str | Path) -> str:
    """A path as it is; a URL without user, password and query, since they may hold secrets."""
    name = str(path)
    if "://" not in name:
        return name
    name = re.sub(r"(?<=://)[^/@]*@", "", name)
    return name.partition("?")[0] if name.startswith("http") else name


class RangedFile(io.RawIOBase):
    """A stored file as a Python file object, for pyarrow; every read is a ranged read."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self._size, self._position = storage, name, size, 0

    def readable(self) -> bool:
        """Say that it can be read, as `io` asks."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; returns it."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer from the position on; returns how many bytes."""
        length = max(0, min(len(buffer), self._size - self._position))
        if length:
            buffer[:length] = self._storage.read_range(self._name, self._position, length)
            self._position += length
        return length

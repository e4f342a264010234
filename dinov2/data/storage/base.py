"""Storages: the files of a dataset, read by ranges wherever they lie."""

import glob
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from dinov2.data.storage.patterns import expand_braces, fixed_folder, has_braces, has_pattern
from dinov2.data.storage.scan import scan_folder
from dinov2.data.storage.train_split import CARD, find_train_files
from dinov2.utils.secrets import without_user


class StoredFile(NamedTuple):
    """One file of a dataset: its name below the dataset's location, its bytes, and what changes when they do."""

    name: str
    size: int
    version: str


class FileType(NamedTuple):
    """Files that a dataset may consist of, told by their names."""

    what: str  # in words
    suffixes: tuple[str, ...]  # in lower case
    is_tile: bool = False  # each is one tile: there may be millions, among files of other types

    def fits(self, name: str) -> bool:
        """Whether a file is of this type."""
        return name.lower().endswith(self.suffixes)


PARQUET = FileType("Parquet", (".parquet", ".pq"))


def is_shard(name: str) -> bool:
    """Whether a file is a Parquet one by its name."""
    return PARQUET.fits(name)


class Storage(Protocol):
    """The files of one type of one dataset; may be pickled, forked and used from several threads."""

    location: str  # the dataset as a path or URL, with the commit where there is one; equal ones hold equal names

    def list_files(self) -> list[StoredFile]:
        """List the files by name, sorted; FileNotFoundError if there is none."""

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read exactly `length` bytes of a file from byte `start` on; OSError where they cannot be had."""

    def locate(self, name: str) -> str:
        """Give the path or URL of a file, for messages."""


class LocalStorage:
    """The files of a type in a folder (with its subfolders), of a glob or braces, or one file, as a `Storage`.

    Hidden files are left out, and with ``train_only`` those of a folder that `find_train_files` does not take.
    """

    def __init__(self, pattern: str, train_only: bool = False, files: FileType = PARQUET) -> None:
        self.pattern, self._files = pattern, files  # the first as the user named it
        path = os.path.expanduser(pattern)
        self._is_folder = os.path.isdir(path)
        self._train_only = train_only and self._is_folder
        self._inside: list[str] = []  # globs below the location
        if self._is_folder:
            self.location = path
        elif os.path.isfile(path):
            self.location, self._inside = os.path.dirname(path), [glob.escape(os.path.basename(path))]
        elif has_pattern(path):
            self.location = fixed_folder(path) or ("/" if path.startswith("/") else ".")
            self._inside = [os.path.relpath(one, self.location) for one in expand_braces(path)]
        else:
            expected = f"give a folder of {self._files.what} files, a glob or one file"
            raise FileNotFoundError(f"dataset '{pattern}' does not exist; {expected}")

    def list_files(self) -> list[StoredFile]:
        """List files by name; see `Storage`."""
        if self._is_folder:
            files = [
                StoredFile(f.name, f.size, str(f.modified_ns)) for f in scan_folder(self.location, self._files.fits)
            ]
        else:
            found = self._find()
            names = filter(self._files.fits, found) if self._files.is_tile else found
            paths = ((name, self.locate(name)) for name in sorted(names))
            stats = ((name, os.stat(path)) for name, path in paths if os.path.isfile(path))
            files = [StoredFile(name, status.st_size, str(status.st_mtime_ns)) for name, status in stats]
        if self._train_only:
            card = Path(self.locate(CARD))
            text = card.read_text(errors="replace") if card.is_file() else ""
            chosen = train_names(self.pattern, [file.name for file in files], text, self._files)
            files = [file for file in files if file.name in chosen]
        if not files:
            raise no_files(self.pattern, self._files)
        return files

    def _find(self) -> list[str]:
        """Names that the patterns fit, once each; each name that only braces stand for must be there."""
        root = self.location or "."
        found = {one: list(glob.iglob(one, root_dir=root, recursive=True)) for one in self._inside}
        missing = [one for one, names in found.items() if not names and not glob.has_magic(one)]
        if missing and has_braces(self.pattern):
            raise FileNotFoundError(
                f"{len(missing)} of the {len(found)} files that '{self.pattern}' stands for do not exist, the first is "
                f"'{self.locate(missing[0])}'"
            )
        return list(dict.fromkeys(name for names in found.values() for name in names))

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


def train_names(dataset: str, names: Sequence[str], card: str, files: FileType) -> set[str]:
    """The files of a folder's training split; those that are tiles each are told by the folders they lie in."""
    example = f"{dataset}/**/*{files.suffixes[0]}"
    if not files.is_tile:
        return set(find_train_files(dataset, names, card, example))
    # The words that tell splits occur in names of tiles by chance ("interval").
    endings = {name.rpartition("/")[0]: os.path.splitext(name)[1] for name in reversed(names)}
    alone = {folder: f"{folder}/0{endings[folder]}".lstrip("/") for folder in sorted(endings)}
    chosen = set(find_train_files(dataset, list(alone.values()), card, example))
    return {name for name in names if alone[name.rpartition("/")[0]] in chosen}


def no_files(dataset: str, files: FileType = PARQUET) -> FileNotFoundError:
    """The error of a dataset without files."""
    found = f"dataset '{dataset}' holds no {files.what} file; at least one is expected"
    return FileNotFoundError(f"{found}, or the kind of what it holds as data.kind (see docs/data.md)")


def public_name(path: str | Path) -> str:
    """A path as it is; a URL without user, password and query, since they may hold secrets."""
    name = str(path)
    if "://" not in name:
        return name
    name = without_user(name)
    return name.partition("?")[0] if name.startswith("http") else name


class RangedFile(io.RawIOBase):
    """A stored file as a Python file object, for pyarrow; every read is a ranged read."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self._size, self._position = storage, name, size, 0

    def readable(self) -> bool:
        """Say that it can be read, as `io` asks."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read here and there, as `io` asks."""
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

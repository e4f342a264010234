"""A collection of images, wherever it is stored, as a source of encoded rows."""

import hashlib
import io
import logging
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from dinov2.data.images.container import Container, Member
from dinov2.data.images.origins import Origins, TileName, read_origins
from dinov2.data.images.table import FIELDS
from dinov2.data.patients import patients_of
from dinov2.data.source import DecodeError, EncodedSample, Origin, decode_image
from dinov2.data.storage.base import LocalStorage, Storage, StoredFile

logger = logging.getLogger(__name__)

GROUP_ROWS = 64
_NUMPY = b"\x93NUMPY"
_SMALL, _MANY = 1 << 20, 100_000  # bytes of a file, and files, at which packing pays
_OTHER_SPLITS = {"test", "testing", "val", "valid", "validation", "holdout"}  # names of folders
_CHECKED_NAMES = 256  # in which a pattern is looked for


class ImageSource:
    """Images of a collection; see `dinov2.data.source.Source`.

    A row group is 64 images that follow one another: loose files by name, or members of one container as they are
    stored, which then come with one read.

    Args:
        index: as `dinov2.data.images.index.load_index` gives it.
        container: how the files hold images; None if each is one.
        origins: what is told of the tiles, and `groups_file` a table that tells more, as of `read_origins`.
    """

    def __init__(
        self,
        storage: Storage,
        index: pa.Table,
        container: Container | None = None,
        origins: Origins | None = None,
        groups_file: str = "",
    ) -> None:
        self.location, self.is_remote = storage.location, not isinstance(storage, LocalStorage)
        self._storage, self._container, self._origins = storage, container, origins or Origins()
        self._files, self._file_sizes = _one(index["name"]), _numbers(index["size"])
        self._names, sizes = self._files, self._file_sizes
        counts = np.array([len(sizes)], np.int64)
        if container is not None:
            self._names, sizes = (_one(index[f"member_{name}"]).flatten() for name in ("name", "size"))
            sizes = _numbers(sizes)
            self._places = {
                name: _numbers(_one(index[f"member_{name}"]).flatten()) for name in ("start", "length", "check")
            }
            self._places["size"] = sizes
            counts = np.diff(_numbers(_one(index["member_name"]).offsets))
        self._first, self.group_rows, self._file = _groups(counts)
        self.num_rows = len(sizes)
        self.group_bytes = np.add.reduceat(sizes, self._first)
        self.fingerprint = self._digest(counts)
        if groups_file:
            files = self._files
            members = None
            if container is not None:
                files, members = files.take(pa.array(np.repeat(np.arange(len(counts)), counts))), self._names
            self._origins = read_origins(groups_file, files, members, self._origins.pattern, storage.location)

    def read(self, group: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """As in `Source`; files that are gone, and members that are corrupt, come as empty bytes."""
        numbers = [int(self._first[group]) + int(row) for row in rows]
        if self._container is None or not numbers:
            data = [self._read_file(number) for number in numbers]
        else:
            file = int(self._file[group])
            stored = StoredFile(_text(self._files[file]), int(self._file_sizes[file]), "")
            data = self._container.read(self._storage, stored, [self._member(number) for number in numbers])
        return [(self._origin(group, number).slide, found) for number, found in zip(numbers, data, strict=True)]

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Turn stored bytes into uint8 (H, W, 3) RGB; see `decode_image`."""
        if not sample.data:
            raise DecodeError("nothing can be read there (it is gone, empty, or its checksum is wrong)")
        if sample.data.startswith(_NUMPY):
            return np.load(io.BytesIO(sample.data), allow_pickle=False)
        return decode_image(sample.data)

    def describe(self, group: int, row: int | None = None) -> str:
        """Name a row group, or one of its images, for a message to the user."""
        first = int(self._first[group])
        if row is None:
            last = first + int(self.group_rows[group]) - 1
            return f"images {self.describe(group, 0)} to {self.describe(group, last - first)}"
        name = self._name(group, first + row)
        inside = f"'{name.member}' in " if name.member else ""
        return f"{inside}'{self._storage.locate(name.file)}'"

    def slides(self, group: int) -> list[str]:
        """Name the slide of every image of a row group."""
        return [origin.slide for origin in self.origins(group)]

    def origins(self, group: int) -> list[Origin]:
        """Slide, patient and site of every image of a row group; nothing is read for it."""
        first = int(self._first[group])
        return [self._origin(group, number) for number in range(first, first + int(self.group_rows[group]))]

    def check_told(self) -> None:
        """Raise ValueError if the pattern of origins is none or found in none of many names, evenly spread.

        Where a table tells of slides and of none of these, that is logged.
        """
        pattern = self._origins.pattern
        said = f"data.patient_pattern = {pattern!r}"
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"{said} is no regular expression ({error})") from error
        if pattern and not groups.keys() & set(FIELDS):
            raise ValueError(f"{said} has no group named {', '.join(FIELDS)}, as in (?P<patient>P\\d+)")
        some = list(self._some())
        if not any(re.search(pattern, name.full) for _, name in some):
            found = f"{said} is found in none of {len(some)} names of tiles"
            raise ValueError(f"{found} in '{self.location}', such as '{some[0][1].full}'")
        if self._origins.by_slide and not any(self._origins.tells_of(number, name) for number, name in some):
            known, slide = next(iter(self._origins.by_slide)), self._origins.of(*some[0]).slide
            words = (
                "dataset '%s': data.groups_file tells of slides such as '%s', and of none of those of %d tiles, as '%s'"
            )
            logger.warning(words, self.location, known, len(some), slide)

    def warn_of_splits(self) -> None:
        """Log where folders inside containers are named after splits, since all of them are trained on."""
        if self._container is None:
            return
        folders = {part.lower() for _, name in self._some() for part in name.member.split("/")[:-1]}
        if others := sorted(folders & _OTHER_SPLITS):
            words = (
                "dataset '%s': tiles in folders %s inside its files are trained on, too; a folder of them, unpacked, "
            )
            logger.warning(words + "is read by splits", self.location, ", ".join(others))

    def told_by(self) -> str:
        """What tells the patients of many tiles, evenly spread: "names" or a table, else "folders", or "nothing"."""
        origins = [self._origins.of(number, name) for number, name in self._some()]
        if not any(any(origin[:2]) for origin in origins):
            return "nothing"
        return "names" if any(origin.patient or patients_of([origin.slide]) for origin in origins) else "folders"

    def _some(self) -> Iterator[tuple[int, TileName]]:
        chosen = np.unique(np.linspace(0, self.num_rows - 1, _CHECKED_NAMES).astype(np.int64)).tolist()
        groups = np.searchsorted(self._first, chosen, side="right") - 1
        return ((number, self._name(group, number)) for group, number in zip(groups.tolist(), chosen, strict=True))

    def repack_advice(self) -> str:
        """Say when Parquet shards would be read faster; empty where they would not."""
        if self._container is None and (self.is_remote or self.num_rows >= _MANY):
            wait = "each takes a request of its own" if self.is_remote else "and each start asks for the size of each"
            return f"{self.num_rows:,} single files, {wait}; python -m dinov2.data.pack makes Parquet shards of them"
        return ""

    def _origin(self, group: int, number: int) -> Origin:
        return self._origins.of(number, self._name(group, number))

    def _name(self, group: int, number: int) -> TileName:
        name = _text(self._names[number])
        return TileName(name) if self._container is None else TileName(_text(self._files[int(self._file[group])]), name)

    def _member(self, number: int) -> Member:
        return Member(
            _text(self._names[number]), **{name: int(values[number]) for name, values in self._places.items()}
        )

    def _read_file(self, number: int) -> bytes:
        name = _text(self._names[number])
        try:
            if self.is_remote:
                return self._storage.read_range(name, 0, int(self._file_sizes[number]))
            with open(self._storage.locate(name), "rb") as file:
                return file.read()
        except (FileNotFoundError, PermissionError):
            return b""

    def _digest(self, counts: np.ndarray) -> str:
        digest = hashlib.blake2b(digest_size=16)
        places = [] if self._container is None else [self._places[name] for name in sorted(self._places)]
        for numbers in (counts, self._file_sizes, *places):
            digest.update(np.ascontiguousarray(numbers, "<i8"))
        for names in (self._files, self._names):
            offsets = np.frombuffer(names.buffers()[1], np.int64)[names.offset : names.offset + len(names) + 1]
            digest.update(np.ascontiguousarray(offsets - offsets[0], "<i8"))
            digest.update(memoryview(names.buffers()[2])[offsets[0] : offsets[-1]])
        return digest.hexdigest()


def _groups(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row groups of files with so many images each: first image, rows and file of each group, int64 (G,)."""
    groups = -(-counts // GROUP_ROWS)
    file = np.repeat(np.arange(len(counts)), groups)
    within = np.arange(len(file)) - np.repeat(np.cumsum(groups) - groups, groups)
    first = np.repeat(np.cumsum(counts) - counts, groups) + within * GROUP_ROWS
    return first, np.minimum(GROUP_ROWS, np.repeat(np.cumsum(counts), groups) - first), file


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return np.from_dlpack(_one(column) if isinstance(column, pa.ChunkedArray) else column)


def _text(name: pa.Scalar) -> str:
    return name.as_py().decode(errors="surrogateescape")

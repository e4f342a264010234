"""Inputs of embedding, divided into parts: images of a folder, rows of a Parquet dataset, or tissue tiles of slides."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet.index import load_index
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.slides.find import SLIDE_SUFFIXES, find_slides
from dinov2.data.slides.resolution import read_mpp_table
from dinov2.data.source import DecodeError, EncodedSample, Source
from dinov2.data.storage.base import RangedFile
from dinov2.data.storage.locate import open_storage
from dinov2.eval.datasets.images import IMAGE_SUFFIXES, ImageFiles, UnreadableImage
from dinov2.eval.embed.read_ahead import Part, TileInput
from dinov2.eval.embed.slides import Grid, SlideTiles

KINDS = ("images", "parquet", "slides")
_EITHER = IMAGE_SUFFIXES & SLIDE_SUFFIXES
_ENDINGS = {
    "images": IMAGE_SUFFIXES - _EITHER,
    "parquet": {".parquet"},
    "slides": (SLIDE_SUFFIXES - _EITHER) | {".txt", ".csv"},
}
_COPIED = ("x", "y", "level", "mpp", "tile_size")
_FETCHES = 8  # row groups at a time


def open_input(
    source: str, kind: str | None, grid: Grid, rows_per_part: int, mpp_file: Path | None = None
) -> TileInput:
    """Find the tiles of an input.

    Args:
        source: a folder (with subfolders) of images, of Parquet shards or of slides; one of these files; a glob, hub
            id or URL of Parquet shards; a text or CSV list of slides.
        kind: one of `KINDS`; None finds out.
        grid: of slides.
        rows_per_part: images or rows in a part.
        mpp_file: resolutions of slides that do not say theirs.

    Raises:
        FileNotFoundError: if there is no such input, or nothing in it.
        ValueError: if its kind cannot be told or is unknown, or something in it is malformed.
    """
    kind = kind or kind_of(source)
    if kind == "parquet":
        return ParquetRows(source, rows_per_part)
    path = Path(source).expanduser()
    if kind == "images":
        return ImageFolder(path, rows_per_part)
    table = read_mpp_table(mpp_file) if mpp_file is not None else None
    is_slide = path.suffix.lower() in SLIDE_SUFFIXES and not path.is_dir()
    rows = sorted(find_slides(source if is_slide else path, mpp_table=table).slides)
    return SlideTiles(rows, Path(os.path.abspath(path.parent if is_slide else path)), grid)


def kind_of(source: str) -> str:
    """Tell the kind of an input from endings; files of TIFF alone may be images or slides and are refused.

    Raises:
        FileNotFoundError: if there is no such input, or nothing in it.
        ValueError: if the kind is unknown or cannot be told.
    """
    path = Path(source).expanduser()
    if not path.exists():
        is_hub_id = source.count("/") == 1 and not source.startswith(("/", ".", "~"))
        if "://" in source or glob.has_magic(source) or is_hub_id:
            return "slides" if path.suffix.lower() in _ENDINGS["slides"] else "parquet"
        raise FileNotFoundError(f"Input '{source}' does not exist; images, Parquet shards or slides are expected.")
    found = {name.suffix.lower() for name in (_files(path) if path.is_dir() else [path])}
    lists = {".txt", ".csv"} if path.is_dir() else set()  # beside the data
    kinds = [kind for kind in KINDS if _ENDINGS[kind] - lists & found]
    if len(kinds) == 1 and not (kinds == ["images"] and found & _EITHER):
        return kinds[0]
    if kinds or found & _EITHER:
        choices = " or ".join(kinds if len(kinds) > 1 else ("images", "slides"))
        raise ValueError(f"Input '{source}' may be {choices} by its endings; say which with --kind.")
    if path.is_dir():
        raise FileNotFoundError(f"Folder '{source}' holds no image, Parquet shard or slide.")
    raise ValueError(
        f"Input '{source}' has the unknown format '{path.suffix}'; an image, a .parquet file, a slide, or a .txt or "
        ".csv list of slides is expected."
    )


def _files(folder: Path) -> list[Path]:
    """Files below a folder that are not hidden, relative to it, by name."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder)
        found += [inside / name for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.as_posix())


class _NumberedParts(TileInput):
    """Tiles in parts of equal length."""

    def __init__(self, total: int, step: int) -> None:
        self._spans = [(first, min(first + step, total)) for first in range(0, total, step)]
        self.parts = [f"part-{number:06d}" for number in range(len(self._spans))]
        self.part_rows = [stop - first for first, stop in self._spans]


class ImageFolder(_NumberedParts):
    """Images of a folder and its subfolders by name, or one image.

    Raises:
        FileNotFoundError: if there is none.
    """

    kind = "images"

    def __init__(self, path: Path, rows_per_part: int) -> None:
        root, files = (path, _files(path)) if path.is_dir() else (path.parent, [Path(path.name)])
        names = [file.as_posix() for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not names or not path.exists():
            raise FileNotFoundError(f"Input '{path}' holds no image; {', '.join(sorted(IMAGE_SUFFIXES))} are read.")
        stats = [os.stat(root / name) for name in names]
        state = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, stats, strict=True)]
        self.fingerprint = hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
        self._root, self._names = root, names
        super().__init__(len(names), rows_per_part)

    def open(self, number: int) -> Part:
        """The images of a part."""
        names = self._names[slice(*self._spans[number])]
        return Part(ImageFiles(self._root, names), {"name": names})


class ParquetRows(_NumberedParts):
    """Rows of a Parquet dataset in stored order, with the coordinates that it stores; see `ParquetSource`."""

    kind = "parquet"

    def __init__(self, dataset: str, rows_per_part: int) -> None:
        self._storage = open_storage(dataset)
        with TemporaryDirectory() as folder:  # so that footers are read once
            sidecar = Path(folder, "index")
            index = load_index(self._storage, sidecar)
            self._source = ParquetSource(self._storage, sidecar)
        self._shards, self._sizes = index["name"].to_pylist(), index["size"].to_pylist()
        self._shard_ends = np.cumsum([sum(rows) for rows in index["group_rows"].to_pylist()])
        self._unit_ends = np.cumsum(self._source.unit_rows)
        self.fingerprint = self._source.fingerprint
        super().__init__(self._source.num_rows, rows_per_part)

    def open(self, number: int) -> Part:
        """Fetch the stored images of a part, each row group once, and what is stored beside them.

        Raises:
            UnreadableImage: if the columns of the coordinates are damaged.
            OSError: if a shard cannot be read.
        """
        first, stop = self._spans[number]
        columns: dict[str, list[Any]] = {}
        for shard, begin, end in _pieces(self._shard_ends, first, stop):
            for name, values in self._stored(shard, begin, end).items():
                columns.setdefault(name, []).extend(values)
        with ThreadPoolExecutor(_FETCHES) as pool:
            fetched = list(pool.map(self._fetch, _pieces(self._unit_ends, first, stop)))
        samples = [sample for unit in fetched for sample in unit]
        columns["slide"] = [sample.slide for sample in samples]
        about = {"rows": f"{columns['name'][0]} to {columns['name'][-1]}"}
        return Part(_FetchedRows(self._source, samples), columns, about)

    def _fetch(self, piece: tuple[int, int, int]) -> list[EncodedSample]:
        unit, begin, end = piece
        read = self._source.read(unit, range(begin, end))
        return [EncodedSample(0, unit, row, *stored) for row, stored in zip(range(begin, end), read, strict=True)]

    def _stored(self, shard: int, begin: int, end: int) -> dict[str, list[Any]]:
        """A name for some rows of a shard, and their values in columns that tell places, null where there is none."""
        name, rows = self._shards[shard], end - begin
        found = {column: [None] * rows for column in _COPIED}
        found["name"] = [f"{name}:{row}" for row in range(begin, end)]
        try:
            file = pq.ParquetFile(RangedFile(self._storage, name, self._sizes[shard]))
            stored = set(file.schema_arrow.names)
            wanted = [column for column in (*_COPIED, *(["path"] if "jpeg" in stored else [])) if column in stored]
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            groups = list(_pieces(np.cumsum(counts), begin, end))
            if wanted:
                table = file.read_row_groups([group for group, _, _ in groups], wanted)
                found |= table.slice(groups[0][1], rows).to_pydict()
        except pa.ArrowException as error:
            raise UnreadableImage(f"Shard '{self._storage.locate(name)}' cannot be read: {error}.") from error
        return found | {"name": found.pop("path", found["name"])}


class _FetchedRows:
    """Rows as stored, each decoded when it is read."""

    def __init__(self, source: Source, samples: Sequence[EncodedSample]) -> None:
        self._source, self._samples = source, samples

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        return self._source.describe(self._samples[index].unit, self._samples[index].row)

    def read(self, index: int) -> np.ndarray:
        try:
            return self._source.decode(self._samples[index])
        except DecodeError as error:
            raise UnreadableImage(f"Image in {self.name(index)} cannot be read: {error}.") from error


def _pieces(ends: np.ndarray, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Units, and which of their rows, that rows first to stop - 1 of all are; `ends` are the units' ends."""
    while first < stop:
        unit = int(np.searchsorted(ends, first, side="right"))
        start = int(ends[unit - 1]) if unit else 0
        end = min(stop, int(ends[unit]))
        yield unit, first - start, end - start
        first = end

"""Inputs of embedding, divided into parts: images of a folder, rows of a Parquet dataset, or tissue tiles of slides."""

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet.index import load_index
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.slides import identity
from dinov2.data.slides.errors import UNREAD, SlideError, unread
from dinov2.data.slides.find import LIST_SUFFIXES, NAMED_SUFFIXES, SLIDE_SUFFIXES, SlideRow, find_slides
from dinov2.data.slides.reader import SlideReader, too_small
from dinov2.data.slides.resolution import MPP_TOLERANCE, PLAUSIBLE_MPP, log_notes, read_mpp_table
from dinov2.data.slides.tissue import TissueMap, TissueRule, log_doubts
from dinov2.data.source import EncodedSample, Source
from dinov2.data.storage.base import RangedFile, public_name
from dinov2.data.storage.locate import open_storage
from dinov2.data.storage.patterns import has_pattern
from dinov2.eval.datasets import images
from dinov2.eval.datasets.images import IMAGE_SUFFIXES, ImageFiles, TileImages, UnreadableImage

logger = logging.getLogger(__name__)

_EITHER = IMAGE_SUFFIXES & SLIDE_SUFFIXES
_PACKED = {".tar", ".zip", ".h5", ".hdf5"}  # which hold tiles that training reads, not embedding
_ENDINGS = {
    "images": IMAGE_SUFFIXES - _EITHER,
    "parquet": {".parquet", ".pq"},
    "slides": (SLIDE_SUFFIXES - _EITHER) | LIST_SUFFIXES,
}
KINDS = tuple(_ENDINGS)
_COPIED = ("x", "y", "level", "mpp", "tile_size")
_FETCHES = 8  # row groups at a time
_CACHE_BYTES = 256 << 20  # two rows of a wide slide's tiles, so that each is decoded once


@dataclass(frozen=True, eq=False)
class Part:
    """The tiles of one part."""

    tiles: TileImages  # to be read, from several threads
    columns: dict[str, Sequence[Any]]  # what the output says of each tile, by column, each as long as the part
    about: dict[str, Any] = field(default_factory=dict)  # what it says of the part, JSON
    close: Callable[[], None] = lambda: None  # gives back what was opened
    nothing: str = "it has no tile with enough tissue"  # why there are no tiles, if there are none


class TileInput(ABC):
    """Tiles in a fixed order, cut into parts that are embedded and kept one by one."""

    kind: ClassVar[str]  # one of KINDS
    fingerprint: str  # of what is embedded; equal ones mean equal tiles in equal parts
    parts: list[str]  # file name of each part's output, without ending
    part_rows: list[int] | None = None  # number of tiles of each part; None where only opening tells

    @abstractmethod
    def open(self, number: int) -> Part:
        """Open a part; raises UnreadableImage where it cannot be."""

    def _divide(self, total: int, step: int) -> None:
        """Make parts of equal length."""
        self._spans = [(first, min(first + step, total)) for first in range(0, total, step)]
        self.parts = [f"part-{number:06d}" for number in range(len(self._spans))]
        self.part_rows = [stop - first for first, stop in self._spans]


@dataclass(frozen=True)
class Grid:
    """Grid of the tiles of a slide that are embedded; ValueError if a value is out of range."""

    mpp: float = 0.5  # micrometres per px of a tile
    tile_size: int = 224  # side of a tile in px
    stride: int = 224  # px from one tile to the next
    min_tissue: float = 0.4  # least fraction of tissue in a tile, estimated from a coarse view of the slide
    rule: TissueRule = field(default_factory=TissueRule)  # which pixels are tissue
    mpp_tolerance: float = MPP_TOLERANCE  # fraction by which a slide may be coarser than `mpp`

    def __post_init__(self) -> None:
        if not PLAUSIBLE_MPP[0] <= self.mpp <= 100:
            raise ValueError(f"--mpp is {self.mpp:g}, but it must lie within {PLAUSIBLE_MPP[0]:g} and 100.")
        if self.tile_size < 1 or self.stride < 1:
            raise ValueError(f"--tile-size {self.tile_size} and --stride {self.stride} must be at least 1.")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"--min-tissue is {self.min_tissue:g}, but it must lie within 0 and 1.")

    def corners(self, reader: SlideReader) -> tuple[np.ndarray, np.ndarray]:
        """Upper left corners of the tiles that lie on the slide and show tissue, row by row.

        Tile (i, j) begins at (i, j) times the stride, rounded to the nearest pixel of the level that is read.

        They are x and y in level-0 px, int64 (N,) each. SlideError: if the slide is coarser than the tiles, or its
        tissue cannot be found.
        """
        level = reader.level_for(self.mpp)
        downsample, step = reader.level_downsamples[level], reader.tile_side(self.stride, self.mpp)
        side = max(1, round(reader.tile_side(self.tile_size, self.mpp) / downsample))
        axes = []
        for length in reader.level_dimensions[level]:
            starts = np.rint(np.arange(int(length * downsample / step) + 1) * step / downsample)
            axes.append(np.rint(starts[starts + side <= length] * downsample).astype(np.int64))
        y, x = (axis.ravel() for axis in np.meshgrid(axes[1], axes[0], indexing="ij"))
        if self.min_tissue > 0 and len(x):
            tissue = TissueMap(reader, self.rule)
            log_doubts([(public_name(reader.path), tissue.doubt)])
            chosen = tissue.fraction(x, y, side * downsample) >= self.min_tissue
            x, y = x[chosen], y[chosen]
        return x, y


def open_input(
    source: str, kind: str | None, grid: Grid, rows_per_part: int, mpp_file: Path | None = None,
    slide_root: Path | None = None,
) -> TileInput:  # fmt: skip
    """Find the tiles of an input.

    Args:
        source: a folder (with subfolders) of images, of Parquet shards or of slides; one of these files; a glob, hub
            id or URL of Parquet shards; a text or CSV list of slides.
        kind: one of `KINDS`; None finds out.
        grid, mpp_file, slide_root: tiles of slides, resolutions given in place of what slides say, and the folder that
            holds those of a list, if they have moved.
        rows_per_part: images or rows in a part.

    Raises FileNotFoundError if there is no such input, or nothing in it; ValueError if its kind cannot be told or is
    unknown, or something in it is malformed.
    """
    kind = kind or _kind_of(source)
    if kind == "parquet":
        return ParquetRows(source, rows_per_part)
    path = Path(source).expanduser()
    if kind == "images":
        return ImageFolder(path, rows_per_part)
    table = read_mpp_table(mpp_file) if mpp_file is not None else None
    is_slide = path.suffix.lower() in NAMED_SUFFIXES and not path.is_dir()
    rows = sorted(find_slides(source if is_slide else path, mpp_table=table, slide_root=slide_root).slides)
    return SlideTiles(rows, Path(os.path.abspath(path.parent if is_slide else path)), grid)


def _to_be_packed(source: str) -> ValueError:
    return ValueError(
        f"Input '{source}' holds tar, zip or HDF5 files; images, Parquet shards and slides are embedded, and python -m "
        "dinov2.data.pack makes shards of these."
    )


def _kind_of(source: str) -> str:
    """Tell the kind of an input from endings; files of TIFF alone may be images or slides and are refused."""
    path = Path(source).expanduser()
    is_there = path.exists() or "://" in source or has_pattern(source)
    if is_there and path.suffix.lower() in _PACKED and not path.is_dir():
        raise _to_be_packed(source)
    if not path.exists():
        is_hub_id = source.count("/") == 1 and not source.startswith(("/", ".", "~"))
        if "://" in source or has_pattern(source) or is_hub_id:
            return "slides" if path.suffix.lower() in _ENDINGS["slides"] else "parquet"
        raise FileNotFoundError(f"Input '{source}' does not exist; images, Parquet shards or slides are expected.")
    files = [path / name for name in images.visible_files(path)] if path.is_dir() else [path]
    found = {file.suffix.lower() for file in set(files) - identity.companions(files)}
    lists = LIST_SUFFIXES if path.is_dir() else set()  # beside the data
    kinds = [kind for kind in KINDS if _ENDINGS[kind] - lists & found]
    if not kinds and not found & _EITHER and found & _PACKED:
        raise _to_be_packed(source)
    if len(kinds) == 1 and not (kinds == ["images"] and found & _EITHER):
        return kinds[0]
    if kinds or found & _EITHER:
        choices = " or ".join(kinds if len(kinds) > 1 else ("images", "slides"))
        raise ValueError(f"Input '{source}' may be {choices} by its endings; say which with --kind.")
    if foreign := sorted(file for file in files if file.suffix.lower() in UNREAD):
        raise ValueError(
            f"Input '{source}' holds slides that are not read, such as '{foreign[0]}': {unread(foreign[0])}."
        )
    if path.is_dir():
        raise FileNotFoundError(f"Folder '{source}' holds no image, Parquet shard or slide.")
    raise ValueError(
        f"Input '{source}' has the unknown format '{path.suffix}'; an image, a .parquet file, a slide, or a .txt or "
        ".csv list of slides is expected."
    )


class ImageFolder(TileInput):
    """Images of a folder and its subfolders by name, or one image."""

    kind = "images"

    def __init__(self, path: Path, rows_per_part: int) -> None:
        self._root, files = (path, images.visible_files(path)) if path.is_dir() else (path.parent, [path.name])
        self._names = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        if not self._names or not path.exists():
            raise FileNotFoundError(f"Input '{path}' holds no image; {', '.join(sorted(IMAGE_SUFFIXES))} are read.")
        self.fingerprint = _fingerprint([[name, *_file_state(self._root / name)] for name in self._names])
        self._divide(len(self._names), rows_per_part)

    def open(self, number: int) -> Part:
        """The images of a part."""
        names = self._names[slice(*self._spans[number])]
        return Part(ImageFiles(self._root, names), {"name": names})


class ParquetRows(TileInput):
    """Rows of a Parquet dataset in stored order, with the coordinates that it stores; see `ParquetSource`."""

    kind = "parquet"

    def __init__(self, dataset: str, rows_per_part: int) -> None:
        self._storage = open_storage(dataset)
        with TemporaryDirectory() as folder:  # so that footers are read once
            sidecar = Path(folder, "index")
            index = load_index(self._storage, sidecar)
            self._source = ParquetSource(self._storage, sidecar)
        self._shards, self._sizes = index["name"].to_pylist(), index["size"].to_pylist()
        self._shard_rows = [sum(rows) for rows in index["group_rows"].to_pylist()]
        self.fingerprint = self._source.fingerprint
        self._divide(self._source.num_rows, rows_per_part)

    def open(self, number: int) -> Part:
        """Fetch the stored images of a part, each row group once, and the coordinates that are stored beside them."""
        first, stop = self._spans[number]
        columns: dict[str, list[Any]] = {}
        for shard, begin, end in _chunks(self._shard_rows, first, stop):
            for name, values in self._stored(shard, begin, end).items():
                columns.setdefault(name, []).extend(values)
        with ThreadPoolExecutor(_FETCHES) as pool:
            fetched = pool.map(self._fetch, *zip(*_chunks(self._source.group_rows, first, stop), strict=True))
            samples = [sample for group in fetched for sample in group]
        columns["slide"] = [sample.slide for sample in samples]
        about = {"rows": f"{columns['name'][0]} to {columns['name'][-1]}"}
        return Part(_FetchedRows(self._source, samples), columns, about)

    def _fetch(self, group: int, begin: int, end: int) -> list[EncodedSample]:
        rows = range(begin, end)
        stored = self._source.read(group, rows)
        return [EncodedSample(0, group, row, *values) for row, values in zip(rows, stored, strict=True)]

    def _stored(self, shard: int, begin: int, end: int) -> dict[str, list[Any]]:
        """A name for some rows of a shard, and their values in columns of coordinates, null where there is none."""
        name, rows = self._shards[shard], range(begin, end)
        found = {column: [None] * len(rows) for column in _COPIED}
        found["name"] = [f"{name}:{row}" for row in rows]
        try:
            file = pq.ParquetFile(RangedFile(self._storage, name, self._sizes[shard]))
            stored = set(file.schema_arrow.names)
            if wanted := stored & {*_COPIED, *(["path"] if "jpeg" in stored else [])}:
                counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                groups, begins, _ = zip(*_chunks(counts, begin, end), strict=True)
                found |= file.read_row_groups(groups, list(wanted)).slice(begins[0], len(rows)).to_pydict()
        except pa.ArrowException as error:
            raise UnreadableImage(f"Shard '{self._storage.locate(name)}' cannot be read: {error}.") from error
        return found | {"name": found.pop("path", found["name"])}


@dataclass(frozen=True)
class _FetchedRows:
    """Rows as stored, each decoded when it is read."""

    source: Source
    samples: Sequence[EncodedSample]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.source.describe(self.samples[index].group, self.samples[index].row)

    def read(self, index: int) -> np.ndarray:
        return images.decode_row(self.source, self.samples[index])


def _chunks(counts: Sequence[int], first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Row groups, and the first and last + 1 of their rows, that rows first to stop - 1 of all row groups are."""
    ends = np.cumsum(counts)
    for group in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
        start = int(ends[group]) - int(counts[group])
        if start >= stop:
            return
        if counts[group]:
            yield group, max(first - start, 0), min(stop, int(ends[group])) - start


class SlideTiles(TileInput):
    """Tissue tiles of slides, one part per slide; ``root`` is the folder that they lie in, or the list of them."""

    kind = "slides"

    def __init__(self, rows: Sequence[SlideRow], root: Path, grid: Grid) -> None:
        self._rows, self._grid = rows, grid
        # Below the folder that was searched, so that the folder may be moved.
        inside = [
            Path(row.path).relative_to(root).as_posix() if Path(row.path).is_relative_to(root) else row.path
            for row in rows
        ]
        self.fingerprint = _fingerprint(
            [
                [name, row.mpp, *_file_state(row.path), *grid.rule.pixels.state(row.path)]
                for name, row in zip(inside, rows, strict=True)
            ]
        )
        # Names that two slides share get a digest of the path behind them.
        stems = [PurePosixPath(public_name(path)).stem.lstrip("._") or "slide" for path in inside]
        times = Counter(stems)
        digests = (hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=4).hexdigest() for path in inside)
        self.parts = [stem if times[stem] == 1 else f"{stem}.{end}" for stem, end in zip(stems, digests, strict=True)]

    def open(self, number: int) -> Part:
        """Open a slide and find its tiles; raises UnreadableImage where that cannot be done."""
        row, slide, grid = self._rows[number], self.parts[number], self._grid
        try:
            reader = SlideReader(row.path, row.mpp, _CACHE_BYTES, mpp_tolerance=grid.mpp_tolerance)
            if reader.mpp is None:
                raise UnreadableImage(
                    f"Slide '{public_name(row.path)}' does not say its resolution; name it in a CSV of slide,mpp lines "
                    "and give that as --mpp-file."
                )
            x, y = grid.corners(reader)
        except SlideError as error:
            raise UnreadableImage(str(error)) from error
        count, level = len(x), reader.level_for(grid.mpp)
        notes = (*reader.resolution.notes, *filter(None, [reader.resampling(grid.mpp)]))
        log_notes(logger, [(public_name(row.path), notes)])
        columns: dict[str, Sequence[Any]] = {"slide": [slide] * count, "x": x, "y": y, "level": [level] * count}
        columns |= {"mpp": [grid.mpp] * count, "tile_size": [grid.tile_size] * count}
        about = {
            "slide": slide, "path": public_name(reader.path), "slide_mpp": reader.mpp, "mpp_source": reader.mpp_source,
            "mpp_notes": notes, "level": level, "level_mpp": reader.mpp * reader.level_downsamples[level],
            "tile_size_level0": round(reader.tile_side(grid.tile_size, grid.mpp)), **asdict(grid),
        }  # fmt: skip
        side = round(reader.tile_side(grid.tile_size, grid.mpp) / reader.level_downsamples[level])
        small = too_small(level, reader.level_dimensions[level], side, grid.tile_size, grid.mpp)
        return Part(_TissueTiles(reader, grid, x, y), columns, about, reader.close, small or Part.nothing)


@dataclass(frozen=True)
class _TissueTiles:
    """Tiles of an open slide by their upper left corners in level-0 px."""

    reader: SlideReader
    grid: Grid
    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def name(self, index: int) -> str:
        slide = public_name(self.reader.path)
        return f"the tile of slide '{slide}' at x {self.x[index]}, y {self.y[index]}"

    def read(self, index: int) -> np.ndarray:
        try:
            return self.reader.read_tile(int(self.x[index]), int(self.y[index]), self.grid.tile_size, self.grid.mpp)
        except SlideError as error:
            raise UnreadableImage(str(error)) from error


def _fingerprint(state: list[list[Any]]) -> str:
    return hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()


def _file_state(path: str | Path) -> list[int]:
    """Size and time of change of a file, of which nothing is known on a server."""
    try:
        stat = os.stat(path)
    except OSError:  # a URL, or a file that is missing, as opening it will say
        return []
    return [stat.st_size, stat.st_mtime_ns]

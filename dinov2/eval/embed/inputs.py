"""What is embedded, divided into parts: images of a folder, rows of a Parquet dataset, or tissue tiles of slides."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dinov2.data.slides.find import SLIDE_SUFFIXES, find_slides
from dinov2.data.slides.resolution import read_mpp_table
from dinov2.eval.datasets.images import IMAGE_SUFFIXES, ImageFiles
from dinov2.eval.embed.parquet import ParquetRows
from dinov2.eval.embed.slides import Grid, SlideTiles

KINDS = ("images", "parquet", "slides")
_EITHER = IMAGE_SUFFIXES & SLIDE_SUFFIXES
_ENDINGS = {
    "images": IMAGE_SUFFIXES - _EITHER,
    "parquet": {".parquet"},
    "slides": (SLIDE_SUFFIXES - _EITHER) | {".txt", ".csv"},
}


class OpenPart(Protocol):
    """The tiles of one part; `read` may be called from several threads.

    Attributes:
        columns: what the output says of each tile, by column, each as long as the part.
        about: what it says of the part, JSON.
    """

    columns: dict[str, Sequence[Any]]
    about: dict[str, Any]

    def __len__(self) -> int:
        """Number of tiles."""

    def name(self, index: int) -> str:
        """What a message to the user calls a tile."""

    def read(self, index: int) -> np.ndarray:
        """One tile, uint8 (H, W, 3) RGB; raises UnreadableImage."""

    def close(self) -> None:
        """Give back what was opened."""


class TileInput(Protocol):
    """Tiles in a fixed order, cut into parts that are embedded and kept one by one; picklable.

    Attributes:
        kind: one of `KINDS`.
        fingerprint: of what is embedded; equal ones mean equal tiles in equal parts.
        parts: file name of each part's output, without ending.
        part_rows: number of tiles of each part; None where only opening tells.
    """

    kind: str
    fingerprint: str
    parts: list[str]
    part_rows: list[int] | None

    def open(self, number: int) -> OpenPart:
        """Open a part; raises UnreadableImage where it cannot be."""


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
        FileNotFoundError: there is no such input, or nothing in it.
        ValueError: its kind cannot be told or is unknown, or something in it is malformed.
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
        FileNotFoundError: there is no such input, or nothing in it.
        ValueError: the kind is unknown or cannot be told.
    """
    path = Path(source).expanduser()
    if not path.exists():
        is_hub_id = source.count("/") == 1 and not source.startswith(("/", ".", "~"))
        if "://" in source or glob.has_magic(source) or is_hub_id:
            return "slides" if path.suffix.lower() in _ENDINGS["slides"] else "parquet"
        raise FileNotFoundError(
            f"Input '{source}' does not exist; images, Parquet shards or slides are expected."
        )
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


class ImageFolder:
    """Images of a folder and its subfolders by name, or one image.

    Raises:
        FileNotFoundError: there is none.
    """

    kind = "images"

    def __init__(self, path: Path, rows_per_part: int) -> None:
        root, files = (path, _files(path)) if path.is_dir() else (path.parent, [Path(path.name)])
        names = [file.as_posix() for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not names or not path.exists():
            raise FileNotFoundError(
                f"Input '{path}' holds no image; {', '.join(sorted(IMAGE_SUFFIXES))} are read."
            )
        stats = [os.stat(root / name) for name in names]
        state = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, stats, strict=True)]
        self.fingerprint = hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
        self._root, self._names, self._step = root, names, rows_per_part
        starts = range(0, len(names), rows_per_part)
        self.parts = [f"part-{number:06d}" for number in range(len(starts))]
        self.part_rows = [min(rows_per_part, len(names) - start) for start in starts]

    def open(self, number: int) -> ImagePart:
        """The images of a part."""
        first = number * self._step
        return ImagePart(self._root, self._names[first : first + self._step])


class ImagePart(ImageFiles):
    """Some images of a folder."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        super().__init__(root, names)
        self.columns: dict[str, Sequence[Any]] = {"name": self.names}
        self.about: dict[str, Any] = {}

    def close(self) -> None:
        """Nothing is held open."""

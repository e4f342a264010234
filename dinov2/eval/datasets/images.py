"""Pixels of tiles: image files, or the rows of a Parquet dataset."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np

from dinov2.data.images.files import IMAGES
from dinov2.data.source import DecodeError, EncodedSample, Origin, Source, decode_image, origins_of
from dinov2.utils import walk

logger = logging.getLogger("dinov2")

IMAGE_SUFFIXES = frozenset(IMAGES.suffixes)


class UnreadableImage(ValueError):
    """An image cannot be decoded; the message names it."""


class TileImages(Protocol):
    """Tiles by number; methods may be called from several threads."""

    def __len__(self) -> int:
        """Number of tiles."""

    def read(self, index: int) -> np.ndarray:
        """One tile, uint8 (H, W, 3) RGB; raises UnreadableImage."""

    def name(self, index: int) -> str:
        """Name of the tile in a message to the user."""


@dataclass(frozen=True)
class ChosenTiles:
    """Those tiles of others that have the given numbers, as they are or changed."""

    images: TileImages
    numbers: Sequence[int] | np.ndarray
    change: Callable[[np.ndarray], np.ndarray] = np.asarray

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        """As the tile is called."""
        return self.images.name(int(self.numbers[index]))

    def read(self, index: int) -> np.ndarray:
        """Read the tile and change it."""
        return self.change(self.images.read(int(self.numbers[index])))


@dataclass(frozen=True)
class ImageFiles:
    """Image files: a folder, and their paths below it."""

    root: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.root / self.names[index])

    def read(self, index: int) -> np.ndarray:
        """Decode the file, as in training."""
        try:
            return decode_image((self.root / self.names[index]).read_bytes())
        except (OSError, DecodeError) as error:
            raise UnreadableImage(f"Image '{self.name(index)}' cannot be read: {error}.") from error


class ParquetTiles:
    """Rows of open datasets, in stored order one after the other; at most ``limit``, spread evenly over all."""

    def __init__(self, sources: Sequence[Source], limit: int | None = None):
        self._groups = [(source, group) for source in sources for group in range(len(source.group_rows))]
        self._ends = np.cumsum(np.concatenate([np.asarray(source.group_rows, np.int64) for source in sources]))
        total = int(self._ends[-1])
        count = total if limit is None else min(limit, total)
        self._rows = np.arange(count) * total // max(count, 1)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The row as it is stored."""
        source, group, row = self.find(index)
        return source.describe(group, row)

    def read(self, index: int) -> np.ndarray:
        """Fetch and decode one row."""
        source, group, row = self.find(index)
        return decode_row(source, EncodedSample(index, group, row, *source.read(group, [row])[0]))

    def origins(self) -> list[Origin]:
        """Slide of every tile, and its patient and site where the dataset tells them."""
        origins = [origin for source, group in self._groups for origin in origins_of(source, group)]
        return [origins[row] for row in self._rows]

    def find(self, index: int) -> tuple[Source, int, int]:
        """Dataset, row group and row within the row group of a tile."""
        number = int(np.searchsorted(self._ends, self._rows[index], side="right"))
        source, group = self._groups[number]
        return source, group, int(self._rows[index] - self._ends[number] + source.group_rows[group])


def decode_row(source: Source, sample: EncodedSample) -> np.ndarray:
    """Decode a stored row to uint8 (H, W, 3) RGB; raises UnreadableImage."""
    try:
        return source.decode(sample)
    except DecodeError as error:
        name = source.describe(sample.group, sample.row)
        raise UnreadableImage(f"Image in {name} cannot be read: {error}.") from error


def read_tiles(source: Source, limit: int | None = None) -> Iterator[np.ndarray]:
    """Decode tiles of an open dataset in stored order, uint8 (H, W, 3) RGB; each row group is fetched once.

    Corrupt rows are left out with a warning. A limit takes so many rows, spread evenly over the dataset.
    """
    tiles = ParquetTiles([source], limit)
    for group, found in groupby(map(tiles.find, range(len(tiles))), key=lambda location: location[1]):
        rows = [row for _, _, row in found]
        for row, stored in zip(rows, source.read(group, rows), strict=True):
            try:
                yield decode_row(source, EncodedSample(0, group, row, *stored))
            except UnreadableImage as error:
                logger.warning("A tile is left out: %s", error)


def visible_files(folder: Path) -> list[str]:
    """Paths below a folder of all files in it, sorted; hidden files and folders are left out."""
    return sorted(file.relative_to(folder).as_posix() for file in walk.visible_files(folder))

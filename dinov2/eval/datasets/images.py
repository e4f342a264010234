"""Pixels of tiles: image files, or the rows of a Parquet dataset."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np

from dinov2.data.source import DecodeError, EncodedSample, Source, decode_image

logger = logging.getLogger("dinov2")

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})


class UnreadableImage(ValueError):
    """An image cannot be decoded; the message names it."""


class TileImages(Protocol):
    """Tiles by number; methods may be called from several threads."""

    def __len__(self) -> int:
        """Number of tiles."""

    def read(self, index: int) -> np.ndarray:
        """One tile, uint8 (H, W, 3) RGB; raises UnreadableImage."""

    def name(self, index: int) -> str:
        """What a message to the user calls the tile."""


class ImageFiles:
    """Image files under a folder.

    Args:
        root: the folder.
        names: their paths below it.
    """

    def __init__(self, root: Path, names: Sequence[str]):
        self.root, self.names = root, tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.root / self.names[index])

    def read(self, index: int) -> np.ndarray:
        """Decode the file: PNG and JPEG as in training, the rest by Pillow."""
        try:
            data = Path(self.name(index)).read_bytes()
            if data[:3] == b"\xff\xd8\xff" or data[:4] == b"\x89PNG":
                return decode_image(data)
            return _pillow(data)
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
            raise UnreadableImage(f"Image '{self.name(index)}' cannot be read: {error}.") from error


def _pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


class ParquetTiles:
    """Rows of Parquet datasets, one dataset after the other, in stored order.

    Args:
        sources: open datasets.
        limit: take this many rows, spread evenly over all; None takes all.
    """

    def __init__(self, sources: Sequence[Source], limit: int | None = None):
        self._units = [(source, unit) for source in sources for unit in range(len(source.unit_rows))]
        rows = np.concatenate([np.asarray(source.unit_rows, np.int64) for source in sources])
        self._ends = np.cumsum(rows)
        total = int(self._ends[-1])
        count = total if limit is None else min(limit, total)
        self._rows = np.arange(count) * total // max(count, 1)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The row as it is stored."""
        source, unit, row = self._find(index)
        return source.describe(unit, row)

    def read(self, index: int) -> np.ndarray:
        """Fetch and decode one row."""
        source, unit, row = self._find(index)
        ((slide, data),) = source.read(unit, [row])
        try:
            return source.decode(EncodedSample(index, unit, row, slide, data))
        except DecodeError as error:
            raise UnreadableImage(f"Image in {self.name(index)} cannot be read: {error}.") from error

    def slides(self) -> list[str]:
        """Slide name of every tile."""
        names = [slide for source, unit in self._units for slide in source.slides(unit)]
        return [names[row] for row in self._rows]

    def _find(self, index: int) -> tuple[Source, int, int]:
        position = int(np.searchsorted(self._ends, self._rows[index], side="right"))
        source, unit = self._units[position]
        first = int(self._ends[position]) - int(source.unit_rows[unit])
        return source, unit, int(self._rows[index]) - first

    def __iter__(self) -> Iterator[np.ndarray]:
        """All tiles, each row group fetched once; damaged rows are left out with a warning."""
        places = map(self._find, range(len(self)))
        for (source, unit), found in groupby(places, key=lambda place: place[:2]):
            rows = [row for _, _, row in found]
            for row, (slide, data) in zip(rows, source.read(unit, rows), strict=True):
                try:
                    yield source.decode(EncodedSample(0, unit, row, slide, data))
                except DecodeError as error:
                    logger.warning("Left out %s: %s.", source.describe(unit, row), error)


def read_tiles(source: Source, limit: int | None = None) -> Iterator[np.ndarray]:
    """Decode tiles in stored order, leaving out damaged rows with a warning.

    Args:
        source: an open dataset.
        limit: take this many rows, spread evenly over the dataset; None takes all.

    Yields:
        uint8 (H, W, 3) RGB.
    """
    return iter(ParquetTiles([source], limit))

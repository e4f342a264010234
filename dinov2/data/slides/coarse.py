"""Coarse views of slides, the same for every pyramid: what rules of tissue look at."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import cv2
import numpy as np

from dinov2.data.slides.errors import SlideReadError
from dinov2.data.slides.reader import SlideReader

MAP_CELL_PX = 32  # side of a map cell in level-0 px
DOWNSAMPLE = 16  # level-0 px per px of the view, as far as whole pixels of a level allow
_TOLERANCE = 1.01  # of levels that are 16.002 times smaller
_MOST_PIXELS = 1 << 22  # of a level that is read although coarser ones would do
_BLOCK = 128  # side in px of what is looked at at a time, which bounds the memory on slides without a pyramid
_PIECE = 256  # side in px of the level of what is read alone where more cannot be decoded
_MOST_KEPT = 1 << 23  # px of a view that is kept for a second look, 7 bytes each


class Box(NamedTuple):
    """Location of an image on its slide in level-0 px."""

    x: float  # left edge
    y: float  # top edge
    width: float
    height: float


class Block(NamedTuple):
    """Some pixels of a view."""

    column: int  # of the view
    row: int
    image: np.ndarray  # uint8 (H, W, 3) RGB
    weight: np.ndarray  # float32 (H, W), fraction of each pixel that the file holds
    box: Box


class CoarseView:
    """A slide about 16 times smaller, averaged over areas of the coarsest level that is at most that coarse.

    Tiles would change with the depth of a pyramid if its coarsest level were looked at, whatever that is. Levels of up
    to 4 megapixels are so soon read that the finest of them is taken: small slides look the same to the last bit.

    Attributes:
        scale: level-0 px per px of the view.
        columns, rows: of the view, the last ones perhaps partly beyond the slide.
        cell: px of the view along the side of a map cell.
    """

    def __init__(self, reader: SlideReader) -> None:
        self.reader = reader
        fine = [level for level, d in enumerate(reader.level_downsamples) if d <= DOWNSAMPLE * _TOLERANCE] or [0]
        small = (level for level in fine if np.prod(reader.level_dimensions[level], dtype=float) <= _MOST_PIXELS)
        self._level = next(small, fine[-1])
        downsample = reader.level_downsamples[self._level]
        self._factor = max(1, int(DOWNSAMPLE * _TOLERANCE / downsample))
        self.scale = self._factor * downsample
        self.cell = max(1, round(MAP_CELL_PX / self.scale))
        self._side, self._kept = _BLOCK - _BLOCK % self.cell, []
        self.columns, self.rows = (-(-side // self._factor) for side in reader.level_dimensions[self._level])

    def blocks(self, read: bool = True, keep: bool = False) -> Iterator[Block]:
        """Squares of whole map cells, row by row, black without `read`.

        Pixels that the file lacks or that cannot be decoded have no weight; SlideReadError if there are no others. With
        `keep` they are not read again the next time, if that does not take too much memory.
        """
        if self._kept:
            yield from self._kept
            return
        kept, side = [], self._side
        for column, row, image, known in self._read() if read else ():
            block = self._block(column // self._factor, row // self._factor, *_averaged(image, known, self._factor))
            if keep and self.columns * self.rows <= _MOST_KEPT:
                kept.append(block)
            yield block
        self._kept = kept
        for row, column in () if read else np.ndindex(-(-self.rows // side), -(-self.columns // side)):
            shape = min(side, self.rows - row * side), min(side, self.columns - column * side)
            yield self._block(column * side, row * side, np.zeros((*shape, 3), np.uint8), np.ones(shape, np.float32))

    def _read(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """As `SlideReader.read_blocks`, but what cannot be decoded is unknown; SlideReadError if that is everything."""
        side, (width, height) = self._side * self._factor, self.reader.level_dimensions[self._level]
        is_any, error = False, None
        for row, column in np.ndindex(-(-height // side), -(-width // side)):
            x, y = column * side, row * side
            shape = min(side, height - y), min(side, width - x)
            try:
                pixels, known = self.reader.read_known(self._level, x, y, *shape[::-1])
            except SlideReadError as raised:
                error = raised
                pixels, known = self._salvaged(x, y, shape)
            is_any |= bool(known.any())
            yield x, y, pixels, known
        if error and not is_any:
            raise error

    def _salvaged(self, x: int, y: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Read a square piece by piece."""
        pixels, known = np.zeros((*shape, 3), np.uint8), np.zeros(shape, bool)
        for top, left in itertools.product(range(0, shape[0], _PIECE), range(0, shape[1], _PIECE)):
            piece = slice(top, top + _PIECE), slice(left, left + _PIECE)
            size = known[piece].shape[::-1]
            with suppress(SlideReadError):
                pixels[piece], known[piece] = self.reader.read_known(self._level, x + left, y + top, *size)
        return pixels, known

    def _block(self, column: int, row: int, image: np.ndarray, weight: np.ndarray) -> Block:
        height, width = (side * self.scale for side in weight.shape)
        return Block(column, row, image, weight, Box(column * self.scale, row * self.scale, width, height))


def _averaged(image: np.ndarray, known: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Average squares of pixels over those that are known, and how many of each these are, in [0, 1]."""
    if factor == 1:
        return image, known.astype(np.float32)
    height, width = (-(-side // factor) for side in known.shape)
    shrink = {"dsize": (width, height), "interpolation": cv2.INTER_AREA}
    if known.all() and known.shape == (height * factor, width * factor):
        return cv2.resize(image, **shrink), np.ones((height, width), np.float32)
    beyond = [(0, -side % factor) for side in known.shape]
    weight = cv2.resize(np.pad(known, beyond).astype(np.float32), **shrink)
    total = cv2.resize(np.pad(image * known[..., None], [*beyond, (0, 0)]).astype(np.float32), **shrink)
    return np.rint(total / np.maximum(weight, 1e-6)[..., None]).clip(0, 255).astype(np.uint8), weight

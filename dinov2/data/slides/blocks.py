"""Tiles of slides: where they lie in the file, compressed, and regions put together from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from dinov2.data.slides.codecs import decode_tile
from dinov2.data.slides.errors import SlideOpenError, SlideReadError
from dinov2.data.slides.resolution import MppSource


class Region(NamedTuple):
    """A rectangle of a level, in px of that level."""

    level: int
    column: int
    row: int
    width: int
    height: int


class Block(NamedTuple):
    """A tile of a level, by its row and column in the grid."""

    row: int
    column: int


@dataclass(frozen=True, eq=False)
class TileLevel:
    """One level of a pyramid: a grid of tiles.

    Attributes:
        width, height: of the level in px.
        tile_width, tile_height: of every tile in px; those at the right and lower edge hold padding.
        offsets: int64 (rows, columns), first byte of each tile in the file.
        lengths: int32 (rows, columns), bytes of each tile; 0 where the file holds none.
        compression: of all tiles.
        photometric: how their components are stored.
        jpeg_tables: JPEG segments that all tiles share, b"" if none.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: np.ndarray
    lengths: np.ndarray
    compression: Literal["jpeg", "j2k"]
    photometric: Literal["rgb", "ycbcr"]
    jpeg_tables: bytes

    def decode(self, tile: bytes) -> np.ndarray:
        """Decode one of its tiles: uint8 (tile_height, tile_width, 3); ValueError if it is damaged."""
        size = self.tile_width, self.tile_height
        return decode_tile(tile, self.compression, self.photometric, self.jpeg_tables, *size)


@dataclass(frozen=True, eq=False)
class TileIndex:
    """All that is needed to read a slide's tiles without parsing its file.

    Attributes:
        path: path or URL of the file.
        size: of the file in bytes.
        levels: finest first.
        downsamples: level-0 px per px of each level.
        mpp, mpp_source: micrometres per level-0 px and where they come from, see `resolution.resolve_mpp`.
    """

    path: str
    size: int
    levels: tuple[TileLevel, ...]
    downsamples: tuple[float, ...]
    mpp: float | None
    mpp_source: MppSource

    def __post_init__(self) -> None:
        sizes = tuple((level.width, level.height) for level in self.levels)
        if not is_pyramid(sizes):
            raise SlideOpenError(self.path, f"its levels {sizes} are not a pyramid of falling sizes")
        for number, level in enumerate(self.levels):
            last = int(np.max(level.offsets + level.lengths))
            if last > self.size or int(np.min(level.offsets)) < 0 or int(np.min(level.lengths)) < 0:
                reason = f"not a whole slide, its tiles reach to byte {last} of {self.size}"
                raise SlideOpenError(self.path, reason, f"level {number}")


def is_pyramid(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether (width, height) of levels are positive and fall."""
    falling = all(b[0] < a[0] and b[1] < a[1] for a, b in pairwise(sizes))
    return bool(sizes) and min(map(min, sizes)) >= 1 and falling


def covering(level: TileLevel, region: Region) -> list[Block]:
    """The tiles that a region touches, row by row."""
    rows = range(region.row // level.tile_height, (region.row + region.height - 1) // level.tile_height + 1)
    first, last = region.column // level.tile_width, (region.column + region.width - 1) // level.tile_width
    return [Block(row, column) for row in rows for column in range(first, last + 1)]


def ranges(index: TileIndex, region: Region) -> list[tuple[int, int]]:
    """(offset, length) in the file of the tiles that cover a region, row by row; length 0 where one is missing."""
    level = index.levels[region.level]
    return [(int(level.offsets[block]), int(level.lengths[block])) for block in covering(level, region)]


def paste(level: TileLevel, region: Region, block: Block, pixels: np.ndarray, out: np.ndarray) -> None:
    """Copy what a tile (H, W, ...) shares with a region into an array of the region's size."""
    top, left = block.row * level.tile_height, block.column * level.tile_width
    row, column = max(region.row, top), max(region.column, left)
    bottom = min(region.row + region.height, top + level.tile_height)
    right = min(region.column + region.width, left + level.tile_width)
    target = out[row - region.row : bottom - region.row, column - region.column : right - region.column]
    target[...] = pixels[row - top : bottom - top, column - left : right - left]


def assemble(index: TileIndex, region: Region, tiles: Sequence[bytes]) -> np.ndarray:
    """Decode the tiles that `ranges` named and cut a region out of them.

    Args:
        index: of the slide.
        region: wholly on its level.
        tiles: bytes of the tiles, in the order of `ranges`.

    Returns:
        uint8 (region.height, region.width, 3) RGB.

    Raises:
        SlideReadError: if a tile is missing or damaged.
    """
    level = index.levels[region.level]
    out = np.empty((region.height, region.width, 3), np.uint8)
    for block, tile in zip(covering(level, region), tiles, strict=True):
        location = f"level {region.level}, tile row {block.row}, tile column {block.column}"
        if not tile:
            raise SlideReadError(index.path, "the tile is missing from the file", location)
        try:
            paste(level, region, block, level.decode(tile), out)
        except ValueError as error:
            raise SlideReadError(index.path, f"its pixels cannot be decoded ({error})", location) from error
    return out

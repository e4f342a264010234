"""Blocks of slides: where they lie in the file, compressed; decoded exactly or not at all; regions made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dinov2.data.slides.errors import SlideOpenError, SlideReadError, import_package
from dinov2.data.slides.resolution import Mpp, MppSource, Resolution

# Says how colours are stored; without it decoders take three components for YCbCr, which RGB tiles are not.
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # and 0 for RGB, 1 for YCbCr
# Most codecs have no checks of their own. Runs of zeros are short, unless a block of the disk was never written.
_HOLE = bytes(512)
_J2K_START, _J2K_TILE_PART, _J2K_END = b"\xff\x4f\xff\x51", b"\xff\x90", b"\xff\xd9"


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
    """One level of a pyramid: a grid of tiles of one size, of which those at the right and lower edge hold padding."""

    width: int  # of the level in px
    height: int
    tile_width: int
    tile_height: int
    offsets: np.ndarray  # int64 (rows, columns), first byte of each tile in the file
    lengths: np.ndarray  # int32 (rows, columns), bytes of each tile; 0 where the file holds none
    compression: Literal["jpeg", "j2k", "webp", "png", "jxl", "other"]  # j2k: a JPEG 2000 codestream
    photometric: Literal["rgb", "ycbcr"]  # how the stored components are meant
    jpeg_tables: bytes  # JPEG segments that all tiles share, b"" if none

    def segments(self, block: "Block") -> list[tuple[int, int]]:
        """(offset, length) in the file of the bytes that make one of its tiles."""
        return [(int(self.offsets[block]), int(self.lengths[block]))]

    @property
    def last_byte(self) -> int:
        """End of the last tile in the file."""
        return int(np.max(self.offsets + self.lengths))

    def join(self, block: "Block", data: Sequence[bytes]) -> np.ndarray:
        """Decode what `segments` named; as `decode`."""
        return self.decode(data[0])

    def decode(self, tile: bytes) -> np.ndarray:
        """Decode one of its tiles: uint8 (tile_height, tile_width, 3) RGB; ValueError if it is cut or corrupt."""
        try:
            if self.compression == "jpeg":
                pixels = decode_jpeg(tile, self.jpeg_tables, self.photometric)
            elif self.compression == "j2k":
                pixels = self._jpeg2000(tile)
            else:
                pixels = self._other(tile)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        shape = self.tile_height, self.tile_width, 3
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"the tile decodes to {pixels.dtype} {pixels.shape}, not uint8 {shape}")
        return pixels

    def _jpeg2000(self, tile: bytes) -> np.ndarray:
        imagecodecs = import_package("imagecodecs", "JPEG 2000 slides need imagecodecs")
        check_codestream(tile)
        pixels = imagecodecs.jpeg2k_decode(tile)
        return _rgb_of_ycbcr(pixels) if self.photometric == "ycbcr" and pixels.ndim == 3 else pixels

    def _other(self, tile: bytes) -> np.ndarray:
        imagecodecs = import_package("imagecodecs", f"Slides of {self.compression} tiles need imagecodecs")
        if self.compression == "png":  # has checksums
            return imagecodecs.png_decode(tile)
        if _HOLE in tile:
            raise ValueError("the tile has a hole of zeros")
        return imagecodecs.webp_decode(tile) if self.compression == "webp" else imagecodecs.jpegxl_decode(tile)


def decode_jpeg(tile: bytes, tables: bytes, photometric: Literal["rgb", "ycbcr", "grey"]) -> np.ndarray:
    """Decode a JPEG tile: uint8 (H, W, 3) RGB, of grey (H, W, 1); ValueError if it is cut or corrupt.

    Args:
        tile: what the file holds.
        tables: JPEG segments that tiles share, b"" if none.
        photometric: what the components stand for; what the tile says of it does not count.
    """
    # It refuses damage that other decoders hide behind grey.
    simplejpeg = import_package("simplejpeg", "JPEG slides need simplejpeg")
    start, rest = tile[:2], _without_applications(tile[2:])
    if start != b"\xff\xd8":
        raise ValueError("the tile is no JPEG")
    colours = b"" if photometric == "grey" else _ADOBE + bytes([photometric == "ycbcr"])
    whole = b"".join((start, _without_applications(tables[2:-2]), colours, rest))
    return simplejpeg.decode_jpeg(whole, "GRAY" if photometric == "grey" else "RGB", strict=True)


@dataclass(frozen=True, eq=False)
class TileIndex:
    """All that is needed to read a slide's tiles without parsing its file; SlideOpenError where it makes no sense."""

    path: str  # path or URL of the file
    size: int  # of the file in bytes
    levels: tuple[TileLevel, ...]  # finest first
    downsamples: tuple[float, ...]  # level-0 px per px of each level
    resolution: Resolution

    @property
    def mpp(self) -> Mpp:
        """Micrometres per level-0 px."""
        return self.resolution.mpp

    @property
    def mpp_source(self) -> MppSource:
        """Where it comes from."""
        return self.resolution.source

    def __post_init__(self) -> None:
        check_pyramid(self.path, [(level.width, level.height) for level in self.levels])
        for number, level in enumerate(self.levels):
            last = level.last_byte
            if last > self.size or int(np.min(level.offsets)) < 0 or int(np.min(level.lengths)) < 0:
                reason = f"not a whole slide, its tiles reach to byte {last} of {self.size}"
                raise SlideOpenError(self.path, reason, f"level {number}")


def falling(sizes: Sequence[tuple[int, int]]) -> int:
    """Number of (width, height) from the first on of which each is smaller in both than the one before.

    Some writers go on until the last levels are equal; those do not count.
    """
    stalls = (number for number, (a, b) in enumerate(pairwise(sizes), 1) if b[0] >= a[0] or b[1] >= a[1])
    return next(stalls, len(sizes))


def check_pyramid(path: str | Path, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise SlideOpenError unless there are levels whose (width, height) are positive and fall."""
    if not sizes or min(map(min, sizes)) < 1 or falling(sizes) < len(sizes):
        raise SlideOpenError(path, f"its levels {tuple(sizes)} are not a pyramid of falling sizes")


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
    """Cut a region out of tiles that `ranges` named: uint8 (H, W, 3) RGB; SlideReadError if one is missing or bad."""
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


def _without_applications(segments: bytes) -> bytes:
    """Leave out leading JFIF, Adobe and other application segments: how colours are stored, the TIFF tag says."""
    position = 0
    while segments[position : position + 1] == b"\xff" and b"\xe0" <= segments[position + 1 : position + 2] <= b"\xef":
        position += 2 + int.from_bytes(segments[position + 2 : position + 4], "big")
    return segments[position:]


def check_codestream(tile: bytes) -> None:
    """Walk a codestream's parts to its end marker: the decoder itself fills what is missing."""
    if tile[:4] != _J2K_START:
        raise ValueError("the tile is no JPEG 2000 codestream")
    position = 2
    while tile[position : position + 1] == b"\xff" and tile[position : position + 2] != _J2K_TILE_PART:
        position += 2 + int.from_bytes(tile[position + 2 : position + 4], "big")
    while tile[position : position + 2] == _J2K_TILE_PART:
        length = int.from_bytes(tile[position + 6 : position + 10], "big")
        position = position + length if length else len(tile.rstrip(b"\x00")) - 2  # 0: up to the end marker
        if 0 < length < 14:
            raise ValueError("the tile is a corrupt JPEG 2000 codestream")
    if tile[position : position + 2] != _J2K_END:
        raise ValueError("the tile is a JPEG 2000 codestream without its end")
    if _HOLE in tile:
        raise ValueError("the tile is a JPEG 2000 codestream with a hole of zeros")


def _rgb_of_ycbcr(pixels: np.ndarray) -> np.ndarray:
    """BT.601, full range, in 16-bit fixed point."""
    one, half = 1 << 16, 1 << 15
    luma = pixels[..., 0].astype(np.int32)
    blue, red = pixels[..., 1].astype(np.int32) - 128, pixels[..., 2].astype(np.int32) - 128
    r = luma + ((round(1.40200 * one) * red + half) >> 16)
    g = luma + ((half - round(0.344136 * one) * blue - round(0.714136 * one) * red) >> 16)
    b = luma + ((round(1.77200 * one) * blue + half) >> 16)
    return np.clip(np.stack([r, g, b], axis=-1), 0, 255).astype(np.uint8)

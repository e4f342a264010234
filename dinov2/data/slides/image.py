"""Images in one piece (striped TIFF, PNG, JPEG, JPEG 2000, WebP, BMP) as slides of one level, held in memory."""

import os
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.slides.blocks import Region, TileIndex, covering, paste
from dinov2.data.slides.errors import SlideOpenError, UnsupportedTiles
from dinov2.data.slides.pages import MAX_WHOLE_BYTES, STORE_IN_TILES, check_whole, index_pages
from dinov2.data.slides.ranges import SlideBytes
from dinov2.data.slides.resolution import Resolution
from dinov2.data.source import DecodeError, decode_image, image_format

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".webp", ".bmp"}  # no slides where a folder is searched
_HELD = 2  # images that a process holds, so at most twice MAX_WHOLE_BYTES
_LONGEST_START = 16  # bytes that tell formats apart


class ImageReader:
    """One image, decoded when first read; the last ones read stay in memory, whoever reads them.

    Args:
        path: the file.
        mpp: micrometres per px; what such files say of it is meant for print.
        index: of `pages.index_pages` of the TIFF file, if it is one.

    Raises:
        UnsupportedTiles: if it is no image of a known format.
        SlideOpenError: if it takes too much memory, or its header is corrupt.
    """

    def __init__(self, path: Path, mpp: float | None, index: TileIndex | None = None) -> None:
        self._path = path
        if index is None:
            with path.open("rb") as file:
                if image_format(file.read(_LONGEST_START)) in ("", "TIFF"):
                    raise UnsupportedTiles(path, "no image in one piece")
        self._decode = _decoded if index is None or index.levels[0].is_whole else _decoded_strips
        self.level_dimensions = (_size(path) if index is None else (index.levels[0].width, index.levels[0].height),)
        self.level_downsamples = (1.0,)
        self.resolution = Resolution(user=mpp) if index is None else index.resolution

    def read(self, region: Region) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of a region, uint8 (H, W, 3), and which the file holds, bool (H, W); ValueError if corrupt."""
        pixels, known = self._decode(self._path, os.stat(self._path).st_mtime_ns)
        if pixels.shape[1::-1] != self.level_dimensions[0]:
            raise SlideOpenError(self._path, f"it decodes to {pixels.shape[1]} x {pixels.shape[0]} px")
        part = slice(region.row, region.row + region.height), slice(region.column, region.column + region.width)
        return pixels[part].copy(), known[part].copy()

    def close(self) -> None:
        """Nothing is kept open."""


def _size(path: Path) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                width, height = image.size
                turned = image.getexif().get(0x0112, 1) >= 5  # orientation, which the decoder applies
        except Image.DecompressionBombError as error:
            reason = f"in one piece it takes more than {MAX_WHOLE_BYTES / 2**30:g} GiB of memory ({error})"
            raise SlideOpenError(path, f"{reason}; {STORE_IN_TILES}") from error
        except OSError as error:
            raise SlideOpenError(path, f"its image cannot be opened ({error})") from error
    check_whole(path, width, height)
    return (height, width) if turned else (width, height)


@lru_cache(_HELD)
def _decoded(path: Path, changed: int) -> tuple[np.ndarray, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            pixels = decode_image(path.read_bytes())
        except DecodeError as error:
            raise ValueError(str(error)) from error
    return pixels, np.broadcast_to(np.True_, pixels.shape[:2])


@lru_cache(_HELD)
def _decoded_strips(path: Path, changed: int) -> tuple[np.ndarray, np.ndarray]:
    level, file = index_pages(path).levels[0], SlideBytes(path)
    region = Region(0, 0, 0, level.width, level.height)
    pixels, known = np.zeros((level.height, level.width, 3), np.uint8), np.ones((level.height, level.width), bool)
    for block in covering(level, region):
        if level.lengths[block]:
            paste(level, region, block, level.join(block, file.read(level.segments(block))), pixels)
        else:
            known[block.row * level.tile_height : (block.row + 1) * level.tile_height] = False
    return pixels, known

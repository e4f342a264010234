"""Whole-slide images, of which regions are read exactly or not at all, from blocks' bytes or through OpenSlide."""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dinov2.data.slides import errors
from dinov2.data.slides.blocks import Block, Region, TileIndex, check_pyramid, covering, falling, paste
from dinov2.data.slides.errors import (
    SlideError,
    SlideOpenError,
    SlideRangeError,
    SlideReadError,
    UnsupportedTiles,
    not_read,
)
from dinov2.data.slides.identity import missing_companions
from dinov2.data.slides.image import ImageReader
from dinov2.data.slides.pages import index_pages
from dinov2.data.slides.ranges import SlideBytes, is_remote
from dinov2.data.slides.resolution import (
    LIKE,
    MPP_TOLERANCE,
    check_user_mpp,
    coarsest_level,
    number,
    power_of,
    resolve_mpp,
)
from dinov2.data.slides.tiff import index_slide
from dinov2.data.storage.retry import RemoteError

logger = logging.getLogger(__name__)
_ROUNDING_PX = 2  # px by which rounding may push a tile at the slide's border over it


class SlideReader:
    """One slide that is parsed once and reads regions at whole pixels of a level's own grid.

    Blocks are read from their bytes where possible, else tifffile decodes them or OpenSlide reads the slide; see
    `_open`. Threads may share a reader; in a
    forked or spawned process it opens the file again.

    Args:
        path: a slide, or an fsspec URL of one whose blocks can be read from their bytes.
        mpp: micrometres per level-0 px, in place of what the slide says.
        cache_bytes: decoded blocks of this slide that may be kept.
        index: of this slide, wherever it lay when it was indexed; it is then not parsed.
        mpp_tolerance: fraction by which level 0 may be coarser than a resolution that is asked for.

    Attributes:
        path: the file, text where it is a URL.
        level_dimensions, level_downsamples: (width, height) in px, and level-0 px per px, of each level.
        mpp, mpp_source: micrometres per level-0 px or None, and where it comes from: "slide", 10 / its objective
            power ("appmag"), "user", or "none".
        resolution: both, with what a user should know of them.

    Raises:
        SlideOpenError, RemoteError, ValueError: as `tiff.index_slide` does; SlideOpenError also if OpenSlide cannot.
    """

    def __init__(
        self, path: str | Path, mpp: float | None = None, cache_bytes: int = 8 << 20, index: TileIndex | None = None,
        mpp_tolerance: float = MPP_TOLERANCE,
    ) -> None:  # fmt: skip
        check_user_mpp(path, mpp)
        self.path = str(path) if is_remote(path) else Path(path)
        self.mpp_tolerance = mpp_tolerance
        if index is None:
            self._pixels = _open(self.path, mpp, cache_bytes)
        else:
            self._pixels = TileReader(replace(index, path=str(path)), cache_bytes)
        # An index may hold another of the user's.
        self.resolution = self._pixels.resolution if mpp is None else self._pixels.resolution.given(mpp)
        self.mpp, self.mpp_source = self.resolution.mpp, self.resolution.source
        self.level_dimensions: tuple[tuple[int, int], ...] = self._pixels.level_dimensions
        self.level_downsamples: tuple[float, ...] = self._pixels.level_downsamples

    def snap(self, level: int, x: int, y: int) -> tuple[int, int]:
        """Column and row of the level's pixel nearest to a level-0 position."""
        downsample = self._downsample(level)
        return round(x / downsample), round(y / downsample)

    def origin(self, level: int, column: int, row: int) -> tuple[int, int]:
        """Level-0 position (x, y) of a level's pixel, rounded; `snap` takes it back to the same pixel."""
        downsample = self._downsample(level)
        return round(column * downsample), round(row * downsample)

    def level_for(self, target_mpp: float) -> int:
        """The coarsest level at most 1 % coarser than a resolution in um/px, else level 0 within `mpp_tolerance`.

        SlideRangeError without one or an mpp.
        """
        finest = self._known_mpp()
        level = coarsest_level(self.level_downsamples, finest, target_mpp, self.mpp_tolerance)
        if level is None:
            limit = f"{target_mpp:g} um/px asked for by more than {self.mpp_tolerance:.0%}"
            reason = f"level 0 has {finest:g} um/px, which is coarser than the {limit}"
            raise SlideRangeError(self.path, reason)
        return level

    def resampling(self, target_mpp: float) -> str:
        """What to say of a resolution that is finer than level 0, "" where it is not."""
        if self.mpp is None or not 0 < target_mpp * LIKE < self.mpp:
            return ""
        return f"level 0 of {self.mpp:g} um/px is resampled to the {target_mpp:g} um/px asked for"

    def tile_side(self, size: int, target_mpp: float) -> float:
        """Side in level-0 px of a tile that shows `size` px of `target_mpp` um; SlideRangeError without an mpp."""
        return size * target_mpp / self._known_mpp()

    def read_tile(self, x: int, y: int, size: int, target_mpp: float) -> np.ndarray:
        """Read a tile of `size` px at a resolution in um/px, resized from the level that `level_for` gives.

        Its upper left corner in level-0 px is snapped to the level's grid; a tile that only rounding takes over the
        slide's border is moved back on it. Gives uint8 (size, size, 3) RGB; raises as `level_for` and `read_region`.
        """
        level = self.level_for(target_mpp)
        side = max(1, round(self.tile_side(size, target_mpp) / self.level_downsamples[level]))
        corner = []
        for first, length in zip(self.snap(level, x, y), self.level_dimensions[level], strict=True):
            last = length - side
            corner.append(last if 0 <= last < first <= last + _ROUNDING_PX else first)
        tile = self.read_region(level, *corner, side, side)
        return resized(tile, size)

    def read_region(self, level: int, column: int, row: int, width: int, height: int) -> np.ndarray:
        """Read a region, in px of its level (0 is the finest): uint8 (height, width, 3) RGB, contiguous.

        Raises:
            SlideRangeError: if there is no such level, or the region leaves it.
            SlideReadError: if pixels are missing, or cannot be read or decoded.
            SlideOpenError: if the file has changed since it was opened.
            RemoteError: if the server cannot be read.
        """
        pixels, known = self.read_known(level, column, row, width, height)
        if not known.all():
            reason = f"{known.size - np.count_nonzero(known)} of its pixels are missing from the file"
            raise SlideReadError(self.path, reason, _location(Region(level, column, row, width, height)))
        return pixels

    def read_known(self, level: int, column: int, row: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Like `read_region`, but says which pixels the file holds: (uint8 (H, W, 3), bool (H, W))."""
        self._downsample(level)
        region = Region(level, column, row, width, height)
        level_width, level_height = self.level_dimensions[level]
        inside = 0 <= column <= level_width - width and 0 <= row <= level_height - height
        if not (inside and width > 0 and height > 0):
            reason = f"the region leaves the level of {level_width}x{level_height} px"
            raise SlideRangeError(self.path, reason, _location(region))
        try:
            return self._pixels.read(region)
        except (RemoteError, SlideError):
            raise
        except (OSError, ValueError) as error:
            what = "bytes cannot be read" if isinstance(error, OSError) else "pixels cannot be decoded"
            raise SlideReadError(self.path, f"its {what} ({error})", _location(region)) from error

    def read_blocks(self, level: int, side: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Read a whole level by squares of at most `side` px: column, row, and what `read_known` gives of each."""
        width, height = self.level_dimensions[level]
        for row in range(0, height, side):
            for column in range(0, width, side):
                size = min(side, width - column), min(side, height - row)
                yield column, row, *self.read_known(level, column, row, *size)

    def close(self) -> None:
        """Give the file handle back; the next read opens it again."""
        self._pixels.close()

    def _known_mpp(self) -> float:
        if self.mpp is None:
            raise SlideRangeError(self.path, "its resolution is unknown; give an mpp for it")
        return self.mpp

    def _downsample(self, level: int) -> float:
        if not 0 <= level < len(self.level_downsamples):
            reason = f"the slide has levels 0 to {len(self.level_downsamples) - 1}"
            raise SlideRangeError(self.path, reason, f"level {level}")
        return self.level_downsamples[level]


def resized(tile: np.ndarray, size: int) -> np.ndarray:
    """Resize a square RGB tile to a side in px, by area to fewer pixels and by cubic splines to more."""
    side = len(tile)
    if side == size:
        return tile
    return cv2.resize(tile, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)


def too_small(level: int, size: tuple[int, int], side: int, tile_size: int, mpp: float) -> str:
    """Say that a level of (width, height) px cannot hold a tile that spans `side` px of it; "" where it can.

    The finished tile has `tile_size` px, at `mpp` um per px, 0 where it is as the level.
    """
    if side <= min(size):
        return ""
    asked = f" for {tile_size} px of {mpp:g} um" if mpp else ""
    return f"its level {level} has {size[0]}x{size[1]} px, but a tile takes {side}x{side} px of it{asked}"


def _open(path: Path | str, mpp: float | None, cache_bytes: int) -> "TileReader | OpenSlideReader | ImageReader":
    """Choose the fastest of the readers that read a slide rightly.

    With equal caches blocks that are decoded here give more tiles per second of CPU than OpenSlide in every codec
    (JPEG 2000 at level 0 1.2 times as many, deflate 3 times; docs/slides.md), so it reads only what they cannot.
    """
    try:
        return TileReader(index_slide(path, mpp), cache_bytes)
    except UnsupportedTiles as error:
        reasons = [error.reason]
    try:
        index = index_pages(path, mpp)
        if index.levels[0].is_tiled or is_remote(path):
            return TileReader(index, cache_bytes)
        return ImageReader(Path(path), mpp, index)
    except UnsupportedTiles as error:
        reasons.append(error.reason)
    if is_remote(path):
        raise UnsupportedTiles(path, "; ".join(dict.fromkeys(reasons)))
    try:
        return OpenSlideReader(path, mpp, cache_bytes)  # before images, since MIRAX begins as a JPEG image does
    except UnsupportedTiles as error:
        reasons.append(error.reason)
    with suppress(UnsupportedTiles):
        return ImageReader(path, mpp)
    raise SlideOpenError(path, not_read(path, missing_companions(path), reasons))


def _location(region: Region) -> str:
    return f"level {region.level}, column {region.column}, row {region.row}, {region.width}x{region.height} px"


class TileReader:
    """One slide, read block by block at the whole pixels of each level's grid; the decoded blocks used last are kept.

    Holds no lock or file position: threads and forks may share it. A block that two want at once is decoded twice.
    """

    def __init__(self, index: TileIndex, cache_bytes: int) -> None:
        self._index, self._bytes = index, SlideBytes(index.path)
        self._capacity = cache_bytes // max(3 * level.tile_width * level.tile_height for level in index.levels)
        self._cache: dict[tuple[int, Block], np.ndarray] = {}
        self.level_dimensions = tuple((level.width, level.height) for level in index.levels)
        self.level_downsamples, self.resolution = index.downsamples, index.resolution

    def read(self, region: Region) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of a region, uint8 (H, W, 3), 0 where the file has no block, and which the file holds, bool (H, W)."""
        level = self._index.levels[region.level]
        out = np.empty((region.height, region.width, 3), np.uint8)
        known = np.ones(out.shape[:2], bool)
        for block, tile in self._tiles(region).items():
            if tile is None:
                tile = np.zeros((level.tile_height, level.tile_width, 3), np.uint8)
                paste(level, region, block, tile[..., 0] > 0, known)
            paste(level, region, block, tile, out)
        return out, known

    def close(self) -> None:
        """Give the file handle and the decoded blocks back; the next read opens the file again."""
        self._bytes.close()
        self._cache.clear()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": {}}

    def _tiles(self, region: Region) -> dict[Block, np.ndarray | None]:
        """Decoded blocks that cover a region, None where the file has none."""
        level, tiles = self._index.levels[region.level], {}
        for block in covering(level, region):
            tiles[block] = tile = self._cache.pop((region.level, block), None)
            if tile is not None:
                self._cache[region.level, block] = tile  # now the youngest
        wanted = {block: level.segments(block) for block in tiles if tiles[block] is None and level.lengths[block]}
        data = iter(self._read_ranges(list(chain.from_iterable(wanted.values()))))
        for block, segments in wanted.items():
            try:
                tiles[block] = level.join(block, list(islice(data, len(segments))))
            except ValueError as error:
                raise ValueError(f"tile row {block.row}, tile column {block.column}: {error}") from error
            # Single operations on a dict are safe in threads; a lock would be lost in a fork.
            if self._capacity:
                self._cache[region.level, block] = tiles[block]
            while len(self._cache) > self._capacity:
                try:
                    self._cache.pop(next(iter(self._cache)), None)
                except (RuntimeError, StopIteration):  # another thread changed it in between
                    continue
        return tiles

    def _read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        try:
            if not is_remote(self._index.path) and self._bytes.size() != self._index.size:
                reason = f"it has {self._bytes.size()} bytes, but {self._index.size} when it was indexed"
                raise SlideOpenError(self._index.path, reason)
            return self._bytes.read(ranges)
        except RemoteError:
            raise
        except OSError as first:  # a handle of a network disk that has been away stays broken
            logger.debug("reading again through a fresh handle after: %s", first)
            self._bytes.close()
            return self._bytes.read(ranges)


class OpenSlideReader:
    """One slide through OpenSlide, which keeps its handle until an error or a fork.

    OpenSlide places regions in whole level-0 pixels; where the downsample is not a whole number, it interpolates
    over an offset of at most half a level-0 pixel.
    """

    def __init__(self, path: Path, mpp: float | None, cache_bytes: int) -> None:
        self._path, self._cache_bytes = path, cache_bytes
        self._handle, self._pid = None, -1
        handle = self._opened()
        levels = falling(handle.level_dimensions)
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions[:levels]
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples[:levels]
        check_pyramid(path, self.level_dimensions)
        said = handle.properties
        power = power_of(said.get("openslide.objective-power")) or power_of(said.get("aperio.AppMag"))
        sides = [number(said.get(f"openslide.mpp-{axis}")) for axis in "xy"]
        explicit = said.get("openslide.vendor") != "generic-tiff"  # which has nothing but the tags
        self.resolution = resolve_mpp(sides, power, explicit=explicit).given(mpp)

    def read(self, region: Region) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of a region, and which of them the file holds; ValueError if they cannot be decoded."""
        downsample = self.level_downsamples[region.level]
        location = round(region.column * downsample), round(region.row * downsample)
        for is_last in (False, True):
            try:
                rgba = np.asarray(self._opened().read_region(location, region.level, (region.width, region.height)))
                break
            except Exception as error:
                self._handle = None  # OpenSlide keeps failing on a handle that failed once
                if is_last:
                    raise ValueError(str(error)) from error
                logger.debug("reading again through a fresh handle after: %s", error)
        # Alpha is 0 where the file has no block; resampling leaves 253 or 254 on single sound pixels.
        return np.ascontiguousarray(rgba[..., :3]), rgba[..., 3] > 0

    def close(self) -> None:
        """Give the file handle back; the next read opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None and self._pid == os.getpid():
            handle.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _opened(self) -> Any:
        handle = self._handle
        if handle is not None and self._pid == os.getpid():
            return handle
        openslide = errors.import_package("openslide", "Slides need openslide-python and openslide-bin")
        try:
            handle = openslide.OpenSlide(self._path)
        except openslide.OpenSlideError as error:
            reason = f"not a whole slide in a format of OpenSlide's ({self._path.stat().st_size} bytes; {error})"
            raise UnsupportedTiles(self._path, reason) from error
        handle.set_cache(openslide.OpenSlideCache(self._cache_bytes))
        self._handle, self._pid = handle, os.getpid()
        return handle

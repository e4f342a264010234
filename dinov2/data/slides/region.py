"""Regions of slides, from the bytes of their tiles or through OpenSlide."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.slides.blocks import Block, Region, TileIndex, check_pyramid, covering, paste
from dinov2.data.slides.errors import SlideOpenError, import_package
from dinov2.data.slides.ranges import SlideBytes, is_remote
from dinov2.data.slides.resolution import number, resolve_mpp
from dinov2.data.storage.retry import RemoteError

logger = logging.getLogger(__name__)


class TileReader:
    """One slide, read tile by tile at the whole pixels of each level's grid.

    Holds no lock and no file position, so threads and forked processes may share it. A tile that two threads want
    at once is decoded twice.

    Args:
        index: of the slide.
        cache_bytes: decoded tiles to keep, those used last.

    Attributes:
        level_dimensions, level_downsamples, mpp, mpp_source: as in `SlideReader`.
    """

    def __init__(self, index: TileIndex, cache_bytes: int) -> None:
        self._index, self._bytes = index, SlideBytes(index.path)
        self._capacity = cache_bytes // max(3 * level.tile_width * level.tile_height for level in index.levels)
        self._cache: dict[tuple[int, Block], np.ndarray] = {}
        self.level_dimensions = tuple((level.width, level.height) for level in index.levels)
        self.level_downsamples, self.mpp, self.mpp_source = index.downsamples, index.mpp, index.mpp_source

    def read(self, region: Region) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of a region, and which of them the file holds.

        Returns:
            uint8 (H, W, 3), 0 where the file has no tile; bool (H, W).

        Raises:
            SlideOpenError: if the file is not the one that was indexed.
            ValueError: if a tile is corrupt.
            OSError: if the file cannot be read, even through a fresh handle.
        """
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
        """Give the file handle and the decoded tiles back; the next read opens the file again."""
        self._bytes.close()
        self._cache.clear()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": {}}

    def _tiles(self, region: Region) -> dict[Block, np.ndarray | None]:
        """Decoded tiles that cover a region, None where the file has none."""
        level, tiles = self._index.levels[region.level], {}
        for block in covering(level, region):
            tiles[block] = tile = self._cache.pop((region.level, block), None)
            if tile is not None:
                self._cache[region.level, block] = tile  # now the youngest
        wanted = [block for block, tile in tiles.items() if tile is None and level.lengths[block]]
        data = self._read_ranges([(int(level.offsets[block]), int(level.lengths[block])) for block in wanted])
        for block, tile in zip(wanted, data, strict=True):
            try:
                tiles[block] = level.decode(tile)
            except ValueError as error:
                raise ValueError(f"tile row {block.row}, tile column {block.column}: {error}") from error
            self._keep((region.level, block), tiles[block])
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

    def _keep(self, key: tuple[int, Block], tile: np.ndarray) -> None:
        # Single operations on a dict are safe in threads; a lock would be lost in a fork.
        if self._capacity:
            self._cache[key] = tile
        while len(self._cache) > self._capacity:
            try:
                self._cache.pop(next(iter(self._cache)), None)
            except (RuntimeError, StopIteration):  # another thread changed it in between
                continue


class OpenSlideReader:
    """One slide through OpenSlide, which keeps its handle until an error or a fork.

    OpenSlide places regions in whole level-0 pixels; where the downsample is not a whole number, it interpolates
    over an offset of at most half a level-0 pixel.

    Args:
        path: a file that OpenSlide can read.
        mpp: as in `SlideReader`.
        cache_bytes: decoded tiles that the handle may keep.

    Attributes:
        level_dimensions, level_downsamples, mpp, mpp_source: as in `SlideReader`.

    Raises:
        SlideOpenError: if the file is missing or no slide.
    """

    def __init__(self, path: Path, mpp: float | None, cache_bytes: int) -> None:
        self._path, self._cache_bytes = path, cache_bytes
        self._handle, self._pid = None, -1
        handle = self._opened()
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples
        check_pyramid(path, self.level_dimensions)
        said = handle.properties
        power = number(said.get("openslide.objective-power")) or number(said.get("aperio.AppMag"))
        sides = [number(said.get(f"openslide.mpp-{axis}")) for axis in "xy"]
        self.mpp, self.mpp_source = resolve_mpp(sides, power, mpp)

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
        # Alpha is 0 where the file has no tile; resampling leaves 253 or 254 on single sound pixels.
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
        openslide = import_package("openslide", "Slides need openslide-python and openslide-bin")
        if not self._path.is_file():
            raise SlideOpenError(self._path, "there is no such file")
        try:
            handle = openslide.OpenSlide(self._path)
        except openslide.OpenSlideError as error:
            reason = f"not a whole slide in a format of OpenSlide's ({self._path.stat().st_size} bytes; {error})"
            raise SlideOpenError(self._path, reason) from error
        handle.set_cache(openslide.OpenSlideCache(self._cache_bytes))
        self._handle, self._pid = handle, os.getpid()
        return handle

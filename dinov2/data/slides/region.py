"""Regions of slides from the bytes of their tiles."""

import logging

import numpy as np

from dinov2.data.slides.blocks import Block, Region, TileIndex, covering, paste
from dinov2.data.slides.errors import SlideOpenError
from dinov2.data.slides.ranges import SlideBytes, is_remote
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
        level_dimensions, level_downsamples: as in `SlideReader`.
    """

    def __init__(self, index: TileIndex, cache_bytes: int) -> None:
        self._index, self._bytes = index, SlideBytes(index.path)
        largest = max(3 * level.tile_width * level.tile_height for level in index.levels)
        self._capacity = cache_bytes // largest
        self._cache: dict[tuple[int, Block], np.ndarray] = {}
        self.level_dimensions = tuple((level.width, level.height) for level in index.levels)
        self.level_downsamples = index.downsamples

    def read(self, region: Region) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of a region, and which of them the file holds.

        Returns:
            uint8 (H, W, 3), 0 where the file has no tile; bool (H, W).

        Raises:
            SlideOpenError: if the file is not the one that was indexed.
            ValueError: if a tile is damaged.
            OSError: if the file cannot be read, even through a fresh handle.
        """
        level = self._index.levels[region.level]
        tiles = self._tiles(region)
        out, known = np.empty((region.height, region.width, 3), np.uint8), None
        for block, tile in tiles.items():
            if tile is None:
                known = np.ones(out.shape[:2], bool) if known is None else known
                nothing = np.zeros((level.tile_height, level.tile_width), np.uint8)
                paste(level, region, block, nothing.astype(bool), known)
                paste(level, region, block, nothing[..., None], out)
            else:
                paste(level, region, block, tile, out)
        return out, np.ones(out.shape[:2], bool) if known is None else known

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
            tile = self._cache.pop((region.level, block), None) if level.lengths[block] else None
            if tile is not None:
                self._cache[region.level, block] = tile  # now the youngest
            tiles[block] = tile
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

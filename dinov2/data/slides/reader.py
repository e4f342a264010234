"""Whole-slide images, of which regions are read exactly or not at all."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from dinov2.data.slides.blocks import Region, TileIndex
from dinov2.data.slides.errors import SlideError, SlideRangeError, SlideReadError, UnsupportedTiles
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.region import OpenSlideReader, TileReader
from dinov2.data.slides.resolution import check_user_mpp, coarsest_level
from dinov2.data.slides.tiff import index_slide
from dinov2.data.storage.retry import RemoteError

_ROUNDING_PX = 2  # px by which rounding may push a patch at the slide's border over it


class SlideReader:
    """One slide that is parsed once and reads regions at whole pixels of a level's own grid.

    Tiles are read from their bytes where possible, else OpenSlide reads the slide. Threads may share a reader; in a
    forked or spawned process it opens the file again.

    Args:
        path: a slide, or an fsspec URL of one whose tiles can be read from their bytes.
        mpp: micrometres per level-0 px, used only when the slide does not say.
        cache_bytes: decoded tiles of this slide that may be kept.
        index: of this slide, wherever it lay when it was indexed; it is then not parsed.

    Attributes:
        path: the file, text where it is a URL.
        level_dimensions: (width, height) in px of each level.
        level_downsamples: level-0 px per px of each level.
        mpp: micrometres per level-0 px, None when unknown.
        mpp_source: where `mpp` comes from: "slide", 10 / its objective power ("appmag"), "user", or "none".

    Raises:
        SlideOpenError: if the file is missing, no slide, or its levels make no sense.
        RemoteError: if the server cannot be read.
        ValueError: if `mpp` is implausible.
    """

    def __init__(
        self, path: str | Path, mpp: float | None = None, cache_bytes: int = 8 << 20, index: TileIndex | None = None
    ) -> None:
        check_user_mpp(path, mpp)
        self.path = str(path) if is_remote(path) else Path(path)
        try:
            index = replace(index, path=str(path)) if index else index_slide(path, mpp)
            self._pixels = TileReader(index, cache_bytes)
        except UnsupportedTiles:
            if is_remote(path):
                raise
            self._pixels = OpenSlideReader(self.path, mpp, cache_bytes)
        self.mpp, self.mpp_source = self._pixels.mpp, self._pixels.mpp_source
        if mpp is not None and self.mpp_source in ("user", "none"):  # an index may hold another of the user's
            self.mpp, self.mpp_source = mpp, "user"
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
        """The coarsest level that is at most 1 % coarser than a resolution in um/px.

        Raises:
            SlideRangeError: if even level 0 is coarser, or the slide's mpp is unknown.
        """
        finest = self._known_mpp()
        level = coarsest_level(self.level_downsamples, finest, target_mpp)
        if level is None:
            reason = f"level 0 has {finest:g} um/px, which is coarser than the {target_mpp:g} um/px asked for"
            raise SlideRangeError(self.path, reason)
        return level

    def patch_side(self, size: int, target_mpp: float) -> float:
        """Side in level-0 px of a patch that shows `size` px of `target_mpp` um; SlideRangeError without an mpp."""
        return size * target_mpp / self._known_mpp()

    def read_patch(self, x: int, y: int, size: int, target_mpp: float) -> np.ndarray:
        """Read a square patch at a resolution, resized from the coarsest level that is fine enough.

        Args:
            x, y: upper left corner in level-0 px, snapped to the level's grid. A patch that only rounding takes over
                the slide's border is moved back on it.
            size: side of the patch in px.
            target_mpp: its resolution in um/px.

        Returns:
            uint8 (size, size, 3) RGB.

        Raises:
            SlideRangeError: see `level_for`, or the patch leaves the slide.
            SlideReadError: see `read_region`.
        """
        level = self.level_for(target_mpp)
        side = max(1, round(self.patch_side(size, target_mpp) / self.level_downsamples[level]))
        corner = []
        for first, length in zip(self.snap(level, x, y), self.level_dimensions[level], strict=True):
            last = length - side
            corner.append(last if 0 <= last < first <= last + _ROUNDING_PX else first)
        patch = self.read_region(level, *corner, side, side)
        return patch if side == size else cv2.resize(patch, (size, size), interpolation=cv2.INTER_AREA)

    def read_region(self, level: int, column: int, row: int, width: int, height: int) -> np.ndarray:
        """Read a region at the level's own resolution.

        Args:
            level: 0 is the finest.
            column, row: top-left corner in px of that level.
            width, height: size in px of that level.

        Returns:
            uint8 (height, width, 3) RGB, contiguous.

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
        """Read a whole level square by square, to bound memory.

        Yields:
            Column and row of a square of at most `side` px, and what `read_known` gives of it.
        """
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


def _location(region: Region) -> str:
    return f"level {region.level}, column {region.column}, row {region.row}, {region.width}x{region.height} px"

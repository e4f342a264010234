"""Regions of slides whose tiles only OpenSlide can read."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.slides.blocks import Region
from dinov2.data.slides.errors import SlideOpenError
from dinov2.data.slides.resolution import MppSource, number, resolve_mpp

logger = logging.getLogger(__name__)


class OpenSlideReader:
    """One slide through OpenSlide, which keeps its handle until an error or a fork.

    OpenSlide places regions in whole level-0 pixels; where the downsample is not a whole number, it interpolates
    over an offset of at most half a level-0 pixel.

    Args:
        path: a file that OpenSlide can read.
        cache_bytes: decoded tiles that the handle may keep.

    Attributes:
        level_dimensions, level_downsamples: as in `SlideReader`.

    Raises:
        SlideOpenError: if the file is missing or no slide.
    """

    def __init__(self, path: Path, cache_bytes: int) -> None:
        self._path, self._cache_bytes = path, cache_bytes
        self._handle, self._pid = None, -1
        handle = self._opened()
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples

    def resolution(self, user_mpp: float | None) -> tuple[float | None, MppSource]:
        """mpp and its source, see `resolve_mpp`."""
        said = self._opened().properties
        power = number(said.get("openslide.objective-power")) or number(said.get("aperio.AppMag"))
        return resolve_mpp([number(said.get(f"openslide.mpp-{axis}")) for axis in "xy"], power, user_mpp)

    def read(self, region: Region) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of a region, and which of them the file holds; ValueError if they cannot be decoded."""
        downsample = self.level_downsamples[region.level]
        place = round(region.column * downsample), round(region.row * downsample)
        size = region.width, region.height
        try:
            rgba = self._rgba(place, region.level, size)
        except Exception as first:  # OpenSlide keeps failing on a handle that failed once
            logger.debug("reading again through a fresh handle after: %s", first)
            try:
                rgba = self._rgba(place, region.level, size)
            except Exception as error:
                raise ValueError(str(error)) from error
        # Alpha is 0 where the file has no tile; resampling leaves 253 or 254 on single sound pixels.
        return np.ascontiguousarray(rgba[..., :3]), rgba[..., 3] > 0

    def close(self) -> None:
        """Give the file handle back; the next read opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None and self._pid == os.getpid():
            handle.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _rgba(self, place: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        handle = self._opened()
        try:
            return np.asarray(handle.read_region(place, level, size))
        except Exception:
            self._handle = None
            raise

    def _opened(self) -> Any:
        handle = self._handle
        if handle is None or self._pid != os.getpid():
            handle = self._handle = _open(self._path, self._cache_bytes)
            self._pid = os.getpid()
        return handle


def _open(path: Path, cache_bytes: int) -> Any:
    try:
        import openslide
    except ImportError as error:
        raise ImportError("Slides need openslide-python and openslide-bin (the 'slides' extra).") from error
    if not path.is_file():
        raise SlideOpenError(path, "there is no such file")
    try:
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        reason = f"not a whole slide in a format of OpenSlide's ({path.stat().st_size} bytes; {error})"
        raise SlideOpenError(path, reason) from error
    handle.set_cache(openslide.OpenSlideCache(cache_bytes))
    return handle

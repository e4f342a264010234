"""Regions of whole-slide images, read exactly or not at all."""

import logging
import os
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

logger = logging.getLogger(__name__)

MppSource = Literal["slide", "appmag", "user", "none"]
PLAUSIBLE_MPP = (0.1, 4.0)  # outside lie resolution tags meant for screens and print (72 dpi is 353 um)


class SlideError(RuntimeError):
    """A slide that cannot give what was asked; names the slide, the place and the reason.

    Attributes:
        slide: path of the slide.
        place: level and position, empty where the whole slide is meant.
        reason: what is wrong, without slide and place.
        detail: place and reason, for a record that names the slide itself.
    """

    def __init__(self, slide: str | Path, reason: str, place: str = "") -> None:
        self.slide, self.place, self.reason = str(slide), place, reason
        self.detail = f"{place}: {reason}" if place else reason
        super().__init__(f"Slide '{slide}'{', ' + place if place else ''}: {reason}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.slide, self.reason, self.place)


class SlideOpenError(SlideError):
    """The file is missing, no slide, or its levels make no sense."""


class SlideRangeError(SlideError, ValueError):
    """The level does not exist, or the region is not wholly on it."""


class SlideReadError(SlideError):
    """The file holds no decodable pixels for (a part of) the region."""


class SlideReader:
    """One slide, opened once, that reads regions at whole pixels of a level's own grid.

    The handle is opened again after an error and in a forked or spawned process; threads may share it.

    Attributes:
        path: the file.
        level_dimensions: (width, height) in px of each level.
        level_downsamples: level-0 px per px of each level.
        mpp: micrometres per level-0 px, None when unknown.
        mpp_source: where `mpp` comes from: "slide", 10 / its objective power ("appmag"), "user", or "none".

    Args:
        path: a file that OpenSlide can read.
        mpp: micrometres per level-0 px, used only when the slide does not say.
        cache_bytes: decoded tiles that this slide's handle may keep.

    Raises:
        SlideOpenError: the file is missing, no slide, or its levels make no sense.
        ValueError: `mpp` is implausible.
    """

    def __init__(self, path: str | Path, mpp: float | None = None, cache_bytes: int = 8 << 20) -> None:
        if mpp is not None and not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
            raise ValueError(
                f"The mpp given for slide '{path}' is {mpp}, but it must lie within {PLAUSIBLE_MPP}."
            )
        self.path = Path(path)
        self._cache_bytes = cache_bytes
        self._handle, self._pid = None, -1
        handle = self._opened()
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples
        self._check_levels()
        self.mpp, self.mpp_source = _resolution(handle.properties, mpp)

    def snap(self, level: int, x: int, y: int) -> tuple[int, int]:
        """Column and row of the level's pixel nearest to a level-0 position."""
        downsample = self._downsample(level)
        return round(x / downsample), round(y / downsample)

    def origin(self, level: int, column: int, row: int) -> tuple[int, int]:
        """Level-0 position (x, y) of a level's pixel, rounded; `snap` takes it back to the same pixel."""
        downsample = self._downsample(level)
        return round(column * downsample), round(row * downsample)

    def read_region(self, level: int, column: int, row: int, width: int, height: int) -> np.ndarray:
        """Read a region at the level's own resolution.

        OpenSlide places regions in whole level-0 pixels; where the downsample is not a whole number, it
        interpolates over an offset of at most half a level-0 pixel.

        Args:
            level: 0 is the finest.
            column, row: top-left corner in px of that level.
            width, height: size in px of that level.

        Returns:
            uint8 (height, width, 3) RGB, contiguous.

        Raises:
            SlideRangeError: no such level, or the region leaves it.
            SlideReadError: pixels are missing, or cannot be decoded even through a fresh handle.
        """
        pixels, known = self.read_known(level, column, row, width, height)
        if not known.all():
            reason = f"{known.size - np.count_nonzero(known)} of its pixels are missing from the file"
            raise SlideReadError(self.path, reason, _place(level, column, row, width, height))
        return pixels

    def read_known(
        self, level: int, column: int, row: int, width: int, height: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Like `read_region`, but says which pixels the file holds: (uint8 (H, W, 3), bool (H, W))."""
        place = _place(level, column, row, width, height)
        x, y = self.origin(level, column, row)
        level_width, level_height = self.level_dimensions[level]
        inside = 0 <= column <= level_width - width and 0 <= row <= level_height - height
        if not (inside and width > 0 and height > 0):
            reason = f"the region leaves the level of {level_width}x{level_height} px"
            raise SlideRangeError(self.path, reason, place)
        read = partial(self._rgba, x, y, level, width, height)
        try:
            rgba = read()
        except Exception as first:  # OpenSlide keeps failing on a handle that failed once
            logger.debug("reading again through a fresh handle after: %s", first)
            try:
                rgba = read()
            except Exception as error:
                raise SlideReadError(self.path, f"its pixels cannot be decoded ({error})", place) from error
        # Alpha is 0 where the file has no tile; resampling leaves 253 or 254 on single sound pixels.
        return np.ascontiguousarray(rgba[..., :3]), rgba[..., 3] > 0

    def close(self) -> None:
        """Give the file handle back; the next read opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None and self._pid == os.getpid():
            handle.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _rgba(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        handle = self._opened()
        try:
            return np.asarray(handle.read_region((x, y), level, (width, height)))
        except Exception:
            self._handle = None
            raise

    def _opened(self) -> Any:
        if self._handle is None or self._pid != os.getpid():
            self._handle, self._pid = _open(self.path, self._cache_bytes), os.getpid()
        return self._handle

    def _downsample(self, level: int) -> float:
        if not 0 <= level < len(self.level_downsamples):
            reason = f"the slide has levels 0 to {len(self.level_downsamples) - 1}"
            raise SlideRangeError(self.path, reason, f"level {level}")
        return self.level_downsamples[level]

    def _check_levels(self) -> None:
        sizes = self.level_dimensions
        falling = all(b[0] < a[0] and b[1] < a[1] for a, b in pairwise(sizes))
        if not sizes or min(map(min, sizes)) < 1 or not falling:
            raise SlideOpenError(self.path, f"its levels {sizes} are not a pyramid of falling sizes")


def _place(level: int, column: int, row: int, width: int, height: int) -> str:
    return f"level {level}, column {column}, row {row}, {width}x{height} px"


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


def _resolution(properties: Any, user_mpp: float | None) -> tuple[float | None, MppSource]:
    sides = _number(properties, "openslide.mpp-x"), _number(properties, "openslide.mpp-y")
    if all(side is not None and PLAUSIBLE_MPP[0] <= side <= PLAUSIBLE_MPP[1] for side in sides):
        return sum(sides) / 2, "slide"
    power = _number(properties, "openslide.objective-power") or _number(properties, "aperio.AppMag")
    if power and PLAUSIBLE_MPP[0] <= 10 / power <= PLAUSIBLE_MPP[1]:
        return 10 / power, "appmag"
    return (user_mpp, "user") if user_mpp is not None else (None, "none")


def _number(properties: Any, key: str) -> float | None:
    try:
        return float(properties.get(key))
    except (TypeError, ValueError):
        return None

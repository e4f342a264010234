"""Sample lists, one `path x y level` per line, and training straight from the slides that they name."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dinov2.data.sample import DecodeError, EncodedSample
from dinov2.data.slide_reader import SlideError, SlideReader

UNIT_LINES = 64
_OPEN_SLIDES = 64  # per process; each keeps a handle and a small tile cache
_SAMPLE_BYTES = 64  # a reference, as it waits in the reader's queue


@dataclass(frozen=True)
class SampleList:
    """The patches of a sample list, in its order.

    Attributes:
        slides: distinct slide paths as written, by first appearance.
        slide: int32 (N,), each patch's place in `slides`.
        x, y: int32 (N,), left and top edge in level-0 px.
        level: int32 (N,), pyramid level that the patch is read from.
    """

    slides: list[str]
    slide: np.ndarray
    x: np.ndarray
    y: np.ndarray
    level: np.ndarray

    def __len__(self) -> int:
        return len(self.slide)

    def digest(self) -> str:
        """Identifies the patches and their order; comments and blank lines do not matter."""
        state = hashlib.blake2b("\n".join(self.slides).encode(errors="surrogateescape"), digest_size=16)
        for column in (self.slide, self.x, self.y, self.level):
            state.update(np.ascontiguousarray(column, "<i4"))
        return state.hexdigest()


def read_sample_list(path: str | Path) -> SampleList:
    """Read a list of `path x y level` lines; paths may hold spaces; blank lines and `#` lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is malformed, or there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no sample list '{path}'; a text file of 'path x y level' lines is expected."
        )
    numbers: dict[str, int] = {}
    columns = slide, x, y, level = array("i"), array("i"), array("i"), array("i")
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line_number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            try:
                name, *values = text.rsplit(maxsplit=3)
                place_x, place_y, place_level = map(int, values)
                if min(place_x, place_y, place_level) < 0:
                    raise ValueError
                for column, value in zip((x, y, level), (place_x, place_y, place_level), strict=True):
                    column.append(value)
            except (ValueError, OverflowError):
                raise ValueError(
                    f"Line {line_number} of sample list '{path}' is {text!r}; a path and three whole numbers "
                    "x y level of at least 0 are expected."
                ) from None
            slide.append(numbers.setdefault(name, len(numbers)))
    if not slide:
        raise ValueError(
            f"The sample list '{path}' holds no patch; at least 1 'path x y level' line is expected."
        )
    return SampleList(list(numbers), *(np.frombuffer(column, np.intc).astype(np.int32) for column in columns))


def locate_slide(name: str, slide_root: str | Path | None) -> Path:
    """Where a slide of a list lies: as written, or at the longest tail of its path found below `slide_root`.

    Returns:
        The path; it may not exist.
    """
    if slide_root is None:
        return Path(name)
    parts = PurePosixPath(name).parts
    tails = (parts[start:] for start in range(1 if parts[0] == "/" else 0, len(parts)))
    candidates = [Path(slide_root, *tail) for tail in tails]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


class SlideListSource:
    """Patches cut from slides while training, in the order contract of any other source.

    A unit is 64 consecutive lines. Reading a unit gives references; a worker cuts the patch when it decodes
    one. Holds no lock, so it may be forked, pickled and used from several threads.

    Args:
        list_path: `path x y level` lines; x, y are level-0 px and are snapped to the level's own pixel grid.
        slide_root: folder to look for the listed paths in; None takes them as written.
        tile_size: side of a patch in px of its level.

    Attributes:
        unit_rows, unit_bytes, fingerprint, num_rows, is_remote: see `dinov2.data.sample.Source`.

    Raises:
        FileNotFoundError: the list, or a slide that it names, does not exist.
        ValueError: a line is malformed, there is none, or `tile_size` is not positive.
    """

    is_remote = False

    def __init__(
        self, list_path: str | Path, slide_root: str | Path | None = None, tile_size: int = 224
    ) -> None:
        if tile_size < 1:
            raise ValueError(f"The tile size is {tile_size} px, but it must be at least 1.")
        self._list_path, self._tile_size = Path(list_path), tile_size
        self._samples = read_sample_list(list_path)
        self._paths = {name: locate_slide(name, slide_root) for name in self._samples.slides}
        missing = [str(path) for path in self._paths.values() if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self._paths)} slides of sample list '{list_path}' do not exist, "
                f"the first is '{missing[0]}'; mount them or set train.slide_root."
            )
        self.num_rows = len(self._samples)
        starts = np.arange(0, self.num_rows, UNIT_LINES)
        self.unit_rows = np.minimum(UNIT_LINES, self.num_rows - starts).astype(np.int64)
        self.unit_bytes = self.unit_rows * _SAMPLE_BYTES
        self.fingerprint = f"{self._samples.digest()}-{tile_size}"
        self._open = lru_cache(_OPEN_SLIDES)(SlideReader)

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """The slide and the reference `x y level` of some lines of a unit, in the order asked for."""
        samples = self._samples
        lines = [unit * UNIT_LINES + int(row) for row in rows]
        return [
            (samples.slides[samples.slide[i]], b"%d %d %d" % (samples.x[i], samples.y[i], samples.level[i]))
            for i in lines
        ]

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Cut the patch that a reference names: uint8 (tile_size, tile_size, 3) RGB.

        Raises:
            DecodeError: the slide cannot give it; says which slide and place, and why.
        """
        x, y, level = map(int, sample.data.split())
        try:
            reader = self._open(self._paths[sample.slide])
            return reader.read_region(level, *reader.snap(level, x, y), self._tile_size, self._tile_size)
        except SlideError as error:
            raise DecodeError(str(error)) from error

    def describe(self, unit: int, row: int | None = None) -> str:
        """Name a unit, or one of its patches, for a message to the user."""
        first = unit * UNIT_LINES + 1
        if row is not None:
            return f"patch {first + row} of sample list '{self._list_path}'"
        last = first + int(self.unit_rows[unit]) - 1
        return f"patches {first} to {last} of sample list '{self._list_path}'"

    def slides(self, unit: int) -> list[str]:
        """Name the slide of every line of a unit."""
        numbers = self._samples.slide[unit * UNIT_LINES : (unit + 1) * UNIT_LINES]
        return [self._samples.slides[number] for number in numbers.tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(_OPEN_SLIDES)(SlideReader)

"""Sample lists, one `path x y level` per line, and training straight from the slides that they name."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dinov2.data.slides.reader import SlideError, SlideReader
from dinov2.data.slides.resolution import read_mpp_table
from dinov2.data.source import DecodeError, EncodedSample

UNIT_LINES = 64
COLUMNS = ("path", "x", "y", "level", "mpp_x", "mpp_y")  # the last two only in lists of six columns
_LINES_AT_ONCE = 1 << 14  # keeps what is not yet packed within a few MB
_OPEN_SLIDES = 64  # per process; each keeps a handle and a small tile cache
_SAMPLE_BYTES = 80  # a reference, as it waits in the reader's queue
_OPENING_THREADS = 16


@dataclass(frozen=True)
class SampleList:
    """The patches of a sample list, in its order.

    Attributes:
        slides: distinct slide paths as written, by first appearance.
        slide: int32 (N,), each patch's place in `slides`.
        x, y: int32 (N,), left and top edge in level-0 px.
        level: int32 (N,), pyramid level that the patch is read from.
        mpp: float32 (N,), um per px of the finished patch; None for lists of four columns, which keep the level's.
    """

    slides: list[str]
    slide: np.ndarray
    x: np.ndarray
    y: np.ndarray
    level: np.ndarray
    mpp: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.slide)

    def digest(self) -> str:
        """Identifies the patches and their order; comments and blank lines do not matter."""
        state = hashlib.blake2b("\n".join(self.slides).encode(errors="surrogateescape"), digest_size=16)
        for column in (self.slide, self.x, self.y, self.level):
            state.update(np.ascontiguousarray(column, "<i4"))
        if self.mpp is not None:
            state.update(np.ascontiguousarray(self.mpp, "<f4"))
        return state.hexdigest()


def read_list_description(path: str | Path) -> dict[str, Any]:
    """What `<list>.meta.json` says of a sample list; nothing where there is no such file.

    Raises:
        ValueError: the file is no JSON object, or names columns that no sample list has.
    """
    description = Path(f"{path}.meta.json")
    if not description.is_file():
        return {}
    try:
        said = json.loads(description.read_text(encoding="utf-8"))
        columns = said.get("columns", list(COLUMNS[:4]))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"'{description}' does not describe a sample list ({error!r}); move it away."
        ) from error
    if columns not in (list(COLUMNS[:4]), list(COLUMNS)):
        raise ValueError(
            f"'{description}' names the columns {columns}, but they must be {COLUMNS[:4]} or {COLUMNS}."
        )
    return said


def read_sample_list(path: str | Path, columns: int | None = None) -> SampleList:
    """Read a list of `path x y level` or `path x y level mpp_x mpp_y` lines.

    Paths may hold spaces; blank lines and `#` lines are skipped.

    Args:
        path: the list.
        columns: 4 or 6, for a list without a `.meta.json` that names its columns; None means 4.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line or the `.meta.json` is malformed, there is no line, or `columns` is neither 4 nor 6.
    """
    path = Path(path)
    if columns not in (None, 4, 6):
        raise ValueError(f"A sample list was said to have {columns} columns, but it must have 4 or 6.")
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no sample list '{path}'; a text file of 'path x y level' lines is expected."
        )
    columns = len(read_list_description(path).get("columns", ())) or columns or 4
    numbers: dict[bytes, int] = {}
    packed, first = [], 1
    with path.open("rb") as file:
        while lines := list(islice(file, _LINES_AT_ONCE)):
            try:
                packed.append(_pack(lines, columns, numbers))
            except (ValueError, OverflowError):
                raise _complaint(path, first, lines, columns) from None
            first += len(lines)
    slides = [name.decode("utf-8", "surrogateescape") for name in numbers]
    if not slides:
        raise ValueError(
            f"The sample list '{path}' holds no patch; at least 1 'path x y level' line is expected."
        )
    return SampleList(slides, *(np.concatenate(parts) for parts in zip(*packed, strict=True)))


def _pack(lines: list[bytes], columns: int, numbers: dict[bytes, int]) -> list[np.ndarray]:
    """Slide, x, y, level and perhaps mpp of some lines; new slides join `numbers`; ValueError if one is bad."""
    lines = [line for line in lines if (text := line.lstrip()) and not text.startswith(b"#")]
    fields = list(chain.from_iterable(line.rsplit(None, columns - 1) for line in lines))
    if len(fields) != columns * len(lines):
        raise ValueError
    places = [np.fromiter(map(int, fields[i::columns]), np.int32, len(lines)) for i in (1, 2, 3)]
    sides = [np.fromiter(map(float, fields[i::columns]), np.float64, len(lines)) for i in range(4, columns)]
    if lines and min(place.min() for place in places) < 0:
        raise ValueError
    mpp = []
    if sides:
        low, high = np.minimum(*sides), np.maximum(*sides)
        if not ((low > 0) & (high <= 1.01 * low) & np.isfinite(high)).all():
            raise ValueError
        mpp = [((low + high) / 2).astype(np.float32)]
    slide = [
        numbers.setdefault(name, len(numbers)) for name in (field.lstrip() for field in fields[::columns])
    ]
    return [np.array(slide, np.int32), *places, *mpp]


def _complaint(path: Path, first: int, lines: list[bytes], columns: int) -> ValueError:
    """Names the first of some lines, the first of them numbered `first`, that cannot be packed."""
    expected = "a path and three whole numbers x y level of at least 0 are expected (in a list of 4 columns)."
    if columns == 6:
        expected = (
            "a path, three whole numbers x y level of at least 0, and mpp_x mpp_y above 0, equal within 1 %, "
            "are expected (in a list of 6 columns)."
        )
    for number, line in enumerate(lines, first):
        try:
            _pack([line], columns, {})
        except (ValueError, OverflowError):
            text = line.strip().decode("utf-8", "surrogateescape")
            return ValueError(f"Line {number} of sample list '{path}' is {text!r}; {expected}")
    raise AssertionError("a chunk of good lines was refused")


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
        list_path: `path x y level` lines; x, y are level-0 px and are snapped to the level's own pixel grid. In
            a list of six columns the patch is cut at its mpp from the level that serves it best.
        slide_root: folder to look for the listed paths in; None takes them as written.
        tile_size: side of a patch in px of its level, or of its mpp.
        mpp_file: CSV `slide,mpp` for slides that do not say theirs, see `read_mpp_table`.
        columns: see `read_sample_list`.

    Attributes:
        unit_rows, unit_bytes, fingerprint, num_rows, is_remote: see `dinov2.data.source.Source`.

    Raises:
        FileNotFoundError: the list, or a slide that it names, does not exist.
        ValueError: a line is malformed, there is none, `tile_size` is not positive, or a list of six columns
            names a slide of unknown mpp.
        SlideError: a slide had to be opened for its mpp and cannot be.
    """

    is_remote = False

    def __init__(
        self,
        list_path: str | Path,
        slide_root: str | Path | None = None,
        tile_size: int = 224,
        mpp_file: str | Path | None = None,
        columns: int | None = None,
    ) -> None:
        if tile_size < 1:
            raise ValueError(f"The tile size is {tile_size} px, but it must be at least 1.")
        self._list_path, self._tile_size = Path(list_path), tile_size
        self._samples = read_sample_list(list_path, columns)
        self._paths = {name: locate_slide(name, slide_root) for name in self._samples.slides}
        missing = [str(path) for path in self._paths.values() if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self._paths)} slides of sample list '{list_path}' do not exist, "
                f"the first is '{missing[0]}'; mount them or set data.slide_root."
            )
        self.num_rows = len(self._samples)
        starts = np.arange(0, self.num_rows, UNIT_LINES)
        self.unit_rows = np.minimum(UNIT_LINES, self.num_rows - starts).astype(np.int64)
        self.unit_bytes = self.unit_rows * _SAMPLE_BYTES
        self.fingerprint = f"{self._samples.digest()}-{tile_size}"
        self._mpp: dict[str, float] = {}  # of slides that do not say theirs
        if self._samples.mpp is not None:
            self._mpp = self._given_mpp(mpp_file)
            given = json.dumps(sorted(self._mpp.items())).encode()
            self.fingerprint += f"-{hashlib.blake2b(given, digest_size=8).hexdigest()}"
        self._open = lru_cache(_OPEN_SLIDES)(SlideReader)

    def _given_mpp(self, mpp_file: str | Path | None) -> dict[str, float]:
        """The mpp of the table, else of the list's description; every other slide must say its own."""
        described = read_list_description(self._list_path).get("slide_mpp")
        given = dict(described or {})
        if mpp_file is not None:
            table = read_mpp_table(mpp_file)
            found = {name: table.get(name) for name in self._samples.slides}
            given |= {name: mpp for name, mpp in found.items() if mpp is not None}
        if described is None:  # else the list was made by a tool that has seen to it
            unsure = [name for name in self._samples.slides if name not in given]
            with ThreadPoolExecutor(_OPENING_THREADS) as pool:
                known = pool.map(lambda name: SlideReader(self._paths[name]).mpp is not None, unsure)
            silent = [name for name, knows in zip(unsure, known, strict=True) if not knows]
            if silent:
                raise ValueError(
                    f"{len(silent)} slides of sample list '{self._list_path}' do not say their resolution, the "
                    f"first is '{silent[0]}'; its six columns need it: name them in a CSV of 'slide,mpp' lines."
                )
        return given

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """The slide and the reference `x y level [mpp]` of some lines of a unit, in the order asked for."""
        samples = self._samples
        read = []
        for i in (unit * UNIT_LINES + int(row) for row in rows):
            reference = b"%d %d %d" % (samples.x[i], samples.y[i], samples.level[i])
            if samples.mpp is not None:
                reference += b" %r" % float(samples.mpp[i])
            read.append((samples.slides[samples.slide[i]], reference))
        return read

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Cut the patch that a reference names: uint8 (tile_size, tile_size, 3) RGB.

        Raises:
            DecodeError: the slide cannot give it; says which slide and place, and why.
        """
        place, size = sample.data.split(), self._tile_size
        x, y, level = map(int, place[:3])
        try:
            reader = self._open(self._paths[sample.slide], self._mpp.get(sample.slide))
            if len(place) == 4:
                return reader.read_patch(x, y, size, float(place[3]))
            return reader.read_region(level, *reader.snap(level, x, y), size, size)
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

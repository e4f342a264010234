"""Sample lists: one `path x y level` per line, perhaps with the resolution of the tile."""

import hashlib
import json
from codecs import BOM_UTF8
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.slides.tables import unquoted

COLUMNS = ("path", "x", "y", "level", "mpp_x", "mpp_y")  # the last two only in lists of six columns
_LINES_AT_ONCE = 1 << 14  # keeps what is not yet packed within a few MB


@dataclass(frozen=True)
class SampleList:
    """The tiles of a sample list, in its order; int32 (N,) but for `mpp`."""

    slides: list[str]  # distinct slide paths as written, by first appearance
    slide: np.ndarray  # each tile's number in `slides`
    x: np.ndarray  # left edge in level-0 px
    y: np.ndarray  # top edge
    level: np.ndarray  # pyramid level that the tile is read from
    mpp: np.ndarray | None = None  # float32 (N,), um per px of the finished tile; None (four columns): the level's

    def __len__(self) -> int:
        return len(self.slide)

    def digest(self) -> str:
        """Identify the tiles and their order; comments and blank lines do not matter."""
        state = hashlib.blake2b("\n".join(self.slides).encode(errors="surrogateescape"), digest_size=16)
        for column in (self.slide, self.x, self.y, self.level):
            state.update(np.ascontiguousarray(column, "<i4"))
        if self.mpp is not None:
            state.update(np.ascontiguousarray(self.mpp, "<f4"))
        return state.hexdigest()


def read_list_description(path: str | Path) -> dict[str, Any]:
    """Read `<list>.meta.json` of a sample list, empty where there is no such file; ValueError if it describes none."""
    description = Path(f"{path}.meta.json")
    if not description.is_file():
        return {}
    try:
        fields = json.loads(description.read_text(encoding="utf-8"))
        columns = fields.get("columns", list(COLUMNS[:4]))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{description}' does not describe a sample list ({error!r}); move it away.") from error
    if columns not in (list(COLUMNS[:4]), list(COLUMNS)):
        raise ValueError(f"'{description}' names the columns {columns}, but they must be {COLUMNS[:4]} or {COLUMNS}.")
    return fields


def read_sample_list(path: str | Path, columns: int | None = None) -> SampleList:
    """Read a list of `path x y level` or `path x y level mpp_x mpp_y` lines.

    Paths may hold spaces and stand in quotes; blank lines and `#` lines are skipped. `columns` is 4 or 6, for a list
    without a `.meta.json` that names its columns; None means 4. ValueError if a line or the `.meta.json` is malformed,
    or there is no line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no sample list '{path}'; a text file of 'path x y level' lines is expected.")
    columns = len(read_list_description(path).get("columns", ())) or columns or 4
    numbers: dict[bytes, int] = {}
    packed, first = [], 1
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        while lines := list(islice(file, _LINES_AT_ONCE)):
            try:
                packed.append(_pack(lines, columns, numbers))
            except (ValueError, OverflowError):
                raise _complaint(path, first, lines, columns) from None
            first += len(lines)
    slides = [unquoted(name.decode("utf-8", "surrogateescape")) for name in numbers]
    if not slides:
        raise ValueError(f"The sample list '{path}' holds no tile; at least 1 'path x y level' line is expected.")
    return SampleList(slides, *(np.concatenate(parts) for parts in zip(*packed, strict=True)))


def _pack(lines: list[bytes], columns: int, numbers: dict[bytes, int]) -> list[np.ndarray]:
    """Convert lines to slide, x, y, level and perhaps mpp; new slides join `numbers`; ValueError if a line is bad."""
    lines = [line for line in lines if (text := line.lstrip()) and not text.startswith(b"#")]
    # From the right, since paths may hold spaces.
    fields = list(chain.from_iterable(line.rsplit(None, columns - 1) for line in lines))
    if len(fields) != columns * len(lines):
        raise ValueError
    positions = [np.fromiter(map(int, fields[i::columns]), np.int32, len(lines)) for i in (1, 2, 3)]
    sides = [np.fromiter(map(float, fields[i::columns]), np.float64, len(lines)) for i in range(4, columns)]
    if lines and min(position.min() for position in positions) < 0:
        raise ValueError
    mpp = []
    if sides:
        low, high = np.minimum(*sides), np.maximum(*sides)
        if not ((low > 0) & (high <= 1.01 * low) & np.isfinite(high)).all():
            raise ValueError
        mpp = [((low + high) / 2).astype(np.float32)]
    slide = [numbers.setdefault(field.lstrip(), len(numbers)) for field in fields[::columns]]
    return [np.array(slide, np.int32), *positions, *mpp]


def _complaint(path: Path, first: int, lines: list[bytes], columns: int) -> ValueError:
    """Name the first line that cannot be packed; `lines` begin at number `first`."""
    position = "three whole numbers x y level of at least 0"
    expected = f"a path and {position} are expected"
    if columns == 6:
        expected = f"a path, {position}, and mpp_x mpp_y above 0, equal within 1 %, are expected"
    for number, line in enumerate(lines, first):
        try:
            _pack([line], columns, {})
        except (ValueError, OverflowError):
            text = line.strip().decode("utf-8", "surrogateescape")
            found = f"Line {number} of sample list '{path}' is {text!r}"
            return ValueError(f"{found}; {expected} (in a list of {columns} columns).")
    raise AssertionError("a chunk of good lines was refused")

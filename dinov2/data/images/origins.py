"""Slide, patient and site of each tile of a collection: as a table tells them, a pattern, or its name."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinov2.data.images.table import FIELDS, file_column, read_local_table
from dinov2.data.source import Origin

logger = logging.getLogger(__name__)

_BARCODE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])[A-Z0-9-]*", re.IGNORECASE | re.ASCII)


class TileName(NamedTuple):
    """Name of a tile: that of its file below the dataset's location and, where that is a container, of the member."""

    file: str
    member: str = ""

    @property
    def full(self) -> str:
        """Both, as they are matched and shown."""
        return f"{self.file}/{self.member}" if self.member else self.file


def slide_of(name: TileName) -> str:
    """Name the slide of a tile by its own name.

    It is the TCGA barcode that the last part of the name begins with; else the folder that the tile lies in, inside a
    container or below the dataset's location; else the container without its ending. Empty for a loose file without
    either: nothing tells of which slide it is. A tile of an HDF5 file is one of the slide that the file is named after.
    """
    tile = name.member or name.file
    folder, _, last = tile.rpartition("/")
    if name.member.endswith("]"):  # a row of a dataset
        return name.file.rpartition(".")[0]
    if barcode := _BARCODE.match(last):
        return barcode[0]
    return folder or (name.file.rpartition(".")[0] if name.member else "")


@dataclass(frozen=True)
class Origins:
    """Finds the origin of a tile by its number and its name: told for the tile, for its slide, or by the pattern."""

    pattern: str = ""  # a regular expression with groups named as `FIELDS`, looked for in the tile's full name
    numbers: np.ndarray | None = None  # for each tile the number of its origin in `told`, int32 (N,), or -1
    told: Sequence[Origin] = ()
    by_slide: Mapping[str, Origin] = field(default_factory=dict)  # by slide, or the last part of its name

    def of(self, number: int, name: TileName) -> Origin:
        """Origin of one tile; what nothing tells is empty, but for the slide as of `slide_of`."""
        told = Origin("")
        if self.numbers is not None and self.numbers[number] >= 0:
            told = self.told[self.numbers[number]]
        if self.pattern and (match := re.search(self.pattern, name.full)):
            told = _filled(told, match.groupdict())
        if not told.slide:
            told = told._replace(slide=slide_of(name))
        known = self._of_slide(told.slide)
        return _filled(told, known._asdict()) if known else told

    def tells_of(self, number: int, name: TileName) -> bool:
        """Whether something is told of the slide of a tile."""
        return self._of_slide(self.of(number, name).slide) is not None

    def _of_slide(self, slide: str) -> Origin | None:
        return self.by_slide.get(slide) or self.by_slide.get(slide.rpartition("/")[2])


def _filled(origin: Origin, more: Mapping[str, str | None]) -> Origin:
    return origin._replace(**{name: text for name, text in more.items() if text and not getattr(origin, name)})


def read_origins(
    path: str | Path, files: pa.Array, members: pa.Array | None, pattern: str = "", location: str = ""
) -> Origins:
    """Read a CSV file with a column `file` or `slide`, and columns `patient` and `site`, for tiles given by name.

    `file` is a tile's full name, that of its container or of the member in it, or the last part of either, or a path of
    these; without that column a row tells of all tiles of a slide. ValueError if columns are missing, nothing matches a
    tile, a name is that of several tiles, or rows of one name differ.

    Args:
        files: names below the dataset's location, large_binary (N,).
        members: names in these, large_binary (N,); None if the files are tiles themselves.
        pattern: as of `Origins`.
        location: of the dataset, where it is a local folder.
    """
    table = read_local_table(path)
    column, expected = file_column(list(table)), "'file' or 'slide', and 'patient', 'slide' or 'site', are expected"
    if not set(table).intersection(FIELDS) or not (column or "slide" in table):
        raise ValueError(f"'{path}' has the columns {', '.join(table) or 'none'}; {expected}")
    rows = as_told(table)
    check_alike(path, table[column or "slide"].to_pylist(), rows)
    if not column:
        by_slide = {row.slide: row for row in rows}
        return Origins(pattern, by_slide=by_slide)
    keys = pc.replace_substring_regex(pc.replace_substring(table[column], "\\", "/"), r"^(\./)+", "")
    full = files if members is None else pc.binary_join_element_wise(files, members, pa.scalar(b"/", pa.large_binary()))
    names = [full, files, *([] if members is None else [members]), pc.replace_substring_regex(full, "^.*/", "")]
    found = np.full(len(full), -1, np.int32)
    for below in _below(keys, path, location):
        for candidates in names:
            numbers = np.from_dlpack(pc.fill_null(pc.index_in(candidates, below.cast(pa.large_binary())), -1))
            numbers = np.where(found < 0, numbers, -1)
            if candidates is not files:
                _check_single(path, table[column], numbers, full)
            found = np.maximum(found, numbers)
    if not (found >= 0).any():
        example = full[0].as_py().decode(errors="replace")
        raise ValueError(
            f"no '{column}' in '{path}' is one of the {len(full):,} tiles, the first of which is '{example}'"
        )
    if unknown := int((found < 0).sum()):
        logger.warning("'%s' does not tell of %d of %d tiles; their names do", path, unknown, len(full))
    return Origins(pattern, found, rows)


def _below(keys: pa.Array, table: str | Path, location: str) -> Iterator[pa.Array]:
    """Names of a table as they are, then of paths, absolute or relative to it, what is below a local location."""
    yield keys
    if not location or "://" in location:
        return
    folder = os.path.abspath(location)
    prefixes = {f"{folder}/", f"{os.path.relpath(folder, os.path.dirname(os.path.abspath(table)))}/"} - {"./"}
    for prefix in sorted(prefixes):
        yield pc.if_else(pc.starts_with(keys, prefix), pc.utf8_slice_codeunits(keys, len(prefix)), "")


def check_alike(path: str | Path, names: Sequence[str], rows: Sequence[Origin]) -> None:
    """Raise ValueError if a table tells of one name twice, and not the same."""
    known: dict[str, Origin] = {}
    for name, row in zip(names, rows, strict=True):
        if known.setdefault(name, row) != row:
            one, other = ("/".join(filter(None, origin)) or "nothing" for origin in (known[name], row))
            raise ValueError(f"'{path}' tells of '{name}' twice, {one} and {other}; one row or equal ones are expected")


def _check_single(path: str | Path, names: pa.Array, numbers: np.ndarray, tiles: pa.Array) -> None:
    """Raise ValueError if a row of a table was found for several tiles."""
    matched = np.flatnonzero(numbers >= 0)
    rows, counts = np.unique(numbers[matched], return_counts=True)
    if (counts > 1).any():
        row = rows[counts > 1][0]
        one, other = (
            tiles[int(tile)].as_py().decode(errors="replace") for tile in matched[numbers[matched] == row][:2]
        )
        raise ValueError(
            f"'{names[int(row)]}' in '{path}' is the name of several tiles, '{one}' and '{other}'; paths below the "
            "dataset are expected"
        )


def as_told(table: Mapping[str, pa.Array]) -> list[Origin]:
    """The origin in each row of a table; equal ones are one object."""
    columns = [table[name].fill_null("").to_pylist() if name in table else None for name in FIELDS]
    count = len(next(iter(table.values())))
    known: dict[Origin, Origin] = {}
    rows = zip(*(column or [""] * count for column in columns), strict=True)
    return [
        known.setdefault(origin, origin) for origin in (Origin(slide, patient, site) for patient, slide, site in rows)
    ]

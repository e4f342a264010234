"""Which slides to train on: a folder, a text file of paths, or a CSV file with weights and resolutions."""

import csv
import math
import os
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from dinov2.data.slides.find import SLIDE_SUFFIXES
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.resolution import PLAUSIBLE_MPP, MppTable
from dinov2.utils.seeding import hash_words

_PATH_COLUMNS = ("path", "slide")


@dataclass(frozen=True)
class SlideRow:
    """One slide to train on.

    Attributes:
        path: file or URL.
        weight: how often it is drawn, up to a common factor.
        mpp: micrometres per level-0 px where the slide itself does not say, else None.
    """

    path: str
    weight: float = 1.0
    mpp: float | None = None


def read_slide_table(
    place: str | Path, weight_column: str = "", mpp_column: str = "mpp", mpp_table: MppTable | None = None
) -> list[SlideRow]:
    """List slides by path.

    Args:
        place: a folder, searched with its subfolders; a text file with one path or URL per line (blank lines and `#`
            lines are skipped); or a .csv file with a header and a column `path` or `slide`. Relative paths are
            relative to the file that holds them.
        weight_column: column of a CSV file with each slide's weight; empty weighs all alike.
        mpp_column: column of a CSV file with micrometres per level-0 px; it and its cells may be absent.
        mpp_table: the same for slides that the table has no number for.

    Raises:
        FileNotFoundError: there is no such place.
        ValueError: no slide is listed, one is listed twice, a column is missing, or a value is out of range.
    """
    path = Path(place)
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.suffix.lower() in SLIDE_SUFFIXES)
        rows = [SlideRow(str(file)) for file in found if file.is_file() and not file.name.startswith(".")]
    elif not path.is_file():
        raise FileNotFoundError(
            f"There are no slides at '{place}'; a folder, a text file of paths or a .csv file is expected."
        )
    elif path.suffix.lower() == ".csv":
        rows = _read_csv(path, weight_column, mpp_column)
    else:
        with path.open(encoding="utf-8", errors="surrogateescape") as lines:
            names = [line.strip() for line in lines]
        rows = [SlideRow(_absolute(name, path)) for name in names if name and not name.startswith("#")]
    if weight_column and path.suffix.lower() != ".csv":
        raise ValueError(f"Slides are weighed by column '{weight_column}', but '{place}' is no .csv file.")
    if not rows:
        raise ValueError(f"'{place}' lists no slide; at least 1 is expected.")
    rows.sort(key=lambda row: row.path)
    twice = next((a.path for a, b in pairwise(rows) if a.path == b.path), None)
    if twice is not None:
        raise ValueError(
            f"'{place}' lists slide '{twice}' twice; once is expected, with a weight if need be."
        )
    if mpp_table is not None:
        rows = [replace(row, mpp=mpp_table.get(row.path)) if row.mpp is None else row for row in rows]
    return rows


def take_share(rows: list[SlideRow], share: float, seed: int) -> list[SlideRow]:
    """Take a share of the slides, at least one, by a hash of the seed and each slide's file name.

    The slides of a smaller share are among those of a larger one, wherever the folder lies.

    Raises:
        ValueError: `share` is not within (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share of slides is {share}, but it must lie within (0, 1].")
    keys = [(_hash(seed, os.path.basename(row.path)), row.path) for row in rows]
    chosen = sorted(range(len(rows)), key=keys.__getitem__)[: max(1, round(share * len(rows)))]
    return [rows[i] for i in sorted(chosen)]


def _hash(seed: int, name: str) -> int:
    words = np.frombuffer(name.encode(errors="surrogateescape"), np.uint8).astype(np.uint64)
    return int(hash_words(seed, len(words), *words)[0])


def _absolute(name: str, table: Path) -> str:
    return name if is_remote(name) else str(table.parent / name)


def _read_csv(path: Path, weight_column: str, mpp_column: str) -> list[SlideRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = reader.fieldnames or ()
        name = next((column for column in _PATH_COLUMNS if column in columns), None)
        if name is None or (weight_column and weight_column not in columns):
            wanted = "'path' or 'slide'" if name is None else f"'{weight_column}'"
            raise ValueError(
                f"'{path}' has the columns {', '.join(columns) or 'none'}; {wanted} is expected."
            )
        rows = []
        for record in reader:
            place = f"line {reader.line_num} of '{path}'"
            slide = (record[name] or "").strip()
            if not slide:
                raise ValueError(f"The column '{name}' is empty in {place}; a path or URL is expected.")
            weight = _number(record[weight_column], (0, math.inf), place) if weight_column else 1.0
            text = (record.get(mpp_column) or "").strip()
            mpp = _number(text, PLAUSIBLE_MPP, place) if text else None
            if weight > 0:
                rows.append(SlideRow(_absolute(slide, path), weight, mpp))
    return rows


def _number(text: str | None, within: tuple[float, float], place: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (within[0] <= value <= within[1] and math.isfinite(value)):
        raise ValueError(
            f"{text!r} in {place} is no number from {within[0]:g} to {within[1]:g}, which is expected."
        )
    return value

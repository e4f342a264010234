"""The one finder of slides, by which every tool understands a folder, a list, a slide or a URL alike."""

import logging
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dinov2.data.slides.image import IMAGE_SUFFIXES
from dinov2.data.slides.index import TileIndexes, is_tile_index
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.resolution import PLAUSIBLE_MPP, MppTable, number, read_csv

logger = logging.getLogger(__name__)

SLIDE_SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm"}
SLIDE_SUFFIXES |= {".btf", ".czi", ".qptiff"}


@dataclass(frozen=True, order=True)
class SlideRow:
    """One slide, ordered by path."""

    path: str  # absolute, or a URL
    weight: float = 1.0  # how often it is drawn, up to a common factor
    mpp: float | None = None  # micrometres per level-0 px where the slide itself does not say
    key: str = field(default="", compare=False)  # path below the folder that was searched, or the path's last part
    tile_index: str = field(default="", compare=False)  # file of `index_slides.py` that holds its tiles, if any


class FoundSlides(NamedTuple):
    """Slides, and paths that lead to one of them again, each with the path that has led there first."""

    slides: list[SlideRow]
    duplicates: list[tuple[str, str]]


def find_slides(source: str | Path, weight_column: str = "", mpp_table: MppTable | None = None) -> FoundSlides:
    """Find slides, each file once: of several paths that lead to one file the first counts.

    They are sorted by key in a folder, and in the given order in a list. FileNotFoundError if there is no such path,
    OSError if a folder cannot be listed, ValueError if there is no slide, one has two weights, a column is missing, or
    a value is out of range.

    Args:
        source: a folder, searched with its subfolders but without hidden files and folders (links to folders are
            not followed); a text file with one path or URL per line (blank lines and `#` lines are skipped); a .csv
            file with a header, a column `path` or `slide`, and perhaps `mpp`; a tile index; one slide; or the URL of
            one. For relative paths in a file see `locate`.
        weight_column: column of a CSV file with each slide's weight, 0 leaves it out; empty weighs all alike.
        mpp_table: micrometres per level-0 px of slides that `source` has no number for.
    """
    path = Path(source)
    ending = path.suffix.lower()
    if weight_column and ending != ".csv":
        raise ValueError(f"Slides are weighed by column '{weight_column}', but '{source}' is no .csv file.")
    if is_remote(source):
        rows = [_row(str(source))]
    elif path.is_dir():
        rows = _search(path)
    elif not path.is_file():
        wanted = "a folder of slides, a text or .csv file of paths, or one slide is expected"
        raise FileNotFoundError(f"'{source}' does not exist; {wanted}.")
    elif ending in SLIDE_SUFFIXES | IMAGE_SUFFIXES:
        rows = [_row(os.path.abspath(path))]
    elif ending == ".csv":
        rows = _read_table(path, weight_column)
    elif is_tile_index(path):
        indexes = TileIndexes(path)
        known = ((slide, indexes.outline(slide)) for slide in indexes)
        mpps = {slide: index.mpp if index.mpp_source == "user" else None for slide, index in known}
        rows = [_row(slide, mpp=mpp, tile_index=os.path.abspath(path)) for slide, mpp in mpps.items()]
    else:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        names = (line.strip() for line in lines)
        rows = [_row(locate(name, path)) for name in names if name and not name.startswith("#")]
    if not rows:
        raise ValueError(f"'{source}' holds no slide; at least one {', '.join(sorted(SLIDE_SUFFIXES))} is expected.")
    found = _each_once(rows, source)
    for index, row in enumerate(found.slides):
        if mpp_table is not None and row.mpp is None:
            found.slides[index] = replace(row, mpp=mpp_table.get(row.path))
    return found


def locate(name: str, listed_in: Path) -> str:
    """Find the file or URL that a list names: beside the list, or in the current directory if only that one exists."""
    if is_remote(name):
        return name
    path = listed_in.parent / name
    return os.path.abspath(name if os.path.exists(name) and not path.exists() else path)


def _row(path: str, **known: Any) -> SlideRow:
    return SlideRow(path, key=Path(urlsplit(path).path if is_remote(path) else path).name, **known)


def _search(folder: Path) -> list[SlideRow]:
    def refuse(error: OSError) -> None:
        found = f"The folder '{error.filename}' cannot be listed ({error.strerror})"
        raise type(error)(f"{found}; it must be readable, since its slides would be missed.") from error

    rows = []
    for location, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = (name for name in folders if not name.startswith("."))
        for file in (Path(location, name) for name in names if not name.startswith(".")):
            if file.suffix.lower() in SLIDE_SUFFIXES:
                rows.append(SlideRow(os.path.abspath(file), key=file.relative_to(folder).as_posix()))
    return sorted(rows, key=lambda row: row.key)


def _read_table(path: Path, weight_column: str) -> list[SlideRow]:
    columns, cells = read_csv(path)
    path_column = next((column for column in ("path", "slide") if column in columns), None)
    if path_column is None or (weight_column and weight_column not in columns):
        wanted = "'path' or 'slide'" if path_column is None else f"'{weight_column}'"
        raise ValueError(f"'{path}' has the columns {', '.join(columns) or 'none'}; {wanted} is expected.")
    rows = []
    for line, row in cells:
        if not row[path_column]:
            empty = f"The column '{path_column}' is empty in line {line} of '{path}'"
            raise ValueError(f"{empty}; a path or URL is expected.")
        weight = _number(row[weight_column], 0, math.inf, line, path) if weight_column else 1.0
        mpp = _number(row["mpp"], *PLAUSIBLE_MPP, line, path) if row.get("mpp") else None
        if weight > 0:
            rows.append(_row(locate(row[path_column], path), weight=weight, mpp=mpp))
    return rows


def _number(text: str, least: float, most: float, line: int, path: Path) -> float:
    value = number(text)
    if value is None or not (least <= value <= most and math.isfinite(value)):
        wanted = f"no number from {least:g} to {most:g}, which is expected"
        raise ValueError(f"{text!r} in line {line} of '{path}' is {wanted}.")
    return value


def _each_once(rows: list[SlideRow], source: str | Path) -> FoundSlides:
    first, found = {}, FoundSlides([], [])
    for row in rows:
        known = first.setdefault(row.path if is_remote(row.path) else os.path.realpath(row.path), row)
        if known is row:
            found.slides.append(row)
        elif (known.weight, known.mpp) != (row.weight, row.mpp):
            raise ValueError(f"'{source}' lists slide '{row.path}' twice, with different weights or mpp.")
        else:
            found.duplicates.append((row.path, known.path))
    if found.duplicates:
        words = "%d paths lead to slides that count already; the first is '%s', the same file as '%s'."
        logger.warning(words, len(found.duplicates), *found.duplicates[0])
    return found

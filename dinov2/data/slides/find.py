"""The one finder of slides, by which every tool understands a folder, a list, a slide or a URL alike."""

import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from dinov2.data.slides import identity
from dinov2.data.slides.dicom import is_dicom
from dinov2.data.slides.errors import UNREAD, unread, unread_at
from dinov2.data.slides.image import IMAGE_SUFFIXES
from dinov2.data.slides.index import TileIndexes, is_tile_index
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.resolution import PLAUSIBLE_MPP, MppTable, number
from dinov2.data.slides.tables import PATH_COLUMNS, column, columns_of, decoded, header_of, read_csv, read_lines
from dinov2.utils.walk import visible_files

logger = logging.getLogger(__name__)

SLIDE_SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm"}
SLIDE_SUFFIXES |= {".btf", ".czi", ".qptiff"}
NAMED_SUFFIXES = SLIDE_SUFFIXES | IMAGE_SUFFIXES  # of what is a slide where it is named
PATIENT_COLUMNS = ("patient", "case_id")
_DOUBLE_SUFFIXES = (".ome.tif", ".ome.tiff")
_TABLE_SUFFIXES = {".csv", ".tsv"}
LIST_SUFFIXES = {".txt", *_TABLE_SUFFIXES}
_ENDINGS_SHOWN = 8
_LOOKED_AT = 1 << 16  # bytes of a file that tell whether it is a text


@dataclass(frozen=True, order=True)
class SlideRow:
    """One slide, ordered by path."""

    path: str  # absolute, or a URL
    weight: float = 1.0  # how often it is drawn, up to a common factor
    mpp: float | None = None  # micrometres per level-0 px that the user gives, in place of what the slide says
    key: str = field(default="", compare=False)  # path below the folder that was searched, or the path's last part
    tile_index: str = field(default="", compare=False)  # file of `index_slides.py` that holds its tiles, if any
    patient: str = field(default="", compare=False)  # that a DICOM file or a table tells; empty: the path does


class FoundSlides(NamedTuple):
    """Slides, and paths that lead to one of them again, each with the path that has led there first."""

    slides: list[SlideRow]
    duplicates: list[tuple[str, str]]


def find_slides(
    source: str | Path, weight_column: str = "", mpp_table: MppTable | None = None,
    slide_root: str | Path | None = None,
) -> FoundSlides:  # fmt: skip
    """Find slides, each once: of several paths that lead to one slide (see `identity`) the first counts.

    They are sorted by key in a folder, and in the given order in a list. FileNotFoundError if there is no such path,
    OSError if a folder cannot be listed, ValueError if there is no slide, one has two weights, a column is missing, a
    value is out of range, or the file is neither a slide nor a list.

    Args:
        source: a folder, searched with its subfolders and linked folders but without hidden files and folders; a text
            file with one path or URL per line; a table with a header, a column of `PATH_COLUMNS`, and perhaps `mpp`
            and one of `PATIENT_COLUMNS`; a tile index; one slide; or the URL of one. For the entries of lists see
            `tables.read_lines` and `locate`; one that is a folder stands for the slides in it.
        weight_column: column of a table with each slide's weight, 0 leaves it out; empty weighs all alike.
        mpp_table: micrometres per level-0 px that the user gives for slides that `source` has no number for.
        slide_root: folder that holds the slides of a list, if they have moved.
    """
    path = Path(source)
    if not is_remote(source) and not path.exists():
        wanted = "a folder of slides, a text or .csv file of paths, or one slide is expected"
        raise FileNotFoundError(f"'{source}' does not exist; {wanted}.")
    is_table = path.is_file() and is_slide_table(path)
    if weight_column and not is_table:
        raise ValueError(f"Slides are weighed by column '{weight_column}', but '{source}' is no .csv file.")
    if is_remote(source):
        rows = [_row(str(source))]
    elif path.is_dir() or path.suffix.lower() in NAMED_SUFFIXES or is_dicom(path):
        rows = _rows_at(identity.with_companions(os.path.abspath(path)))
    elif is_table:
        rows = _read_table(path, weight_column, slide_root)
    elif is_tile_index(path):
        indexes = TileIndexes(path)
        mpps = {slide: indexes.outline(slide).resolution.user for slide in indexes}
        rows = [_row(slide, mpp=mpp, tile_index=os.path.abspath(path)) for slide, mpp in mpps.items()]
    else:
        _refuse_binary(path)
        rows = [row for name in read_lines(path) for row in _entry(name, path, slide_root)]
    if not rows:
        wanted = f"at least one {', '.join(sorted(SLIDE_SUFFIXES))} is expected"
        raise ValueError(f"'{source}' holds no slide, since {_what_else(path)}; {wanted}.")
    found = _each_once(rows, source)
    for index, row in enumerate(found.slides):
        if mpp_table is not None and row.mpp is None:
            found.slides[index] = replace(row, mpp=mpp_table.get(row.path))
    if mpp_table is not None and all(row.mpp is None for row in found.slides):
        logger.warning("The mpp table names none of the %d slides of '%s'.", len(found.slides), source)
    return found


def is_slide_table(path: Path) -> bool:
    """Whether a local file is a table of slides by its ending, or a text that begins with a header of such columns."""
    if path.suffix.lower() in _TABLE_SUFFIXES:
        return True
    if path.suffix.lower() in NAMED_SUFFIXES:
        return False
    with path.open("rb") as file:
        _, line = header_of(decoded(file.read(_LOOKED_AT)))
    return "\0" not in line and is_header(line, path)


def is_header(line: str, listed_in: Path) -> bool:
    """Whether a line names columns of a table of slides, and no slide or folder itself."""
    columns = columns_of(line)
    if len(columns) == 1 and any(os.path.exists(path) for path in (line, listed_in.parent / line)):
        return False
    return column(PATH_COLUMNS, columns) is not None


def locate(name: str, listed_in: str | Path, slide_root: str | Path | None = None) -> str:
    """Find the file, folder or URL that a list names, as an absolute path.

    With a `slide_root`, the longest tail of the name that exists below it is taken; then what lies beside the list,
    then in the current directory; then the one slide below the root that is called so. A name without the ending of a
    slide also stands for a slide of that name. What is nowhere is located below the root, or else beside the list.
    """
    if name.startswith("file://") and not os.path.exists(name.removeprefix("file://")):
        name = unquote(name)
    name = os.path.expanduser(name.removeprefix("file://"))
    if is_remote(name):
        return name
    tails = []
    if slide_root is not None:
        parts = [part for part in re.split(r"[/\\]", name) if part]
        tails = [Path(slide_root, *parts[start:]) for start in range(len(parts))]
    candidates = [*tails, Path(listed_in).parent / name, Path(name)]
    endings = [""] if Path(name).suffix.lower() in NAMED_SUFFIXES else ["", *sorted(SLIDE_SUFFIXES), *_DOUBLE_SUFFIXES]
    for ending in endings:
        for candidate in candidates:
            if os.path.exists(f"{candidate}{ending}"):
                return identity.with_companions(os.path.abspath(f"{candidate}{ending}"))
    if slide_root is not None and (found := _below(str(slide_root), tails[-1].name)):
        return found
    return os.path.abspath(candidates[0])


def _below(root: str, name: str) -> str:
    """The one slide of a name, with or without its ending, below a folder; empty if there is none."""
    found = _slides_by_name(root).get(name, [])
    distinct = list(dict.fromkeys(identity.same_slides(found).values()))
    if len(distinct) > 1:
        several = f"The slide '{name}' lies at {len(distinct)} paths below '{root}', '{distinct[0]}' among them"
        raise ValueError(f"{several}; list more of its path, so that one is meant.")
    return distinct[0] if distinct else ""


@lru_cache(4)
def _slides_by_name(root: str) -> dict[str, list[str]]:
    names = defaultdict(list)
    for row in _search(Path(root), NAMED_SUFFIXES):
        path = Path(row.path)
        names[path.name].append(row.path)
        if path.suffix.lower() in SLIDE_SUFFIXES:  # an image of a slide's name may be a picture of it
            for stem in {path.stem, path.name.partition(".")[0]}:  # the barcode of names as barcode.uuid.svs
                names[stem].append(row.path)
    return names


def _row(path: str, **known: Any) -> SlideRow:
    return SlideRow(path, key=Path(urlsplit(path).path if is_remote(path) else path).name, **known)


def _rows_at(path: str, **known: Any) -> list[SlideRow]:
    """The slides at a path, which may be a folder."""
    if not is_remote(path) and os.path.isdir(path):
        return [replace(row, **known) for row in _search(Path(path))]
    return [_row(path, **known)]


def _entry(name: str, listed_in: Path, slide_root: str | Path | None, **known: Any) -> list[SlideRow]:
    """The slides that an entry of a list stands for: none for `._x`, which macOS leaves beside x on foreign disks."""
    if re.split(r"[/\\]", name)[-1].startswith("._"):
        return []
    return _rows_at(locate(name, listed_in, slide_root), **known)


def _search(folder: Path, suffixes: Set[str] = SLIDE_SUFFIXES) -> list[SlideRow]:
    def refuse(error: OSError) -> None:
        found = f"The folder '{error.filename}' cannot be listed ({error.strerror})"
        raise type(error)(f"{found}; it must be readable, since its slides would be missed.") from error

    files, foreign = [], set()
    for file in visible_files(folder, refuse):
        if file.suffix.lower() in suffixes:
            files.append(file)
        elif other := unread_at(file):
            foreign.add(other)
        elif is_dicom(file):
            files.append(file)
    if files and foreign:
        first, words = min(foreign), "%d slides below '%s' are left out, such as '%s': %s."
        logger.warning(words, len(foreign), folder, first, unread(first))
    parts = identity.companions(files)
    rows = [
        SlideRow(identity.with_companions(os.path.abspath(file)), key=file.relative_to(folder).as_posix())
        for file in files
        if file not in parts
    ]
    return sorted(rows, key=lambda row: row.key)


def _what_else(path: Path) -> str:
    """What a folder or list holds that has no slide."""
    if not path.is_dir():
        return "no line of it names one"
    files = list(visible_files(path))
    if foreign := sorted(filter(None, map(unread_at, [path, *files]))):
        return f"'{foreign[0]}' is not read: {unread(foreign[0])}"
    endings = sorted({file.suffix.lower() or "no ending" for file in files})
    return f"its files have the endings {', '.join(endings[:_ENDINGS_SHOWN])}" if files else "it holds no file at all"


def _refuse_binary(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT)
    if path.suffix.lower() in UNREAD:
        raise ValueError(f"'{path}' cannot be read: {unread(path)}.")
    if "\0" in decoded(start):
        kind = f"a file of format '{path.suffix}'" if path.suffix else "neither a text nor a known format"
        if path.suffix.lower() in LIST_SUFFIXES:
            kind = "no text of a known encoding, as UTF-8, or UTF-16 with its mark"
        raise ValueError(
            f"'{path}' is {kind}, which is not read; {', '.join(sorted(NAMED_SUFFIXES))}, or a text or .csv file of "
            "their paths is expected."
        )


def _read_table(path: Path, weight_column: str, slide_root: str | Path | None) -> list[SlideRow]:
    columns, cells = read_csv(path)
    path_column, patient_column = (column(names, columns) for names in (PATH_COLUMNS, PATIENT_COLUMNS))
    mpp_column, weights = column(["mpp"], columns), column([weight_column], columns) if weight_column else ""
    if path_column is None or weights is None:
        one_of = " or ".join(map(repr, PATH_COLUMNS))
        wanted = f"{one_of} is expected, in the first line" if path_column is None else f"'{weight_column}' is expected"
        raise ValueError(f"'{path}' has the columns {', '.join(columns) or 'none'}; {wanted}.")
    rows = []
    for line, row in cells:
        if not row[path_column]:
            empty = f"The column '{path_column}' is empty in line {line} of '{path}'"
            raise ValueError(f"{empty}; a path or URL is expected.")
        weight = _number(row[weights], 0, math.inf, line, path) if weights else 1.0
        mpp = row[mpp_column] if mpp_column else ""
        known = {"mpp": _number(mpp, *PLAUSIBLE_MPP, line, path) if mpp else None}
        if patient_column and row[patient_column]:
            known["patient"] = row[patient_column]
        if weight > 0:
            rows += _entry(row[path_column], path, slide_root, weight=weight, **known)
    return rows


def _number(text: str, least: float, most: float, line: int, path: Path) -> float:
    value = number(text)
    if value is None or not (least <= value <= most and math.isfinite(value)):
        wanted = f"no number from {least:g} to {most:g}, which is expected"
        raise ValueError(f"{text!r} in line {line} of '{path}' is {wanted}.")
    return value


def _each_once(rows: list[SlideRow], source: str | Path) -> FoundSlides:
    """Leave one row for each slide, at the place of its first path."""
    chosen, patients, foreign = identity.dicom_slides([row.path for row in rows])
    if foreign:
        logger.warning("%d DICOM files are no whole slides and are left out, such as '%s'.", len(foreign), foreign[0])
        left_out = set(foreign)
        rows = [row for row in rows if row.path not in left_out]
    same = identity.same_slides([row.path for row in rows])
    first: dict[str, SlideRow] = {}
    found, keys = FoundSlides([], []), {row.path: row.key for row in reversed(rows)}
    for row in rows:
        path = chosen.get(same[row.path], same[row.path])
        known = first.get(path)
        if known is None:
            first[path] = replace(row, path=path, key=keys[path], patient=row.patient or patients.get(path, ""))
        elif (known.weight, known.mpp) != (row.weight, row.mpp):
            raise ValueError(f"'{source}' lists slide '{row.path}' twice, with different weights or mpp.")
        elif row.path not in chosen or os.path.dirname(row.path) != os.path.dirname(path):
            found.duplicates.append((row.path, path))
    found.slides.extend(first.values())
    if not found.slides:
        raise ValueError(f"'{source}' holds no slide; its DICOM files are pictures of another kind.")
    if found.duplicates:
        words = "%d paths lead to slides that count already; the first is '%s', the same slide as '%s'."
        logger.warning(words, len(found.duplicates), *found.duplicates[0])
    return found

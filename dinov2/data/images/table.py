"""Tables of images: CSV files that name tiles, and the patients, slides and sites of them."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from dinov2.data.images.files import IMAGES
from dinov2.data.slides.tables import decoded

FILE_COLUMNS = ("file", "image", "path", "filename", "file_name", "filepath", "file_path", "image_path", "image_file")
"""Columns that name files of images, the first ones first, in lower case."""


FIELDS = ("patient", "slide", "site")
"""Columns that tell where a tile is from; `_ALIASES` have other names of them."""

_ALIASES = {"patient": ("patient_id", "case_id"), "slide": ("slide_id",), "site": ("site_id",)}
_DELIMITERS = (",", ";", "\t")
_BEFORE_HEADER = re.compile(r"(?:[ \t]*(?:#.*)?\n)*")


def first_rows(data: bytes) -> tuple[list[str], list[list[str]]]:
    """Names of the columns of a table, see `read_table`, and its rows, by the beginning of its bytes."""
    text = _text(data)
    delimiter = _delimiter(text.partition("\n")[0])
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True))
    except csv.Error:
        return [], []
    rows = [[cell.strip() for cell in row] for row in rows if row]
    header, is_headless = _header(rows[0] if rows else [])
    return header, rows if is_headless else rows[1:]


def read_table(data: bytes, name: str) -> dict[str, pa.Array]:
    """Read a table with a header: its columns as texts, their names in lower case.

    Cells are separated by the most frequent of comma, semicolon and tab in the header and may be quoted; UTF-8, or
    UTF-16 with its mark; any line ends; blank lines and comments (`#`) before the header are passed over. A table whose
    first row names an image has no header: that column is `file`. ValueError if it is no table.
    """
    text = _text(data)
    try:
        delimiter = _delimiter(text.partition("\n")[0])
        first = next(csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True), [])
        header, is_headless = _header([cell.strip() for cell in first])
        if twice := [column for column, count in Counter(header).items() if count > 1 and column]:
            raise ValueError(f"it has two columns {twice[0]!r}, one is expected")
        names = [column or f"column {number}" for number, column in enumerate(header, 1)]
        table = pyarrow.csv.read_csv(
            io.BytesIO(text.encode(errors="surrogateescape")),
            read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=0 if is_headless else 1),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except (pa.ArrowException, UnicodeError, csv.Error, ValueError) as error:
        raise ValueError(f"'{name}' cannot be read as a table ({' '.join(str(error).split())})") from error
    columns = {name: pa.compute.utf8_trim_whitespace(table[name].combine_chunks()) for name in names}
    for field, aliases in _ALIASES.items():
        alias = next((alias for alias in aliases if alias in columns), "")
        if field not in columns and alias:
            columns[field] = columns[alias]
    return columns


def _text(data: bytes) -> str:
    text = decoded(data).replace("\r\n", "\n").replace("\r", "\n")
    return text[_BEFORE_HEADER.match(text).end() :]


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=header.count)


def _header(cells: list[str]) -> tuple[list[str], bool]:
    """Names of columns by the cells of the first row, and whether it is a row itself: one that names an image."""
    image = next((number for number, cell in enumerate(cells) if IMAGES.fits(cell)), None)
    if image is None:
        return [cell.lower() for cell in cells], False
    return ["file" if number == image else "" for number in range(len(cells))], True


def file_column(columns: Sequence[str], named: str = "") -> str:
    """Name of the column of files: ``named``, or the first of `FILE_COLUMNS`; empty if there is none."""
    return next((column for column in (named.lower(), *FILE_COLUMNS) if column and column in columns), "")


def read_local_table(path: str | Path) -> dict[str, pa.Array]:
    """`read_table` of a local file; FileNotFoundError if there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"table '{path}' does not exist; a CSV file is expected")
    return read_table(Path(path).read_bytes(), str(path))

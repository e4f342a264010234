"""Text files that people make of slides: lines and tables, as editors and spreadsheets leave them."""

import codecs
import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_SEPARATORS = (",", ";", "\t")
_QUOTES = ('"', "'")
PATH_COLUMNS = ("path", "slide", "wsi", "slide_path", "slide_id")  # TRIDENT's is wsi, CLAM's slide_id


def decoded(data: bytes) -> str:
    """Text of a file's bytes: UTF-8, or what its byte-order mark says; bytes that are neither survive as surrogates."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    return data.decode(encoding, errors="replace" if encoding == "utf-16" else "surrogateescape")


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without blanks and quotes around them; blank ones and comments (`#`) are left out."""
    lines = (line.strip() for line in decoded(path.read_bytes()).splitlines())
    return [unquoted(line) for line in lines if line and not line.startswith("#")]


def header_of(text: str) -> tuple[int, str]:
    """Number, from 0, and text of the first line that is no blank, comment or separator as spreadsheets tell it."""
    lines = text.splitlines()
    kept = ((number, line) for number, line in enumerate(lines) if not _is_aside(line))
    return next(kept, (len(lines), ""))


def column(names: Iterable[str], columns: Sequence[str]) -> str | None:
    """The first of some names that a table has a column for, as it spells it, in capitals or not."""
    spelt = {found.lower(): found for found in reversed(columns)} | {found: found for found in columns}
    return next((spelt[form] for name in names for form in (name, name.lower()) if form in spelt), None)


def unquoted(text: str) -> str:
    """A text without the quotes around it."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES
    return text[1:-1].strip() if is_quoted else text


def columns_of(header: str) -> list[str]:
    """Columns that the header of a table names, separated by the most frequent of comma, semicolon and tab."""
    reader = csv.reader([header], delimiter=_separator(header), skipinitialspace=True)
    return [name.strip() for name in next(reader, [])]


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a table with a header: its columns, and each row's line number and cells, blanks around them removed.

    Blank lines and comments (`#`) are left out.
    """
    text = decoded(path.read_bytes())
    first, header = header_of(text)
    lines = StringIO("".join(text.splitlines(keepends=True)[first:]), newline="")
    reader = csv.DictReader(lines, delimiter=_separator(header), skipinitialspace=True)
    columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    rows = [(first + reader.line_num, {name: (row[name] or "").strip() for name in columns}) for row in reader]
    return columns, [(number, row) for number, row in rows if not row[columns[0]].startswith("#")]


def _is_aside(line: str) -> bool:
    line = line.strip().lower()
    return not line or line.startswith(("#", "sep="))


def _separator(header: str) -> str:
    return max(_SEPARATORS, key=header.count)

"""Text files that people make of slides: lines and tables, as editors and spreadsheets leave them."""

import codecs
import csv
from io import StringIO
from pathlib import Path

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_SEPARATORS = (",", ";", "\t")
_QUOTES = ('"', "'")


def decoded(data: bytes) -> str:
    """Text of a file's bytes: UTF-8, or what its byte-order mark says; bytes that are neither survive as surrogates."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    return data.decode(encoding, errors="replace" if encoding == "utf-16" else "surrogateescape")


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without blanks and quotes around them; blank ones and comments (`#`) are left out."""
    lines = (line.strip() for line in decoded(path.read_bytes()).splitlines())
    return [unquoted(line) for line in lines if line and not line.startswith("#")]


def unquoted(text: str) -> str:
    """A text without the quotes around it."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES
    return text[1:-1].strip() if is_quoted else text


def columns_of(header: str) -> list[str]:
    """Columns that the first line of a table names, separated by the most frequent of comma, semicolon and tab."""
    reader = csv.reader([header], delimiter=_separator(header), skipinitialspace=True)
    return [name.strip() for name in next(reader, [])]


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a table with a header: its columns, and each row's line number and cells, blanks around them removed."""
    text = decoded(path.read_bytes())
    separator = _separator(text.partition("\n")[0])
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    columns = reader.fieldnames = [column.strip() for column in reader.fieldnames or []]
    rows = [(reader.line_num, {name: (row[name] or "").strip() for name in columns}) for row in reader]
    return columns, rows


def _separator(header: str) -> str:
    return max(_SEPARATORS, key=header.count)

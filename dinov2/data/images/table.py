"""Tables of images: CSV files that name tiles, and the patients, slides and sites of them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

FILE_COLUMNS = ("file", "image", "path", "filename", "file_name", "filepath", "file_path", "image_path", "image_file")
"""Columns that name files of images, the first ones first, in lower case."""


def delimiter_of(name: str) -> str:
    """The delimiter of a table by its file name."""
    return "\t" if name.lower().endswith(".tsv") else ","


def read_table(data: bytes, name: str) -> dict[str, pa.Array]:
    """Read a CSV or, by its name, TSV file with a header: its columns as texts, their names in lower case.

    UTF-8 with or without a byte order mark, quoted cells, and any line ends. ValueError if it is no table.
    """
    try:
        first = data[: data.find(b"\n") if b"\n" in data else None].decode("utf-8-sig")
        header = next(csv.reader([first], delimiter=delimiter_of(name)), [])
        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter_of(name), newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
        )
    except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{name}' cannot be read as a table ({' '.join(str(error).split())})") from error
    columns = {column.strip().lower(): table[column].combine_chunks() for column in table.column_names}
    return {
        column: pa.compute.utf8_trim_whitespace(values)
        for column, values in columns.items()
        if values.type == pa.string()
    }


def file_column(columns: Sequence[str], named: str = "") -> str:
    """Name of the column of files: ``named``, or the first of `FILE_COLUMNS`; empty if there is none."""
    return next((column for column in (named.lower(), *FILE_COLUMNS) if column and column in columns), "")


def read_local_table(path: str | Path) -> dict[str, pa.Array]:
    """`read_table` of a local file; FileNotFoundError if there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"table '{path}' does not exist; a CSV file is expected")
    return read_table(Path(path).read_bytes(), str(path))

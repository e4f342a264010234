"""Patients and slides that are set aside: exclusion lists and the validation share."""

import csv
from pathlib import Path

from dinov2.utils.seeding import hash_name

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_exclusions(path: str | Path) -> list[str]:
    """Read a list of patients or slides, one per line; blank lines and those that begin with # are skipped.

    Args:
        path: UTF-8 text. Of a .csv or .tsv file the first column counts.

    Returns:
        Each name once, as written and in order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not text, or names nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"exclusion file '{path}' does not exist; a text file of one patient or slide per line is expected"
        )
    delimiter = _DELIMITERS.get(path.suffix.lower())
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        cells = [_first_cell(line, delimiter) if delimiter else line for line in lines]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"exclusion file '{path}' cannot be read ({error}); UTF-8 text is expected") from None
    if any("\0" in cell for cell in cells):
        raise ValueError(f"exclusion file '{path}' holds zero bytes; UTF-8 text is expected")
    names = [name for name in dict.fromkeys(map(str.strip, cells)) if name and not name.startswith("#")]
    if not names:
        raise ValueError(f"exclusion file '{path}' names nothing; at least 1 patient or slide is expected")
    return names


def in_validation(patient: str, share: float) -> bool:
    """Decide whether a patient belongs to the validation share, by the name alone.

    True where hash_name(patient) / 2**64 lies below `share`. So a patient is on the same side in every dataset, and a
    larger share keeps the patients of a smaller one.

    Raises:
        ValueError: if `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"the validation share is {share}; at least 0 and less than 1 is expected")
    return hash_name(patient) / 2**64 < share


def _first_cell(line: str, delimiter: str) -> str:
    """Read line by line, lest a stray quotation mark swallow the lines after it."""
    cells = next(csv.reader([line], delimiter=delimiter), [])
    return cells[0] if cells else ""

"""Manifests of the Genomic Data Commons: which files, how large, and with which md5."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_COLUMNS = ("id", "filename", "md5", "size", "state")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_MD5 = re.compile(r"[0-9a-f]{32}")
_FORBIDDEN = re.compile(r"[/\\\x00-\x1f\x7f]")
_LONGEST_NAME = 240  # leaves room in a file system's 255 bytes for what is appended while a file is fetched


@dataclass(frozen=True)
class GdcFile:
    """One file of the GDC, checked: it may be used as a path and in a URL; ValueError if not."""

    id: str  # its UUID
    name: str  # its file name, which does not lead out of a folder
    md5: str  # of its content, 32 lower-case hexadecimal digits
    size: int  # in bytes
    state: str = ""  # as the GDC has it ("released"), or empty

    def __post_init__(self) -> None:
        if not _UUID.fullmatch(self.id):
            raise ValueError(f"id {self.id!r} is not a UUID")
        if self.name != self.name.strip() or self.name in ("", ".", "..") or _FORBIDDEN.search(self.name):
            raise ValueError(f"filename {self.name!r} is no plain file name, one without a folder")
        if len(self.name.encode(errors="replace")) > _LONGEST_NAME or self.name.endswith(".part"):
            raise ValueError(f"filename {self.name!r} has more than {_LONGEST_NAME} bytes or the ending .part")
        if not _MD5.fullmatch(self.md5):
            raise ValueError(f"md5 {self.md5!r} is not 32 hexadecimal digits")
        if self.size < 0:
            raise ValueError(f"size {self.size} is negative")


def read_manifest(path: Path) -> list[GdcFile]:
    """Read a manifest: tab-separated, its first line names the columns (any order, others are ignored).

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not a manifest, or a line is wrong, by number; or it lists nothing.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"Manifest '{path}' is not text in UTF-8 (byte {error.start}).") from error
    header = [name.strip() for name in lines[0].split("\t")]
    if missing := [name for name in _COLUMNS[:4] if name not in header]:
        raise ValueError(
            f"Manifest '{path}', line 1 is {lines[0][:60]!r} and lacks {', '.join(missing)}; "
            f"the GDC's tab-separated columns {', '.join(_COLUMNS)} are expected."
        )
    files: dict[str, GdcFile] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} columns in place of {len(header)}")
            row = dict(zip(header, cells, strict=True))
            if not (row["size"].isascii() and row["size"].isdigit()):
                raise ValueError(f"size {row['size']!r} is not a whole number of bytes")
            file = GdcFile(row["id"], row["filename"], row["md5"].lower(), int(row["size"]), row.get("state", ""))
            if files.setdefault(file.id, file) != file:
                raise ValueError(f"id {file.id} differs from an earlier line")
        except ValueError as error:
            raise ValueError(f"Manifest '{path}', line {number}: {error}.") from error
    if not files:
        raise ValueError(f"Manifest '{path}' lists no file; at least one line below the header is expected.")
    return list(files.values())


def manifest_lines(files: Iterable[GdcFile]) -> Iterator[str]:
    """Write files as the lines of a manifest."""
    yield "\t".join(_COLUMNS) + "\n"
    for file in files:
        yield f"{file.id}\t{file.name}\t{file.md5}\t{file.size}\t{file.state}\n"

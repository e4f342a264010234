"""Errors of whole-slide images; each names the slide, the location and the reason, and what it is that is not read."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov2.data.slides.tables import decoded
from dinov2.data.storage.base import public_name
from dinov2.utils.provenance import how_to_install

_CONVERT = "converted to OME-TIFF (QuPath, or bfconvert of Bio-Formats) it is read"
UNREAD = {
    ".i2syntax": "Philips i2Syntax", ".isyntax": "Philips iSyntax", ".vsi": "Olympus VSI", ".oir": "Olympus OIR",
    ".nd2": "Nikon ND2", ".lif": "Leica LIF", ".lof": "Leica LOF", ".zvi": "Zeiss ZVI", ".kfb": "KFBio KFB",
    ".sdpc": "Sqray SDPC", ".dyqx": "Sqray DYQX", ".mds": "Motic MDS", ".mdsx": "Motic MDSX", ".tron": "InteMedic TRON",
    ".ims": "Imaris", ".zarr": "OME-Zarr",
}  # fmt: skip
"""Formats of slides for which there is no reader, by their endings."""

_PACKED = {
    b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf": "7z", b"Rar!": "rar",
}  # fmt: skip
_PICTURES = {b"GIF8": "GIF", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"%PDF": "PDF"}
_CZI = b"ZISRAWFILE"
_TEXTS = {".vms", ".vmu"}  # slides that begin as texts do
_LOOKED_AT, _QUOTED = 4096, 40  # bytes of a file, letters of a text


class SlideError(RuntimeError):
    """A slide, a path or URL without credentials, that cannot give what was asked, where on it, and the reason.

    `location` is level and position, or empty; `detail` is it and `reason`, for a record that names the slide itself.
    """

    def __init__(self, slide: str | Path, reason: str, location: str = "") -> None:
        self.slide, self.location, self.reason = public_name(slide), location, reason
        self.detail = f"{location}: {reason}" if location else reason
        super().__init__(f"Slide '{self.slide}'{', ' + location if location else ''}: {reason}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.slide, self.reason, self.location)


class SlideOpenError(SlideError):
    """The file is missing, no slide, or its levels make no sense."""


class UnsupportedTiles(SlideOpenError):
    """The file cannot be read in this way; another may still read it."""


class SlideRangeError(SlideError, ValueError):
    """The level does not exist, or the region is not wholly on it."""


class SlideReadError(SlideError):
    """The file holds no decodable pixels for (a part of) the region."""


def import_package(name: str, need: str) -> Any:
    """Import a package of the 'slides' extra; `need` begins the error where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{need}; {how_to_install('slides')}.") from error


def unread_at(file: Path) -> Path | None:
    """The slide of a format of `UNREAD` that a file is, or a part of; None if it is of none."""
    return next((path for path in (file, *file.parents) if path.suffix.lower() in UNREAD), None)


def unread(path: str | Path) -> str:
    """Say of a file or folder with an ending of `UNREAD` what it is, and what would be read."""
    return f"it is of the format {UNREAD[Path(path).suffix.lower()]}, for which there is no reader; {_CONVERT}"


def not_read(path: str | Path, missing: Sequence[str], reasons: Sequence[str]) -> str:
    """Say what a local file is that no reader opens, and what would be read.

    Args:
        path: the file.
        missing: files that the slide needs and that are not there.
        reasons: why each of the readers refused it.
    """
    path = Path(path)
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"the file '{missing[0]}' that belongs to it{others} is missing; all are expected, named as they were"
    with path.open("rb") as file:
        start, size = file.read(_LOOKED_AT), os.fstat(file.fileno()).st_size
    if not start.strip(b"\0"):
        found = f"its {size} bytes begin with zeros" if size else "it is empty (0 bytes)"
        return f"{found}, as copies that were not finished are"
    if path.suffix.lower() in UNREAD:
        return unread(path)
    if start.startswith(_CZI):
        return f"it is a Zeiss CZI file of a kind that is not read ({reasons[-1]}); {_CONVERT}"
    for known, what in ((_PACKED, "it is packed by {}; unpack it"), (_PICTURES, "it is a {} file; store it as PNG")):
        for magic, name in known.items():
            if start.startswith(magic):
                return what.format(name)
    text = decoded(start)
    if "\0" not in text and text.splitlines()[0].isprintable() and path.suffix.lower() not in _TEXTS:
        return f"it is a text of {size} bytes that begins with {text[:_QUOTED]!r}; the slide itself is expected"
    accepted = "a TIFF pyramid, a format of OpenSlide's, or one image in PNG, JPEG or JPEG 2000 is expected"
    return f"{'; '.join(dict.fromkeys(reasons))}; {accepted}"

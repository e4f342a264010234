"""Kinds of data, each recognised by what is at a path, and opened with its section of the configuration."""

import os
import re
from collections.abc import Callable

from dinov2.data.kinds import endings
from dinov2.data.slides.tables import decoded
from dinov2.data.source import SourceRequest

_LARGEST_TILE = 4096  # px of a side; larger TIFF images are slides
_TILE_WIDTH = 322  # tag of a TIFF image that is stored in blocks, as slides are


def is_url(path: str) -> bool:
    """Whether a path is one of another machine."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path)) and not path.startswith("file://")


def holds(path: str, fits: Callable[[str], bool]) -> bool:
    """Whether a local folder (with its subfolders), a glob or a single path has a file whose ending fits."""
    return any(map(fits, endings(path)))


def is_slide(path: str, named: bool = False) -> bool:
    """Whether a file is a slide by its name and, if it is a TIFF file, by its first page.

    One that is itself `named` is no tile among others, and may be an image in one piece, such as PNG.
    """
    from dinov2.data.slides.find import NAMED_SUFFIXES, SLIDE_SUFFIXES

    ending = os.path.splitext(path)[1].lower()
    if named or ending not in (".tif", ".tiff") or not os.path.isfile(path):
        return ending in (NAMED_SUFFIXES if named else SLIDE_SUFFIXES)
    from PIL import Image

    try:
        with Image.open(path, formats=["TIFF"]) as image:
            single = image.n_frames == 1 and _TILE_WIDTH not in image.tag_v2
            return not (single and max(image.size) <= _LARGEST_TILE)
    except Exception:  # whatever Pillow stumbles over is for the reader of slides to name
        return True


def first_line(path: str) -> str:
    """The first line of a local text file that is neither blank nor a comment; empty where there is none."""
    path = os.path.expanduser(path.removeprefix("file://"))
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        text = decoded(file.read(1 << 16))
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("#") and "\0" not in line), "")


def refuse_revision(request: SourceRequest) -> None:
    """For kinds that have none: raise ValueError where a revision is configured."""
    if request.revision:
        raise ValueError(f"'{request.path}' has no revisions, so data.revision = {request.revision!r} cannot be taken.")

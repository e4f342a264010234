"""Kinds of data, each recognised by what is at a path, and opened with its section of the configuration."""

import os
import re
from collections.abc import Callable

from dinov2.data.kinds import endings
from dinov2.data.slides.tables import decoded, header_of
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
    """Whether a file is a slide by its name and, where tiles are of such files too, by its size.

    One that is itself `named` may be an image in one piece, such as PNG; where a folder is searched these are tiles.
    """
    from dinov2.data.slides.find import IMAGE_SUFFIXES, NAMED_SUFFIXES, SLIDE_SUFFIXES

    ending = os.path.splitext(path)[1].lower()
    if ending not in IMAGE_SUFFIXES | {".tif", ".tiff"} or not os.path.isfile(path):
        return ending in (NAMED_SUFFIXES if named else SLIDE_SUFFIXES)
    from PIL import Image

    try:
        with Image.open(path) as image:
            in_one_piece = getattr(image, "n_frames", 1) == 1 and _TILE_WIDTH not in getattr(image, "tag_v2", ())
            large = max(image.size) > _LARGEST_TILE
    except Exception:  # whatever Pillow stumbles over is for the reader of slides to name
        in_one_piece, large = False, True
    return (large and named) or (ending not in IMAGE_SUFFIXES and (large or not in_one_piece))


def first_line(path: str) -> str:
    """The first line of a local text that is no blank, comment or separator of a table; empty where there is none."""
    path = os.path.expanduser(path.removeprefix("file://"))
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        _, line = header_of(decoded(file.read(1 << 16)))
    return "" if "\0" in line else line.strip()


def refuse_groups(request: SourceRequest) -> None:
    """For kinds that tell patients otherwise: raise ValueError where keys that tell them are set for nothing else."""
    data = request.config.data
    for key in ("groups_file", "patient_pattern"):
        if (value := getattr(data, key)) and not data.datasets:
            raise ValueError(
                f"data.{key} = {value!r} tells of tiles in folders, lists, tar, zip and HDF5 files, of which "
                f"'{request.path}' is none; Parquet shards tell by columns 'patient' and 'site', slides by their names "
                "or tables."
            )


def refuse_revision(request: SourceRequest) -> None:
    """For kinds that have none: raise ValueError where a revision is configured."""
    if request.revision:
        raise ValueError(f"'{request.path}' has no revisions, so data.revision = {request.revision!r} cannot be taken.")

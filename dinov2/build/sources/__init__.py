"""Kinds of data, each recognised by what is at a path, and opened with its section of the configuration."""

import glob
import os
import re
from collections.abc import Callable
from itertools import islice

from dinov2.data.slides.tables import decoded
from dinov2.data.source import SourceRequest
from dinov2.utils.walk import visible_files

_MOST_FILES = 1_000_000


def is_url(path: str) -> bool:
    """Whether a path is one of another machine."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path)) and not path.startswith("file://")


def holds(path: str, fits: Callable[[str], bool]) -> bool:
    """Whether a local folder (with its subfolders), a glob or a single path has a file whose name fits."""
    path = os.path.expanduser(path.removeprefix("file://"))
    if os.path.isdir(path):
        files = (file.name for file in visible_files(path))
    elif glob.has_magic(path) and not os.path.exists(path):
        files = glob.iglob(path, recursive=True)
    else:
        files = iter([path] if os.path.isfile(path) else [])
    return any(fits(name.lower()) for name in islice(files, _MOST_FILES))


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

"""Finding slides in folders and lists, each file once."""

import os
from pathlib import Path
from typing import NamedTuple

SLIDE_SUFFIXES = {
    ".svs",
    ".tif",
    ".tiff",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".vms",
    ".vmu",
    ".bif",
    ".svslide",
    ".dcm",
}


class FoundSlides(NamedTuple):
    """Slides, and what names one of them again.

    Attributes:
        slides: absolute path and key of each slide. The key is the path below the folder that was searched, or
            the path's last part.
        duplicates: absolute paths that lead to a slide that another path has led to, with that path.
    """

    slides: list[tuple[str, str]]
    duplicates: list[tuple[str, str]]


def find_slides(source: Path) -> FoundSlides:
    """Find the slides of a folder (with its subfolders), of a text file with one path per line, or one slide.

    Links to folders are not followed. Of several paths that lead to one file the first counts.

    Returns:
        The slides, sorted by key in a folder, in the given order in a list.

    Raises:
        FileNotFoundError: there is no such place, or no slide in it.
        PermissionError, OSError: a folder cannot be listed.
    """
    if source.is_dir():
        walk = os.walk(source, onerror=_refuse)
        files = (Path(folder, name) for folder, _, names in walk for name in names)
        slides = [file for file in files if file.suffix.lower() in SLIDE_SUFFIXES]
        keyed = sorted((file.relative_to(source).as_posix(), os.path.abspath(file)) for file in slides)
    elif source.suffix.lower() in SLIDE_SUFFIXES and source.is_file():
        keyed = [(source.name, os.path.abspath(source))]
    elif source.is_file():
        lines = source.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        paths = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        keyed = [(Path(path).name, os.path.abspath(path)) for path in paths]
    else:
        raise FileNotFoundError(
            f"'{source}' does not exist; a folder, a list of paths or one slide is expected."
        )
    if not keyed:
        endings = ", ".join(sorted(SLIDE_SUFFIXES))
        raise FileNotFoundError(f"'{source}' holds no slide; at least one {endings} is expected.")
    first: dict[str, str] = {}
    found = FoundSlides([], [])
    for key, path in keyed:
        file = os.path.realpath(path)
        if file in first:
            found.duplicates.append((path, first[file]))
        else:
            first[file] = path
            found.slides.append((path, key))
    return found


def _refuse(error: OSError) -> None:
    raise type(error)(
        f"The folder '{error.filename}' cannot be listed ({error.strerror}); it must be readable, since its "
        "slides would be missed."
    ) from error

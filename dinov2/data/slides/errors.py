"""Errors of whole-slide images; each names the slide, the location and the reason."""

import importlib
import re
from pathlib import Path
from typing import Any


class SlideError(RuntimeError):
    """A slide that cannot give what was asked: its `slide`, a path or URL without credentials, and `reason`.

    `location` is level and position, empty where the whole slide is meant; `detail` is both of them, for a record that
    names the slide itself.
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
    """The file's tiles cannot be read from their bytes; OpenSlide may still read it."""


class SlideRangeError(SlideError, ValueError):
    """The level does not exist, or the region is not wholly on it."""


class SlideReadError(SlideError):
    """The file holds no decodable pixels for (a part of) the region."""


def public_name(path: str | Path) -> str:
    """A path as it is; a URL without user, password and query, since they may hold secrets."""
    name = str(path)
    if "://" not in name:
        return name
    name = re.sub(r"(?<=://)[^/@]*@", "", name)
    return name.partition("?")[0] if name.startswith("http") else name


def import_package(name: str, need: str) -> Any:
    """Import a package of the 'slides' extra; `need` begins the error where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{need} (the 'slides' extra).") from error

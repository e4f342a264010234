"""Errors of whole-slide images; each names the slide, the location and the reason."""

import importlib
from pathlib import Path
from typing import Any

from dinov2.data.storage.base import public_name


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
        raise ImportError(f"{need} (the 'slides' extra).") from error

"""Kinds of data: which of the registered ones a path names."""

import glob
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from dinov2.configs import load_config
from dinov2.data.images.files import UNREAD as UNREAD_IMAGES
from dinov2.data.slides.errors import UNREAD as UNREAD_SLIDES
from dinov2.data.slides.errors import unread
from dinov2.data.source import Source, SourceRequest
from dinov2.data.storage.patterns import expand_braces, has_pattern
from dinov2.extensions import SOURCES
from dinov2.utils.walk import visible_files

logger = logging.getLogger(__name__)

_COMPRESSED_TAR = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz")
_MOST_FILES = 1_000_000


def recognise(path: str) -> str:
    """The kind of data that a path names, the first of `dinov2.extensions.SOURCES` that recognises it.

    FileNotFoundError if there is no such path, ValueError if it is of no known kind.
    """
    endings.cache_clear()
    for name, kind in SOURCES.items():
        if kind().recognises(path):
            return name
    for ending, file in endings(path).items():
        if ending in UNREAD_SLIDES:
            raise ValueError(f"Data '{path}' holds slides that are not read, such as '{file}': {unread(file)}.")
    there = Path(path.removeprefix("file://")).expanduser()
    known = "; ".join(f"{name}: {kind().accepts}" for name, kind in SOURCES.items())
    if there.is_dir():
        files = sorted(file.name for file in islice(there.iterdir(), 1000))
        seen = f"a folder that holds {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}" if files else "empty"
    elif there.is_file():
        with there.open("rb") as file:
            seen = f"a file that begins with {file.read(20)!r}"
    else:
        raise FileNotFoundError(f"There is no data at '{path}'; known kinds are {known}.")
    advice = "; data.kind names one"
    if ".arrow" in (found := endings(path)):
        advice = "; of what `datasets` has saved to disk load_from_disk(FOLDER).to_parquet(FILE) makes shards"
    elif images := [ending for ending in UNREAD_IMAGES if ending in found]:
        advice = f"; images in {', '.join(ending[1:] for ending in images)} are not read, as PNG they are"
    raise ValueError(f"Data '{path}' is {seen}, which is none of the known kinds ({known}){advice}.")


def beside(path: str, kind: str) -> list[str]:
    """What a local folder holds besides data of the kind that it was recognised as: kinds, and endings not read."""
    if not os.path.isdir(os.path.expanduser(path)):
        return []
    found = [name for name, part in SOURCES.items() if name != kind and part().recognises(path)]
    left_out = {"images": UNREAD_IMAGES, "tar": _COMPRESSED_TAR}.get(kind, ())
    return found + [f"*{ending}" for ending in endings(path) if ending in left_out]


def log_beside(path: str, kind: str) -> None:
    """Say what a folder holds besides the kind of data that it was recognised as, since that is left out."""
    if others := ", ".join(beside(path, kind)):
        words = "dataset '%s': of the kinds in this folder %s is taken and %s left out; data.kind names another"
        logger.warning(words, path, kind, others)


@lru_cache(1)
def endings(path: str) -> Mapping[str, str]:
    """Endings of the file names in a local folder with its subfolders, of a glob or of a file, in lower case.

    Of each one file that has it is named. Hidden files and folders are left out. Two names are endings of their own:
    ``.tar.gz`` and other compressed tar files, and ``metadata.parquet``, which may lie beside images. A folder of a
    million files takes a second or more, so the last answer is kept; `recognise` forgets it.
    """
    path = os.path.expanduser(path.removeprefix("file://"))
    if os.path.isdir(path):
        files = map(os.fspath, visible_files(path))
    elif has_pattern(path) and not os.path.exists(path):
        files = (file for one in expand_braces(path) for file in glob.iglob(one, recursive=True))
    else:
        files = iter([path] if os.path.isfile(path) else [])
    found: dict[str, str] = {}
    for file in islice(files, _MOST_FILES):
        name = os.path.basename(file).lower()
        stem, ending = os.path.splitext(name)
        special = name == "metadata.parquet" or stem.endswith(".tar")
        found.setdefault((name if not stem.endswith(".tar") else f".tar{ending}") if special else ending, file)
    return found


def open_source(path: str, kind: str = "auto", **keys: Any) -> tuple[str, Source]:
    """Open a dataset outside a run, with values of keys of section ``data``; gives its kind and source.

    ValueError if it is drawn without end, and as `SourceKind.open` raises.
    """
    if kind == "auto":
        log_beside(path, kind := recognise(path))
    config = load_config(None)
    config = replace(config, data=replace(config.data, path=path, **keys))
    part = SOURCES[kind]()
    options = part.Options() if hasattr(part, "Options") else None
    source = part.open(SourceRequest(path, "", config, options, None, lambda slide: True))
    if getattr(source, "is_endless", False):
        raise ValueError(f"'{path}' is of the kind '{kind}', which is drawn without end")
    return kind, source

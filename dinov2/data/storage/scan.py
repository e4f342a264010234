"""Files of a local folder: one pass over its directories, links followed once."""

import os
from array import array
from collections.abc import Callable
from typing import NamedTuple


class FoundFile(NamedTuple):
    """A file below a folder: its name there, with slashes, its bytes and when it was changed."""

    name: str
    size: int
    modified_ns: int


def scan_folder(folder: str, fits: Callable[[str], bool]) -> list[FoundFile]:
    """List the files at any depth whose names fit, sorted by name; hidden files and folders are left out.

    A linked folder or file is listed once, and not at all where it is reached without a link, so that loops end and
    nothing counts twice. The result depends on the tree alone, not on the order in which a disk lists it. OSError if a
    folder cannot be listed, since its files would be missed.
    """
    found: list[FoundFile] = []
    inodes, devices = array("Q"), array("Q")  # of `found`
    linked: list[tuple[FoundFile, tuple[int, int]]] = []
    reached: set[tuple[int, int]] = set()  # folders
    links = [""]
    while links:  # real folders come before linked ones, and those in the order of their names
        folders = [links.pop(0)]
        while folders:
            inside = folders.pop()
            status = os.stat(os.path.join(folder, inside))
            if (status.st_ino, status.st_dev) in reached:
                continue
            reached.add((status.st_ino, status.st_dev))
            for entry in _entries(os.path.join(folder, inside)):
                name = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(name)
                elif fits(entry.name) and entry.is_file():  # which a broken link is not
                    status = entry.stat()
                    file = FoundFile(name, status.st_size, status.st_mtime_ns)
                    if entry.is_symlink():
                        linked.append((file, (status.st_ino, status.st_dev)))
                    else:
                        found.append(file)
                        inodes.append(status.st_ino)
                        devices.append(status.st_dev)
        links.sort()
    if linked:
        known = set(zip(inodes, devices, strict=True))
        for file, identity in sorted(linked):
            if identity not in known:
                known.add(identity)
                found.append(file)
    return sorted(found)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        found = f"the folder '{folder}' cannot be listed ({error.strerror})"
        raise type(error)(f"{found}; it must be readable, since its files would be missed") from error

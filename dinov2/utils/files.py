"""Files that are whole or absent: written beside, brought to the disk, then renamed; and locks between processes."""

import errno
import fcntl
import filecmp
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from dinov2.utils.secrets import public

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MOST_SAID = 1000  # bytes that the holder of a lock says of itself
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.part")


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Name a file beside ``path`` to write and `commit`; this process alone has it, until the end."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def commit(partial: Path, path: Path) -> None:
    """Bring a finished file to the disk and give it its name, over an earlier file of that name."""
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


@contextmanager
def replacing(*paths: Path, new: bool = False) -> Iterator[Any]:
    """Name a file to write in place of each path; they get their names when the block ends well, none otherwise.

    A crash in between leaves an old file as it was, and at most `leftovers`. Several paths are committed in order: give
    the one that vouches for the others last. With ``new`` none replaces another: what is there already stays if its
    contents are the same (a kill in between left it), else FileExistsError. Several or ``new`` ones come as a tuple.
    """
    with ExitStack() as stack:
        if len(paths) == 1:  # of several, whoever writes them says which they are
            stack.enter_context(_naming(paths[0]))
        partials = tuple(stack.enter_context(unfinished(path)) for path in paths)
        yield partials if new or len(partials) > 1 else partials[0]
        for partial, path in zip(partials, paths, strict=True):  # all are whole before the first gets its name
            _sync(partial)
            if new and path.exists() and not filecmp.cmp(path, partial, shallow=False):
                raise FileExistsError(f"'{path}' exists already with other contents; name another or move it away.")
        for partial, path in zip(partials, paths, strict=True):
            if not new or not path.exists():
                commit(partial, path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let the error of a full disk say which file does not fit: that of a failed write names none."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, lines: str | Iterable[str]) -> None:
    """Write a text file that is whole or absent; undecodable bytes of file names survive."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines([lines] if isinstance(lines, str) else lines)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole or absent."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz file that is whole or absent."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_arrays(path: Path, *names: str) -> list[np.ndarray] | None:
    """Read arrays of an .npz file; None where there is no such file, or a corrupt one."""
    try:
        with np.load(path) as stored:
            return [stored[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def write_new(contents: Mapping[Path, Iterable[str]]) -> None:
    """Write several new texts, given by lines, in order; they get their names as of `replacing`, the last one first."""
    with replacing(*reversed(contents), new=True) as partials:
        for lines, partial in zip(contents.values(), reversed(partials), strict=True):
            with partial.open("w", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(lines)


def checksum(path: Path) -> str:
    """XXH3 of 128 bits over a file, as hexadecimal digits: what ``xxh128sum`` prints of it.

    It finds what breaks by itself, at 1 to 2 GB/s with the reading (4.5 without; SHA-256 0.6); it stops no forger.
    """
    import xxhash  # not where a step is measured

    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def leftovers(folder: Path) -> Iterator[tuple[str, Path]]:
    """Unfinished files of a folder, each after the name that it was to get."""
    for partial in folder.glob(".*.part"):
        if match := _PARTIAL.fullmatch(partial.name):
            yield match[1], partial


def remove_leftovers(folder: Path, *names: str) -> None:
    """Delete what runs that were killed left of files of these names; nobody else may be writing one of them."""
    for name, partial in leftovers(folder):
        if name in names:
            partial.unlink(missing_ok=True)


def check_report(path: Path, keys: set[str]) -> None:
    """Raise FileExistsError if a file of JSON lines is there whose objects have other keys, so that it is not ours."""
    try:
        ours = all(set(json.loads(line)) == keys for line in path.read_text().splitlines())
    except (FileNotFoundError, ValueError, TypeError) as error:
        ours = isinstance(error, FileNotFoundError)
    if not ours:
        raise FileExistsError(f"'{path}' was not made by this command; give another destination or move it away")


def check_apart(source: str, folder: str | Path, destination: Path) -> None:
    """Raise ValueError if a destination overlaps the local folder of a source; beside a single file it may lie."""
    here, target = Path(folder).resolve(), destination.resolve()
    below = here in target.parents and not Path(source).expanduser().is_file()
    if target == here or target in here.parents or below:
        raise ValueError(f"source '{source}' and destination '{destination}' overlap; give a folder apart from it")


@contextmanager
def naming_full_disk(folder: str | Path) -> Iterator[None]:
    """Say of a full disk or quota what to do, as OSError; for commands that go on where they stopped."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(f"No room left in '{folder}'; make some, then run the same command again.") from error


def json_lines(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One JSON object per line, without what is secret in it."""
    return (json.dumps(public(record)) + "\n" for record in records)


def check_description(path: Path, identity: dict[str, Any]) -> bool:
    """Compare a folder's description, if there is one, with what decides over the rows that are to be built in it.

    Returns whether there is one; raises FileExistsError where it is of another build, or corrupt.
    """
    identity = json.loads(json.dumps(identity))  # as it is kept: tuples are lists there
    try:
        found = json.loads(path.read_text())["build"]
        differing = sorted(key for key in identity | found if identity.get(key) != found.get(key))
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(
            f"'{path}' does not describe a build ({error!r}); give another --output or move the folder away."
        ) from error
    if differing:
        key = differing[0]
        raise FileExistsError(
            f"'{path.parent}' holds a build with {key} {found.get(key)!r}, not {identity.get(key)!r}; "
            "give another --output or move it away."
        )
    return True


@contextmanager
def locked(path: Path, first: int = 0, length: int = 1, busy: str = "", holder: str = "") -> Iterator[None]:
    """Hold a lock between processes, on a folder, on a file or on a range of numbers that the file stands for.

    The lock is not inherited by child processes and goes with this one, however that ends. Where the file system
    has no locks, a warning says so and the block runs without one.

    Args:
        path: a folder, or a file, made where it is missing, that this process must not open again before the end.
        first, length: the range; an empty one locks nothing.
        busy: text of the FileExistsError where another process holds the lock, if not the usual one; ``{holder}`` in it
            stands for what that one has said of itself.
        holder: what this process says of itself, which becomes the file's content.
    """
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            if folder:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif length > 0:  # 0 would stand for everything after `first`
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, first)
        except (BlockingIOError, PermissionError) as error:
            said = "" if folder else os.pread(descriptor, _MOST_SAID, 0).decode(errors="replace").strip()
            raise FileExistsError(
                busy.replace("{holder}", said or "another process")
                or f"Another process is writing into '{path if folder else path.parent}'; wait for it or stop it."
            ) from error
        except OSError as error:
            logger.warning("'%s' cannot be locked (%s); start no second process there.", path, error.strerror)
        if holder:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode()[:_MOST_SAID], 0)
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

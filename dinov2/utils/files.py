"""What keeps a dataset's folder whole: a description of the build, locks, and files that appear when finished."""

import fcntl
import json
import logging
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinov2.utils.jobs import commit

logger = logging.getLogger(__name__)

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.part")


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Name a file to write and `commit` as `path`; no other process has the same, and it is removed in the end."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def leftovers(folder: Path) -> Iterator[tuple[str, Path]]:
    """Unfinished files of a folder, each after the name that it was to get."""
    for partial in folder.glob(".*.part"):
        if match := _PARTIAL.fullmatch(partial.name):
            yield match[1], partial


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole or absent."""
    with unfinished(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
        commit(partial, path)


def check_description(path: Path, identity: dict[str, Any]) -> bool:
    """Compare a folder's description with what is to be built in it.

    Args:
        path: the description.
        identity: what decides over the rows, as JSON holds it.

    Returns:
        Whether there is a description.

    Raises:
        FileExistsError: it is of another build, or damaged.
    """
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
def locked(path: Path, first: int, stop: int) -> Iterator[None]:
    """Keep other builders off the shards `first` to `stop` - 1; the lock goes with the process, however it ends.

    Args:
        path: a file of the folder, which the process must not open again before the end.
        first, stop: range of shards.

    Raises:
        FileExistsError: another builder holds some of these shards.
    """
    with path.open("r+b") as file:
        try:
            if stop > first:  # a length of 0 would lock everything
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, stop - first, first)
        except (BlockingIOError, PermissionError) as error:
            raise FileExistsError(
                f"Another builder is writing some of these shards into '{path.parent}'; wait for it or stop it."
            ) from error
        except OSError:
            logger.warning("'%s' cannot be locked; let no second builder write the same shards", path)
        yield

"""Folders searched for files, one rule for all tools: hidden names are left out, linked folders are followed once."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path


def visible_files(folder: str | Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Paths of the files below a folder, in no useful order; those of linked folders come last.

    What begins with a dot is left out, `._x` of macOS among it. A folder that several links lead to, or that holds a
    link to itself, is searched once, where it lies if that is below `folder`. `onerror` is told of folders that cannot
    be listed; by default they are passed over.
    """
    seen: set[str] = set()
    waiting = deque([os.fspath(folder)])
    while waiting:
        start = waiting.popleft()
        for location, folders, names in os.walk(start, onerror=onerror):
            real = os.path.realpath(location)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            visible = sorted(name for name in folders if not name.startswith("."))
            links = {name for name in visible if os.path.islink(os.path.join(location, name))}
            waiting += (os.path.join(location, name) for name in visible if name in links)
            folders[:] = (name for name in visible if name not in links)
            yield from (Path(location, name) for name in names if not name.startswith("."))

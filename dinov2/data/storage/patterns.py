"""Patterns of names: globs, and the braces in which WebDataset's users count shards."""

import glob
import re
from itertools import product

_BRACES = re.compile(r"\{([^{},]+(?:,[^{},]*)+|\d+\.\.\d+)\}")
_MAGIC = re.compile(r"[*?[]")
_MOST_NAMES = 1_000_000


def has_pattern(path: str) -> bool:
    """Whether a path stands for several: by ``*``, ``?``, ``[...]``, ``{a,b}`` or ``{000..099}``."""
    return glob.has_magic(path) or has_braces(path)


def has_braces(path: str) -> bool:
    """Whether a path has a list ``{a,b}`` or a range ``{000..099}``."""
    return bool(_BRACES.search(path))


def fixed_folder(path: str) -> str:
    """The folder in which the first pattern of a path begins, empty if that is none."""
    begins = min(found.start() for found in (_BRACES.search(path), _MAGIC.search(path)) if found)
    return path[:begins].rpartition("/")[0]


def expand_braces(path: str) -> list[str]:
    """The paths that braces stand for, in their order, once each; the path itself where it has none.

    A range is of whole numbers, both ends included, padded as its longer end where one begins with a zero. ValueError
    if there are more than a million.
    """
    parts = _BRACES.split(path)
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MOST_NAMES:
        raise ValueError(f"'{path}' stands for {count:,} names; at most {_MOST_NAMES:,} are accepted")
    return list(dict.fromkeys("".join(chosen) for chosen in product(*choices)))


def _choices(inside: str) -> list[str] | range:
    if ".." not in inside or "," in inside:
        return inside.split(",")
    first, last = inside.split("..")
    is_padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    step = 1 if int(first) <= int(last) else -1
    numbers = range(int(first), int(last) + step, step)
    if len(numbers) > _MOST_NAMES:
        return numbers  # which are counted only
    return [f"{number:0{width}d}" for number in numbers]

"""Command lines as the pages of the documentation show them."""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dinov2.command import COMMANDS
from tests.helpers.commands import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ +)*(?:\S*pathfm|\S*python|echo|source|\./\S+|scripts/\S+|\.ci/\S+)(?: |$)")


def shell_lines(page: Path) -> list[str]:
    """Command lines of the fenced blocks, whole; blocks without a language may be something else, such as a tree."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), flags=re.M | re.S)
    blocks = [text for language, text in fenced if language in ("", "bash")]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if _COMMAND.match(line.strip())]


def python_blocks(page: Path) -> list[str]:
    """Fenced blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.M | re.S)


def command_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The module of a command that ``pathfm`` has too, however it is started, and its arguments; else None."""
    modules = {name: target.partition(":")[0] for name, (target, _) in COMMANDS.items()}
    if words[0].endswith("pathfm"):
        name = next(name for name in (" ".join(words[1:3]), words[1]) if name in modules)
        return modules[name], words[1 + len(name.split()) :]
    if not words[0].endswith("python") or len(words) < 2:
        return None
    given = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
    rest = words[3:] if words[1] == "-m" else words[2:]
    return next(((name, rest) for name in (given, f"{given}.__main__") if name in modules.values()), None)


@functools.cache
def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a command asks first."""
    seen: list[argparse.ArgumentParser] = []
    parse = argparse.ArgumentParser.parse_known_args

    def watched(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return parse(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", watched)
        importlib.import_module(module).main(["--help"])
    return seen[0]


def words_of(line: str) -> list[str]:
    """Words of a line as a shell takes it, without a comment at its end."""
    return shlex.split(line, comments=True)

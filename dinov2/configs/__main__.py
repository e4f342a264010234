"""The default YAML and the key tables of the documentation, from the schema: ``python -m dinov2.configs [--write]``."""

import argparse
import dataclasses
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dinov2.configs.fields import accepted, key_of
from dinov2.configs.older_keys import OLDER_KEYS
from dinov2.configs.schema import Config
from dinov2.utils.cli import run_command
from dinov2.utils.files import write_text

DEFAULTS = Path(__file__).with_name("ssl_default_config.yaml")
PAGE = Path(__file__).parents[2] / "docs/config.md"
_MARKUP = re.compile(r"[\[\]`]|\(\w+\.md\)")  # of Markdown
_MARK = "<!-- Written by python -m dinov2.configs --write -->"


def default_yaml() -> str:
    """Every key with its default and one line on what it means."""
    title = "# Every key with its default, written by python -m dinov2.configs --write."
    return "\n".join([title, *_yaml(Config())]) + "\n"


def key_tables() -> str:
    """Tables of all keys, section by section, and of older keys, in Markdown."""
    lines = ["## Keys", "", "| key | accepted | default | meaning |", "|---|---|---|---|"]
    lines += _rows(Config)
    lines += ["", "## Older keys", "", "| key | today |", "|---|---|"]
    for name, entry in OLDER_KEYS.items():
        only = f"only {' or '.join(entry.only)}; " if entry.only else ""
        lines.append(f"| `{name}` | " + (f"`{entry.new}` |" if entry.new else f"no effect: {only}{entry.ignored} |"))
    return "\n".join(lines) + "\n"


def page() -> str:
    """The configuration page with its tables as they should be."""
    return PAGE.read_text().partition(_MARK)[0] + f"{_MARK}\n\n{key_tables()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the default YAML, or write it and the tables of the page."""
    parser = argparse.ArgumentParser(prog="python -m dinov2.configs", description="Default configuration.")
    parser.add_argument("--write", action="store_true", help="write the YAML file and the tables of docs/config.md")
    args = parser.parse_args(argv)

    def body() -> None:
        if args.write:
            write_text(DEFAULTS, default_yaml())
            write_text(PAGE, page())
        else:
            sys.stdout.write(default_yaml())

    return run_command(body, logging.getLogger("dinov2"))


def _yaml(section: Any, indent: str = "") -> Iterator[str]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            about = "" if indent else f"  # {_MARKUP.sub('', _sentence(type(value)))}"
            yield from ([] if indent else [""])
            yield f"{indent}{field.name}:{about}"
            yield from _yaml(value, f"{indent}  ")
        else:
            text = f"{indent}{field.name}: {_flow(value)}"
            yield f"{text:<40}  # {key_of(field).doc}"


def _rows(section: type, path: str = "") -> Iterator[str]:
    """Rows of a section's keys; sections of one type in it share theirs."""
    hints = get_type_hints(section)
    prefix = f"{path}." if path else ""
    for hint, group in groupby(dataclasses.fields(section), lambda field: hints[field.name]):
        if dataclasses.is_dataclass(hint):
            names = [field.name for field in group]
            if not path:
                yield f"| **{names[0]}** | | | {_sentence(hint)} |"
            yield from _rows(hint, prefix + (f"{{{','.join(names)}}}" if len(names) > 1 else names[0]))
            continue
        for field in group:
            key, default = key_of(field), field.default
            default = {} if default is dataclasses.MISSING else default
            yield f"| `{prefix}{field.name}` | {accepted(hint, key, listed=False)} | `{_flow(default)}` | {key.doc} |"


def _sentence(section: type) -> str:
    return " ".join(section.__doc__.split())


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    sys.exit(main())

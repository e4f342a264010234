"""Every command line of the pages holds: its command, its options, its scripts, its configuration keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dinov2.configs import load_config, recipes
from tests.helpers.commands import ROOT
from tests.helpers.pages import PAGES, command_of, parser_of, shell_lines, words_of

LINES = [
    page for page in PAGES if page.name != "extending.md"
]  # whose lines take parts that its diffs add, and are run
OWN_PARSERS = ("dinov2.command", "dinov2.eval.eva_cli")  # of which the second is stock eva's
TRAIN = "dinov2.train.train"


def is_synopsis(line: str) -> bool:
    return "..." in line or "{meta," in line or "[--" in line


@pytest.mark.parametrize("page", LINES, ids=lambda page: page.name)
def test_fenced_lines(page: Path):
    for line in shell_lines(page):
        if is_synopsis(line):
            continue
        words = words_of(line)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the environment
            del words[0]
        scripts = [word for word in words if re.fullmatch(r"(\./|scripts/|\.ci/)[\w/.]+", word)]
        assert not [script for script in scripts if not (ROOT / script).exists()], line
        if words and re.fullmatch(r"\./run_.*node.*\.sh", words[0]):
            load_config(recipes()[0], words[1:])
        found = words and command_of(words)
        if not found or found[0] in OWN_PARSERS:
            continue
        module, arguments = found
        known, unknown = parser_of(module).parse_known_args(arguments)
        assert not [word for word in unknown if word.startswith("-")], line
        if module == TRAIN and known.config_file in recipes():
            load_config(known.config_file, [word for word in arguments if re.match(r"[\w.]+=", word)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_within_the_text(page: Path):
    for line in re.findall(r"`(pathfm \w[^`\n]*)`", page.read_text()):
        if is_synopsis(line):
            continue
        found = command_of(words_of(line))
        assert found, line
        if found[0] not in OWN_PARSERS:
            known = {option for action in parser_of(found[0])._actions for option in action.option_strings}
            given = {word.partition("=")[0] for word in found[1] if word.startswith("--")}
            assert given <= known, line

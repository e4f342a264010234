"""What the documentation points at exists: files, tests, shipped configurations, keys."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from dinov2.configs.older_keys import OLDER_KEYS
from dinov2.configs.schema import Config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert not [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]


def anchors(page: Path) -> set[str]:
    """Names by which headings are linked to: in small letters, without punctuation, blanks as hyphens."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    headings = [heading.lower() for heading in re.findall(r"^#+ +(.+)$", text, flags=re.M)]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path):
    for file, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        assert heading in anchors(page.parent / file if file else page), f"{file}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path):
    file = None
    for name, test in re.findall(r"`([\w/]*\.?p?y?)::(\w+)`", page.read_text()):
        file = ROOT / "tests" / name if name else file
        assert f"def {test}(" in file.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_keys_exist(page: Path):
    sections = {field.name: get_type_hints(Config)[field.name] for field in fields(Config)}
    for section, key in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", page.read_text()):
        if section in sections and is_dataclass(sections[section]) and key not in ("py", "png"):
            known = key in {field.name for field in fields(sections[section])}
            assert known or f"{section}.{key}" in OLDER_KEYS, f"{section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short_and_narrow(page: Path):
    text = page.read_text()
    lines = text.splitlines()
    prose = re.sub(r"^```diff\n.*?^```$", "", text, flags=re.M | re.S).splitlines()
    assert len([line for line in prose if not line.startswith("|")]) <= 200
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]

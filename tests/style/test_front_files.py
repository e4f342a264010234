"""Files that strangers and their tools read first agree with the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import dinov2

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_citation():
    """What the Citation File Format 1.2.0 requires, and what it says of this version."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["authors"] == PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    assert str(citation["version"]) == dinov2.__version__


def test_workflow_pins_its_actions_and_uses_the_scripts():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["tests"]["steps"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(re.fullmatch(r"[\w/-]+@v\d+\.\d+\.\d+", name) for name in used)
    assert [step["run"] for step in steps if step.get("run", "").startswith("./")] == ["./install.sh", "./run_tests.sh"]


def test_pictures_are_small():
    pictures = list((ROOT / "docs/images").iterdir())
    assert pictures and all(path.stat().st_size < 300_000 for path in pictures)

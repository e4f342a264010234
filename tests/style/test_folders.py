"""Folders stay small enough to be taken in at one look; ruff's complexity rule does the same for functions."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_MODULES = 18


def test_folders_hold_few_modules():
    folders = {path.parent for path in ROOT.glob("dinov2/**/*.py")}
    modules = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: number for folder, number in modules.items() if number > MOST_MODULES} == {}

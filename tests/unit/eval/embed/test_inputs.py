"""Kinds of inputs of embedding, and those that are packed first."""

from pathlib import Path

import pytest

from dinov2.eval.embed.inputs import Grid, open_input
from tests.helpers.collections import tiles, write_folder


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.h5"])
def test_archives_are_packed_first(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {name: tiles(1).popitem()[1]})
    for source in (tmp_path / "set", tmp_path / "set" / name, tmp_path / "{x,y}.tar"):
        with pytest.raises(ValueError, match=r"dinov2\.data\.pack"):
            open_input(str(source), None, Grid(), 100)
    with pytest.raises(FileNotFoundError):
        open_input(str(tmp_path / name), None, Grid(), 100)

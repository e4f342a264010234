"""Braces in names, as the shell expands them, and the files that they stand for."""

import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from dinov2.data.storage.base import PARQUET, FileType
from dinov2.data.storage.locate import open_storage
from dinov2.data.storage.patterns import expand_braces, has_pattern
from tests.helpers.collections import tiles, write_tar

TAR = FileType("tar", (".tar",))


@pytest.mark.parametrize(
    "pattern",
    [
        "s-{000..011}.tar",
        "s-{9..12}.tar",
        "s-{08..11}",
        "s-{3..1}",
        "{a,b}/{0..2}.tar",
        "{}",
        "{a}",
        "x{1..",
        "plain",
    ],
)
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_braces_mean_what_they_mean_to_the_shell(pattern: str) -> None:
    shown = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    assert expand_braces(pattern) == shown.stdout.splitlines()


def test_a_pattern_of_too_many_names() -> None:
    with pytest.raises(ValueError, match="at most 1,000,000"):
        expand_braces("{0..9999}-{0..9999}")
    with pytest.raises(ValueError, match="at most 1,000,000"):
        expand_braces("{0..99999999999}")


def test_local_files_in_braces(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"a-{number:03d}.tar", tiles(1))
    storage = pickle.loads(pickle.dumps(open_storage(f"{tmp_path}/a-{{002..004}}.tar", files=TAR)))
    assert [file.name for file in storage.list_files()] == ["a-002.tar", "a-003.tar", "a-004.tar"]
    assert storage.location == str(tmp_path)
    nested = open_storage(f"{tmp_path.parent}/{{none*,{tmp_path.name}/a-001}}*.tar", files=TAR)
    assert [file.name for file in nested.list_files()] == [f"{tmp_path.name}/a-001.tar"]
    mixed = open_storage(f"{tmp_path}/a-00{{1,2,2}}*.tar", files=TAR)
    assert [file.name for file in mixed.list_files()] == ["a-001.tar", "a-002.tar"]
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 files .*a-012.tar"):
        open_storage(f"{tmp_path}/a-{{010..012}}.tar", files=TAR).list_files()


def test_a_name_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a{1,2}.parquet").write_bytes(b"x")
    assert has_pattern("a{1,2}.parquet")
    assert [file.name for file in open_storage(f"{tmp_path}/a{{1,2}}.parquet").list_files()] == ["a{1,2}.parquet"]
    assert PARQUET.fits("a{1,2}.parquet")

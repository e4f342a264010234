"""Manifests as they are written, and what is wrong with others."""

from pathlib import Path

import pytest

from prepatching_scripts.gdc.manifest import GdcFile, read_manifest
from tests.unit.prepatching_scripts.gdc.conftest import HEADER

ID, MD5 = "353efa55-06d3-43a8-adf5-50f3219e9f14", "0123456789abcdef0123456789abcdef"
GOOD = f"{ID}\ta.svs\t{MD5}\t5\treleased\n"


def test_manifest_as_windows_and_the_portal_write_it(tmp_path: Path):
    path, other = tmp_path / "m.txt", "00000000-0000-0000-0000-000000000001"
    lines = [
        "md5\tid\tsize\tfilename\tcases",
        f"{MD5.upper()}\t{ID}\t5\ta b.svs\tx",
        "",
        f"{MD5}\t{other}\t0\tä\t",
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, lines[1], ""]).encode())
    assert read_manifest(path) == [GdcFile(ID, "a b.svs", MD5, 5), GdcFile(other, "ä", MD5, 0)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (GOOD.replace("a.svs", "../a.svs"), "plain file name"),
        (GOOD.replace("a.svs", ".."), "plain file name"),
        (GOOD.replace("a.svs", "/etc/passwd"), "plain file name"),
        (GOOD.replace("a.svs", "a\\b.svs"), "plain file name"),
        (GOOD.replace("a.svs", ""), "plain file name"),
        (GOOD.replace("a.svs", "a\0.svs"), "plain file name"),
        (GOOD.replace("a.svs", "a" * 250), "more than 240 bytes"),
        (GOOD.replace("a.svs", "a.part"), "the ending .part"),
        (GOOD.replace(ID, "../../etc"), "not a UUID"),
        (GOOD.replace(MD5, "xyz"), "32 hexadecimal"),
        (GOOD.replace("\t5\t", "\t-5\t"), "whole number"),
        (GOOD.replace("\t5\t", "\t5.0\t"), "whole number"),
        (GOOD.replace("\t5\t", "\t\t"), "whole number"),
        (GOOD.replace("\treleased", ""), "4 columns in place of 5"),
        (GOOD.replace("\t5\t", "\t6\t"), "differs from an earlier line"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, reason: str):
    (tmp_path / "m.txt").write_text(HEADER + GOOD + "\n" + line)
    with pytest.raises(ValueError, match=f"line 4.*{reason}"):
        read_manifest(tmp_path / "m.txt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (GOOD.encode(), "line 1 .* lacks id, filename, md5, size"),
        (b"<html>", "line 1 .*<html>"),
        (b"", "line 1"),
        (HEADER.encode(), "lists no file"),
        ((HEADER + GOOD).encode("utf-16"), "not text in UTF-8"),
    ],
)
def test_what_is_not_a_manifest(tmp_path: Path, content: bytes, reason: str):
    (tmp_path / "m.txt").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_manifest(tmp_path / "m.txt")

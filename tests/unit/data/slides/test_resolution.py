"""Resolutions that users give for slides, and whose word counts."""

import math
from pathlib import Path

import pytest

from dinov2.data.slides.resolution import read_mpp_table, resolve_mpp


@pytest.mark.parametrize(
    ("sides", "power", "user", "expected"),
    [
        ((0.25, 0.26), 20, 0.5, (0.255, "slide")),
        ((None, 0.25), 20, 0.4, (0.5, "appmag")),
        ((352.8, 352.8), None, 0.4, (0.4, "user")),
        ((math.nan, 0.25), 1000, None, (None, "none")),
        ((0.0, 0.0), 0.0, None, (None, "none")),
        ((0.1, 4.0), None, None, (2.05, "slide")),
    ],
)
def test_order_of_sources(sides: tuple, power: float | None, user: float | None, expected: tuple) -> None:
    mpp, source = resolve_mpp(sides, power, user)
    assert (mpp if mpp is None else pytest.approx(mpp), source) == expected


def test_table_finds_slides_by_path_name_stem_and_barcode(tmp_path: Path) -> None:
    path = tmp_path / "mpp.csv"
    path.write_bytes(
        b"\xef\xbb\xbfscanner, slide ,mpp\r\n"
        b'x,"/data/with, comma.svs",0.2\r\n'
        b"x,b.svs,0.3\r\n"
        b"x,TCGA-AA-0001-01Z-00-DX1,0.4\r\n"
        b"x,stem with spaces,0.5\r\n"
        b"x,/old/moved.ndpi,1\r\n"
    )
    table = read_mpp_table(path)
    assert table.get("/data/with, comma.svs") == 0.2
    assert table.get(Path("/anywhere/b.svs")) == 0.3
    assert table.get("/x/TCGA-AA-0001-01Z-00-DX1.6F2C-11.svs") == 0.4
    assert table.get("s3://bucket/stem with spaces.tiff") == 0.5
    assert table.get("/new/moved.ndpi") == table.get("moved.tif") == 1.0
    assert table.get("/x/TCGA-AA-0002-01Z-00-DX1.svs") is None and table.get("b2.svs") is None


def test_ambiguous_file_names_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "mpp.csv"
    path.write_text("slide,mpp\n/a/s.svs,0.2\n/b/s.svs,0.3\n/c/t.svs,0.6\n/d/t.svs,0.6\n")
    table = read_mpp_table(path)
    assert (table.get("/a/s.svs"), table.get("/b/s.svs"), table.get("/z/s.svs")) == (0.2, 0.3, None)
    assert table.get("/z/t.svs") == 0.6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has columns \[\], but it needs slide and mpp"),
        ("path,mpp\na,0.5\n", r"has columns \['path', 'mpp'\]"),
        ("slide,mpp\na,0.5\nb,0,5\n", r"Line 3 .* slide 'b' the mpp '0'"),
        ("slide,mpp\na\n", r"Line 2 .* slide 'a' the mpp ''; a name and a number within \(0.1, 4.0\)"),
        ("slide,mpp\na,nan\n", "Line 2"),
        ("slide,mpp\n ,0.5\n", "Line 2"),
        ("slide,mpp\na,0.5\na,0.25\n", "gives slide 'a' both 0.5 and 0.25"),
    ],
)
def test_faulty_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mpp.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mpp_table(path)


def test_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no mpp table '.*none\.csv'"):
        read_mpp_table(tmp_path / "none.csv")

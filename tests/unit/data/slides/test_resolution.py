"""Resolutions that users give for slides, and whose word counts."""

import logging
import math
from pathlib import Path

import pytest

from dinov2.data.slides.find import find_slides
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.resolution import coarsest_level, log_notes, micrometres, read_mpp_table, resolve_mpp
from tests.helpers.dicom import write_header
from tests.helpers.slides import MakeSlide


@pytest.mark.parametrize(
    ("sides", "power", "user", "expected"),
    [
        ((0.25, 0.25), 20, None, (0.25, "slide")),
        ((0.25, 0.25), 20, 0.5, (0.5, "user")),
        ((None, 0.25), 40, None, (0.25, "slide")),
        ((None, None), 20, None, (0.5, "appmag")),
        ((None, None), 20, 0.4, (0.4, "user")),
        ((0.0685, 0.0685), 100, None, (0.0685, "slide")),
        ((352.8, 352.8), 20, None, (0.5, "appmag")),
        ((352.8, 352.8), None, 0.4, (0.4, "user")),
        ((math.nan, 0.25), 1000, None, (None, "none")),
        ((0.0, 0.0), 0.0, None, (None, "none")),
        ((0.02, 20.0), None, None, (10.01, "slide")),
        ((0.019, 0.019), None, None, (None, "none")),
    ],
)
def test_order_of_sources(sides: tuple, power: float | None, user: float | None, expected: tuple) -> None:
    found = resolve_mpp(sides, power).given(user)
    assert (found.mpp if found.mpp is None else pytest.approx(found.mpp), found.source) == expected


def test_nothing_is_replaced_without_a_word() -> None:
    plain = resolve_mpp((0.25, 0.25), 40)
    assert plain.notes == () and plain.given(0.25).notes == ()  # nothing is replaced
    for found in (plain.given(0.5), resolve_mpp((0.25, 0.5), 40), resolve_mpp((352.8, 352.8), 40)):
        assert len(found.notes) == 1
    assert plain.given(0.5).own == 0.25 and plain.given(0.5).given(None) == plain
    assert resolve_mpp((0.25, 0.252), 40).notes == ()  # as square as scanners are
    assert resolve_mpp((352.8, 352.8), 40, explicit=False).notes == ()  # 72 dpi, which says nothing


def test_each_kind_of_note_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    slides = [(f"{n}.svs", resolve_mpp((0.25, 0.25), 40).given(0.3 + n / 10).notes) for n in range(3)]
    log_notes(logging.getLogger("test"), [*slides, ("odd.svs", resolve_mpp((0.25, 0.5), 40).notes), ("plain.svs", ())])
    assert len(caplog.records) == 2 and "0.svs" in caplog.records[0].message and "odd.svs" in caplog.records[1].message


@pytest.mark.parametrize(
    ("unit", "scale"),
    [
        *((unit, 1.0) for unit in (None, "um", "\u00b5m", "\u03bcm", "\u00c2\u00b5m", "\u00ce\u00bcm", "\ufffdm")),
        *((unit, 1.0) for unit in ("\\u00B5m", "&#181;m", "micron", "Micrometer", " um ")),
        ("nm", 1e-3), ("mm", 1e3), ("cm", 1e4), ("m", 1e6),
    ],
)  # fmt: skip
def test_lengths_in_every_unit_and_encoding(unit: str | None, scale: float) -> None:
    assert micrometres("0.5", unit) == pytest.approx(0.5 * scale)


@pytest.mark.parametrize(
    ("value", "unit"), [("0.5", "pixel"), ("0.5", "reference frame"), ("x", "um"), ("0", "um"), ("inf", "um")]
)
def test_what_is_no_length(value: str, unit: str) -> None:
    assert micrometres(value, unit) is None


def test_level_within_the_tolerance() -> None:
    """20x, 0.5 um: slides of 0.40 to 0.60 um serve it at level 0, those of finer ones from the level below it."""
    assert [coarsest_level((1.0, 4.0), mpp, 0.5) for mpp in (0.25, 0.4, 0.5052, 0.6)] == [0, 0, 0, 0]
    assert coarsest_level((1.0, 4.0), 0.601, 0.5) is None
    assert coarsest_level((1.0, 2.0), 0.2525, 0.5) == 1  # 1 % coarser
    assert coarsest_level((1.0, 2.0), 0.26, 0.5) == 0  # never coarser than that where there is a finer level
    assert coarsest_level((1.0,), 0.5052, 0.5, tolerance=0) is None


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


@pytest.mark.parametrize("named", ["series", "file", "path", "folder", "folder path"])
def test_table_finds_a_dicom_slide_by_any_of_its_names(tmp_path: Path, named: str) -> None:
    first = write_header(tmp_path / "slide_7/a.dcm", "1.2.3", columns=2048)
    other = write_header(tmp_path / "slide_7/b.dcm", "1.2.3", columns=512)
    write_header(tmp_path / "slide_8/c.dcm", "1.2.4")
    folder = {"folder": first.parent.name, "folder path": str(first.parent)}
    name = {"series": "1.2.3", "file": other.name, "path": str(other), **folder}[named]
    (tmp_path / "mpp.csv").write_text(f"slide,mpp\n{name},0.3\n")
    rows = find_slides(tmp_path, mpp_table=read_mpp_table(tmp_path / "mpp.csv")).slides
    assert {row.path: row.mpp for row in rows} == {str(first): 0.3, str(tmp_path / "slide_8/c.dcm"): None}


def test_a_folder_of_two_dicom_slides_names_neither(tmp_path: Path) -> None:
    for series in ("1.2.3", "1.2.4"):
        write_header(tmp_path / f"slides/{series}.dcm", series)
    (tmp_path / "mpp.csv").write_text("path,MPP\nslides,0.3\n")
    table = read_mpp_table(tmp_path / "mpp.csv")
    assert [row.mpp for row in find_slides(tmp_path / "slides", mpp_table=table).slides] == [None, None]


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
        ("name,mpp\na,0.5\n", r"has columns \['name', 'mpp'\]"),
        ("slide,mpp\na,0.5\nb,0,5\n", r"Line 3 .* slide 'b' the mpp '0'"),
        ("slide,mpp\na\n", r"Line 2 .* slide 'a' the mpp ''"),
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


@pytest.mark.parametrize(
    ("said", "expected", "words"),
    [
        ("AppMag = 40|MPP = 0,2520", (0.252, "slide"), ""),
        ("AppMag = 40x", (0.25, "appmag"), ""),
        ("AppMag = 20|MPP = 0.3 um", (0.5, "appmag"), "0.3 um"),
    ],
)
def test_what_aperio_files_say(make_slide: MakeSlide, said: str, expected: tuple, words: str) -> None:
    resolution = SlideReader(make_slide("a.svs", f"|{said}")).resolution
    assert (pytest.approx(resolution.mpp), resolution.source) == expected
    assert words in " ".join(resolution.notes) and bool(words) == bool(resolution.notes)

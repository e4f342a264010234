"""One slide is one slide: DICOM files, MIRAX and Hamamatsu sets, links of both kinds, copies."""

import os
import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest

from dinov2.data.patients import patient_of
from dinov2.data.slides.find import find_slides
from tests.helpers.dicom import write_header, write_slide


def found(source: Path) -> list[str]:
    base = source if source.is_dir() else source.parent
    return [Path(row.path).relative_to(base).as_posix() for row in find_slides(source).slides]


def test_the_files_of_a_dicom_series_are_one_slide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, columns in enumerate((256, 4096, 1024)):
        write_header(tmp_path / f"a/{number}.dcm", "1.2.3", columns=columns)
        write_header(tmp_path / f"flat/b{number}.DCM", "1.2.4", columns=columns)
        write_header(tmp_path / f"flat/c{number}.dcm", "1.2.5", columns=columns)
    write_header(tmp_path / "flat/c9.dcm", "1.2.5", columns=8192, kind="LABEL")
    assert found(tmp_path) == ["a/1.dcm", "flat/b1.DCM", "flat/c1.dcm"]
    assert not caplog.records  # nothing is amiss with such a folder
    listed = tmp_path / "list.txt"
    listed.write_text("flat/c2.dcm\na/0.dcm\na/2.dcm\n")
    assert found(listed) == ["flat/c2.dcm", "a/2.dcm"]  # of those that are listed


def test_series_of_one_frame_of_reference_are_one_slide(tmp_path: Path) -> None:
    for number, columns in enumerate((512, 2048)):
        write_header(tmp_path / f"{number}.dcm", f"1.2.{number}", columns=columns, FrameOfReferenceUID="1.2.7")
    write_header(tmp_path / "2.dcm", "1.2.2", FrameOfReferenceUID="1.2.8")
    write_header(tmp_path / "3.dcm", "1.2.5", FrameOfReferenceUID="1.2.7", StudyInstanceUID="1.2.10")
    assert found(tmp_path) == ["1.dcm", "2.dcm", "3.dcm"]


def test_other_dicom_files_are_left_out_and_corrupt_ones_stay(tmp_path: Path, caplog) -> None:
    write_header(tmp_path / "slide.dcm", "1.2.3")
    write_header(tmp_path / "ct.dcm", "1.2.4", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    write_header(tmp_path / "label.dcm", "1.2.5", kind="LABEL")
    (tmp_path / "text.dcm").write_text("no such file")
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "slide.dcm").read_bytes()[:200])
    assert found(tmp_path) == ["cut.dcm", "slide.dcm", "text.dcm"]
    assert "2 DICOM files" in caplog.text
    (tmp_path / "only").mkdir()
    shutil.move(tmp_path / "ct.dcm", tmp_path / "only/ct.dcm")
    with pytest.raises(ValueError, match="no slide"):
        find_slides(tmp_path / "only")


def test_a_copy_of_a_dicom_slide_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        write_header(tmp_path / f"b/{number}.dcm", "1.2.3", columns=100 + number)
        if number < 2:
            write_header(tmp_path / f"a/{number}.dcm", "1.2.3", columns=100 + number)
    result = find_slides(tmp_path)
    assert [row.key for row in result.slides] == ["b/2.dcm"]  # where most of it lies
    assert {Path(path).parent.name for path, _ in result.duplicates} == {"a"}
    assert "count already" in caplog.text


@pytest.mark.parametrize(
    ("folder", "fields", "patient"),
    [
        ("x", {"PatientID": "P-17"}, "P-17"),
        ("x", {"PatientID": "tcga-aa-0001", "ContainerIdentifier": "other"}, "TCGA-AA-0001"),
        ("x", {"PatientID": "", "ContainerIdentifier": "TCGA-AA-0002-01Z-00-DX1"}, "TCGA-AA-0002"),
        ("x", {"PatientID": "Anonymous", "ContainerIdentifier": "S1"}, "1.2.9"),
        ("TCGA-AA-0003", {"ContainerIdentifier": "Unknown"}, "TCGA-AA-0003"),
        ("TCGA-AA-0003", {"PatientID": "P-18"}, "P-18"),
        ("x", {}, "1.2.9"),  # the study, whatever its files are called
    ],
)
def test_the_patient_of_a_dicom_slide(tmp_path: Path, folder: str, fields: dict[str, str], patient: str) -> None:
    write_header(tmp_path / folder / "1.dcm", "1.2.3", **fields)
    [row] = find_slides(tmp_path).slides
    assert patient_of(row.path, row.patient) == patient


def test_a_link_to_one_file_of_a_series_opens_the_whole(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1100, 700, 3), np.uint8)
    slide = write_slide(tmp_path / "store", image)
    [row] = find_slides(tmp_path / "store").slides
    assert row.path == str(slide) and openslide.OpenSlide(row.path).level_dimensions == ((700, 1100), (175, 275))
    (tmp_path / "links").mkdir()
    (tmp_path / "links/x.dcm").symlink_to(tmp_path / "store/1.dcm")
    [linked] = find_slides(tmp_path / "links").slides
    assert openslide.OpenSlide(linked.path).level_count == 2


def mirax(folder: Path, name: str, slide_id: str, start: bytes = b"\xff\xd8 thumbnail") -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "Slidedat.ini").write_text(f"[GENERAL]\nSLIDE_ID = {slide_id}\n")
    (folder / name / "Data0000.dat").write_bytes(bytes(10))
    (folder / f"{name}.mrxs").write_bytes(start)
    return folder / f"{name}.mrxs"


def test_mirax_file_and_folder_are_one_slide(tmp_path: Path) -> None:
    mirax(tmp_path / "in", "s", "A")
    assert found(tmp_path / "in") == ["s.mrxs"]
    assert [row.key for row in find_slides(tmp_path / "in/s").slides] == ["s.mrxs"]  # its folder means it
    listed = tmp_path / "list.txt"
    listed.write_text("in/s\nin/s.mrxs\n")
    assert found(listed) == ["in/s.mrxs"]


def test_a_link_to_a_slide_of_several_files_leads_to_where_they_are(tmp_path: Path) -> None:
    slide = mirax(tmp_path / "store", "s", "A")
    for name in ("bare", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.mrxs").symlink_to(slide)
    (tmp_path / "whole/s").symlink_to(tmp_path / "store/s")
    assert [row.path for row in find_slides(tmp_path / "bare").slides] == [str(slide)]
    assert [row.path for row in find_slides(tmp_path / "whole").slides] == [str(tmp_path / "whole/s.mrxs")]


def test_mirax_slides_of_one_name_differ_by_their_index(tmp_path: Path) -> None:
    """The file beside the folder is a thumbnail, or empty, and says nothing."""
    for place, slide_id in (("a", "A"), ("b", "B"), ("c", "A")):
        mirax(tmp_path / place, "1", slide_id, start=b"")
    assert found(tmp_path) == ["a/1.mrxs", "b/1.mrxs"]


@pytest.mark.parametrize(("ending", "image"), [("vms", "s.jpg"), ("VMU", "s.tif")])
def test_hamamatsu_sets_are_one_slide(tmp_path: Path, ending: str, image: str) -> None:
    words = (
        f"[Virtual Microscope Specimen]\nNoLayers=1\nImageFile={image}\nMapFile=map_{image}\nOptimisationFile=o.opt\n"
    )
    (tmp_path / f"s.{ending}").write_text(words)
    for name in (image, f"map_{image}", "o.opt"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "other.tif").write_bytes(b"another slide")
    assert found(tmp_path) == ["other.tif", f"s.{ending}"]


def test_links_of_both_kinds_count_once(tmp_path: Path) -> None:
    (tmp_path / "z.svs").write_bytes(b"slide")
    os.link(tmp_path / "z.svs", tmp_path / "hard.svs")
    (tmp_path / "soft.svs").symlink_to("z.svs")
    result = find_slides(tmp_path)
    assert [row.key for row in result.slides] == ["hard.svs"] and len(result.duplicates) == 2


def test_copies_count_once_and_slides_that_differ_anywhere_looked_at_do_not(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    variants = {"a": whole, "b": whole, "longer": np.append(whole, np.uint8(0))}
    for name, position in (("start", 10), ("middle", len(whole) // 2), ("end", len(whole) - 1)):
        variants[name] = whole.copy()
        variants[name][position] ^= 1
    for name, content in variants.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.svs").write_bytes(content.tobytes())
    (tmp_path / "a/other name.svs").write_bytes(whole.tobytes())
    result = find_slides(tmp_path)
    assert [row.key for row in result.slides] == [
        "a/other name.svs", "a/s.svs", "end/s.svs", "longer/s.svs", "middle/s.svs", "start/s.svs",
    ]  # fmt: skip
    assert result.duplicates == [(str(tmp_path / "b/s.svs"), str(tmp_path / "a/s.svs"))]
    listed = tmp_path / "list.csv"
    listed.write_text("path,mpp\nb/s.svs,0.5\na/s.svs,0.25\n")
    with pytest.raises(ValueError, match="twice"):
        find_slides(listed)


def test_dicom_files_without_an_ending_are_found_and_grouped(tmp_path: Path) -> None:
    for number, name in enumerate(("IM0001", "1.2.840.17", "IM0003")):
        write_header(tmp_path / name, "1.2.3", columns=100 + number, PatientID="P")
    (tmp_path / "README").write_text("no slide")
    [row] = find_slides(tmp_path).slides
    assert (row.key, row.patient) == ("IM0003", "P")
    assert [row.patient for row in find_slides(tmp_path / "IM0001").slides] == ["P"]


def test_of_a_slide_in_two_folders_the_one_with_the_finest_level_counts(tmp_path: Path) -> None:
    for name, columns in {"a/1": 256, "a/2": 128, "b/0": 1024}.items():
        write_header(tmp_path / f"{name}.dcm", "1.2.3", columns=columns)
    assert found(tmp_path) == ["b/0.dcm"]

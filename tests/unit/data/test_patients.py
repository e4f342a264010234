"""Patients of slides, told by barcodes in file names or folders."""

import pytest

from dinov2.data.patients import comparable, names_of, patient_of, patients_of

TCGA = "TCGA-A6-2670-01Z-00-DX1.c2f4b3a1-1f2e-4d5c"


@pytest.mark.parametrize(
    ("slide", "patient"),
    [
        (f"/data/tcga/{TCGA}.svs", "TCGA-A6-2670"),
        (TCGA, "TCGA-A6-2670"),
        ("TCGA-A6-2670", "TCGA-A6-2670"),
        ("tcga-a6-2670_extra.svs", "TCGA-A6-2670"),
        ("shards/TCGA-A6-2670.parquet", "TCGA-A6-2670"),
        ("/cohort/TCGA-A6-2670/slide 1.svs", "TCGA-A6-2670"),
        ("/TCGA-A6-2670/TCGA-02-0001-01.svs", "TCGA-02-0001"),
        (r"C:\slides\TCGA-A6-2670-01.svs", "TCGA-A6-2670"),
        ("TCGA-12K-parquet/case_17.svs", "case_17"),  # no barcode: a project's name
        ("TCGA-A6-26701-01.svs", "TCGA-A6-26701-01"),
        ("TCGA-COAD/case_17.svs", "case_17"),
        ("x-TCGA-A6-2670.svs", "x-TCGA-A6-2670"),
        ("/data/case_17.ome.tiff", "case_17"),
        ("case_17.SVS", "case_17"),
        ("S.2019.0012.svs", "S.2019.0012"),
        ("case_17.v2", "case_17.v2"),
        ("part/0003.parquet", "0003"),
        ("dicom/series 4/", "series 4"),
        (".svs", ".svs"),
        ("", ""),
    ],
)
def test_patient(slide: str, patient: str) -> None:
    assert patient_of(slide) == patient


@pytest.mark.parametrize(
    "name",
    [
        "TCGA-A6-2670",
        "tcga-a6-2670",
        "TCGA-A6-2670-01Z-00-DX1",
        "tcga-a6-2670-01z-00-dx1",
        TCGA,
        f"{TCGA}.svs",
        f"{TCGA}.SVS",
        f"/data/{TCGA}.svs",
    ],
)
def test_names_of_a_tcga_slide(name: str) -> None:
    assert comparable(name) in names_of(f"/data/{TCGA}.svs")


@pytest.mark.parametrize("name", ["TCGA-A6", "TCGA-A6-267", "TCGA-A6-2671", "TCGA-A6-2670-01Z", "data", "/data", ""])
def test_not_names_of_a_tcga_slide(name: str) -> None:
    assert comparable(name) not in names_of(f"/data/{TCGA}.svs")


def test_names_of_another_slide_are_case_sensitive() -> None:
    slide = "/data/Case_17.scan.ome.tiff"
    assert names_of(slide) == {slide, "Case_17.scan.ome.tiff", "Case_17.scan", "Case_17"}
    assert comparable("case_17") not in names_of(slide)
    assert names_of("") == set()


def test_scans_in_the_folder_of_a_patient_are_of_that_patient() -> None:
    slides = [
        "slides/TCGA-AA-0001/scan_1.svs",
        "slides/TCGA-AA-0001/scan_2.svs",
        "slides/tcga-aa-0002/scan_1.svs",
    ]
    patients = ("TCGA-AA-0001", "TCGA-AA-0001", "TCGA-AA-0002")
    assert patients_of(slides) == patients == tuple(map(patient_of, slides))


def test_a_slide_without_barcode_among_others_is_its_own_patient() -> None:
    assert patients_of(iter(["TCGA-AA-0001/a.svs", "b.svs"])) == ("TCGA-AA-0001", "b")


def test_slides_without_barcodes_tell_no_patients() -> None:
    assert patients_of(["a/scan_1.svs", "b/scan_1.svs"]) is None
    assert patients_of([]) is None

"""Exclusion files, and the validation fraction against the digests of coreutils' b2sum."""

from pathlib import Path

import pytest

from dinov2.data.stream.patient_split import in_validation, read_exclusions

# printf NAME | b2sum -l 64
DIGESTS = {
    "TCGA-02-0001": 0x3890BD91DBDDBD41,
    "TCGA-A6-2670": 0x856D678FA61C37E5,
    "case_17": 0xCB2C6B68C443DF0A,
    "Präparat 3": 0x0E97496DBA00126B,
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", b"case 1\nTCGA-A6-2670\n# all of site 3\n\n  b,c.svs  \ncase 1\n"),
        ("list", b"\xef\xbb\xbfcase 1\r\nTCGA-A6-2670\r\n\r\n#\r\nb,c.svs"),
        ("list.csv", b'case 1,BRCA\nTCGA-A6-2670,x\n# note,y\n,\n\n"b,c.svs",z\n'),
        ("list.TSV", b"case 1\tBRCA\nTCGA-A6-2670\t\nb,c.svs\tx\n"),
    ],
)
def test_exclusion_files(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert read_exclusions(path) == ["case 1", "TCGA-A6-2670", "b,c.svs"]


def test_a_stray_quotation_mark_hides_no_later_line(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text('a,1\n"b,2\nc,3\n')
    assert read_exclusions(path) == ["a", "b,2", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "names nothing; at least 1 patient or slide"),
        ("notes.txt", b"# nobody\n\n   \n", "names nothing"),
        ("utf16.txt", "case 1".encode("utf-16"), "cannot be read .*UTF-8 text is expected"),
        ("zeros.txt", b"case\0 1", "holds zero bytes"),
        ("long.csv", b"x" * 200_000, "cannot be read .*UTF-8 text is expected"),
    ],
)
def test_wrong_exclusion_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^exclusion file '.*{name}' {message}"):
        read_exclusions(path)


@pytest.mark.parametrize("name", ["missing.txt", ""])
def test_no_exclusion_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; a text file of one patient or slide per line"):
        read_exclusions(tmp_path / name)


@pytest.mark.parametrize("patient", DIGESTS)
def test_validation_fraction_is_the_digest_as_a_fraction(patient: str) -> None:
    fraction = DIGESTS[patient] / 2**64
    assert in_validation(patient, fraction + 1e-9)
    assert not in_validation(patient, fraction - 1e-9)
    assert not in_validation(patient, 0)


def test_validation_fraction_is_met_and_nested() -> None:
    patients = [f"TCGA-{number // 1000:02}-{number % 1000:04}" for number in range(20_000)]
    small = {patient for patient in patients if in_validation(patient, 0.05)}
    large = {patient for patient in patients if in_validation(patient, 0.2)}
    assert len(small) == pytest.approx(1000, abs=5 * (20_000 * 0.05 * 0.95) ** 0.5)
    assert len(large) == pytest.approx(4000, abs=5 * (20_000 * 0.2 * 0.8) ** 0.5)
    assert small < large


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_wrong_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and less than 1 is expected"):
        in_validation("case_17", fraction)

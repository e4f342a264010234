"""Headers of DICOM slides: which files are one slide, and whose it is."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dinov2.data.patients import barcode_of
from dinov2.data.slides.errors import import_package

SUFFIX = ".dcm"
_MAGIC, _MAGIC_AT = b"DICM", 128
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # SOP class of VL Whole Slide Microscopy Images
_NOBODY = {"", "unknown", "anonymous", "anonymized", "anonymised", "anon", "none", "n/a", "na", "null"}
_LAST_TAG = 0x00480006  # what lies behind it, frame positions and pixels, may be large
_TAGS = {
    "kind": 0x00080008, "sop_class": 0x00080016, "patient": 0x00100020, "study": 0x0020000D, "series": 0x0020000E,
    "frame": 0x00200052, "container": 0x00400512, "columns": 0x00480006,
}  # fmt: skip


class DicomHeader(NamedTuple):
    """One file of a slide, as far as telling slides apart needs it."""

    study: str  # UIDs
    series: str
    frame: str  # of reference; empty if it has none
    patient: str  # see `read_header`
    columns: int  # width of its pixel matrix
    is_slide: bool  # whether it is a level of a whole slide, and not a label, an overview or a picture of another kind


def is_dicom(path: str | Path) -> bool:
    """Whether a local file is called as DICOM files are; without an ending, as archives name them, by its beginning."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending == SUFFIX or (ending and not ending[1:].isdigit()):
        return ending == SUFFIX
    try:
        with path.open("rb") as file:
            return file.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] == _MAGIC
    except OSError:
        return False


@lru_cache(64)
def headers_in(folder: str, changed: int) -> dict[str, DicomHeader]:
    """Headers of the DICOM files in a folder that changed at a time, by name."""
    headers = {path.name: read_header(path) for path in Path(folder).iterdir() if is_dicom(path)}
    return {name: header for name, header in headers.items() if header is not None}


def is_same_slide(one: DicomHeader, other: DicomHeader) -> bool:
    """Whether two files are of one slide: of one series, or of one study and frame of reference."""
    same_frame = one.frame and (one.study, one.frame) == (other.study, other.frame)
    return one.series == other.series or bool(same_frame)


def read_header(path: str | Path) -> DicomHeader | None:
    """Read the first kilobytes of a file; None if it is no DICOM file, ImportError without pydicom.

    The patient is the one of the PatientID, else the TCGA barcode of the container (the glass slide), else of the path,
    else the study: what archives fill in where they know nobody, as "Anonymous", counts as none.
    """
    pydicom = import_package("pydicom", "DICOM slides need pydicom")
    try:
        with open(path, "rb") as file:
            tags = list(map(pydicom.tag.Tag, _TAGS.values()))
            found = pydicom.filereader.read_partial(file, lambda tag, *_: tag > _LAST_TAG, specific_tags=tags)
    except (pydicom.errors.InvalidDicomError, EOFError):
        return None
    except OSError:
        raise
    except Exception:  # its parser lets through whatever corrupt bytes make it stumble over
        return None
    values = {name: found[tag].value if tag in found else "" for name, tag in _TAGS.items()}
    if not values["series"]:
        return None
    patient, container, study = (str(values[name] or "").strip() for name in ("patient", "container", "study"))
    if patient.lower() in _NOBODY:
        patient = barcode_of(container) or barcode_of(str(path)) or study
    is_level = "VOLUME" in (values["kind"] or ())
    return DicomHeader(
        study, str(values["series"]), str(values["frame"]), patient, int(values["columns"] or 0),
        str(values["sop_class"]) == _WHOLE_SLIDE and is_level,
    )  # fmt: skip

"""Headers of DICOM slides: which files are one slide, and whose it is."""

from pathlib import Path
from typing import NamedTuple

from dinov2.data.patients import barcode_of
from dinov2.data.slides.errors import import_package

SUFFIX = ".dcm"
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

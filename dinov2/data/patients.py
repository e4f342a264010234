"""Patients of slides: the one rule by which training splits, exclusion lists and folds of probes keep them whole.

A slide is named by its path. Its patient is the one that the dataset tells, as by a column `patient` of shards; else
the TCGA barcode (TCGA-XX-XXXX, upper case) that its file name or else the nearest of its folders begins with; without
a barcode it is the file name without its extensions.
"""

import re
from collections.abc import Iterable

_BARCODE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE | re.ASCII)
_EXTENSIONS = re.compile(
    r"(\.(svs|svslide|tiff?|ome|btf|qptiff|ndpi|mrxs|scn|bif|vmu|vms|czi|isyntax|i2syntax|dcm|zarr"
    r"|png|jpe?g|jp2|j2k|webp|bmp|parquet))+\Z",
    re.IGNORECASE,
)


def patient_of(slide: str, told: str = "") -> str:
    """Name the patient of a slide: the one told, else its TCGA barcode, else its file name without .ome.tiff etc."""
    return comparable(told) or barcode_of(slide) or _stem(_components(slide)[-1])


def patients_of(slides: Iterable[str]) -> tuple[str, ...] | None:
    """Name the patient of each slide, where paths tell patients at all: None if none of them has a barcode."""
    slides = tuple(slides)
    return tuple(map(patient_of, slides)) if any(map(barcode_of, slides)) else None


def names_of(slide: str, told: str = "") -> set[str]:
    """List what an exclusion list may call a slide, in the spelling of `comparable`.

    These are its patient (see `patient_of`), its whole path, its file name with and without extensions, and the file
    name up to the first dot, which is the slide's barcode where names are barcode.uuid.svs.
    """
    file_name = _components(slide)[-1]
    stem = _stem(file_name)
    names = {patient_of(slide, told), slide, file_name, stem, stem.partition(".")[0]}
    return {comparable(name) for name in names} - {""}


def comparable(name: str) -> str:
    """Bring a name of a patient or slide to the form in which names are compared: TCGA ones in upper case."""
    return name.upper() if _BARCODE.match(_components(name)[-1]) else name


def barcode_of(slide: str) -> str:
    """The TCGA barcode that a file name, or else the nearest of its folders, begins with; empty without one."""
    matches = filter(None, map(_BARCODE.match, reversed(_components(slide))))
    return next((match[0].upper() for match in matches), "")


def _components(path: str) -> list[str]:
    return re.split(r"[/\\]", path.rstrip("/\\"))


def _stem(file_name: str) -> str:
    return _EXTENSIONS.sub("", file_name) or file_name

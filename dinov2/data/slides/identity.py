"""Paths of one slide: links, copies, the files of a DICOM series, and the sets of files of Hamamatsu and 3DHISTECH."""

import configparser
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dinov2.data.slides import dicom
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.tables import decoded

_SAMPLED_BYTES = 1 << 16  # at the beginning, in the middle and at the end of a file
_MIRAX, _MIRAX_INDEX = ".mrxs", "Slidedat.ini"
_HAMAMATSU = {".vms", ".vmu"}
_NEEDED = ("imagefile", "mapfile")  # keys of their index files


def with_companions(path: str) -> str:
    """The path by which a slide of several files opens: the link itself, or the file that it leads to.

    OpenSlide looks for the others beside the path that it is given. A folder of MIRAX data gives the slide beside it.
    """
    if os.path.isfile(os.path.join(path, _MIRAX_INDEX)) and os.path.isfile(f"{path.rstrip(os.sep)}{_MIRAX}"):
        return f"{path.rstrip(os.sep)}{_MIRAX}"
    if not os.path.islink(path):
        return path
    real = os.path.realpath(path)
    count = [len(_others(each)) for each in (path, real)]
    return real if count[1] > count[0] else path


def companions(slides: Iterable[Path]) -> set[Path]:
    """Files that are parts of some slides and no slides themselves: images that a .vms or .vmu file names."""
    return {other for slide in slides if slide.suffix.lower() in _HAMAMATSU for other in _others(slide)}


def same_slides(paths: Sequence[str]) -> dict[str, str]:
    """The first of the paths that lead to the same slide, by each path that may be a further one; URLs are as they are.

    The same are: links to one file; files of one name and size with the same bytes where they are sampled, and of MIRAX
    with the same index; and the copies of a DICOM slide, which `dicom_slides` has brought down to a file each.
    """
    first_of, first = {}, {}
    for path in paths:
        first_of[path] = path if is_remote(path) else first.setdefault(_file_identity(path), path)
    left = [path for path in dict.fromkeys(first_of.values()) if not is_remote(path)]
    names = Counter(os.path.basename(path) for path in left)
    alike = defaultdict(list)
    for path in left:
        if names[os.path.basename(path)] > 1 and os.path.isfile(path):
            alike[os.path.basename(path), os.path.getsize(path)].append(path)
    copies = {}
    for candidates in alike.values():
        contents: dict[str, str] = {}
        for path in candidates if len(candidates) > 1 else ():
            copies[path] = contents.setdefault(_content_identity(path), path)
    return {path: copies.get(known, known) for path, known in first_of.items()}


def dicom_slides(paths: Sequence[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Bring the files of DICOM slides down to one each.

    Files of one series are one slide, and so are series of a study that share a frame of reference. Of a slide that
    lies in several folders the one with the finest level counts, then the one with most files. Files that cannot be
    parsed stay, for opening to say why.

    Returns:
        For each .dcm file that belongs to a slide, the file that stands for it: the level of most pixels; the patient
        of each of these; and files of something else, such as labels that no level lies beside.
    """
    headers = {path: dicom.read_header(path) for path in paths if _is_dicom(path) and os.path.isfile(path)}
    frames: dict[tuple[str, str], str] = {}
    groups: dict[str, list[str]] = defaultdict(list)
    for path, header in headers.items():
        if header:
            slide = frames.setdefault((header.study, header.frame), header.series) if header.frame else header.series
            groups[slide].append(path)
    chosen, patients, foreign = {}, {}, []
    for group in groups.values():
        levels = [path for path in group if headers[path].is_slide]
        if not levels:
            foreign += group
            continue
        files = Counter(os.path.dirname(path) for path in levels)
        finest = max(levels, key=lambda path: (headers[path].columns, files[os.path.dirname(path)]))
        chosen |= dict.fromkeys(group, finest)
        patients[finest] = headers[finest].patient
    return chosen, patients, foreign


def slides_and_patients(paths: Sequence[str]) -> dict[str, tuple[str, str]]:
    """By path, the one of the paths that stands for its slide, and the patient that the slide tells, or nothing."""
    chosen, patients, _ = dicom_slides(paths)
    same = same_slides(paths)
    slides = {path: chosen.get(first, first) for path, first in same.items()}
    return {path: (slide, patients.get(slide, "")) for path, slide in slides.items()}


def other_names(path: str) -> list[str]:
    """By what else than its path a table may call a DICOM slide; nothing for other slides.

    These are its series, each file of it that lies beside, by path and name, and the folder that it has to itself.
    """
    header = dicom.read_header(path) if _is_dicom(path) and os.path.isfile(path) else None
    if header is None:
        return []
    folder = os.path.dirname(os.path.abspath(path))
    beside = dicom.headers_in(folder, os.stat(folder).st_mtime_ns)
    files = [name for name, other in beside.items() if dicom.is_same_slide(header, other)]
    own = [folder, os.path.basename(folder)] if len(files) == len(beside) else []
    return [header.series, *files, *(os.path.join(folder, name) for name in files), *own]


def _is_dicom(path: str) -> bool:
    return not is_remote(path) and dicom.is_dicom(path)


def _file_identity(path: str) -> tuple[object, ...]:
    """Equal for links of both kinds to one file."""
    try:
        status = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else (os.path.realpath(path),)


def _content_identity(path: str) -> str:
    """Digest of samples of a file and, where it says little itself, of the index beside it."""
    digest = hashlib.blake2b(digest_size=16)
    index = Path(path).with_suffix("") / _MIRAX_INDEX
    for file in (Path(path), *([index] if index.is_file() else [])):
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            for start in (0, max(0, size // 2 - _SAMPLED_BYTES // 2), max(0, size - _SAMPLED_BYTES)):
                opened.seek(start)
                digest.update(opened.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _others(slide: str | Path) -> list[Path]:
    """Files beside a slide that it cannot be opened without, as far as they are there."""
    slide = Path(slide)
    ending = slide.suffix.lower()
    if ending == _MIRAX:
        return [file for file in [slide.with_suffix("") / _MIRAX_INDEX] if file.is_file()]
    if ending in _HAMAMATSU:
        return [file for file in (slide.parent / name for _, name in _named_files(slide)) if file.is_file()]
    if ending == dicom.SUFFIX:
        return list(slide.parent.glob("*.[dD][cC][mM]"))
    return []


def missing_companions(slide: str | Path) -> list[str]:
    """Files that a slide cannot be opened without and that are not there."""
    slide, there = Path(slide), _others(slide)
    ending = slide.suffix.lower()
    if ending == _MIRAX:
        return [] if there else [str(slide.with_suffix("") / _MIRAX_INDEX)]
    named = _named_files(slide) if ending in _HAMAMATSU else ()
    needed = (slide.parent / name for key, name in named if key.startswith(_NEEDED))
    return [str(file) for file in needed if file not in there]


def _named_files(slide: Path) -> Iterator[tuple[str, str]]:
    """Keys, in lower case, and values of an index file that may name files beside it."""
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True)
    try:
        parser.read_string(decoded(slide.read_bytes()))
    except (configparser.Error, OSError):
        return
    for section in parser.sections():
        yield from ((key, name) for key, name in parser[section].items() if name and os.path.basename(name) == name)

"""Resolution of slides in micrometres per level-0 pixel (mpp), and tables of it that users give."""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from dinov2.data.slides.identity import other_names
from dinov2.data.slides.tables import PATH_COLUMNS, column, read_csv

Mpp = float | None  # None where it is unknown
MppSource = Literal["slide", "appmag", "user", "none"]
PLAUSIBLE_MPP = (0.02, 20.0)  # outside lie resolution tags meant for screens and print (72 dpi is 353 um)
MPP_TOLERANCE = 0.2  # by which a slide may be coarser than what is asked: 20x, 0.5 um, takes slides up to 0.6 um
LIKE = 1.01  # a level this much coarser than the target is as good as it
_UM_PER_UNIT = {
    "": 1.0, "u": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0,
    "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "pm": 1e-6, "å": 1e-4, "in": 25400.0, "inch": 25400.0,
}  # fmt: skip
# U+00B5 and U+03BC, each also as UTF-8 that was read as Latin-1, as an escape, and lost.
_MICRO = re.compile(r"\u00c2?\u00b5|\u00ce\u00bc|\u03bc|\\u00b5|\\u03bc|&(#181|#956|micro|mu);|\ufffd+", re.I)


@dataclass(frozen=True)
class Resolution:
    """A slide's resolution in micrometres per level-0 px: its own, and the user's, who has the last word."""

    own: Mpp = None  # what the slide says
    own_source: MppSource = "none"  # "slide", 10 / its objective power ("appmag"), or "none"
    own_notes: tuple[str, ...] = ()  # what a user should know of it, as ends of sentences about the slide
    user: Mpp = None  # given for this slide

    def given(self, mpp: Mpp) -> "Resolution":
        """Let the value of a user, or None, take the place of another one."""
        return replace(self, user=mpp)

    @property
    def mpp(self) -> Mpp:
        """What counts."""
        return self.own if self.user is None else self.user

    @property
    def source(self) -> MppSource:
        """Where that comes from."""
        return self.own_source if self.user is None else "user"

    @property
    def notes(self) -> tuple[str, ...]:
        """All that a user should know."""
        if self.user is None:
            return self.own_notes
        if self.own is None or math.isclose(self.user, self.own, rel_tol=1e-3):
            return ()
        return (f"the given {self.user:g} um/px counts, not its own {self.own:g}",)


def is_plausible(mpp: float | None) -> bool:
    """Whether a scanner can have had this resolution; neither None nor NaN is."""
    return mpp is not None and PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def check_user_mpp(slide: str | Path, mpp: float | None) -> None:
    """Raise ValueError for a given mpp that no scanner has."""
    if mpp is not None and not is_plausible(mpp):
        raise ValueError(f"The mpp given for slide '{slide}' is {mpp}, but it must lie within {PLAUSIBLE_MPP}.")


def resolve_mpp(
    sides: Sequence[Mpp], power: float | None, *, explicit: bool = True, notes: tuple[str, ...] = ()
) -> Resolution:
    """Choose a slide's own mpp: the mean of what it says along x and y, else 10 / its objective power.

    Args:
        sides: um per level-0 px along x and y, None where the slide does not say.
        power: of the objective; 20 for 20x.
        explicit: whether `sides` are meant for this; TIFF's tags of resolution often are for print or screens, and are
            left out without a word where they are not plausible.
        notes: what else a user should know.
    """
    known, notes = [side for side in sides if side is not None], list(notes)
    mpp, source = None, "none"
    if known and all(map(is_plausible, known)):
        mpp, source = sum(known) / len(known), "slide"
        if max(known) > LIKE * min(known):
            notes.append(f"its pixels are {' x '.join(f'{side:g}' for side in sides)} um; their mean counts")
    elif power and is_plausible(10 / power):
        mpp, source = 10 / power, "appmag"
    if known and explicit and source != "slide":
        said = " x ".join(f"{side:g}" for side in known)
        instead = f"10 / its objective power {power:g} counts" if mpp else "it does not count"
        notes.append(f"it says {said} um/px, outside {PLAUSIBLE_MPP[0]:g} to {PLAUSIBLE_MPP[1]:g}; {instead}")
    return Resolution(mpp, source, tuple(notes))


def log_notes(logger: logging.Logger, notes: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Say what a user should know of the resolution of slides (path, notes), each kind in one line."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for slide, note in ((slide, note) for slide, several in notes for note in several):
        kinds.setdefault(re.sub(r"[\d.e+-]+", "", note), []).append((slide, note))
    for found in kinds.values():
        slide, note = found[0]
        others = f" ({len(found) - 1} other slides alike)" if len(found) > 1 else ""
        logger.warning("Slide '%s': %s%s.", slide, note, others)


def coarsest_level(
    downsamples: Sequence[float], slide_mpp: float, mpp: float, tolerance: float = MPP_TOLERANCE
) -> int | None:
    """Choose the coarsest level that is at most 1 % coarser than `mpp`, else level 0 within the tolerance, or None."""
    fine = [level for level, d in enumerate(downsamples) if slide_mpp * d <= mpp * LIKE]
    if fine:
        return fine[-1]
    return 0 if slide_mpp <= mpp * (1 + tolerance) * (1 + 1e-9) else None


def micrometres(value: object, unit: str | None) -> float | None:
    """Convert a length to micrometres; None if it is no number above 0 or has no unit of length (pixel).

    The sign of micro is understood in every encoding that files have it in.
    """
    name = _MICRO.sub("u", unit or "").strip().lower()
    scale, length = _UM_PER_UNIT.get(name), number(value)
    return length * scale if scale and length and math.isfinite(length) and length > 0 else None


def number(text: object) -> float | None:
    """Convert what a slide or a table says to a number, perhaps with a decimal comma, None where it is none."""
    if isinstance(text, str) and text.count(",") == 1 and "." not in text:
        text = text.replace(",", ".")
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def power_of(text: object) -> float | None:
    """Convert an objective's power, as 20 or "20x", to a number, None where it is none."""
    return number(text.strip().rstrip("xX\u00d7") if isinstance(text, str) else text)


@dataclass(frozen=True)
class MppTable:
    """The mpp that a user gives for slides."""

    written: dict[str, float]  # by slide as the table names it
    shortened: dict[str, float]  # by file name and stem of the paths in the table, without those that are ambiguous

    def get(self, slide_path: str | Path, file: str | Path | None = None) -> float | None:
        """Look up a slide by path, file name, stem and barcode (stem up to its first dot), then by its other names.

        These are for a DICOM slide its series, its folder, and all files of the series; see `identity.other_names`.
        `file` is where the slide lies, if that is not `slide_path`.
        """
        path = PurePosixPath(slide_path)
        names = (str(slide_path), path.name, path.stem, path.stem.partition(".")[0])
        tables = ((table, name) for table in (self.written, self.shortened) for name in names)
        for table, name in tables:
            if name in table:
                return table[name]
        others = other_names(str(file or slide_path))
        return next((self.written[name] for name in others if name in self.written), None)


def read_mpp_table(path: str | Path) -> MppTable:
    """Read a CSV file with columns `mpp` and `slide`, or another of `PATH_COLUMNS`: path, file name, stem or barcode.

    ValueError if a column is missing, a value is no plausible mpp, or a slide has two.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no mpp table '{path}'; a CSV file with columns slide,mpp is expected.")
    columns, rows = read_csv(path)
    slide_column, mpp_column = column(["slide", *PATH_COLUMNS], columns), column(["mpp"], columns)
    if slide_column is None or mpp_column is None:
        raise ValueError(f"The mpp table '{path}' has columns {columns}, but it needs slide and mpp.")
    written, values = {}, {}
    for line, row in rows:
        slide, mpp = row[slide_column], number(row[mpp_column])
        if not slide or not is_plausible(mpp):
            found = f"Line {line} of mpp table '{path}' gives slide {slide!r} the mpp {row[mpp_column]!r}"
            raise ValueError(f"{found}; a name and a number within {PLAUSIBLE_MPP} are expected.")
        if written.setdefault(slide, mpp) != mpp:
            raise ValueError(f"The mpp table '{path}' gives slide {slide!r} both {written[slide]} and {mpp}.")
        for name in (PurePosixPath(slide).name, PurePosixPath(slide).stem):
            values.setdefault(name, set()).add(mpp)
    return MppTable(written, {name: found.pop() for name, found in values.items() if len(found) == 1})

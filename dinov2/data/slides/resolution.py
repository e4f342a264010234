"""Resolution of slides in micrometres per level-0 pixel (mpp), and tables of it for slides that do not say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from dinov2.data.slides.tables import read_csv

Mpp = float | None  # None where it is unknown
MppSource = Literal["slide", "appmag", "user", "none"]
PLAUSIBLE_MPP = (0.1, 4.0)  # outside lie resolution tags meant for screens and print (72 dpi is 353 um)
_TOLERANCE = 1.01  # a level this much coarser than the target still serves it


def is_plausible(mpp: float | None) -> bool:
    """Whether a scanner can have had this resolution; neither None nor NaN is."""
    return mpp is not None and PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def check_user_mpp(slide: str | Path, mpp: float | None) -> None:
    """Raise ValueError for a given mpp that no scanner has."""
    if mpp is not None and not is_plausible(mpp):
        raise ValueError(f"The mpp given for slide '{slide}' is {mpp}, but it must lie within {PLAUSIBLE_MPP}.")


def resolve_mpp(sides: Sequence[Mpp], power: float | None, user_mpp: Mpp) -> tuple[Mpp, MppSource]:
    """Choose a slide's mpp: its own (mean of `sides`, along x and y), else 10 / objective power, else the user's."""
    if all(map(is_plausible, sides)):
        return sum(sides) / len(sides), "slide"
    if power and is_plausible(10 / power):
        return 10 / power, "appmag"
    return (user_mpp, "user") if user_mpp is not None else (None, "none")


def coarsest_level(downsamples: Sequence[float], slide_mpp: float, mpp: float) -> int | None:
    """Choose the coarsest level that is at most 1 % coarser than `mpp`; None where even level 0 is coarser."""
    fine = [level for level, d in enumerate(downsamples) if slide_mpp * d <= mpp * _TOLERANCE]
    return fine[-1] if fine else None


def number(text: object) -> float | None:
    """Convert what a slide or a table says to a number, None where it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True)
class MppTable:
    """The mpp that a user gives for slides."""

    written: dict[str, float]  # by slide as the table names it
    shortened: dict[str, float]  # by file name and stem of the paths in the table, without those that are ambiguous

    def get(self, slide_path: str | Path) -> float | None:
        """Look up a slide by path, file name, stem and barcode (stem up to its first dot)."""
        path = PurePosixPath(slide_path)
        names = (str(slide_path), path.name, path.stem, path.stem.partition(".")[0])
        tables = ((table, name) for table in (self.written, self.shortened) for name in names)
        return next((table[name] for table, name in tables if name in table), None)


def read_mpp_table(path: str | Path) -> MppTable:
    """Read a CSV file with the columns `slide` (path, file name, stem or barcode) and `mpp`.

    ValueError if a column is missing, a value is no plausible mpp, or a slide has two.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no mpp table '{path}'; a CSV file with columns slide,mpp is expected.")
    columns, rows = read_csv(path)
    if not {"slide", "mpp"} <= set(columns):
        raise ValueError(f"The mpp table '{path}' has columns {columns}, but it needs slide and mpp.")
    written, values = {}, {}
    for line, row in rows:
        slide, mpp = row["slide"], number(row["mpp"])
        if not slide or not is_plausible(mpp):
            found = f"Line {line} of mpp table '{path}' gives slide {slide!r} the mpp {row['mpp']!r}"
            raise ValueError(f"{found}; a name and a number within {PLAUSIBLE_MPP} are expected.")
        if written.setdefault(slide, mpp) != mpp:
            raise ValueError(f"The mpp table '{path}' gives slide {slide!r} both {written[slide]} and {mpp}.")
        for name in (PurePosixPath(slide).name, PurePosixPath(slide).stem):
            values.setdefault(name, set()).add(mpp)
    return MppTable(written, {name: found.pop() for name, found in values.items() if len(found) == 1})

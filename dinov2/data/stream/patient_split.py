"""Split of a dataset by slide and patient: rows to train on, rows kept for validation, and rows left out."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from dinov2.data.patients import comparable, names_of, patient_of
from dinov2.data.source import Source
from dinov2.data.stream.patients import in_validation
from dinov2.data.stream.subset import SubsetSource

logger = logging.getLogger(__name__)

_THREADS = 16  # units whose slides are looked up at a time, since a source may have to fetch them
_CHUNK = 128  # units per task at most; a task costs far more than to look up a unit that the index knows
_NAMED = 5
_MIXED = 255


class Fate(IntEnum):
    """Use of a slide; exclusion comes before validation."""

    TRAINING = 0
    EXCLUDED = 1
    VALIDATION = 2


@dataclass(frozen=True)
class Count:
    """Slides, patients and rows of one fate."""

    slides: int
    patients: int
    rows: int

    def __str__(self) -> str:
        return f"{self.rows:,} rows of {self.slides:,} slides and {self.patients:,} patients"


@dataclass(frozen=True)
class PatientSplit:
    """A dataset split by patient.

    Attributes:
        training: the rows to train on; the source itself where these are all.
        validation: the rows of validation patients; None if there are none.
        counts: slides, patients and rows of each fate. A patient counts in each fate that a slide of theirs has.
        unmatched: names of the exclusion list that no slide of this dataset has.
        unnamed: whether some rows name no slide, so that they cannot be excluded.
    """

    training: Source
    validation: Source | None
    counts: dict[Fate, Count]
    unmatched: frozenset[str]
    unnamed: bool


def split_by_patient(
    source: Source, dataset: str, excluded: Sequence[str] = (), validation_share: float = 0.0
) -> PatientSplit:
    """Split a dataset; a pure function of its slides, so that all ranks find the same.

    Looks up the slide of every row, which costs reads where the source's index does not know it.

    Args:
        source: the dataset.
        dataset: its name, for messages.
        excluded: patients and slides to leave out, see `dinov2.data.patients.names_of`.
        validation_share: fraction of patients to keep for validation, see `dinov2.data.stream.patients.in_validation`.

    Raises:
        ValueError: if nothing is left to train on, or the share is not in [0, 1).
    """
    logger.info("looking up the slides of %d row groups of dataset '%s'", len(source.unit_rows), dataset)
    fates = Fates(excluded, validation_share)
    unit_fate, mixed = _look_up(source, fates)
    counts = _count(source, fates, unit_fate, mixed)
    if not counts[Fate.TRAINING].rows:
        raise ValueError(
            f"of the {source.num_rows:,} rows of dataset '{dataset}' {counts[Fate.EXCLUDED].rows:,} are excluded "
            f"and {counts[Fate.VALIDATION].rows:,} are kept for validation; at least 1 must be left to train on"
        )

    def subset(fate: Fate) -> Source:
        rows = {unit: np.flatnonzero(of_rows == fate) for unit, of_rows in mixed.items()}
        return SubsetSource(source, unit_fate == fate, rows)

    return PatientSplit(
        training=source if counts[Fate.TRAINING].rows == source.num_rows else subset(Fate.TRAINING),
        validation=subset(Fate.VALIDATION) if counts[Fate.VALIDATION].rows else None,
        counts=counts,
        unmatched=frozenset(fates.lines.values()) - fates.matched,
        unnamed="" in fates,
    )


def describe_splits(splits: Sequence[PatientSplit], datasets: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """Tell the user what was set aside, a line per dataset and one for names that matched nothing anywhere."""
    lines = [
        f"dataset '{name}': training on {split.counts[Fate.TRAINING]}; "
        f"excluded {split.counts[Fate.EXCLUDED]}; kept for validation {split.counts[Fate.VALIDATION]}"
        + ("; rows that name no slide cannot be excluded" if split.unnamed else "")
        for split, name in zip(splits, datasets, strict=True)
    ]
    nowhere = frozenset.intersection(*(split.unmatched for split in splits))
    if nowhere:
        named = ", ".join([name for name in excluded if name in nowhere][:_NAMED])
        more = ", ..." if len(nowhere) > _NAMED else ""
        lines.append(f"{len(nowhere)} of {len(excluded)} names to exclude match no slide: {named}{more}")
    return lines


class Fates(dict[str, int]):
    """Fate of each slide, found when first asked for; threads that ask at once find the same."""

    def __init__(self, excluded: Sequence[str], share: float) -> None:
        in_validation("", share)  # refuses a wrong share before any slide is read
        self.lines = {comparable(name): name for name in excluded}
        self.matched: set[str] = set()
        self._share = share

    def __missing__(self, slide: str) -> int:
        hits = [self.lines[name] for name in names_of(slide) if name in self.lines]
        self.matched.update(hits)
        held_out = in_validation(patient_of(slide), self._share)
        fate = Fate.EXCLUDED if hits else Fate.VALIDATION if held_out else Fate.TRAINING
        self[slide] = int(fate)
        return self[slide]


def _look_up(source: Source, fates: Fates) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Find the fate of every unit, uint8 (U,), and of every row of those units that hold several fates."""
    total = len(source.unit_rows)
    step = max(1, min(_CHUNK, total // (4 * _THREADS)))
    unit_fate, mixed = np.zeros(total, np.uint8), {}

    def look_up(start: int) -> None:
        for unit in range(start, min(start + step, total)):
            slides = source.slides(unit)
            if not slides:
                continue
            if slides.count(slides[0]) == len(slides):
                unit_fate[unit] = fates[slides[0]]
                continue
            of_rows = np.fromiter(map(fates.__getitem__, slides), np.uint8, len(slides))
            if np.all(of_rows == of_rows[0]):
                unit_fate[unit] = of_rows[0]
            else:
                unit_fate[unit], mixed[unit] = _MIXED, of_rows

    pool = ThreadPoolExecutor(_THREADS)
    try:
        for _ in pool.map(look_up, range(0, total, step)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return unit_fate, mixed


def _count(source: Source, fates: Fates, unit_fate: np.ndarray, mixed: dict[int, np.ndarray]) -> dict[Fate, Count]:
    counts = {}
    for fate in Fate:
        slides = [slide for slide, of_slide in fates.items() if of_slide == fate]
        rows = int(source.unit_rows[unit_fate == fate].sum())
        rows += sum(np.count_nonzero(of_rows == fate) for of_rows in mixed.values())
        counts[fate] = Count(len(slides), len({patient_of(slide) for slide in slides}), rows)
    return counts

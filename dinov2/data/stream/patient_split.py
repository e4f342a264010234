"""Split of a dataset by slide and patient: rows to train on, rows kept for validation, and rows left out."""

import csv
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

from dinov2.data.patients import comparable, names_of, patient_of
from dinov2.data.source import Origin, Source, origins_of
from dinov2.data.stream.derived import SubsetSource
from dinov2.utils.seeding import hash_name, hash_words

logger = logging.getLogger(__name__)

_THREADS = 16  # row groups whose slides are looked up at a time, since a source may have to fetch them
_CHUNK = 128  # row groups per task at most; a task costs far more than to look up a row group that the index knows
_NAMED = 5
_MIXED = 255
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_exclusions(path: str | Path) -> list[str]:
    """Read the names of patients or slides from UTF-8 text, one per line, each once and in order.

    Blank and # lines are skipped; of .csv and .tsv the first column counts. ValueError if it is no text or names none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"exclusion file '{path}' does not exist; a text file of one patient or slide per line is expected"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        if delimiter := _DELIMITERS.get(path.suffix.lower()):
            # Line by line, lest a stray quotation mark swallow the lines after it.
            lines = ["".join(next(csv.reader([line], delimiter=delimiter), [])[:1]) for line in lines]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"exclusion file '{path}' cannot be read ({error}); UTF-8 text is expected") from None
    if any("\0" in line for line in lines):
        raise ValueError(f"exclusion file '{path}' holds zero bytes; UTF-8 text is expected")
    names = [name for name in dict.fromkeys(map(str.strip, lines)) if name and not name.startswith("#")]
    if not names:
        raise ValueError(f"exclusion file '{path}' names nothing; at least 1 patient or slide is expected")
    return names


def in_validation(patient: str, fraction: float) -> bool:
    """Decide whether a patient is kept for validation, by the name alone: hash_name(patient) / 2**64 < fraction.

    So a patient is on the same side in every dataset, and a larger fraction keeps the patients of a smaller one.
    ValueError if `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction is {fraction}; at least 0 and less than 1 is expected")
    return hash_name(patient) / 2**64 < fraction


def is_used(slide: str, fraction: float, seed: int) -> bool:
    """Decide whether a slide belongs to a fraction in (0, 1] of all, by a hash of seed and name alone.

    So a slide is treated alike in every dataset, and a larger fraction holds the slides of a smaller one; of n slides
    the number that are used is binomial.
    """
    return fraction >= 1 or int(hash_words(seed, hash_name(slide))[0]) / 2**64 < fraction


class Fate(IntEnum):
    """Use of a slide; exclusion comes before validation."""

    TRAINING = 0
    EXCLUDED = 1
    VALIDATION = 2
    UNUSED = 3  # by the fraction of slides


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
    """A dataset split by patient."""

    training: Source  # the rows to train on; the source itself where these are all
    validation: Source | None  # the rows of validation patients; None if there are none
    counts: dict[Fate, Count]  # a patient counts in each fate that a slide of theirs has
    unmatched: frozenset[str]  # names of the exclusion list that no slide of this dataset has
    unnamed: bool  # whether some rows name neither slide nor patient, so that they cannot be excluded
    sites: frozenset[str]  # of all rows; empty for those that tell none


def split_by_patient(
    source: Source,
    dataset: str,
    excluded: Sequence[str] = (),
    validation_fraction: float = 0.0,
    excluded_sites: Sequence[str] = (),
    slide_fraction: float = 1.0,
    seed: int = 0,
) -> PatientSplit:
    """Split a dataset; a pure function of its slides, patients and sites, so that all ranks find the same.

    Looks up the origin of every row, which costs reads where the source's index does not know it. The patient is the
    one that the source tells, else the slide's. ValueError if nothing is left to train on.

    Args:
        source: the dataset, called ``dataset`` in messages.
        excluded: patients and slides to leave out, see `dinov2.data.patients.names_of`.
        validation_fraction: of patients to keep for validation, see `in_validation`.
        excluded_sites: sites to leave out, where the source tells them.
        slide_fraction: of the other slides that to train on, see `is_used`.
    """
    logger.info("looking up the slides of %d row groups of dataset '%s'", len(source.group_rows), dataset)
    fates = Fates(excluded, validation_fraction, excluded_sites, slide_fraction, seed)
    group_fate, mixed = _look_up(source, fates)
    counts, subsets = {}, {}
    for fate in Fate:
        origins = [origin for origin, of_origin in fates.items() if of_origin == fate]
        slides, patients = {origin.slide for origin in origins}, {patient_of(*origin[:2]) for origin in origins}
        rows = {group: np.flatnonzero(of_rows == fate) for group, of_rows in mixed.items()}
        total = int(source.group_rows[group_fate == fate].sum()) + sum(map(len, rows.values()))
        counts[fate] = Count(len(slides), len(patients), total)
        if fate in (Fate.TRAINING, Fate.VALIDATION) and total:
            is_all = total == source.num_rows
            subsets[fate] = source if is_all else SubsetSource(source, group_fate == fate, rows)
    if Fate.TRAINING not in subsets:
        raise ValueError(
            f"of the {source.num_rows:,} rows of dataset '{dataset}' {counts[Fate.EXCLUDED].rows:,} are excluded "
            f"and {counts[Fate.VALIDATION].rows:,} are kept for validation"
            + (f", and data.slide_fraction leaves out {unused:,}" if (unused := counts[Fate.UNUSED].rows) else "")
            + "; at least 1 must be left to train on"
        )
    return PatientSplit(
        training=subsets[Fate.TRAINING],
        validation=subsets.get(Fate.VALIDATION),
        counts=counts,
        unmatched=frozenset(fates.lines.values()) - fates.matched,
        unnamed=any(not origin.slide and not origin.patient for origin in fates),
        sites=frozenset(origin.site for origin in fates),
    )


def describe_splits(
    splits: Sequence[PatientSplit],
    datasets: Sequence[str],
    excluded: Sequence[str],
    excluded_sites: Sequence[str] = (),
) -> list[str]:
    """Tell the user what was set aside, a line per dataset, and what to exclude matched nothing anywhere."""
    lines = [
        f"dataset '{name}': training on {split.counts[Fate.TRAINING]}; "
        f"excluded {split.counts[Fate.EXCLUDED]}; kept for validation {split.counts[Fate.VALIDATION]}"
        + (f"; left out by data.slide_fraction {split.counts[Fate.UNUSED]}" if split.counts[Fate.UNUSED].rows else "")
        + ("; rows that name no slide cannot be excluded" if split.unnamed else "")
        + ("; rows that tell no site are excluded by none" if excluded_sites and "" in split.sites else "")
        for split, name in zip(splits, datasets, strict=True)
    ]
    unmatched = frozenset.intersection(*(split.unmatched for split in splits))
    sites = frozenset.union(*(split.sites for split in splits))
    for names, nowhere, what in (
        (excluded, [name for name in excluded if name in unmatched], "names to exclude match no slide"),
        (excluded_sites, [name for name in excluded_sites if name not in sites], "sites to exclude match no row"),
    ):
        if nowhere:
            more = ", ..." if len(nowhere) > _NAMED else ""
            lines.append(f"{len(nowhere)} of {len(names)} {what}: {', '.join(nowhere[:_NAMED])}{more}")
    return lines


class Fates(dict[Origin, int]):
    """Fate of each origin, found when first asked for; threads that ask at once find the same."""

    def __init__(
        self, excluded: Sequence[str], validation_fraction: float, excluded_sites: Sequence[str] = (),
        slide_fraction: float = 1.0, seed: int = 0,
    ) -> None:  # fmt: skip
        in_validation("", validation_fraction)  # refuses a wrong one before any slide is read
        self.lines = {comparable(name): name for name in excluded}
        self.matched: set[str] = set()
        self._fraction = validation_fraction
        self._sites = frozenset(excluded_sites) - {""}  # which is of rows that tell none
        self._used = slide_fraction, seed

    def __missing__(self, origin: Origin) -> int:
        hits = [self.lines[name] for name in names_of(origin.slide, origin.patient) if name in self.lines]
        self.matched.update(hits)
        held_out = in_validation(patient_of(origin.slide, origin.patient), self._fraction)
        excluded = hits or origin.site in self._sites
        # Validation comes first, so that it is the same for every fraction of the slides.
        fate = Fate.EXCLUDED if excluded else Fate.VALIDATION if held_out else Fate.TRAINING
        if fate == Fate.TRAINING and not is_used(origin.slide, *self._used):
            fate = Fate.UNUSED
        self[origin] = int(fate)
        return self[origin]


def _look_up(source: Source, fates: Fates) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Find the fate of every row group, uint8 (G,), and of every row of those row groups that hold several fates."""
    total = len(source.group_rows)
    step = max(1, min(_CHUNK, total // (4 * _THREADS)))
    group_fate, mixed = np.zeros(total, np.uint8), {}

    def look_up(start: int) -> None:
        for group in range(start, min(start + step, total)):
            origins = origins_of(source, group)
            is_one = origins.count(origins[0]) == len(origins) if origins else True  # spares the hashes of all
            found = {fates[origin] for origin in (origins[:1] if is_one else set(origins))}
            if len(found) == 1:
                (group_fate[group],) = found
            elif found:
                group_fate[group] = _MIXED
                mixed[group] = np.fromiter(map(fates.__getitem__, origins), np.uint8, len(origins))

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(look_up, range(0, total, step)):  # which cancels the rest where one fails
            pass
    return group_fate, mixed

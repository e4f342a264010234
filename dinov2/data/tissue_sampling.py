"""Random patches of tissue from one slide.

A coarse tissue map proposes positions and the patch itself, at full resolution, decides. Which patches a
slide gives depends on the seed and its key, not on other slides or on the number of processes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from dinov2.data.slide_reader import SlideError, SlideReader, SlideReadError
from dinov2.data.tissue import TissueMap, TissueRule

DRAWS_PER_ROUND, MAX_ROUNDS = 4096, 50
MAX_CHECKS_PER_PATCH = 20  # a map that is wrong more often than that is not worth following
MAX_UNREADABLE = 16  # patches per slide that may fail to decode before the slide is given up


@dataclass(frozen=True)
class Sampling:
    """What is drawn from every slide.

    Attributes:
        rule: what a patch must show.
        seed: of all draws.
        levels: pyramid levels to draw from; None takes all that a slide has.
        per_level: patches per slide and level.
        per_slide: patches per slide over all levels, shared out evenly; None sets no limit.
        tile_size: side of a patch in px of its level.
    """

    rule: TissueRule
    seed: int
    levels: tuple[int, ...] | None
    per_level: int
    per_slide: int | None
    tile_size: int

    def quotas(self, num_levels: int) -> dict[int, int]:
        """Patches wanted from each level of a slide that has `num_levels` of them."""
        levels = [level for level in self.levels or range(num_levels) if level < num_levels]
        if self.per_slide is None:
            return dict.fromkeys(levels, self.per_level)
        share, rest = divmod(self.per_slide, max(1, len(levels)))
        return {level: min(self.per_level, share + (i < rest)) for i, level in enumerate(levels)}


@dataclass(frozen=True)
class SlideJob:
    """One slide to draw from: its path, the name that keys its draws, and what to draw."""

    path: str
    key: str
    sampling: Sampling


@dataclass
class SlideDraw:
    """What a slide gave: int32 (N, 3) rows of x, y, level; or why it gave nothing."""

    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int32))
    failure: str = ""


def draw_from_slide(job: SlideJob) -> SlideDraw:
    """Draw the patches of one slide; a slide that cannot give any says why instead of raising."""
    if "\n" in job.path or "\r" in job.path:
        return SlideDraw(failure="its path holds a line break, which a sample list cannot express")
    sampling = job.sampling
    try:
        reader = SlideReader(job.path)
        quotas = sampling.quotas(len(reader.level_dimensions))
        if not quotas:
            return SlideDraw(failure=f"it has levels 0 to {len(reader.level_dimensions) - 1} only")
        rows = _draw_levels(reader, quotas, job)
    except SlideError as error:
        return SlideDraw(failure=error.detail)
    except OSError as error:
        return SlideDraw(failure=str(error))
    return SlideDraw(rows, "" if len(rows) else "no patch passed the tissue rule")


def _draw_levels(reader: SlideReader, quotas: dict[int, int], job: SlideJob) -> np.ndarray:
    tissue, unreadable, rows = TissueMap(reader, job.sampling.rule), [], []
    for level, quota in quotas.items():
        words = f"{job.sampling.seed} {level} {job.key}".encode(errors="surrogateescape")
        digest = hashlib.blake2b(words, digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        proposals = _proposals(reader, tissue, level, job.sampling, rng)
        places = _accepted(reader, proposals, level, quota, job.sampling, unreadable)
        rows += [(*reader.origin(level, *place), level) for place in places]
    return np.array(rows, np.int32).reshape(-1, 3)


def _proposals(
    reader: SlideReader, tissue: TissueMap, level: int, sampling: Sampling, rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Distinct (column, row) places of patches that lie on the level and show tissue on the map."""
    size, downsample = sampling.tile_size, reader.level_downsamples[level]
    columns, rows = (side - size + 1 for side in reader.level_dimensions[level])
    if columns < 1 or rows < 1:
        return
    seen: set[tuple[int, int]] = set()
    for _ in range(MAX_ROUNDS):
        column, row = rng.integers(0, columns, DRAWS_PER_ROUND), rng.integers(0, rows, DRAWS_PER_ROUND)
        shares = tissue.fraction(column * downsample, row * downsample, size * downsample)
        likely = shares > sampling.rule.min_fraction
        for place in zip(column[likely].tolist(), row[likely].tolist(), strict=True):
            if place not in seen:
                seen.add(place)
                yield place


def _accepted(
    reader: SlideReader,
    proposals: Iterator[tuple[int, int]],
    level: int,
    quota: int,
    sampling: Sampling,
    unreadable: list[SlideReadError],
) -> list[tuple[int, int]]:
    """The first `quota` proposals whose pixels pass the rule; `unreadable` collects those that have none."""
    proposals = islice(proposals, quota * MAX_CHECKS_PER_PATCH)
    size, accepted = sampling.tile_size, []
    while len(accepted) < quota:
        batch = list(islice(proposals, (quota - len(accepted)) * 5 // 4 + 8))
        if not batch:
            break
        passed = set()
        by_tile = sorted(batch, key=lambda place: (place[1] // 256, place[0]))  # neighbours share tiles
        for column, row in by_tile:
            try:
                if sampling.rule.accepts(reader.read_region(level, column, row, size, size)):
                    passed.add((column, row))
            except SlideReadError as error:
                unreadable.append(error)
                if len(unreadable) > MAX_UNREADABLE:
                    raise
        accepted += [place for place in batch if place in passed]
    return accepted[:quota]

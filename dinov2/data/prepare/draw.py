"""Random tiles of tissue from one slide.

A coarse tissue map proposes positions and the tile itself, as training will see it, decides. Which tiles a
slide gives depends on the seed and its key, not on other slides or on the number of processes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from dinov2.data.slides.coarse import Box
from dinov2.data.slides.errors import SlideError, SlideRangeError, SlideReadError
from dinov2.data.slides.reader import SlideReader, too_small
from dinov2.data.slides.resolution import MPP_TOLERANCE
from dinov2.data.slides.tissue import TissueMap, TissueRule

DRAWS_PER_ROUND, MAX_ROUNDS = 4096, 50
MAX_CHECKS_PER_TILE = 20  # a map that is wrong more often than that is not worth following
MAX_UNREADABLE = 16  # tiles per slide that may fail to decode before the slide is given up
BLOCK_PX = 256  # of most slides; only the order of reading depends on it, in which neighbours share blocks


class Target(NamedTuple):
    """Source of one kind of tile: a level, the side in px of it, and the mpp made of it (0 keeps its own)."""

    level: int
    side: int
    mpp: float


@dataclass(frozen=True)
class Sampling:
    """Options of what is drawn from every slide."""

    rule: TissueRule  # what a tile must show
    seed: int  # of all draws
    levels: tuple[int, ...] | None  # pyramid levels to draw from; None takes all that a slide has
    per_target: int  # tiles per slide and level, or per slide and mpp
    per_slide: int | None  # tiles per slide over all targets, divided evenly; None sets no limit
    tile_size: int  # side of a finished tile in px
    mpps: tuple[float, ...] = ()  # um per px of the tiles, each read from the level that serves it; () draws by level
    mpp_tolerance: float = MPP_TOLERANCE  # fraction by which a slide may be coarser than these

    def targets(self, reader: SlideReader) -> tuple[list[Target], dict[float, str]]:
        """Targets that a slide can give, and why it cannot give the other mpp."""
        if not self.mpps:
            num_levels = len(reader.level_dimensions)
            levels = [level for level in self.levels or range(num_levels) if level < num_levels]
            return [Target(level, self.tile_size, 0.0) for level in levels], {}
        targets, skipped = [], {}
        for mpp in self.mpps:
            try:
                level = reader.level_for(mpp)
            except SlideRangeError as error:
                skipped[mpp] = error.detail
                continue
            side = round(reader.tile_side(self.tile_size, mpp) / reader.level_downsamples[level])
            targets.append(Target(level, side, float(np.float32(mpp))))  # as readers of the list hold it
        return targets, skipped

    def quotas(self, num_targets: int) -> list[int]:
        """Tiles wanted from each of a slide's targets."""
        if self.per_slide is None:
            return [self.per_target] * num_targets
        each, rest = divmod(self.per_slide, max(1, num_targets))
        return [min(self.per_target, each + (i < rest)) for i in range(num_targets)]


@dataclass(frozen=True)
class SlideJob:
    """One slide to draw from: its path, the name that keys its draws, what to draw, and its mpp if a user gave one."""

    path: str
    key: str
    sampling: Sampling
    mpp: float | None = None


@dataclass
class SlideDraw:
    """Tiles that a slide gave."""

    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int32))  # (N, 3) rows of x, y, level
    mpp: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # (N,), um per px; 0 keeps the level's own
    failure: str = ""  # why it gave nothing
    is_read: bool = True  # whether the slide could be read to the end, so that drawing again would change nothing
    skipped: dict[float, str] = field(default_factory=dict)  # mpp that it cannot give, with the reason
    given_mpp: float | None = None  # the mpp of the job, if there was one
    level0_mpp: float | None = None  # um per level-0 px
    notes: tuple[str, ...] = ()  # what a user should know of the slide's resolution
    preview_failure: str = ""  # why its preview is missing
    doubt: str = ""  # why the tissue rule may be wrong for it


def draw_from_slide(job: SlideJob) -> SlideDraw:
    """Draw the tiles of one slide; a slide that cannot give any says why instead of raising."""
    if "\n" in job.path or "\r" in job.path:
        return SlideDraw(failure="its path holds a line break, which a sample list cannot express", is_read=False)
    try:
        reader = SlideReader(job.path, job.mpp, mpp_tolerance=job.sampling.mpp_tolerance)
        targets, skipped = job.sampling.targets(reader)
        if not targets:
            reasons = dict.fromkeys(skipped.values())  # one for all where the mpp is unknown
            none = f"it has levels 0 to {len(reader.level_dimensions) - 1} only"
            return SlideDraw(failure="; ".join(reasons) or none, is_read=False)
        tissue, unreadable, corners = TissueMap(reader, job.sampling.rule), [], {}
        quotas = dict(zip(targets, job.sampling.quotas(len(targets)), strict=True))
        for target, quota in quotas.items():
            proposals = islice(_proposals(reader, tissue, target, job), quota * MAX_CHECKS_PER_TILE)
            accepted = _accepted(reader, proposals, target, quota, job.sampling, tissue.rule, unreadable)
            corners[target] = [reader.origin(target.level, *pixel) for pixel in accepted]  # level-0 x, y
    except (SlideError, OSError) as error:
        return SlideDraw(failure=getattr(error, "detail", str(error)), is_read=False)
    nothing = {
        target: _why_none(reader, target, job.sampling, quota)
        for target, quota in quotas.items()
        if not corners[target]
    }
    skipped |= {float(f"{target.mpp:g}"): reason for target, reason in nothing.items() if target.mpp}
    rows = [(*corner, target.level) for target, found in corners.items() for corner in found]
    mpp = [target.mpp for target, found in corners.items() for _ in found]
    if not rows:
        return SlideDraw(failure="; ".join(dict.fromkeys(nothing.values())), doubt=tissue.doubt)
    notes = (*reader.resolution.notes, *(note for target in corners if (note := reader.resampling(target.mpp))))
    drawn = np.array(rows, np.int32), np.array(mpp, np.float32)
    return SlideDraw(*drawn, "", True, skipped, job.mpp, reader.mpp, notes, doubt=tissue.doubt)


def _why_none(reader: SlideReader, target: Target, sampling: Sampling, quota: int) -> str:
    """Why a target of a slide has given no tile."""
    if not quota:
        return f"no tile was asked for, since {sampling.per_slide} of the slide are wanted in all"
    size = reader.level_dimensions[target.level]
    if reason := too_small(target.level, size, target.side, sampling.tile_size, target.mpp):
        return reason
    return f"no tile passed the tissue rule '{sampling.rule.name}' with more than {sampling.rule.min_fraction:.0%}"


def _proposals(reader: SlideReader, tissue: TissueMap, target: Target, job: SlideJob) -> Iterator[tuple[int, int]]:
    """Distinct (column, row) corners of tiles that lie on the level and show tissue on the map."""
    name = f"{target.mpp:g} um" if target.mpp else str(target.level)
    words = f"{job.sampling.seed} {name} {job.key}".encode(errors="surrogateescape")
    digest = hashlib.blake2b(words, digest_size=16).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    size, downsample = target.side, reader.level_downsamples[target.level]
    columns, rows = (side - size + 1 for side in reader.level_dimensions[target.level])
    if columns < 1 or rows < 1:
        return
    seen: set[tuple[int, int]] = set()
    for _ in range(MAX_ROUNDS):
        column, row = rng.integers(0, columns, DRAWS_PER_ROUND), rng.integers(0, rows, DRAWS_PER_ROUND)
        fractions = tissue.fraction(column * downsample, row * downsample, size * downsample)
        likely = fractions > job.sampling.rule.min_fraction
        for pixel in zip(column[likely].tolist(), row[likely].tolist(), strict=True):
            if pixel not in seen:
                seen.add(pixel)
                yield pixel


def _accepted(
    reader: SlideReader, proposals: Iterator[tuple[int, int]], target: Target, quota: int, sampling: Sampling,
    rule: TissueRule, unreadable: list[SlideReadError],
) -> list[tuple[int, int]]:  # fmt: skip
    """The first `quota` proposals whose pixels pass the rule; `unreadable` collects those that have none."""
    accepted: list[tuple[int, int]] = []
    side = target.side * reader.level_downsamples[target.level]
    while len(accepted) < quota:
        batch = list(islice(proposals, (quota - len(accepted)) * 5 // 4 + 8))
        if not batch:
            break
        passed = set()
        for pixel in sorted(batch, key=lambda pixel: (pixel[1] // BLOCK_PX, pixel[0])):
            try:
                corner = reader.origin(target.level, *pixel)
                if target.mpp:
                    tile = reader.read_tile(*corner, sampling.tile_size, target.mpp)
                else:
                    tile = reader.read_region(target.level, *pixel, sampling.tile_size, sampling.tile_size)
                if rule.accepts(tile, Box(*corner, side, side)):
                    passed.add(pixel)
            except SlideReadError as error:
                unreadable.append(error)
                if len(unreadable) > MAX_UNREADABLE:
                    raise
        accepted += [pixel for pixel in batch if pixel in passed]
    return accepted[:quota]

"""Patches drawn while training, at any place and resolution of a set of slides."""

import hashlib
import json
import logging
import os
import struct
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from dinov2.data.online.positions import Geometry
from dinov2.data.online.prepare import Dropped, OnlineSlide, PatchOptions, load_plan, prepare_slide
from dinov2.data.slides.blocks import Region, assemble, ranges
from dinov2.data.slides.errors import SlideError
from dinov2.data.slides.find import SlideRow
from dinov2.data.slides.ranges import SlideBytes, is_remote
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tissue import CELL_RULE, TissueCache
from dinov2.data.source import DecodeError, EncodedSample
from dinov2.data.storage.base import public_name
from dinov2.data.stream.order import Locations, SampleOrder
from dinov2.utils.jobs import run_jobs
from dinov2.utils.seeding import hash_words, sample_rng

logger = logging.getLogger(__name__)

UNIT_PATCHES = 64
ENDLESS_UNITS = 1 << 24  # 2^30 patches; only then do they come round again
_STREAM = 1 << 33  # of the draws of a patch; others of the same key belong to augmentation and masks
_PLANS_KEPT = 256  # slides whose mask and tile index a process keeps, 1 to 3 MB each
_OPEN_SLIDES = 64
_MAX_UNREADABLE = 0.05  # fraction of the slides that may be left out because they cannot be read
_REQUESTS = 16  # slides on servers that one unit asks at a time
_HEADER = struct.Struct("<IIiiI")  # slide, geometry, column, row, number of tiles; the tiles' lengths follow


class Patch(NamedTuple):
    """One drawn patch: numbers of its slide and geometry, and its upper left corner in px of the level read."""

    slide: int
    geometry: int
    column: int
    row: int


class OnlineOrder:
    """As `SampleOrder`, but patch by patch: sample g is row g % 64 of unit g // 64; after `units` the first is next."""

    lanes, block_rows = 1, UNIT_PATCHES  # patch follows patch; a process holds those that it has looked ahead to

    def __init__(self, seed: int, units: int = ENDLESS_UNITS) -> None:
        self.seed, self.num_rows = seed, units * UNIT_PATCHES
        self.parts = [(0, self)]  # first unit and order of each dataset: this one alone
        self.parameters = {"seed": seed, "lanes": self.lanes, "block_rows": self.block_rows}

    def locate(self, indices: np.ndarray) -> Locations:
        """Find global sample indices, int64 (n,), in any order."""
        epoch, patch = np.divmod(np.asarray(indices, np.int64), self.num_rows)
        unit, row = np.divmod(patch, UNIT_PATCHES)
        return Locations(epoch, unit, np.zeros_like(unit), row)

    def members(self, epoch: int, unit: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Global sample indices of a unit, and the rows they stand for, int64 (64,) each; there is one chunk only."""
        rows = np.arange(0 if chunk else UNIT_PATCHES)
        return epoch * self.num_rows + unit * UNIT_PATCHES + rows, rows


class OnlinePatchSource:
    """Patches drawn at random from slides; patch p is a pure function of the seed, p and the slides.

    Row r of unit u is patch p = 64 u + r. It is drawn from Philox keyed (seed, p): a slide by weight; one of the
    resolutions *that this slide can give*, by weight, which is the same as drawing one of all and, where the slide
    cannot give it, drawing again; and a place, uniform as `dinov2.data.online.positions` defines it. The square is
    read from the coarsest level that is fine enough and resized to `tile_size`.

    The first M patches of an endless source are the patches of a source with `max_patches` M. The order of the slides
    does not matter. ValueError if too many slides cannot be read, or none gives patches.

    Args:
        seed: of the draws, in [0, 2^64).
        slide_share: fraction of the slides to use, see `take_fraction`.
        max_patches: number of distinct patches; 0 draws without end (2^30).
    """

    def __init__(
        self, rows: Sequence[SlideRow], cache_folder: str | Path, *, options: PatchOptions, seed: int,
        slide_share: float = 1.0, max_patches: int = 0, workers: int = 1,
    ) -> None:  # fmt: skip
        self._options, self._seed = options, seed
        kept = take_fraction(sorted(rows), slide_share, seed)
        prepare = partial(prepare_slide, TissueCache(cache_folder), options)
        made = [result for _, result in sorted(run_jobs(prepare, kept, workers, "slide"), key=itemgetter(0))]
        self.slide_list = [result for result in made if isinstance(result, OnlineSlide)]
        self.dropped = [result for result in made if isinstance(result, Dropped)]
        _check_dropped(self.dropped, len(kept))
        self.is_remote = any(is_remote(slide.path) for slide in self.slide_list)
        self.num_rows = max_patches or ENDLESS_UNITS * UNIT_PATCHES
        weights = [slide.weight for slide in self.slide_list]
        self._slide_ends = np.cumsum(weights)
        self._mpp_ends = [np.cumsum(slide.weights) for slide in self.slide_list]
        per_patch = np.average([slide.patch_bytes for slide in self.slide_list], weights=weights)
        self._patch_bytes = int(per_patch) + 2 * _HEADER.size
        used = [[Path(s.path).name, s.size, s.weight, s.key, s.counts] for s in self.slide_list]
        dropped = [Path(slide.path).name for slide in self.dropped]
        state = [repr(options), repr(CELL_RULE), seed, max_patches, used, dropped]
        self.fingerprint = hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
        self.is_endless = max_patches == 0
        drawn = "patches without end" if self.is_endless else f"{self.num_rows:,} patches"
        self.summary = f"{drawn} from {len(self.slide_list)} slides; {len(self.dropped)} slides are left out"
        self._make_units()

    def order(self, seed: int, lanes: int, block_rows: int) -> OnlineOrder | SampleOrder:
        """Patch after patch without end; with `max_patches`, each of them once per epoch, shuffled."""
        if self.is_endless:
            return OnlineOrder(seed)
        return SampleOrder(self.unit_rows, seed=seed, lanes=lanes, block_rows=block_rows)

    def draw(self, number: int) -> Patch:
        """Draw slide, resolution and place of a patch from ``(seed, number)``."""
        rng = sample_rng(self._seed, number, _STREAM)
        by_slide, by_mpp = rng.random(2)
        slide = _pick(self._slide_ends, by_slide)
        geometry = _pick(self._mpp_ends[slide], by_mpp)
        plan = self._plan(slide)
        positions = plan.positions[geometry]
        return Patch(slide, geometry, *positions.position(plan.mask, int(rng.integers(len(positions)))))

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Draw patches and fetch their tiles, all of a slide at a time: its name, and a header with the tiles."""
        patches = [self.draw(unit * UNIT_PATCHES + int(row)) for row in rows]
        of_slide: dict[int, list[int]] = {}
        for number, patch in enumerate(patches):
            of_slide.setdefault(patch.slide, []).append(number)
        fetch = partial(self._fetch, patches)
        if self.is_remote and len(of_slide) > 1:
            with ThreadPoolExecutor(min(_REQUESTS, len(of_slide))) as pool:
                fetched = list(pool.map(fetch, of_slide.values()))
        else:
            fetched = list(map(fetch, of_slide.values()))
        data = {number: item for items in fetched for number, item in items}
        return [(self._name(patch.slide), data[number]) for number, patch in enumerate(patches)]

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Put a patch together: uint8 (tile_size, tile_size, 3) RGB; DecodeError if a tile is missing or corrupt."""
        number, which, column, row, count = _HEADER.unpack_from(sample.data)
        slide, size = self.slide_list[number], self._options.tile_size
        geometry = slide.geometries[which]
        region = Region(geometry.level, column, row, geometry.side, geometry.side)
        try:
            if slide.tiles is None:
                pixels = self._open(slide.path).read_region(*region)
            else:
                lengths = struct.unpack_from(f"<{count}I", sample.data, _HEADER.size)
                ends = accumulate(lengths, initial=_HEADER.size + 4 * count)
                tiles = [sample.data[start:end] for start, end in pairwise(ends)]
                pixels = assemble(slide.tiles, region, tiles)
        except SlideError as error:
            raise DecodeError(str(error)) from error
        return pixels if geometry.side == size else cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)

    def describe(self, unit: int, row: int | None = None) -> str:
        """Name a unit, or one of its patches, for a message to the user."""
        first = unit * UNIT_PATCHES
        if row is None:
            return f"patches {first} to {first + UNIT_PATCHES - 1} drawn from {len(self.slide_list)} slides"
        slide, which, column, line = self.draw(first + row)
        g: Geometry = self.slide_list[slide].geometries[which]
        x, y = round(column * g.downsample), round(line * g.downsample)
        return f"patch {first + row}, slide '{self._name(slide)}' at x {x}, y {y}, level {g.level}, {g.mpp:g} um/px"

    def slides(self, unit: int) -> list[str]:
        """Name the slide of every patch of a unit."""
        first = unit * UNIT_PATCHES
        rngs = (sample_rng(self._seed, first + row, _STREAM) for row in range(int(self.unit_rows[unit])))
        return [self._name(_pick(self._slide_ends, rng.random(2)[0])) for rng in rngs]

    def _fetch(self, patches: Sequence[Patch], numbers: Sequence[int]) -> list[tuple[int, bytes]]:
        """Read the tiles of patches of one slide in one go; gives each patch's number and what `decode` takes."""
        slide = patches[numbers[0]].slide
        index, wanted = self._plan(slide).index, []
        for patch in (patches[number] for number in numbers):
            g = self.slide_list[slide].geometries[patch.geometry]
            region = Region(g.level, patch.column, patch.row, g.side, g.side)
            wanted.append([] if index is None else ranges(index, region))
        tiles = iter(SlideBytes(self.slide_list[slide].path).read([item for items in wanted for item in items]))
        packed = []
        for number, items in zip(numbers, wanted, strict=True):
            own = [next(tiles) for _ in items]
            lengths = struct.pack(f"<{len(own)}I", *map(len, own))
            packed.append((number, b"".join((_HEADER.pack(*patches[number], len(own)), lengths, *own))))
        return packed

    def _name(self, slide: int) -> str:
        return public_name(self.slide_list[slide].path)

    def _make_units(self) -> None:
        """Rows and bytes of units, and what a process keeps open; none of it travels between processes."""
        units = -(-self.num_rows // UNIT_PATCHES)
        self.unit_rows = np.broadcast_to(np.int64(UNIT_PATCHES), units)  # takes no memory
        if not self.is_endless:
            self.unit_rows = np.minimum(UNIT_PATCHES, self.num_rows - UNIT_PATCHES * np.arange(units))
        self.unit_bytes = np.broadcast_to(np.int64(UNIT_PATCHES * self._patch_bytes), units)
        least = self._options.min_foreground
        self._plan = lru_cache(_PLANS_KEPT)(lambda slide: load_plan(self.slide_list[slide], least))
        self._open = lru_cache(_OPEN_SLIDES)(SlideReader)

    def __getstate__(self) -> dict[str, Any]:
        made = ("unit_rows", "unit_bytes", "_plan", "_open")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_units()


def take_fraction(rows: list[SlideRow], fraction: float, seed: int) -> list[SlideRow]:
    """Take a fraction in (0, 1] of the slides, at least one, by a hash of the seed and each slide's file name.

    The slides of a smaller fraction are among those of a larger one, wherever the folder lies.
    """

    def key(number: int) -> tuple[int, str]:
        name = os.path.basename(rows[number].path).encode(errors="surrogateescape")
        return int(hash_words(seed, len(name), *name)[0]), rows[number].path

    chosen = sorted(range(len(rows)), key=key)[: max(1, round(fraction * len(rows)))]
    return [rows[number] for number in sorted(chosen)]


def _pick(ends: np.ndarray, uniform: float) -> int:
    return min(int(np.searchsorted(ends, uniform * ends[-1], side="right")), len(ends) - 1)


def _check_dropped(dropped: Sequence[Dropped], slides: int) -> None:
    for slide in dropped:
        logger.warning("slide '%s' is left out: %s", slide.path, slide.reason)
    unreadable = [slide for slide in dropped if slide.unreadable]
    if len(unreadable) > _MAX_UNREADABLE * slides:
        found = f"{len(unreadable)} of {slides} slides cannot be read, where {_MAX_UNREADABLE:.1%} may be left out"
        raise ValueError(f"{found}; the first is '{unreadable[0].path}': {unreadable[0].reason}.")
    if len(dropped) == slides:
        reasons = Counter(slide.reason for slide in dropped).most_common(3)
        causes = "; ".join(f"{count} because {reason}" for reason, count in reasons)
        raise ValueError(f"None of {slides} slides gives patches: {causes}.")

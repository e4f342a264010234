"""Tiles drawn while training, at any position and resolution of a set of slides."""

import hashlib
import json
import logging
import os
import pickle
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.online.positions import Geometry
from dinov2.data.online.prepare import Dropped, OnlineSlide, TileOptions, load_plan, prepare_slide
from dinov2.data.slides.blocks import Region, assemble, ranges
from dinov2.data.slides.errors import SlideError
from dinov2.data.slides.find import SlideRow
from dinov2.data.slides.ranges import SlideBytes, is_remote
from dinov2.data.slides.reader import SlideReader, resized
from dinov2.data.slides.resolution import log_notes
from dinov2.data.slides.tissue import CELL_RULE, TissueCache, TissueRule, log_doubts
from dinov2.data.source import DecodeError, EncodedSample
from dinov2.data.storage.base import public_name
from dinov2.data.stream.order import Locations, SampleOrder
from dinov2.utils.jobs import run_jobs
from dinov2.utils.seeding import hash_words, sample_rng

logger = logging.getLogger(__name__)

GROUP_TILES = 64
ENDLESS_GROUPS = 1 << 24  # 2^30 tiles; only then do they come round again
_STREAM = 1 << 33  # of the draws of a tile; others of the same key belong to augmentation and masks
_PLANS_KEPT = 256  # slides whose mask and tile index a process keeps, 1 to 3 MB each
_OPEN_SLIDES = 64
_MAX_UNREADABLE = 0.05  # fraction of the slides that may be left out because they cannot be read
_REQUESTS = 16  # slides on servers that one row group asks at a time
_PICKLED_BYTES = 256  # that a tile takes beside its blocks on the way from reader to decoder, at most


class Tile(NamedTuple):
    """One drawn tile: numbers of its slide and geometry, and its upper left corner in px of the level read."""

    slide: int
    geometry: int
    column: int
    row: int


class OnlineOrder:
    """As `SampleOrder`, but tile by tile: sample g is row g % 64 of row group g // 64; the first follows the last."""

    lanes, block_rows = 1, GROUP_TILES  # tile follows tile; a process holds those that it has looked ahead to

    def __init__(self, seed: int, groups: int = ENDLESS_GROUPS) -> None:
        self.seed, self.num_rows = seed, groups * GROUP_TILES
        self.parts = [(0, self)]  # first row group and order of each dataset: this one alone
        self.parameters = {"seed": seed, "lanes": self.lanes, "block_rows": self.block_rows}

    def locate(self, indices: np.ndarray) -> Locations:
        """Find global sample indices, int64 (n,), in any order."""
        epoch, tile = np.divmod(np.asarray(indices, np.int64), self.num_rows)
        group, row = np.divmod(tile, GROUP_TILES)
        return Locations(epoch, group, np.zeros_like(group), row)

    def members(self, epoch: int, group: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Global sample indices of a row group, which is one chunk, and the rows they stand for, int64 (64,) each."""
        rows = np.arange(0 if chunk else GROUP_TILES)
        return epoch * self.num_rows + group * GROUP_TILES + rows, rows


class OnlineTileSource:
    """Tiles drawn at random from slides; tile p is a pure function of the seed, p and the slides.

    Row r of row group u is tile p = 64 u + r. It is drawn from Philox keyed (seed, p): a slide by weight; one of the
    resolutions *that this slide can give*, by weight, which is the same as drawing one of all and, where the slide
    cannot give it, drawing again; and a position, uniform as `dinov2.data.online.positions` defines it. The square is
    read from the coarsest level that is fine enough and resized to `tile_size`.

    The first M tiles of an endless source are the tiles of a source with `max_tiles` M. The order of the slides
    does not matter. ValueError if too many slides cannot be read, or none gives tiles.

    Args:
        seed: of the draws, in [0, 2^64).
        slide_fraction: fraction of the slides to use, see `take_fraction`.
        max_tiles: number of distinct tiles; 0 draws without end (2^30).
        rule: of the tissue; `min_fraction` is that of a cell.
    """

    def __init__(
        self, rows: Sequence[SlideRow], cache_folder: str | Path, *, options: TileOptions, seed: int,
        slide_fraction: float = 1.0, max_tiles: int = 0, workers: int = 1, rule: TissueRule = CELL_RULE,
    ) -> None:  # fmt: skip
        self._options, self._seed = options, seed
        kept = take_fraction(sorted(rows), slide_fraction, seed)
        prepare = partial(prepare_slide, TissueCache(cache_folder, rule), options)
        made = [result for _, result in sorted(run_jobs(prepare, kept, workers, "slide"), key=itemgetter(0))]
        self.slide_list = [result for result in made if isinstance(result, OnlineSlide)]
        self.dropped = [result for result in made if isinstance(result, Dropped)]
        log_doubts([(slide.path, slide.doubt) for slide in made])
        _check_dropped(self.dropped, len(kept))
        log_notes(logger, ((slide.path, slide.mpp_notes) for slide in self.slide_list))
        self.is_remote = any(is_remote(slide.path) for slide in self.slide_list)
        self.num_rows = max_tiles or ENDLESS_GROUPS * GROUP_TILES
        weights = [slide.weight for slide in self.slide_list]
        self._slide_ends = np.cumsum(weights)
        self._mpp_ends = [np.cumsum(slide.weights) for slide in self.slide_list]
        per_tile = np.average([slide.tile_bytes for slide in self.slide_list], weights=weights)
        self._tile_bytes = int(per_tile) + _PICKLED_BYTES
        used = [[Path(s.path).name, s.size, s.weight, s.key, s.counts] for s in self.slide_list]
        dropped = [Path(slide.path).name for slide in self.dropped]
        # Under the name that the options had when the runs began that are to be resumed.
        named = repr(options).replace(TileOptions.__name__, "PatchOptions")
        state = [named, repr(rule), seed, max_tiles, used, dropped]
        self.fingerprint = hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
        self.is_endless = max_tiles == 0
        drawn = "tiles without end" if self.is_endless else f"{self.num_rows:,} tiles"
        self.summary = f"{drawn} from {len(self.slide_list)} slides; {len(self.dropped)} slides are left out"
        self._make_groups()

    def order(self, seed: int, lanes: int, block_rows: int) -> OnlineOrder | SampleOrder:
        """Tile after tile without end; with `max_tiles`, each of them once per epoch, shuffled."""
        if self.is_endless:
            return OnlineOrder(seed)
        return SampleOrder(self.group_rows, seed=seed, lanes=lanes, block_rows=block_rows)

    def draw(self, number: int) -> Tile:
        """Draw slide, resolution and position of a tile from ``(seed, number)``."""
        rng = sample_rng(self._seed, number, _STREAM)
        by_slide, by_mpp = rng.random(2)
        slide = _pick(self._slide_ends, by_slide)
        geometry = _pick(self._mpp_ends[slide], by_mpp)
        plan = self._plan(slide)
        positions = plan.positions[geometry]
        return Tile(slide, geometry, *positions.position(plan.mask, int(rng.integers(len(positions)))))

    def read(self, group: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Draw tiles and fetch their blocks, all of a slide at a time: its name, and the pickled tile and blocks."""
        tiles = [self.draw(group * GROUP_TILES + int(row)) for row in rows]
        of_slide: dict[int, list[int]] = {}
        for number, tile in enumerate(tiles):
            of_slide.setdefault(tile.slide, []).append(number)
        fetch = partial(self._fetch, tiles)
        if self.is_remote and len(of_slide) > 1:
            with ThreadPoolExecutor(min(_REQUESTS, len(of_slide))) as pool:
                fetched = list(pool.map(fetch, of_slide.values()))
        else:
            fetched = list(map(fetch, of_slide.values()))
        data = {number: item for items in fetched for number, item in items}
        return [(self._name(tile.slide), data[number]) for number, tile in enumerate(tiles)]

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Put a tile together: uint8 (tile_size, tile_size, 3) RGB; DecodeError if a block is missing or corrupt."""
        (number, which, column, row), blocks = pickle.loads(sample.data)
        slide, size = self.slide_list[number], self._options.tile_size
        geometry = slide.geometries[which]
        region = Region(geometry.level, column, row, geometry.side, geometry.side)
        try:
            if slide.blocks is None:
                pixels = self._open(slide.path).read_region(*region)
            else:
                pixels = assemble(slide.blocks, region, blocks)
        except SlideError as error:
            raise DecodeError(str(error)) from error
        return resized(pixels, size)

    def describe(self, group: int, row: int | None = None) -> str:
        """Name a row group, or one of its tiles, for a message to the user."""
        first = group * GROUP_TILES
        if row is None:
            return f"tiles {first} to {first + GROUP_TILES - 1} drawn from {len(self.slide_list)} slides"
        slide, which, column, line = self.draw(first + row)
        g: Geometry = self.slide_list[slide].geometries[which]
        x, y = round(column * g.downsample), round(line * g.downsample)
        return f"tile {first + row}, slide '{self._name(slide)}' at x {x}, y {y}, level {g.level}, {g.mpp:g} um/px"

    def slides(self, group: int) -> list[str]:
        """Name the slide of every tile of a row group."""
        first = group * GROUP_TILES
        rngs = (sample_rng(self._seed, first + row, _STREAM) for row in range(int(self.group_rows[group])))
        return [self._name(_pick(self._slide_ends, rng.random(2)[0])) for rng in rngs]

    def _fetch(self, tiles: Sequence[Tile], numbers: Sequence[int]) -> list[tuple[int, bytes]]:
        """Read the blocks of tiles of one slide in one go; gives each tile's number and what `decode` takes."""
        slide = tiles[numbers[0]].slide
        index, wanted = self._plan(slide).index, []
        for tile in (tiles[number] for number in numbers):
            g = self.slide_list[slide].geometries[tile.geometry]
            region = Region(g.level, tile.column, tile.row, g.side, g.side)
            wanted.append([] if index is None else ranges(index, region))
        blocks = iter(SlideBytes(self.slide_list[slide].path).read([item for items in wanted for item in items]))
        own = ([next(blocks) for _ in items] for items in wanted)
        return [(number, pickle.dumps((tuple(tiles[number]), data))) for number, data in zip(numbers, own, strict=True)]

    def _name(self, slide: int) -> str:
        return public_name(self.slide_list[slide].path)

    def _make_groups(self) -> None:
        """Rows and bytes of row groups, and what a process keeps open; none of it travels between processes."""
        groups = -(-self.num_rows // GROUP_TILES)
        self.group_rows = np.broadcast_to(np.int64(GROUP_TILES), groups)  # takes no memory
        if not self.is_endless:
            self.group_rows = np.minimum(GROUP_TILES, self.num_rows - GROUP_TILES * np.arange(groups))
        self.group_bytes = np.broadcast_to(np.int64(GROUP_TILES * self._tile_bytes), groups)
        least = self._options.min_foreground
        self._plan = lru_cache(_PLANS_KEPT)(lambda slide: load_plan(self.slide_list[slide], least))
        self._open = lru_cache(_OPEN_SLIDES)(SlideReader)

    def __getstate__(self) -> dict[str, Any]:
        made = ("group_rows", "group_bytes", "_plan", "_open")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_groups()


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
        raise ValueError(f"None of {slides} slides gives tiles: {causes}.")

"""Slides made ready for drawing tiles: opened, their tissue found, the positions counted; kept in a cache."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.online.positions import Geometry, Positions
from dinov2.data.slides.blocks import TileIndex
from dinov2.data.slides.errors import SlideError, UnsupportedTiles
from dinov2.data.slides.find import SlideRow
from dinov2.data.slides.index import TileIndexes, opened_index, write_tile_index
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.reader import SlideReader, too_small
from dinov2.data.slides.resolution import MPP_TOLERANCE, MppSource, Resolution, coarsest_level
from dinov2.data.slides.tiff import index_slide
from dinov2.data.slides.tissue import TissueCache, TissueMap, TissueMask
from dinov2.data.storage.base import public_name
from dinov2.data.storage.fsspec import filesystem, version_of
from dinov2.data.storage.retry import RemoteError, Retries
from dinov2.utils.files import read_arrays, write_arrays


@dataclass(frozen=True)
class TileOptions:
    """Tiles that are cut from every slide; the configuration has checked it."""

    mpps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)  # output resolutions in micrometres per px
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # how often each is drawn, up to a common factor
    tile_size: int = 224  # side of a tile in px
    min_foreground: float = 0.4  # least fraction of foreground in a tile
    # Fraction by which slides may be coarser than `mpps`; no part of what identifies a run, as its geometries are.
    mpp_tolerance: float = field(default=MPP_TOLERANCE, repr=False)


def mpps_of(magnifications: tuple[float, ...]) -> tuple[float, ...]:
    """Micrometres per px of objective magnifications: 40x is 0.25."""
    return tuple(10 / magnification for magnification in magnifications)


@dataclass(frozen=True)
class OnlineSlide:
    """One slide to draw from; small, since every process holds all of them."""

    path: str  # file or URL
    weight: float  # how often it is drawn, up to a common factor
    size: int  # bytes of the file
    mpp_source: MppSource
    mpp_notes: tuple[str, ...]  # what a user should know of its resolution
    stem: Path  # of its files in the cache
    key: str  # of its counted positions among those files; identifies all that is known of the slide and its tissue
    geometries: tuple[Geometry, ...]  # one for each resolution that the slide can give
    weights: tuple[float, ...]  # how often each of them is drawn, up to a common factor
    counts: tuple[int, ...]  # number of positions of each
    blocks: TileIndex | None  # outline of the index of its blocks; None where only OpenSlide can read them
    tile_index: str  # file with the whole index if it is one of many slides; empty if it lies in the cache
    tile_bytes: float  # of blocks that a tile takes at most, on average over the geometries
    doubt: str  # why the tissue rule may be wrong for it; empty where nothing speaks against it


@dataclass(frozen=True)
class Dropped:
    """A slide that gives no tiles, why, and whether that is because it cannot be read."""

    path: str
    reason: str
    unreadable: bool = False
    doubt: str = ""


class DrawingPlan(NamedTuple):
    """Data of a draw, loaded from the cache."""

    mask: TissueMask
    positions: tuple[Positions, ...]
    index: TileIndex | None


# What the cache knows of a slide: its tissue, its levels and own resolution as JSON, and its blocks in outline.
_Known = tuple[TissueMask, dict[str, Any], TileIndex | None]


def prepare_slide(cache: TissueCache, options: TileOptions, row: SlideRow) -> OnlineSlide | Dropped:
    """Make one slide ready, from the cache where that was done before; says why where it cannot be."""
    name = public_name(row.path)
    try:
        size, version = _stat(row.path)
        stem = cache.stem(row.path, size, version)
        mask, facts, blocks = _recall(stem, row, cache) or _examine(stem, row, cache)
    except RemoteError:
        raise  # the server's fault; a slide left out because of it would change the dataset
    except (SlideError, OSError) as error:
        return Dropped(name, getattr(error, "detail", str(error)), unreadable=True)
    resolution = Resolution(facts["mpp"], facts["mpp_source"], tuple(facts["notes"]), row.mpp)
    mpp = resolution.mpp
    if mpp is None:
        return Dropped(name, "its resolution is unknown; give its mpp in a table")
    geometries, weights = [], []
    for wanted, weight in zip(options.mpps, options.weights, strict=True):
        level = coarsest_level(facts["downsamples"], mpp, wanted, options.mpp_tolerance)
        if level is not None:
            downsample = facts["downsamples"][level]
            side = max(1, round(options.tile_size * wanted / mpp / downsample))
            geometries.append(Geometry(level, *facts["sizes"][level], downsample, side, wanted))
            weights.append(weight)
    if not geometries:
        return Dropped(name, f"at {mpp:.4g} um/px it is coarser than every resolution that is wanted")
    state = [mask.digest(), mpp, facts, list(map(asdict, geometries)), options.min_foreground]
    key = hashlib.blake2b(json.dumps(state).encode(), digest_size=10).hexdigest()
    counted = Path(f"{stem}-{key}.npz")
    positions = _load_positions(counted, geometries, options.min_foreground)
    if positions is None:
        positions = [Positions.count(mask, geometry, options.min_foreground) for geometry in geometries]
        write_arrays(counted, **{f"ends{number}": p.ends for number, p in enumerate(positions)})
    if not any(map(len, positions)):
        return Dropped(name, _why_none(mask, geometries, options), doubt=facts["doubt"])
    weights = [weight if len(p) else 0.0 for weight, p in zip(weights, positions, strict=True)]
    longest = [_most_bytes(blocks, geometry) for geometry in geometries]
    return OnlineSlide(
        row.path, row.weight, size, resolution.source, resolution.notes, stem, key, tuple(geometries), tuple(weights),
        tuple(map(len, positions)), blocks, row.tile_index,
        tile_bytes=float(np.average(longest, weights=weights)), doubt=facts["doubt"],
    )  # fmt: skip


def _why_none(mask: TissueMask, geometries: Sequence[Geometry], options: TileOptions) -> str:
    """Why a slide gives no tile."""
    least = min(geometries, key=lambda geometry: geometry.mpp)
    if reason := too_small(least.level, (least.width, least.height), least.side, options.tile_size, least.mpp):
        return reason
    return f"no tile of it is {options.min_foreground:.0%} tissue" if mask.packed.any() else "it shows no tissue"


def load_plan(slide: OnlineSlide, min_foreground: float) -> DrawingPlan:
    """Load what a draw from the slide looks at; FileNotFoundError if the cache was emptied."""
    known = TissueCache(slide.stem.parent).load(slide.stem)
    positions = _load_positions(Path(f"{slide.stem}-{slide.key}.npz"), slide.geometries, min_foreground)
    if known is None or positions is None:
        raise FileNotFoundError(f"What is known of slide '{slide.path}' has gone from '{slide.stem.parent}'.")
    index = None if slide.blocks is None else _tile_indexes(slide.stem, slide.tile_index)[slide.path]
    return DrawingPlan(known[0], tuple(positions), index)


def _recall(stem: Path, row: SlideRow, cache: TissueCache) -> _Known | None:
    found = cache.load(stem)
    if found is None:
        return None
    try:
        return *found, _tile_indexes(stem, row.tile_index).outline(row.path) if found[1]["tiled"] else None
    except (OSError, ValueError, KeyError):
        return None


def _examine(stem: Path, row: SlideRow, cache: TissueCache) -> _Known:
    """Open a slide, find its tissue, and put into the cache what is known of it."""
    try:
        index = opened_index(row.tile_index)[row.path] if row.tile_index else index_slide(row.path)
    except UnsupportedTiles:
        index = None
    reader = SlideReader(row.path, index=index)
    tissue = TissueMap(reader, cache.rule)
    mask = TissueMask.of_map(tissue)
    own = reader.resolution
    facts = {"mpp": own.own, "mpp_source": own.own_source, "notes": own.own_notes}
    facts |= {"sizes": list(map(list, reader.level_dimensions)), "downsamples": list(reader.level_downsamples)}
    facts |= {"tiled": index is not None, "doubt": tissue.doubt}
    reader.close()
    cache.folder.mkdir(parents=True, exist_ok=True)
    if index is not None and not row.tile_index:
        write_tile_index(Path(f"{stem}.tiles"), index)
    cache.store(stem, mask, facts)  # last, since it is what says that the slide was examined
    return mask, facts, None if index is None else _tile_indexes(stem, row.tile_index).outline(row.path)


def _tile_indexes(stem: Path, tile_index: str) -> TileIndexes:
    return opened_index(tile_index) if tile_index else TileIndexes(f"{stem}.tiles")


def _most_bytes(blocks: TileIndex | None, geometry: Geometry) -> int:
    """Bytes of as many of the longest block as a tile can touch."""
    if blocks is None:
        return 0
    level = blocks.levels[geometry.level]
    across, down = ((geometry.side - 2) // side + 2 for side in (level.tile_width, level.tile_height))
    return across * down * int(level.lengths.max())


def _load_positions(path: Path, geometries: Sequence[Geometry], min_foreground: float) -> list[Positions] | None:
    ends = read_arrays(path, *(f"ends{number}" for number in range(len(geometries))))
    return ends and [Positions(g, e, min_foreground) for g, e in zip(geometries, ends, strict=True)]


def _stat(path: str) -> tuple[int, str]:
    """Size of a file in bytes, and what changes when it does."""
    if not is_remote(path):
        stat = os.stat(path)
        return stat.st_size, str(stat.st_mtime_ns)
    fs, inside = filesystem(path, Retries())
    info = Retries().call(public_name(path), lambda: fs.info(inside))
    return int(info["size"]), version_of(info)

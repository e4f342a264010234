"""Slides made ready for drawing patches: opened, their tissue found, the places of patches counted; kept in a cache."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from dinov2.data.online.positions import Geometry, Positions
from dinov2.data.online.tissue_mask import TissueCache, TissueMask, save_arrays
from dinov2.data.slides.blocks import TileIndex, index_slide
from dinov2.data.slides.errors import SlideError, UnsupportedTiles, public_name
from dinov2.data.slides.index import describe, load_arrays, outline, store_arrays
from dinov2.data.slides.ranges import filesystem, is_remote
from dinov2.data.slides.reader import MPP_TOLERANCE, SlideReader
from dinov2.data.slides.resolution import MppSource
from dinov2.data.slides.table import SlideRow
from dinov2.data.storage.fsspec import VERSION_KEYS
from dinov2.data.storage.retry import RemoteError, Retries


@dataclass(frozen=True)
class PatchOptions:
    """What is cut from every slide.

    Attributes:
        mpps: output resolutions in micrometres per px.
        weights: how often each is drawn, up to a common factor.
        tile_size: side of a patch in px.
        min_foreground: least share of foreground in a patch.

    Raises:
        ValueError: a value is out of range, a resolution is there twice, or resolutions and weights differ in number.
    """

    mpps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    tile_size: int = 224
    min_foreground: float = 0.4

    def __post_init__(self) -> None:
        if len(self.mpps) != len(self.weights) or not self.mpps or len(set(self.mpps)) < len(self.mpps):
            raise ValueError(
                f"Resolutions {self.mpps} and weights {self.weights} do not match; one weight each is expected."
            )
        if not all(0 < value < np.inf for value in (*self.mpps, *self.weights)):
            raise ValueError(
                f"Resolutions {self.mpps} and weights {self.weights} must be positive and finite."
            )
        if self.tile_size < 1 or not 0 <= self.min_foreground <= 1:
            raise ValueError(
                f"The tile size is {self.tile_size} px and the least foreground {self.min_foreground}; at least 1 and "
                "a share within [0, 1] are expected."
            )


def mpps_of(magnifications: tuple[float, ...]) -> tuple[float, ...]:
    """Micrometres per px of objective magnifications: 40x is 0.25."""
    return tuple(10 / magnification for magnification in magnifications)


@dataclass(frozen=True)
class SlideJob:
    """One slide to make ready."""

    row: SlideRow
    cache: TissueCache
    options: PatchOptions


@dataclass(frozen=True)
class OnlineSlide:
    """One slide to draw from; small, since every process holds all of them.

    Attributes:
        path: file or URL.
        weight: how often it is drawn, up to a common factor.
        size: bytes of the file.
        mpp_source: see `slide_mpp.resolve_mpp`.
        stem: of its files in the cache.
        key: of its counted places among those files; identifies all that is known of the slide and its tissue.
        geometries: one for each resolution that the slide can give.
        shares: how often each of them is drawn, up to a common factor.
        places: number of places of each.
        tiles: the index of its tiles without offsets and lengths; None where only OpenSlide can read them.
        patch_bytes: of tiles that a patch takes at most, on average over the geometries.
    """

    path: str
    weight: float
    size: int
    mpp_source: MppSource
    stem: Path
    key: str
    geometries: tuple[Geometry, ...]
    shares: tuple[float, ...]
    places: tuple[int, ...]
    tiles: TileIndex | None
    patch_bytes: float


@dataclass(frozen=True)
class Dropped:
    """A slide that gives no patches, why, and whether that is because it cannot be read."""

    path: str
    reason: str
    unreadable: bool = False


@dataclass(frozen=True)
class DrawingPlan:
    """What a draw looks at, loaded from the cache."""

    mask: TissueMask
    positions: tuple[Positions, ...]
    index: TileIndex | None


def prepare_slide(job: SlideJob) -> OnlineSlide | Dropped:
    """Make one slide ready, from the cache where that was done before; says why where it cannot be."""
    row, options, name = job.row, job.options, public_name(job.row.path)
    try:
        size, version = _stat(row.path)
        stem = job.cache.stem(row.path, size, version)
        mask, facts = _recall(stem, job.cache) or _examine(row.path, stem, job.cache)
    except RemoteError:
        raise  # the server's fault; a slide left out because of it would change the dataset
    except (SlideError, OSError) as error:
        return Dropped(name, getattr(error, "detail", str(error)), unreadable=True)
    mpp, source = (facts["mpp"], facts["mpp_source"]) if facts["mpp"] else (row.mpp, "user")
    if mpp is None:
        return Dropped(name, "its resolution is unknown; give its mpp in a table")
    offered = zip(options.mpps, options.weights, strict=True)
    wanted = {g: weight for o, weight in offered if (g := _geometry(facts, mpp, o, options.tile_size))}
    if not wanted:
        return Dropped(name, f"at {mpp:.4g} um/px it is coarser than every resolution that is wanted")
    state = json.dumps(
        [mask.digest(), mpp, facts, [asdict(g) for g in wanted], options.min_foreground]
    ).encode()
    key = hashlib.blake2b(state, digest_size=10).hexdigest()
    positions = _count(Path(f"{stem}-{key}.npz"), mask, list(wanted), options.min_foreground)
    if not any(map(len, positions)):
        return Dropped(
            name,
            f"no patch of it is {options.min_foreground:.0%} tissue" if mask.any() else "it shows no tissue",
        )
    shares = tuple(weight if len(p) else 0.0 for weight, p in zip(wanted.values(), positions, strict=True))
    longest = [_longest_patch(facts, geometry) for geometry in wanted]
    return OnlineSlide(
        path=row.path,
        weight=row.weight,
        size=size,
        mpp_source=source,
        stem=stem,
        key=key,
        geometries=tuple(wanted),
        shares=shares,
        places=tuple(map(len, positions)),
        tiles=outline(row.path, size, facts["tiles"], facts["downsamples"]) if facts["tiles"] else None,
        patch_bytes=float(np.average(longest, weights=shares)),
    )


def load_plan(slide: OnlineSlide, min_foreground: float) -> DrawingPlan:
    """What a draw from the slide looks at.

    Raises:
        FileNotFoundError: the cache was emptied.
    """
    with np.load(f"{slide.stem}.npz") as stored:
        mask = TissueMask(stored["packed"], int(stored["columns"]), float(stored["cell_px"]))
    index = None if slide.tiles is None else load_arrays(_tiles_path(slide.stem), slide.tiles)
    positions = _load(Path(f"{slide.stem}-{slide.key}.npz"), slide.geometries, min_foreground)
    return DrawingPlan(mask, tuple(positions), index)


def _recall(stem: Path, cache: TissueCache) -> tuple[TissueMask, dict[str, Any]] | None:
    found = cache.load(stem)
    return found if found and (found[1]["tiles"] is None or _tiles_path(stem).is_file()) else None


def _examine(path: str, stem: Path, cache: TissueCache) -> tuple[TissueMask, dict[str, Any]]:
    """Open a slide, find its tissue, and put into the cache what is known of it."""
    try:
        index = index_slide(path)
    except UnsupportedTiles:
        index = None
    reader = SlideReader(path, index=index)
    mask = TissueMask.of_slide(reader, cache.rule)
    facts = {
        "mpp": reader.mpp,
        "mpp_source": reader.mpp_source,
        "sizes": reader.level_dimensions,
        "downsamples": reader.level_downsamples,
        "tiles": None if index is None else describe(index),
    }
    reader.close()
    cache.folder.mkdir(parents=True, exist_ok=True)
    if index is not None:
        store_arrays(_tiles_path(stem), index)
    cache.store(stem, mask, facts)  # last, since it is what says that the slide was examined
    return mask, json.loads(json.dumps(facts))


def _tiles_path(stem: Path) -> Path:
    return Path(f"{stem}-tiles.npz")


def _geometry(facts: dict[str, Any], slide_mpp: float, mpp: float, tile_size: int) -> Geometry | None:
    """How patches are read: from the coarsest level that is fine enough; None where even level 0 is not."""
    fine = [level for level, d in enumerate(facts["downsamples"]) if slide_mpp * d <= mpp * MPP_TOLERANCE]
    if not fine:
        return None
    level, downsample = fine[-1], facts["downsamples"][fine[-1]]
    side = max(1, round(tile_size * mpp / slide_mpp / downsample))
    return Geometry(level, *facts["sizes"][level], downsample, side, mpp)


def _longest_patch(facts: dict[str, Any], geometry: Geometry) -> int:
    """Bytes of as many of the longest tile as a patch can touch."""
    if facts["tiles"] is None:
        return 0
    level = facts["tiles"][geometry.level]
    across, down = ((geometry.side - 2) // level[name] + 2 for name in ("tile_width", "tile_height"))
    return across * down * level["longest"]


def _count(
    path: Path, mask: TissueMask, geometries: Sequence[Geometry], min_foreground: float
) -> list[Positions]:
    """Count the places of patches, or take them from the cache."""
    try:
        return _load(path, geometries, min_foreground)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        positions = [Positions.count(mask, geometry, min_foreground) for geometry in geometries]
        save_arrays(path, **{f"ends{number}": p.ends for number, p in enumerate(positions)})
        return positions


def _load(path: Path, geometries: Sequence[Geometry], min_foreground: float) -> list[Positions]:
    with np.load(path) as stored:
        ends = [stored[f"ends{number}"] for number in range(len(geometries))]
    return [Positions(g, e, min_foreground) for g, e in zip(geometries, ends, strict=True)]


def _stat(path: str) -> tuple[int, str]:
    """Size of a file in bytes, and what changes when it does."""
    if not is_remote(path):
        stat = os.stat(path)
        return stat.st_size, str(stat.st_mtime_ns)
    retries, url = Retries(), public_name(path)
    fs, inside = filesystem(path, retries)
    info = retries.call(url, lambda: fs.info(inside))
    return int(info["size"]), next(
        (str(info[name]) for name in VERSION_KEYS if info.get(name) is not None), ""
    )

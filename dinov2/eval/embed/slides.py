"""A grid of tissue tiles over slides, one part per slide."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from dinov2.data.slides.errors import SlideError, public_name
from dinov2.data.slides.find import SlideRow
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.resolution import PLAUSIBLE_MPP
from dinov2.data.slides.tissue import TissueMap, TissueRule
from dinov2.eval.datasets.images import UnreadableImage
from dinov2.eval.embed.read_ahead import Part, TileInput

_CACHE_BYTES = 256 << 20  # two rows of a wide slide's tiles, so that each is decoded once


@dataclass(frozen=True)
class Grid:
    """Which tiles of a slide are embedded.

    Attributes:
        mpp: micrometres per px of a tile.
        tile_size: side of a tile in px.
        stride: px from one tile to the next.
        min_tissue: least share of tissue in a tile, estimated from the slide's coarsest level.

    Raises:
        ValueError: if a value is out of range.
    """

    mpp: float = 0.5
    tile_size: int = 224
    stride: int = 224
    min_tissue: float = 0.4

    def __post_init__(self) -> None:
        if not PLAUSIBLE_MPP[0] <= self.mpp <= 100:
            raise ValueError(f"--mpp is {self.mpp:g}, but it must lie within {PLAUSIBLE_MPP[0]:g} and 100.")
        if self.tile_size < 1 or self.stride < 1:
            raise ValueError(f"--tile-size {self.tile_size} and --stride {self.stride} must be at least 1.")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"--min-tissue is {self.min_tissue:g}, but it must lie within 0 and 1.")

    def places(self, reader: SlideReader) -> tuple[np.ndarray, np.ndarray]:
        """Upper left corners of the tiles that lie on the slide and show tissue, row by row.

        Tile (i, j) begins at (i, j) times the stride, rounded to the nearest pixel of the level that is read.

        Returns:
            x and y in level-0 px, int64 (N,) each.

        Raises:
            SlideError: if the slide is coarser than the tiles, or its coarsest level cannot be read.
        """
        level = reader.level_for(self.mpp)
        downsample, step = reader.level_downsamples[level], reader.patch_side(self.stride, self.mpp)
        side = max(1, round(reader.patch_side(self.tile_size, self.mpp) / downsample))
        axes = []
        for length in reader.level_dimensions[level]:
            starts = np.rint(np.arange(int(length * downsample / step) + 1) * step / downsample)
            axes.append(np.rint(starts[starts + side <= length] * downsample).astype(np.int64))
        y, x = (axis.ravel() for axis in np.meshgrid(axes[1], axes[0], indexing="ij"))
        if self.min_tissue > 0 and len(x):
            shares = TissueMap(reader, TissueRule()).fraction(x, y, side * downsample)
            x, y = x[shares >= self.min_tissue], y[shares >= self.min_tissue]
        return x, y


class SlideTiles(TileInput):
    """Tissue tiles of slides, one part per slide.

    Args:
        rows: the slides.
        root: folder that they lie in, or the file that lists them.
        grid: which tiles.
    """

    kind = "slides"

    def __init__(self, rows: Sequence[SlideRow], root: Path, grid: Grid) -> None:
        self._rows, self._grid = list(rows), grid
        inside = [_inside(row.path, root) for row in rows]
        state = [[name, row.mpp, *_state(row.path)] for name, row in zip(inside, rows, strict=True)]
        self.fingerprint = hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
        self.parts = _part_names(inside)

    def open(self, number: int) -> Part:
        """Open a slide and find its tiles; raises UnreadableImage where that cannot be done."""
        row = self._rows[number]
        try:
            reader = SlideReader(row.path, row.mpp, _CACHE_BYTES)
            if reader.mpp is None:
                raise UnreadableImage(
                    f"Slide '{public_name(row.path)}' does not say its resolution; name it in a CSV of slide,mpp lines "
                    "and give that as --mpp-file."
                )
            x, y = self._grid.places(reader)
        except SlideError as error:
            raise UnreadableImage(str(error)) from error
        slide, grid, count = self.parts[number], self._grid, len(x)
        level = reader.level_for(grid.mpp)
        columns = {
            "slide": [slide] * count,
            "x": x,
            "y": y,
            "level": np.full(count, level),
            "mpp": np.full(count, grid.mpp),
            "tile_size": np.full(count, grid.tile_size),
        }
        about = {
            "slide": slide,
            "path": public_name(reader.path),
            "slide_mpp": reader.mpp,
            "mpp_source": reader.mpp_source,
            "level": level,
            "tile_size_level0": round(reader.patch_side(grid.tile_size, grid.mpp)),
            **asdict(grid),
        }
        return Part(_TissueTiles(reader, grid, x, y), columns, about, reader.close)


@dataclass(frozen=True)
class _TissueTiles:
    """Tiles of an open slide by their upper left corners in level-0 px."""

    reader: SlideReader
    grid: Grid
    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def name(self, index: int) -> str:
        slide = public_name(self.reader.path)
        return f"the tile of slide '{slide}' at x {self.x[index]}, y {self.y[index]}"

    def read(self, index: int) -> np.ndarray:
        x, y = int(self.x[index]), int(self.y[index])
        try:
            return self.reader.read_patch(x, y, self.grid.tile_size, self.grid.mpp)
        except SlideError as error:
            raise UnreadableImage(str(error)) from error


def _inside(path: str, root: Path) -> str:
    """A slide's path below the folder that was searched, so that the folder may be moved; else the path."""
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path


def _state(path: str) -> list[int]:
    """Size and time of change of a file, of which nothing is known on a server."""
    try:
        stat = os.stat(path)
    except OSError:  # a URL, or a file that is missing, as opening it will say
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _part_names(paths: Sequence[str]) -> list[str]:
    """File names without endings; those that two slides share get a digest of the path behind them."""
    stems = [PurePosixPath(public_name(path)).stem.lstrip("._") or "slide" for path in paths]
    times = Counter(stems)
    digests = [hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=4) for path in paths]
    return [
        stem if times[stem] == 1 else f"{stem}.{digest.hexdigest()}"
        for stem, digest in zip(stems, digests, strict=True)
    ]

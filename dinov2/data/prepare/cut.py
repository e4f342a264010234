"""Rows of a Parquet dataset, cut from slides: pixels, where they come from, or why there are none."""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dinov2.data.prepare.draw import BLOCK_PX
from dinov2.data.slides.coarse import Box, CoarseView
from dinov2.data.slides.errors import SlideError, SlideOpenError, SlideReadError
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.sample_list import SampleList
from dinov2.data.slides.tissue import TissueRule

ROWS_AT_ONCE = 1024  # encoded tiles held in memory, read in the order of the blocks below them
IMAGE_COLUMN, PATIENT_COLUMN, REASON = "image_bytes", "patient", "reason"


@dataclass(frozen=True)
class Encoding:
    """Encoding of a tile: "png", "jpeg" with its quality and chroma subsampling, or "raw".

    PNG uses zlib's run-length strategy: on tissue within 1 % of the smallest file at 4 to 20 times the speed.
    """

    kind: str = "png"
    quality: int = 95
    subsampling: str = "4:2:0"

    def encode(self, image: np.ndarray) -> bytes:
        """Encode a uint8 (H, W, 3) RGB image."""
        if self.kind == "raw":
            return image.tobytes()
        if self.kind == "png":
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            _, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE])
            return data.tobytes()
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "jpeg", quality=self.quality, subsampling=self.subsampling)
        return buffer.getvalue()

    def metadata(self) -> dict[str, str]:
        """Key-values for a shard."""
        jpeg = {"jpeg_quality": str(self.quality), "jpeg_subsampling": self.subsampling}
        return {"image_encoding": self.kind, **(jpeg if self.kind == "jpeg" else {})}


@dataclass(frozen=True)
class Cutting:
    """Options of the cutting of all tiles."""

    encoding: Encoding
    rule: TissueRule  # for `tissue_frac`
    tile_size: int  # side of a tile in px
    mpp_tolerance: float  # fraction by which slides may be coarser than the mpp of tiles
    max_slide_failures: int  # undecodable tiles of a slide at which the job that meets them gives the slide up


@dataclass(frozen=True)
class Tiles:
    """Tiles of a list, with path, the user's mpp (None: unknown) and told patient (or "") of each of its slides."""

    samples: SampleList
    paths: list[Path]
    mpps: list[float | None]
    patients: list[str]

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, rows: np.ndarray) -> "Tiles":
        """Some tiles, in the order of `rows`, with the slides that they need."""
        samples = self.samples
        used, slide = np.unique(samples.slide[rows], return_inverse=True)
        mpp = None if samples.mpp is None else samples.mpp[rows]
        names, columns = [samples.slides[i] for i in used], (samples.x[rows], samples.y[rows], samples.level[rows])
        part = SampleList(names, slide.astype(np.int32), *columns, mpp)
        return Tiles(part, *([column[i] for i in used] for column in (self.paths, self.mpps, self.patients)))


def cut_tiles(tiles: Tiles, cutting: Cutting, rows_at_once: int) -> Iterator[list[dict[str, Any]]]:
    """Cut tiles, within `rows_at_once` of them slide by slide and by rows of blocks.

    Yields, for each so many tiles, in their order, the rows of the dataset without `task_id`; the row of a tile
    that cannot be read has a `reason` instead of everything but slide_path, x, y and level.
    """
    slides = _Slides(tiles, cutting)
    for start in range(0, len(tiles), rows_at_once):
        chunk = np.arange(start, min(start + rows_at_once, len(tiles)))
        rows: list[dict[str, Any]] = [{}] * len(chunk)
        for slide in np.unique(tiles.samples.slide[chunk]).tolist():
            for i in slides.in_block_order(chunk[tiles.samples.slide[chunk] == slide]):
                rows[i - start] = slides.cut(i)
        yield rows


class _Slides:
    """Keeps the slide being read, and counts what failed."""

    def __init__(self, tiles: Tiles, cutting: Cutting) -> None:
        self._tiles, self._samples, self._cutting = tiles, tiles.samples, cutting
        self._reader, self._slide, self._rule = None, -1, None
        self._bad: dict[int, str] = {}  # slides given up, and why
        self._failures = [0] * len(tiles.paths)

    def in_block_order(self, rows: np.ndarray) -> Sequence[int]:
        """Sort tiles of one slide so that neighbours share decoded blocks."""
        samples = self._samples
        try:
            reader = self._open(int(samples.slide[rows[0]]))
        except SlideError:
            return rows.tolist()
        if samples.mpp is None:
            scale = np.take(reader.level_downsamples, samples.level[rows], mode="clip")
        else:
            scale = samples.mpp[rows] / (reader.mpp or 1)
        strip = samples.y[rows] // (BLOCK_PX * scale)
        return rows[np.lexsort((samples.x[rows], strip, scale))].tolist()

    def cut(self, i: int) -> dict[str, Any]:
        """One row."""
        samples = self._samples
        slide, x, y, level = (int(column[i]) for column in (samples.slide, samples.x, samples.y, samples.level))
        location = {"slide_path": samples.slides[slide], "x": x, "y": y, "level": level}
        mpp = None if samples.mpp is None else float(samples.mpp[i])
        try:
            told = {PATIENT_COLUMN: self._tiles.patients[slide] or None}
            return location | told | self._read(self._open(slide), x, y, level, mpp)
        except SlideError as error:
            if isinstance(error, SlideReadError):
                self._failures[slide] += 1
                if self._failures[slide] >= self._cutting.max_slide_failures:
                    self._bad[slide] = f"given up after {self._failures[slide]} unreadable tiles"
            return location | {REASON: error.detail}

    def _open(self, slide: int) -> SlideReader:
        path = self._tiles.paths[slide]
        if slide in self._bad:
            raise SlideOpenError(path, self._bad[slide])
        if slide != self._slide:
            if self._reader is not None:
                self._reader.close()
            self._reader, self._slide, self._rule = None, slide, None
            try:
                self._reader = SlideReader(path, self._tiles.mpps[slide], mpp_tolerance=self._cutting.mpp_tolerance)
            except SlideError as error:
                self._bad[slide] = error.detail
                raise
            with suppress(SlideError):  # `tissue_frac` is then unknown, but the tiles of the list are what is wanted
                self._rule = self._cutting.rule.on(CoarseView(self._reader))
        return self._reader

    def _read(self, reader: SlideReader, x: int, y: int, level: int, mpp: float | None) -> dict[str, Any]:
        size = read_size = self._cutting.tile_size
        if mpp is None:
            image = reader.read_region(level, *reader.snap(level, x, y), size, size)
            downsample = reader.level_downsamples[level]
            mpp = level_mpp = None if reader.mpp is None else reader.mpp * downsample
        else:
            image, level = reader.read_tile(x, y, size, mpp), reader.level_for(mpp)
            downsample = reader.level_downsamples[level]
            level_mpp = reader.mpp * downsample
            read_size = round(size * mpp / level_mpp)
        row = {"level": level, "tile_size": size, "level_downsample": downsample, "image_dtype": "uint8"}
        box = Box(x, y, read_size * downsample, read_size * downsample)
        fraction = None if self._rule is None else self._rule.fraction(image, box)
        row |= {IMAGE_COLUMN: self._cutting.encoding.encode(image), "tissue_frac": fraction}
        row |= {"slide_id": reader.path.stem, "mpp": mpp, "mpp_source": reader.mpp_source, "read_size": read_size}
        row["level_mpp"] = level_mpp
        return row

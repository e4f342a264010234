"""Tissue of slides: the HSV rule, a coarse map that says where to look, and masks to draw from, kept on disk."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np

from dinov2.data.slides.reader import SlideReader
from dinov2.utils.files import read_arrays, write_arrays, write_text

_VERSION = 2  # of the files of masks; raise it when they come to mean something else
MAP_CELL_PX = 32  # side of a map cell in level-0 pixels
PEN_LOWER, PEN_UPPER = (90, 90, 0), (125, 255, 255)  # hues of blue ink, saturated as tissue of those is not
MAX_PEN_FRACTION = 0.1
_BLOCK_CELLS = 64  # the map is read in squares of so many cells, to bound memory on slides without a pyramid


@dataclass(frozen=True)
class TissueRule:
    """A pixel is tissue when its OpenCV HSV value lies within the bounds, a tile when enough pixels are.

    Defaults are the ones of Virchow and OpenMidnight: blue to pink hues (0-180), not white, not black.
    `reject_pen` also refuses tiles of which more than a tenth is blue ink. Red and purple ink have the hues of
    the stain, so no rule of colour can tell them; green and black are no tissue in the first place.
    ValueError if a bound is outside 0-255 or above its counterpart, or the fraction is outside [0, 1).
    """

    lower: tuple[int, int, int] = (90, 8, 103)
    upper: tuple[int, int, int] = (180, 255, 255)
    min_fraction: float = 0.6
    reject_pen: bool = False

    def __post_init__(self) -> None:
        pairs = list(zip(self.lower, self.upper, strict=True))
        if len(pairs) != 3 or not all(0 <= low <= high <= 255 for low, high in pairs):
            raise ValueError(f"Tissue bounds {self.lower} to {self.upper} must be 3 rising pairs within 0 to 255.")
        if not 0 <= self.min_fraction < 1:
            raise ValueError(f"The tissue fraction is {self.min_fraction}, but it must lie in [0, 1).")

    def mask(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W), 255 where a pixel of the uint8 (H, W, 3) RGB image is tissue, else 0."""
        return cv2.inRange(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), self.lower, self.upper)

    def fraction(self, image: np.ndarray) -> float:
        """Fraction of tissue pixels in a uint8 (H, W, 3) RGB image."""
        return cv2.countNonZero(self.mask(image)) / (image.shape[0] * image.shape[1])

    def accepts(self, image: np.ndarray) -> bool:
        """Whether the fraction of tissue pixels is above `min_fraction` (strictly), and not too much of it is ink."""
        accepted = self.fraction(image) > self.min_fraction
        if not accepted or not self.reject_pen:
            return accepted
        ink = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), PEN_LOWER, PEN_UPPER)
        return cv2.countNonZero(ink) / ink.size <= MAX_PEN_FRACTION


class TissueMap:
    """Fraction of tissue in any rectangle of a slide, estimated from its coarsest level; SlideReadError without it."""

    def __init__(self, reader: SlideReader, rule: TissueRule) -> None:
        level = len(reader.level_dimensions) - 1
        downsample = reader.level_downsamples[level]
        cell = max(1, round(MAP_CELL_PX / downsample))
        self.cell_px = cell * downsample
        width, height = reader.level_dimensions[level]
        self.cells = np.zeros((-(-height // cell), -(-width // cell)), np.float32)
        for column, row, image, known in reader.read_blocks(level, cell * _BLOCK_CELLS):
            mask = (rule.mask(image) > 0) & known
            padded = np.pad(mask, [(0, -length % cell) for length in mask.shape])
            fractions = padded.reshape(padded.shape[0] // cell, cell, -1, cell).mean((1, 3))
            top, left = row // cell, column // cell
            self.cells[top : top + fractions.shape[0], left : left + fractions.shape[1]] = fractions
        self._integral = cv2.integral(self.cells, sdepth=cv2.CV_64F)

    def fraction(self, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
        """Estimate the tissue fraction, float64 (N,), of squares by left and top edges (N,) and side in level-0 px."""
        rows, columns = self.cells.shape
        top, left = np.minimum(self._edge(y), rows - 1), np.minimum(self._edge(x), columns - 1)
        bottom = np.clip(self._edge(y + size), top + 1, rows)
        right = np.clip(self._edge(x + size), left + 1, columns)
        corner = self._integral
        total = corner[bottom, right] - corner[top, right] - corner[bottom, left] + corner[top, left]
        return total / ((bottom - top) * (right - left))

    def _edge(self, position: np.ndarray) -> np.ndarray:
        return np.rint(position / self.cell_px).astype(int)  # the nearest


CELL_RULE = TissueRule(min_fraction=0.5)


@dataclass(frozen=True)
class TissueMask:
    """Cells of a slide, each foreground or not."""

    packed: np.ndarray  # uint8 (rows, columns / 8 rounded up), a bit for each cell, as `np.packbits` puts them
    columns: int  # cells of a row
    cell_px: float  # side of a cell in level-0 px

    @classmethod
    def of_slide(cls, reader: SlideReader, rule: TissueRule) -> "TissueMask":
        """Mark the cells of which more than `rule.min_fraction` of the pixels are tissue."""
        tissue = TissueMap(reader, rule)
        return cls(np.packbits(tissue.cells > rule.min_fraction, axis=1), tissue.cells.shape[1], tissue.cell_px)

    def cells(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """uint8 (rows, columns), 1 where a cell of rows first to last - 1 is foreground, else 0."""
        return np.unpackbits(self.packed[first:last], axis=1, count=self.columns)

    def digest(self) -> str:
        """Identify the cells."""
        shape = f"{len(self.packed)} {self.columns} {self.cell_px!r}".encode()
        return hashlib.blake2b(shape + self.packed.tobytes(), digest_size=16).hexdigest()

    def geojson(self) -> dict[str, Any]:
        """Outlines of the foreground as GeoJSON in level-0 px; what is one part has one polygon, with its holes."""
        # OpenCV's outlines run through pixels. Enlarged by 2, each pixel of one tells on which side of its cell it is.
        doubled = np.kron(np.pad(self.cells(), 1), np.ones((2, 2), np.uint8))
        outlines, nesting = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        features = []
        for number, (_, _, hole, parent) in enumerate(nesting[0] if nesting is not None else ()):
            if parent >= 0:
                continue
            rings = [self._ring(outlines[number])]
            while hole >= 0:
                rings.append(self._ring(outlines[hole]))
                hole = nesting[0][hole][0]
            polygon = {"type": "Polygon", "coordinates": rings}
            features.append({"type": "Feature", "properties": {"class": "tissue"}, "geometry": polygon})
        return {"type": "FeatureCollection", "features": features}

    def _ring(self, outline: np.ndarray) -> list[list[float]]:
        corners = (outline[:, 0] + 1) // 2 - 1
        corners = np.concatenate([corners, corners[:1]])
        turns = np.append(True, np.any(np.diff(corners, axis=0) != 0, axis=1))
        return (corners[turns] * self.cell_px).round(1).tolist()


class TissueCache:
    """Masks of slides in a folder, `<slide>-<key>.npz` and `.geojson`, that any number of processes may share."""

    def __init__(self, folder: str | Path, rule: TissueRule = CELL_RULE) -> None:
        self.folder, self.rule = Path(folder), rule

    def stem(self, slide: str, size: int, version: str) -> Path:
        """Name the files of a slide, without suffix; a changed file or rule gets another name."""
        words = json.dumps([_VERSION, slide, size, version, asdict(self.rule)]).encode()
        key = hashlib.blake2b(words, digest_size=10).hexdigest()
        return self.folder / f"{Path(urlsplit(slide).path).stem[:100]}-{key}"

    def load(self, stem: Path) -> tuple[TissueMask, dict[str, Any]] | None:
        """Load a mask and the notes that were stored with it; None where there is none that can be read."""
        stored = read_arrays(Path(f"{stem}.npz"), "packed", "columns", "cell_px", "notes")
        if stored is None:
            return None
        packed, columns, cell_px, notes = stored
        return TissueMask(packed, int(columns), float(cell_px)), json.loads(str(notes))

    def store(self, stem: Path, mask: TissueMask, notes: dict[str, Any]) -> None:
        """Write a mask, JSON notes and the polygons."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(Path(f"{stem}.geojson"), json.dumps(mask.geojson()))
        notes = json.dumps(notes)
        write_arrays(Path(f"{stem}.npz"), packed=mask.packed, columns=mask.columns, cell_px=mask.cell_px, notes=notes)

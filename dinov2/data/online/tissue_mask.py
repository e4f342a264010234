"""Tissue of slides, found once and kept on disk: a mask of cells to draw from, polygons for other tools."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np

from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tissue import TissueMap, TissueRule
from dinov2.utils.files import read_arrays, write_arrays, write_text

CELL_RULE = TissueRule(min_fraction=0.5)
_VERSION = 2  # of the files; raise it when they come to mean something else


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
        packed = np.packbits(tissue.cells > rule.min_fraction, axis=1)
        return cls(packed, tissue.cells.shape[1], tissue.cell_px)

    @property
    def rows(self) -> int:
        """Rows of cells."""
        return len(self.packed)

    def cells(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """uint8 (rows, columns), 1 where a cell of rows first to last - 1 is foreground, else 0."""
        return np.unpackbits(self.packed[first:last], axis=1, count=self.columns)

    def digest(self) -> str:
        """Identify the cells."""
        shape = f"{self.rows} {self.columns} {self.cell_px!r}".encode()
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
    """Masks of slides in a folder: `<slide>-<key>.npz`, and `.geojson` beside it.

    Files are written whole or not at all, so that any number of processes may share the folder.
    """

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

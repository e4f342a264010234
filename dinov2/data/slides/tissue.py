"""Tissue of slides: the rule in force, a coarse map that says where to look, and masks to draw from, kept on disk."""

import argparse
import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np

from dinov2.configs.fields import key_of
from dinov2.data.slides.coarse import Box, CoarseView
from dinov2.data.slides.reader import SlideReader
from dinov2.extensions import TISSUE_RULES
from dinov2.utils.files import read_arrays, write_arrays, write_text

logger = logging.getLogger(__name__)

_VERSION = 3  # of the files of masks; raise it when they come to mean something else
PEN_LOWER, PEN_UPPER = (90, 90, 0), (125, 255, 255)  # hues of blue ink, saturated as tissue of those is not
MAX_PEN_FRACTION = 0.1
_COLOURED = (0, 30, 40), (180, 255, 255)  # HSV of what is stained; tinted glass and black borders are not
_DOUBTS_LOGGED = 20
_LEAST_COLOURED, _MOST_MISSED = 1e-3, 0.5  # fraction of a slide that is stained; and of that, of what a rule may miss


@dataclass(frozen=True)
class TissueRule:
    """A pixel is tissue by the rule of a name, a tile when enough of its pixels are.

    `reject_pen` also refuses tiles of which more than a tenth is blue ink. Red and purple ink have the hues of
    the stain, so no rule of colour can tell them; green and black are no tissue of "hsv" in the first place.
    ValueError if there is no such rule, an option of it is wrong, or the fraction is outside [0, 1).
    """

    name: str = "hsv"  # in `TISSUE_RULES`
    options: Any = None  # `Options` of the rule; None: its defaults
    min_fraction: float = 0.6
    reject_pen: bool = False

    def __post_init__(self) -> None:
        kind = _kind(self.name)
        if self.options is None:
            object.__setattr__(self, "options", kind.Options())
        object.__setattr__(self, "pixels", kind(self.options))  # no field: follows from the others, or from a slide
        if not 0 <= self.min_fraction < 1:
            raise ValueError(f"The tissue fraction is {self.min_fraction}, but it must lie in [0, 1).")

    pixels = None  # the `PixelRule`

    @classmethod
    def described(cls, described: Mapping[str, Any]) -> "TissueRule":
        """Make the rule that `dataclasses.asdict` has described, also of when "hsv" was the only one."""
        name = described.get("name", "hsv")
        options = described.get("options") or {key: described[key] for key in ("lower", "upper") if key in described}
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        made = _kind(name).Options(**options)
        return cls(name, made, described["min_fraction"], described.get("reject_pen", False))

    def on(self, view: CoarseView) -> "TissueRule":
        """The rule of one slide; SlideError if it cannot be found."""
        fitted = copy.copy(self)
        object.__setattr__(fitted, "pixels", self.pixels.fit(view))
        return fitted

    def mask(self, image: np.ndarray, box: Box | None = None) -> np.ndarray:
        """uint8 (H, W), 255 where a pixel of the uint8 (H, W, 3) RGB image is tissue, else 0."""
        return self.pixels.mask(image, box)

    def fraction(self, image: np.ndarray, box: Box | None = None) -> float:
        """Fraction of tissue pixels in a uint8 (H, W, 3) RGB image, which lies in a box of its slide."""
        return cv2.countNonZero(self.mask(image, box)) / (image.shape[0] * image.shape[1])

    def accepts(self, image: np.ndarray, box: Box | None = None) -> bool:
        """Whether the fraction of tissue pixels is above `min_fraction` (strictly), and not too much of it is ink."""
        accepted = self.fraction(image, box) > self.min_fraction
        if not accepted or not self.reject_pen:
            return accepted
        ink = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), PEN_LOWER, PEN_UPPER)
        return cv2.countNonZero(ink) / ink.size <= MAX_PEN_FRACTION


def add_rule_options(parser: argparse._ActionsContainer, default: str | None = "hsv") -> None:
    """Add ``--tissue`` and a flag ``--<rule>-<option>`` for each option of a registered rule to a parser."""
    names = ", ".join(TISSUE_RULES)
    parser.add_argument(
        "--tissue", default=default, metavar="RULE", help=f"which pixels are tissue: {names} ({default})"
    )
    for name, option in _rule_options():
        value, about = option.default, key_of(option).doc
        several = {"nargs": len(value)} if isinstance(value, tuple) else {}
        shown = " ".join(map(str, value)) if several else value
        kind = type(value[0] if several else value)
        flag = f"--{name}-{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=value, help=f"of --tissue {name}: {about} ({shown})", **several)


def rule_of_options(args: argparse.Namespace, min_fraction: float = 0.6, reject_pen: bool = False) -> TissueRule:
    """Make the rule that the flags of `add_rule_options` describe; ValueError where `TissueRule` raises it."""
    kind, options = _kind(args.tissue), {}
    for option in (option for name, option in _rule_options() if name == args.tissue):
        value = getattr(args, f"{args.tissue}_{option.name}")
        options[option.name] = value = tuple(value) if isinstance(value, list) else value
        if not key_of(option).accepts(value):
            flag = f"--{args.tissue}-{option.name.replace('_', '-')}"
            raise ValueError(f"{flag} is {value}, but it must lie{key_of(option).interval()}.")
    return TissueRule(args.tissue, kind.Options(**options), min_fraction, reject_pen)


def _kind(name: str) -> Any:
    if problem := TISSUE_RULES.problem(name):
        raise ValueError(problem)
    return TISSUE_RULES[name]


def _rule_options() -> list[tuple[str, Any]]:
    return [(name, option) for name, rule in TISSUE_RULES.items() for option in fields(rule.Options)]


class TissueMap:
    """Fraction of tissue in any rectangle of a slide, estimated from a `CoarseView`; SlideReadError without one.

    Attributes:
        rule: the one of this slide.
        doubt: why the rule may be wrong for it, in words for a log; empty where nothing speaks against it.
    """

    def __init__(self, reader: SlideReader, rule: TissueRule) -> None:
        view = CoarseView(reader)
        self.rule = rule.on(view)
        cell = view.cell
        self.cell_px = cell * view.scale
        self.cells = np.zeros((-(-view.rows // cell), -(-view.columns // cell)), np.float32)
        counts = np.zeros(3)  # pixels, coloured ones, and of these those that are no tissue
        for block in view.blocks(read=self.rule.pixels.needs_pixels):
            mask = self.rule.mask(block.image, block.box) > 0
            if self.rule.pixels.bounds_hue:
                coloured = (cv2.inRange(cv2.cvtColor(block.image, cv2.COLOR_RGB2HSV), *_COLOURED) > 0) & (
                    block.weight > 0
                )
                counts += mask.size, np.count_nonzero(coloured), np.count_nonzero(coloured & ~mask)
            padded = np.pad(mask * block.weight, [(0, -length % cell) for length in mask.shape])
            fractions = padded.reshape(padded.shape[0] // cell, cell, -1, cell).mean((1, 3))
            top, left = block.row // cell, block.column // cell
            self.cells[top : top + fractions.shape[0], left : left + fractions.shape[1]] = fractions
        self.doubt = _doubt(rule.name, *counts)
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


def _doubt(name: str, pixels: float, coloured: float, missed: float) -> str:
    if coloured <= _LEAST_COLOURED * pixels or missed <= _MOST_MISSED * coloured:
        return ""
    others = ", ".join(other for other in TISSUE_RULES if other != name)
    found = f"{missed / coloured:.0%} of its coloured pixels are no tissue by the rule '{name}'"
    return f"{found}, as in IHC, dark scans or warm white balance; other rules are {others}"


def log_doubts(doubts: Iterable[tuple[str, str]]) -> None:
    """Warn of slides, with a line for each of the first ones that there is a doubt of."""
    found = [(slide, doubt) for slide, doubt in doubts if doubt]
    for slide, doubt in found[:_DOUBTS_LOGGED]:
        logger.warning("slide '%s': %s", slide, doubt)
    if len(found) > _DOUBTS_LOGGED:
        logger.warning("The same is true of %d more slides.", len(found) - _DOUBTS_LOGGED)


CELL_RULE = TissueRule(min_fraction=0.5)


@dataclass(frozen=True)
class TissueMask:
    """Cells of a slide, each foreground or not."""

    packed: np.ndarray  # uint8 (rows, columns / 8 rounded up), a bit for each cell, as `np.packbits` puts them
    columns: int  # cells of a row
    cell_px: float  # side of a cell in level-0 px

    @classmethod
    def of_map(cls, tissue: TissueMap) -> "TissueMask":
        """Mark the cells of which more than `min_fraction` of the pixels are tissue."""
        cells = tissue.cells > tissue.rule.min_fraction
        return cls(np.packbits(cells, axis=1), tissue.cells.shape[1], tissue.cell_px)

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
        rule = [asdict(self.rule), self.rule.pixels.state(slide)]
        words = json.dumps([_VERSION, slide, size, version, *rule]).encode()
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

"""Which patches show tissue: the HSV rule, and a coarse map that says where it is worth looking."""

from dataclasses import dataclass

import cv2
import numpy as np

from dinov2.data.slides.reader import SlideReader

MAP_CELL_PX = 32  # side of a map cell in level-0 pixels
PEN_LOWER, PEN_UPPER = (90, 90, 0), (125, 255, 255)  # hues of blue ink, saturated as tissue of those is not
MAX_PEN_FRACTION = 0.1
_BLOCK_CELLS = 64  # the map is read in squares of so many cells, to bound memory on slides without a pyramid


@dataclass(frozen=True)
class TissueRule:
    """A pixel is tissue when its OpenCV HSV value lies within the bounds, a patch when enough pixels are.

    Defaults are the ones of Virchow and OpenMidnight: blue to pink hues (0-180), not white, not black.
    `reject_pen` also refuses patches of which more than a tenth is blue ink. Red and purple ink have the hues of
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
        """Estimate the tissue fraction of squares by their left and top edges, (N,), and side in level-0 px.

        Gives float64 (N,) in [0, 1]; edges count to the nearest cell.
        """
        rows, columns = self.cells.shape
        top, left = np.minimum(self._edge(y), rows - 1), np.minimum(self._edge(x), columns - 1)
        bottom = np.clip(self._edge(y + size), top + 1, rows)
        right = np.clip(self._edge(x + size), left + 1, columns)
        corner = self._integral
        total = corner[bottom, right] - corner[top, right] - corner[bottom, left] + corner[top, left]
        return total / ((bottom - top) * (right - left))

    def _edge(self, position: np.ndarray) -> np.ndarray:
        return np.rint(position / self.cell_px).astype(int)

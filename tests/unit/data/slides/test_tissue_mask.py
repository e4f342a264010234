"""Masks against plain counting, outlines against areas."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.measure import block_reduce

from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tissue import CELL_RULE, TissueMap, TissueMask


def mask_of(cells: np.ndarray, cell_px: float = 32.0) -> TissueMask:
    return TissueMask(np.packbits(cells, axis=1), cells.shape[1], cell_px)


def area(ring: list[list[float]]) -> float:
    x, y = np.array(ring).T
    return abs(float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())) / 2


def test_a_cell_is_foreground_when_most_of_its_stored_pixels_are_tissue(
    train_slide: Path, stored_levels: list[np.ndarray]
) -> None:
    mask = TissueMask.of_map(TissueMap(SlideReader(train_slide), CELL_RULE))
    assert mask.cell_px == 32
    means = np.rint(block_reduce(stored_levels[0], (16, 16, 1), np.mean)).astype(np.uint8)
    hsv = cv2.cvtColor(means, cv2.COLOR_RGB2HSV)
    tissue = np.all((hsv >= (90, 8, 103)) & (hsv <= (180, 255, 255)), axis=-1)
    cells = mask.cells()
    height, width = tissue.shape
    assert cells.shape == (-(-height // 2), -(-width // 2)) and 0.1 < cells.mean() < 0.9
    for row, column in np.ndindex(height // 2, width // 2):
        assert cells[row, column] == (tissue[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].sum() > 2)
    np.testing.assert_array_equal(mask.cells(3, 7), cells[3:7])


def test_outlines_enclose_exactly_the_foreground() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        cells = (rng.random(rng.integers(1, 16, 2)) < rng.random()).astype(np.uint8)
        drawn = mask_of(cells, 24.5).geojson()
        assert drawn["type"] == "FeatureCollection"
        rings = [feature["geometry"]["coordinates"] for feature in drawn["features"]]
        assert all(ring[0] == ring[-1] for polygon in rings for ring in polygon)
        enclosed = sum(area(polygon[0]) - sum(map(area, polygon[1:])) for polygon in rings)
        assert enclosed == pytest.approx(cells.sum() * 24.5**2, rel=1e-3)


def test_outlines_lie_in_level_0_pixels() -> None:
    cells = np.zeros((5, 6), np.uint8)
    cells[1:4, 2:5] = 1
    cells[2, 3] = 0
    (feature,) = mask_of(cells).geojson()["features"]
    outer, hole = (sorted(map(tuple, ring[:-1])) for ring in feature["geometry"]["coordinates"])
    assert outer == [(64, 32), (64, 128), (160, 32), (160, 128)]
    assert hole == [(96, 64), (96, 96), (128, 64), (128, 96)]

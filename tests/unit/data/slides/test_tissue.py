"""The tissue rule against another library's HSV, and the coarse map against plain counting."""

from pathlib import Path

import numpy as np
import pytest
from skimage.color import rgb2hsv
from skimage.measure import block_reduce

from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tissue import TissueMap, TissueRule
from dinov2.data.slides.tissue_rules import Hsv
from tests.helpers.slides import MakeSlide, damage_tile


def tissue_by_scikit_image(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels surely within and surely outside the default bounds, one step of 8-bit rounding left open."""
    hsv = rgb2hsv(image) * (180, 255, 255)
    low, high = np.array((90, 8, 103)), np.array((179, 255, 255))  # OpenCV rounds hue 180 to 0, which is red
    within = ((hsv >= low + 1) & (hsv <= high)).all(-1)
    outside = (hsv <= low - 1).any(-1)
    return within, outside


def test_rule_agrees_with_scikit_image_on_all_kinds_of_colours() -> None:
    rng = np.random.default_rng(0)
    greys = np.repeat(rng.integers(0, 256, (100, 256, 1)), 3, axis=2) + rng.integers(-12, 13, (100, 256, 3))
    image = np.concatenate([rng.integers(0, 256, (200, 256, 3)), greys.clip(0, 255)]).astype(np.uint8)
    mask = TissueRule().mask(image) > 0
    within, outside = tissue_by_scikit_image(image)
    assert within.sum() > 10_000 and outside.sum() > 10_000 and (within | outside).mean() > 0.97
    assert mask[within].all() and not mask[outside].any()


@pytest.mark.parametrize(
    ("colour", "tissue"),
    [
        ((225, 150, 190), True),  # eosin
        ((90, 60, 150), True),  # haematoxylin
        ((255, 255, 255), False),
        ((240, 236, 240), False),  # nearly white
        ((0, 0, 0), False),
        ((60, 160, 60), False),  # green ink
        ((150, 100, 50), False),  # DAB
    ],
)
def test_known_colours(colour: tuple[int, int, int], tissue: bool) -> None:
    assert TissueRule().accepts(np.full((8, 8, 3), colour, np.uint8)) is tissue


def test_fraction_must_be_exceeded() -> None:
    image = np.full((10, 10, 3), 255, np.uint8)
    image[:6] = (225, 150, 190)
    assert TissueRule().fraction(image) == 0.6
    assert not TissueRule().accepts(image)
    image[6, 0] = (225, 150, 190)
    assert TissueRule().accepts(image)
    assert TissueRule(min_fraction=0.4).accepts(image)
    assert not TissueRule(options=Hsv.Options(upper=(150, 255, 255))).accepts(image)


@pytest.mark.parametrize(
    ("ink", "refused"),
    [((40, 70, 190), True), ((90, 60, 150), False), ((200, 30, 60), False), ((150, 40, 170), False)],
    ids=["blue pen", "haematoxylin", "red pen", "purple pen"],
)
def test_pen_is_refused_on_request(ink: tuple[int, int, int], refused: bool) -> None:
    """A tenth of the pixels may be blue; red and purple pass, as documented."""
    image = np.full((10, 10, 3), (225, 150, 190), np.uint8)
    image[0] = ink
    assert TissueRule(reject_pen=True).accepts(image)
    image[1, 0] = ink
    assert TissueRule(reject_pen=True).accepts(image) is not refused
    assert TissueRule().accepts(image)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "hsv", "options": {"lower": (90, 8, 300)}},
        {"name": "hsv", "options": {"lower": (200, 8, 103), "upper": (180, 255, 255)}},
        {"name": "mask", "options": {}},
        {"name": "mask", "options": {"folder": "/nowhere"}},
        {"name": "hvs", "options": {}},
        {"min_fraction": 1.0},
        {"min_fraction": -0.1},
    ],
)
def test_impossible_rules_are_refused(options: dict) -> None:
    with pytest.raises(ValueError):
        TissueRule.described({"min_fraction": 0.6} | options)


def coarse_tissue(level: np.ndarray) -> np.ndarray:
    """Tissue in the means of 16 x 16 px of a level, as scikit-image averages them."""
    means = np.rint(block_reduce(level, (16, 16, 1), np.mean)).astype(np.uint8)
    return TissueRule().mask(means) > 0


def test_map_counts_means_of_the_finest_level_that_is_small(train_slide: Path, stored_levels: list[np.ndarray]) -> None:
    tissue = TissueMap(SlideReader(train_slide), TissueRule())
    assert tissue.cell_px == 32
    mask = coarse_tissue(stored_levels[0])
    rng = np.random.default_rng(0)
    column, row = rng.integers(0, 60, 50), rng.integers(0, 45, 50)
    counted = [mask[2 * r : 2 * r + 14, 2 * c : 2 * c + 14].mean() for c, r in zip(column, row, strict=True)]
    np.testing.assert_allclose(tissue.fraction(column * 32.0, row * 32.0, 224.0), counted, atol=1e-6)


def test_map_covers_odd_sizes_and_ignores_missing_tiles(make_slide: MakeSlide, tmp_path: Path) -> None:
    pink = np.full((2304 + 17, 300, 3), (225, 150, 190), np.uint8)  # taller than what is read at once
    whole = make_slide("odd.svs", image=pink)
    tissue = TissueMap(SlideReader(whole), TissueRule())
    assert tissue.cells.shape == (73, 10)
    assert (tissue.cells[:72, :9] == 1).all()
    assert tissue.cells[72, 0] == pytest.approx(17 / 32) and tissue.cells[0, 9] == pytest.approx(12 / 32)
    hole = TissueMap(SlideReader(damage_tile(whole, tmp_path / "hole.svs", 0, empty=True)), TissueRule())
    assert (hole.cells[:8, :8] == 0).all() and (hole.cells[8:72, :8] == 1).all()


def test_squares_smaller_than_a_cell_find_one(train_slide: Path) -> None:
    tissue = TissueMap(SlideReader(train_slide), TissueRule())
    edges = np.array([0.0, 1000.0, 2303.0])
    assert tissue.fraction(edges, np.array([0.0, 800.0, 1775.0]), 1.0).shape == (3,)

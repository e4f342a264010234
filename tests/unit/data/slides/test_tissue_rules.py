"""Rules of tissue by name: Otsu and masks of the users' against scikit-image, and pyramids of every depth."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.color import rgb2hsv
from skimage.draw import polygon2mask
from skimage.filters import threshold_otsu
from skimage.measure import block_reduce

from dinov2.data.slides.coarse import Box, CoarseView
from dinov2.data.slides.errors import SlideError
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tissue import TissueCache, TissueMap, TissueRule, add_rule_options, rule_of_options
from dinov2.data.slides.tissue_rules import Given, Hsv, Otsu
from dinov2.extensions import TISSUE_RULES
from tests.helpers.slides import MakeSlide, damage_tile

PINK, BROWN, GLASS, SALMON = (225, 150, 190), (150, 100, 50), (244, 242, 240), (230, 160, 140)


def painted(colour: tuple[int, int, int], shape: tuple[int, int] = (1024, 768)) -> np.ndarray:
    """Glass with a disc of a colour, and noise."""
    y, x = np.indices(shape)
    inside = (y - shape[0] / 2) ** 2 + (x - shape[1] / 2) ** 2 < 250**2
    noise = np.random.default_rng(0).integers(-6, 7, (*shape, 3))
    return (np.where(inside[..., None], colour, GLASS) + noise).clip(0, 255).astype(np.uint8)


def pyramid(path: Path, image: np.ndarray, levels: int) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for _ in range(levels):
            size = f"{image.shape[1]}x{image.shape[0]}"
            tiff.write(image, tile=(256, 256), compression="jpeg", photometric="rgb", metadata=None, software=None,
                       description=f"Aperio Image Library v12\r\n{size} (256x256)|AppMag = 20|MPP = 0.5")  # fmt: skip
            height, width = image.shape[:2]
            image = np.asarray(Image.fromarray(image).resize((max(1, width // 2), max(1, height // 2)), Image.BOX))
    return path


@pytest.mark.parametrize("rule", ["hsv", "otsu"])
def test_tissue_is_the_same_whatever_the_depth_of_the_pyramid(tmp_path: Path, rule: str) -> None:
    rng = np.random.default_rng(1)
    faint = cv2.resize(rng.integers(0, 256, (16, 16), np.uint8), (1024, 1024), interpolation=cv2.INTER_CUBIC)[..., None]
    image = faint / 255 * np.array(PINK) + (1 - faint / 255) * np.array(GLASS) + rng.integers(-9, 10, (1024, 1024, 3))
    slides = [pyramid(tmp_path / f"{n}.svs", image.clip(0, 255).astype(np.uint8), n) for n in (1, 2, 3, 5, 6, 8, 11)]
    maps = [TissueMap(SlideReader(slide), TissueRule(rule)).cells for slide in slides]
    assert 0.05 < maps[0].mean() < 0.99
    for cells in maps[1:]:
        np.testing.assert_array_equal(cells, maps[0])


def test_a_level_beyond_the_limit_is_never_looked_at_and_bigger_ones_are_averaged(tmp_path: Path, monkeypatch) -> None:
    """As of slides whose fine levels have too many pixels to be read."""
    monkeypatch.setattr("dinov2.data.slides.coarse._MOST_PIXELS", 0)
    monkeypatch.setattr("dinov2.data.slides.coarse._BLOCK", 20)
    image = painted(PINK)
    for levels, scale in ((1, 1), (3, 4), (5, 16), (9, 16)):
        reader = SlideReader(pyramid(tmp_path / f"{levels}.svs", image, levels))
        view = CoarseView(reader)
        assert view.scale == 16
        with tifffile.TiffFile(reader.path) as tiff:
            stored = tiff.pages[int(np.log2(scale))].asarray()
        expected = block_reduce(stored, (16 // scale, 16 // scale, 1), np.mean)
        seen = np.zeros_like(expected)
        for block in view.blocks():
            assert max(block.image.shape) <= 20 and (block.weight == 1).all()
            height, width = block.weight.shape
            seen[block.row : block.row + height, block.column : block.column + width] = block.image
            assert block.box == (16 * block.column, 16 * block.row, 16 * width, 16 * height)
        np.testing.assert_allclose(seen, expected, atol=0.51)


def test_means_are_over_the_pixels_that_are_known(make_slide: MakeSlide) -> None:
    image = np.full((41, 50, 3), PINK, np.uint8)
    [block] = CoarseView(SlideReader(make_slide("odd.svs", image=image))).blocks()
    assert block.image.shape == (3, 4, 3) and np.abs(block.image.astype(int) - PINK).max() <= 20  # not mixed with black
    np.testing.assert_allclose(block.weight[2], [9 / 16, 9 / 16, 9 / 16, 9 / 16 * 2 / 16], atol=1e-6)


@pytest.mark.parametrize("colour", [PINK, BROWN, SALMON])
def test_otsu_agrees_with_scikit_image_in_any_stain(make_slide: MakeSlide, colour: tuple[int, int, int]) -> None:
    slide = make_slide("s.svs", image=painted(colour))
    tissue = TissueMap(SlideReader(slide), TissueRule("otsu"))
    with tifffile.TiffFile(slide) as tiff:
        means = np.rint(block_reduce(tiff.pages[0].asarray(), (16, 16, 1), np.mean)).astype(np.uint8)
    saturation = np.rint(rgb2hsv(means)[..., 1] * 255)
    cells = block_reduce(saturation > threshold_otsu(saturation), (2, 2), np.mean)
    assert 0.1 < cells.mean() < 0.9
    assert np.count_nonzero(tissue.cells != cells) <= 2  # where a saturation is rounded otherwise
    inside = np.full((64, 64, 3), colour, np.uint8)
    assert tissue.rule.accepts(inside) and not tissue.rule.accepts(np.full((64, 64, 3), GLASS, np.uint8))


def test_otsu_on_blank_glass_and_black_borders(make_slide: MakeSlide) -> None:
    blank = (np.array(GLASS) + np.random.default_rng(0).integers(0, 2, (512, 512, 3))).astype(np.uint8)
    assert not TissueMap(SlideReader(make_slide("blank.svs", image=blank)), TissueRule("otsu")).cells.any()
    even = np.full((512, 512, 3), 240, np.uint8)
    assert not TissueMap(SlideReader(make_slide("even.svs", image=even)), TissueRule("otsu")).cells.any()
    image = painted(PINK)
    image[:, :128] = (9, 2, 0)
    cells = TissueMap(SlideReader(make_slide("border.svs", image=image)), TissueRule("otsu")).cells
    assert not cells[:, :3].any() and cells[16, 12] == 1
    fixed = TissueRule("otsu", Otsu.Options(saturation=200))
    assert not TissueMap(SlideReader(make_slide("fixed.svs", image=image)), fixed).cells.any()


def test_all_is_tissue_without_a_rule(make_slide: MakeSlide) -> None:
    slide = make_slide("s.svs", image=np.full((512, 530, 3), 255, np.uint8))
    tissue = TissueMap(SlideReader(slide), TissueRule("none"))
    assert tissue.fraction(np.array([0.0, 300.0]), np.array([0.0, 280.0]), 224.0).tolist() == [1, 1]
    assert tissue.rule.accepts(np.zeros((8, 8, 3), np.uint8))


RING = [[100, 200], [600, 150], [700, 800], [200, 900], [100, 200]]
HOLE = [[300, 400], [300, 600], [500, 600], [500, 400], [300, 400]]
ISLAND = [[20, 20], [90, 20], [90, 90], [20, 90], [20, 20]]
POLYGON = {"type": "Polygon", "coordinates": [RING, HOLE]}
SQUARE = {"type": "Polygon", "coordinates": [ISLAND]}
FEATURES = [{"type": "Feature", "properties": {"name": "x"}, "geometry": each} for each in (POLYGON, SQUARE)]
MULTI = {"type": "MultiPolygon", "coordinates": [POLYGON["coordinates"], SQUARE["coordinates"]]}


def drawn() -> np.ndarray:
    """The polygons as scikit-image fills them, bool (1024, 768)."""
    rings = [polygon2mask((1024, 768), np.array(ring)[:, ::-1] - 0.5) for ring in (RING, HOLE, ISLAND)]
    return (rings[0] & ~rings[1]) | rings[2]


def write_mask(folder: Path, name: str, form: str) -> None:
    folder.mkdir(exist_ok=True)
    mask = drawn()
    if form == "json":
        kinds = {"collection": {"type": "FeatureCollection", "features": FEATURES}, "list": FEATURES, "multi": MULTI}
        kinds["geometries"] = {"type": "GeometryCollection", "geometries": [POLYGON, SQUARE]}
        (folder / name.partition("@")[0]).write_text(json.dumps(kinds[name.partition("@")[2]]))
        return
    images = {
        "grey": mask.astype(np.uint8), "white": mask.astype(np.uint8) * 255, "bool": mask,
        "rgb": mask[..., None] * np.array((0, 0, 255), np.uint8), "wide": mask.astype(np.uint16) * 700,
        "small": cv2.resize(mask.astype(np.uint8) * 255, (384, 512), interpolation=cv2.INTER_NEAREST),
        "alpha": np.dstack([np.full((*mask.shape, 3), 200, np.uint8), mask.astype(np.uint8) * 255]),
    }  # fmt: skip
    Image.fromarray(images[form]).save(folder / name)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("s.geojson@collection", "json"), ("s.json@list", "json"), ("s.svs.geojson@multi", "json"),
        ("s.geojson@geometries", "json"), ("s.png", "grey"), ("s.png", "white"), ("s_mask.png", "bool"),
        ("s-mask.tif", "rgb"), ("s.tiff", "wide"), ("s.png", "alpha"), ("s.png", "small"),
    ],
)  # fmt: skip
def test_masks_of_the_users(make_slide: MakeSlide, tmp_path: Path, name: str, form: str) -> None:
    """On the map, and exactly on a tile."""
    slide = make_slide("s.svs", image=np.full((1024, 768, 3), 255, np.uint8))
    write_mask(tmp_path / "masks", name, form)
    rule = TissueRule("mask", Given.Options(str(tmp_path / "masks")))
    tissue = TissueMap(SlideReader(slide), rule)
    expected = drawn()
    np.testing.assert_allclose(tissue.cells, block_reduce(expected, (32, 32), np.mean), atol=0.76)
    assert abs(tissue.cells.mean() - expected.mean()) < 0.01
    for x, y, side, size in ((200, 300, 224, 224), (10, 10, 100, 100), (90, 180, 448, 224)):
        found = tissue.rule.mask(np.zeros((size, size, 3), np.uint8), Box(x, y, side, side)) > 0
        wanted = block_reduce(expected[y : y + side, x : x + side], (side // size, side // size), np.max)
        assert (found != wanted).mean() < 0.03
    assert np.count_nonzero(tissue.rule.mask(np.zeros((8, 8, 3), np.uint8), Box(350, 450, 100, 100))) == 0


def test_a_slide_in_one_piece_is_no_mask_of_itself(tmp_path: Path) -> None:
    Image.new("RGB", (768, 1024), "white").save(tmp_path / "s.png")
    write_mask(tmp_path, "s_mask.png", "white")
    tissue = TissueMap(SlideReader(tmp_path / "s.png"), TissueRule("mask", Given.Options(str(tmp_path))))
    assert tissue.cells.mean() == pytest.approx(drawn().mean(), abs=0.01)


def test_masks_that_cannot_be_used_are_named(make_slide: MakeSlide, tmp_path: Path) -> None:
    slide, folder = make_slide("s.svs"), tmp_path / "masks"
    folder.mkdir()
    rule = TissueRule("mask", Given.Options(str(folder)))
    reader = SlideReader(slide)
    shapes = (
        [[]],
        [[[0, 0], [float("nan"), 0], [9, 9]]],
        [[[0, 0], [0.5, 0], [0.5, 1]]],
        [[[600, 600], [700, 700], [600, 700]]],
    )
    outside = [json.dumps({"type": "Polygon", "coordinates": rings}).encode() for rings in ([], *shapes)]
    none = b'{"type": "FeatureCollection", "features": []}'
    for content in (b"", b"{}", none, b"[1]", b'{"type": "Polygon"}', *outside):
        (folder / "s.geojson").write_bytes(content)
        with pytest.raises(SlideError):
            TissueMap(reader, rule)
    (folder / "s.geojson").unlink()
    with pytest.raises(SlideError):
        TissueMap(reader, rule)
    Image.new("L", (100, 200)).save(folder / "s.png")  # of other proportions than the slide
    with pytest.raises(SlideError):
        TissueMap(reader, rule)
    (folder / "s.geojson").write_text(
        json.dumps({"type": "Polygon", "coordinates": [[[-1e12, -1e12], [1e12, -1e12], [1e12, 1e12], [-1e12, 1e12]]]})
    )
    assert TissueMap(reader, rule).cells.all()
    (folder / "s.geojson").unlink()
    stems = {TissueCache(tmp_path, rule).stem(str(slide), 1, "")}
    Image.new("L", (100, 100), 255).save(folder / "s.png")
    assert TissueMap(reader, rule).cells.all()
    stems |= {TissueCache(tmp_path, each).stem(str(slide), 1, "") for each in (rule, TissueRule(), TissueRule("otsu"))}
    assert len(stems) == 4  # a changed mask is another tissue


@pytest.mark.parametrize(
    ("colour", "doubtful"), [(PINK, False), (BROWN, True), (SALMON, True), ((70, 40, 70), True), (GLASS, False)]
)
def test_slides_whose_colours_lie_outside_the_rule_are_doubted(make_slide: MakeSlide, colour, doubtful: bool) -> None:
    """IHC, warm white balance, dark scan."""
    reader = SlideReader(make_slide("s.svs", image=painted(colour)))
    doubt = TissueMap(reader, TissueRule()).doubt
    assert bool(doubt) is doubtful
    assert all(name in doubt for name in TISSUE_RULES) or not doubtful
    assert not TissueMap(reader, TissueRule("otsu")).doubt


def test_rules_survive_their_description_and_older_ones() -> None:
    for rule in (TissueRule(), TissueRule("otsu", Otsu.Options(floor=12), 0.3, True), TissueRule("none")):
        assert TissueRule.described(json.loads(json.dumps(asdict(rule)))) == rule
    older = {"lower": [90, 8, 100], "upper": [170, 255, 255], "min_fraction": 0.5, "reject_pen": True}
    expected = TissueRule("hsv", Hsv.Options((90, 8, 100), (170, 255, 255)), 0.5, True)
    assert TissueRule.described(older) == expected


def test_flags_of_every_rule() -> None:
    parser = argparse.ArgumentParser()
    add_rule_options(parser)
    assert rule_of_options(parser.parse_args([])) == TissueRule()
    given = parser.parse_args(["--tissue", "otsu", "--otsu-saturation", "30"])
    assert rule_of_options(given, 0.2) == TissueRule("otsu", Otsu.Options(saturation=30), 0.2)
    bounds = parser.parse_args(["--hsv-lower", "100", "9", "90"])
    assert rule_of_options(bounds).options == Hsv.Options(lower=(100, 9, 90))
    for wrong in (["--tissue", "hvs"], ["--tissue", "mask"], ["--tissue", "otsu", "--otsu-floor", "300"]):
        with pytest.raises(ValueError):
            rule_of_options(parser.parse_args(wrong))


def test_what_cannot_be_decoded_is_no_tissue_and_does_not_cost_the_slide(make_slide: MakeSlide, tmp_path: Path) -> None:
    whole = make_slide("s.svs", image=np.full((1024, 1024, 3), PINK, np.uint8))
    cells = TissueMap(SlideReader(damage_tile(whole, tmp_path / "bad.svs", 5, empty=False)), TissueRule()).cells
    expected = np.ones((32, 32))
    expected[8:16, 8:16] = 0  # tile 5 of 4 x 4
    np.testing.assert_array_equal(cells, expected)
    one = make_slide("one.svs", image=np.full((256, 256, 3), PINK, np.uint8))
    with pytest.raises(SlideError):
        TissueMap(SlideReader(damage_tile(one, tmp_path / "none.svs", 0, empty=False)), TissueRule())

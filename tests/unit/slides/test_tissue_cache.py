"""Masks against plain counting, outlines against areas, the cache against change and damage, and lists of slides."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from dinov2.data.online.prepare import Dropped, OnlineSlide, PatchOptions, SlideJob, load_plan, prepare_slide
from dinov2.data.online.tissue_mask import CELL_RULE, TissueCache, TissueMask
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.resolution import MppTable
from dinov2.data.slides.table import SlideRow, read_slide_table, take_share
from dinov2.data.slides.tissue import TissueRule
from tests.unit.slides.conftest import MakeSlide


def mask_of(cells: np.ndarray, cell_px: float = 32.0) -> TissueMask:
    return TissueMask(np.packbits(cells, axis=1), cells.shape[1], cell_px)


def area(ring: list[list[float]]) -> float:
    x, y = np.array(ring).T
    return abs(float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())) / 2


def job(path: Path, folder: Path, mpp: float | None = None, rule: TissueRule = CELL_RULE) -> SlideJob:
    return SlideJob(SlideRow(str(path), mpp=mpp), TissueCache(folder, rule), PatchOptions())


def test_a_cell_is_foreground_when_most_of_its_stored_pixels_are_tissue(
    train_slide: Path, stored_levels: list[np.ndarray]
) -> None:
    mask = TissueMask.of_slide(SlideReader(train_slide), CELL_RULE)
    assert mask.cell_px == 32  # 8 px of the coarsest level, 4 times smaller
    hsv = cv2.cvtColor(stored_levels[-1], cv2.COLOR_RGB2HSV)
    tissue = np.all((hsv >= (90, 8, 103)) & (hsv <= (180, 255, 255)), axis=-1)
    cells = mask.cells()
    height, width = tissue.shape
    assert cells.shape == (-(-height // 8), -(-width // 8)) and 0.1 < cells.mean() < 0.9
    for row, column in np.ndindex(height // 8, width // 8):
        block = tissue[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert cells[row, column] == (block.sum() > 32)
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


def test_a_slide_is_examined_once_and_again_when_it_or_the_rule_changes(
    make_slide: MakeSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, folder, examined = make_slide("a.svs", "|MPP = 0.25"), tmp_path / "cache", []
    original = TissueMask.of_slide
    monkeypatch.setattr(TissueMask, "of_slide", lambda *args: examined.append(1) or original(*args))
    first = prepare_slide(job(slide, folder))
    assert (
        isinstance(first, OnlineSlide)
        and prepare_slide(job(slide, folder)).key == first.key
        and len(examined) == 1
    )
    os.utime(slide, ns=(1, 1))
    assert prepare_slide(job(slide, folder)).stem != first.stem and len(examined) == 2
    stricter = TissueRule(min_fraction=0.9)
    assert prepare_slide(job(slide, folder, rule=stricter)).stem.parent == folder and len(examined) == 3
    assert not list(folder.glob("*.part*"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"no zip at all"])
def test_damaged_cache_files_are_made_again(make_slide: MakeSlide, tmp_path: Path, content: bytes) -> None:
    slide, folder = make_slide("a.svs", "|MPP = 0.25"), tmp_path / "cache"
    first = prepare_slide(job(slide, folder))
    for path in folder.glob("*.npz"):
        path.write_bytes(content)
    again = prepare_slide(job(slide, folder))
    assert (again.stem, again.key, again.places) == (first.stem, first.key, first.places)
    plan = load_plan(again, 0.4)
    assert plan.mask.cells().all() and len(plan.positions[0]) == (512 - 224 + 1) ** 2
    assert plan.index.levels[0].lengths.shape == (2, 2)


def test_a_shared_folder_holds_whole_files_only(make_slide: MakeSlide, tmp_path: Path) -> None:
    slides = [make_slide(f"{name}.svs", "|MPP = 0.5") for name in "ab"]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(prepare_slide, [job(slide, tmp_path / "shared") for slide in slides] * 6))
    alone = [prepare_slide(job(slide, tmp_path / "own")).key for slide in slides]
    assert [slide.key for slide in made] == alone * 6
    names = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == names and len(names) == 8
    outlines = [json.loads(path.read_text()) for path in (tmp_path / "shared").glob("*.geojson")]
    assert [len(outline["features"]) for outline in outlines] == [1, 1]


def test_slides_that_give_nothing_say_why(make_slide: MakeSlide, tmp_path: Path) -> None:
    white, text = np.full((512, 512, 3), 255, np.uint8), tmp_path / "text.svs"
    pink = np.full((64, 64, 3), (225, 150, 190), np.uint8)
    text.write_text("not a slide")
    for path, mpp, reason, unreadable in (
        (make_slide("white.svs", "|MPP = 0.25", white), None, "shows no tissue", False),
        (make_slide("mute.svs"), None, "its resolution is unknown", False),
        (make_slide("coarse.svs", "|MPP = 3"), None, "coarser than every resolution", False),
        (make_slide("small.svs", "|MPP = 0.25", pink), None, "no patch", False),
        (tmp_path / "missing.svs", None, "No such file", True),
        (text, None, "not a", True),
    ):  # fmt: skip
        made = prepare_slide(job(path, tmp_path / "cache", mpp))
        assert isinstance(made, Dropped) and reason in made.reason, made
        assert made.path == str(path) and made.unreadable is unreadable


def test_mpp_comes_from_the_slide_then_its_power_then_the_table(
    make_slide: MakeSlide, tmp_path: Path
) -> None:
    for name, properties, given, source, side in (
        ("a.svs", "|AppMag = 20|MPP = 0.25", 0.5, "slide", 224),
        ("b.svs", "|AppMag = 40", 0.5, "appmag", 224),
        ("c.svs", "", 0.125, "user", 448),
    ):
        made = prepare_slide(job(make_slide(name, properties), tmp_path / "cache", given))
        assert (made.mpp_source, made.geometries[0].mpp, made.geometries[0].side) == (source, 0.25, side)


def test_slides_are_listed_from_folders_texts_and_tables(tmp_path: Path) -> None:
    for name in ("b/2.TIFF", "a.svs", "notes.md", ".hidden.svs"):
        (tmp_path / "slides" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "slides" / name).touch()
    found = read_slide_table(tmp_path / "slides")
    assert found == [SlideRow(str(tmp_path / "slides" / name)) for name in ("a.svs", "b/2.TIFF")]
    text = tmp_path / "list.txt"
    text.write_text("# comment\n\n/x/with space.svs\ns3://bucket/y.svs\nslides/a.svs\n")
    assert sorted(row.path for row in read_slide_table(text)) == sorted([
        str(tmp_path / "slides/a.svs"), "/x/with space.svs", "s3://bucket/y.svs"])  # fmt: skip
    table = tmp_path / "table.csv"
    table.write_text("slide,tumour,mpp\n/x/1.svs,2.5,0.25\n/x/0.svs,1,\n/x/2.svs,0,0.5\n")
    rows = read_slide_table(table, "tumour", mpp_table=MppTable({"0": 0.5}, {}))
    assert rows == [SlideRow("/x/0.svs", 1.0, 0.5), SlideRow("/x/1.svs", 2.5, 0.25)]


@pytest.mark.parametrize(
    ("name", "content", "weight", "message"),
    [
        ("a.csv", "slide,w\nx,-1\n", "w", "'-1' in line 2 of .* is no number from 0"),
        ("a.csv", "slide,w\nx,nan\n", "w", "'nan' in line 2"),
        ("a.csv", "slide,mpp\nx,40\n", "", "'40' in line 2 .* from 0.1 to 4"),
        ("a.csv", "slide,w\nx,1\n", "weight", "'weight' is expected"),
        ("a.csv", "file\nx\n", "", "'path' or 'slide' is expected"),
        ("a.csv", "slide,w\nx,0\n", "w", "lists no slide"),
        ("a.txt", "x.svs\nx.svs\n", "", "lists slide '.*x.svs' twice"),
        ("a.txt", "#\n", "", "lists no slide"),
        ("a.txt", "x.svs\n", "w", "is no .csv file"),
    ],
)
def test_impossible_lists_are_refused(
    tmp_path: Path, name: str, content: str, weight: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_slide_table(tmp_path / name, weight)


def test_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no slides at .*nowhere"):
        read_slide_table(tmp_path / "nowhere")


def test_shares_of_slides_are_nested_and_do_not_depend_on_the_folder() -> None:
    rows = [SlideRow(f"/a/{i}.svs") for i in range(200)]
    one, ten, half = (take_share(rows, share, 7) for share in (0.001, 0.1, 0.5))
    assert (len(one), len(ten), len(half)) == (1, 20, 100)
    assert set(one) < set(ten) < set(half) and take_share(rows, 1.0, 7) == rows
    moved = take_share([SlideRow(f"/b/c/{i}.svs") for i in range(200)], 0.1, 7)
    assert [Path(row.path).name for row in moved] == [Path(row.path).name for row in ten]
    assert take_share(rows, 0.1, 8) != ten
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie within \(0, 1\]"):
            take_share(rows, share, 7)


@pytest.mark.parametrize(
    "options",
    [
        {"mpps": (0.5, 1.0), "weights": (1.0,)},
        {"mpps": (0.5, 0.5), "weights": (1.0, 1.0)},
        {"mpps": (), "weights": ()},
        {"mpps": (0.5,), "weights": (0.0,)},
        {"mpps": (float("inf"),), "weights": (1.0,)},
        {"tile_size": 0},
        {"min_foreground": 1.5},
    ],
)
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"Resolutions|tile size"):
        PatchOptions(**options)

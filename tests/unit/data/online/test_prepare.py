"""Slides made ready: the cache against change and damage, slides that give nothing, and whose word counts."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.online.prepare import Dropped, OnlineSlide, TileOptions, load_plan, prepare_slide
from dinov2.data.slides.find import SlideRow, find_slides
from dinov2.data.slides.index import complete_tile_index
from dinov2.data.slides.tissue import CELL_RULE, TissueCache, TissueMask, TissueRule
from tests.helpers.slides import MakeSlide


def job(path: Path, folder: Path, mpp: float | None = None, rule: TissueRule = CELL_RULE) -> tuple:
    return TissueCache(folder, rule), TileOptions(), SlideRow(str(path), mpp=mpp)


def test_a_slide_is_examined_once_and_again_when_it_or_the_rule_changes(
    make_slide: MakeSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, folder, examined = make_slide("a.svs", "|MPP = 0.25"), tmp_path / "cache", []
    original = TissueMask.of_map
    monkeypatch.setattr(TissueMask, "of_map", lambda *args: examined.append(1) or original(*args))
    first = prepare_slide(*job(slide, folder))
    assert isinstance(first, OnlineSlide) and prepare_slide(*job(slide, folder)).key == first.key and len(examined) == 1
    os.utime(slide, ns=(1, 1))
    assert prepare_slide(*job(slide, folder)).stem != first.stem and len(examined) == 2
    stricter = TissueRule(min_fraction=0.9)
    assert prepare_slide(*job(slide, folder, rule=stricter)).stem.parent == folder and len(examined) == 3
    assert not list(folder.glob("*.part*"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"no zip at all"])
def test_corrupt_cache_files_are_made_again(make_slide: MakeSlide, tmp_path: Path, content: bytes) -> None:
    slide, folder = make_slide("a.svs", "|MPP = 0.25"), tmp_path / "cache"
    first = prepare_slide(*job(slide, folder))
    corrupt = [path for path in folder.iterdir() if path.suffix in (".npz", ".tiles")]
    assert len(corrupt) == 3
    for path in corrupt:
        path.write_bytes(content)
    again = prepare_slide(*job(slide, folder))
    assert (again.stem, again.key, again.counts) == (first.stem, first.key, first.counts)
    plan = load_plan(again, 0.4)
    assert plan.mask.cells().all() and len(plan.positions[0]) == (512 - 224 + 1) ** 2
    assert plan.index.levels[0].lengths.shape == (2, 2)


def test_a_shared_folder_holds_whole_files_only(make_slide: MakeSlide, tmp_path: Path) -> None:
    slides = [make_slide(f"{name}.svs", "|MPP = 0.5") for name in "ab"]
    with ThreadPoolExecutor(6) as pool:
        made = list(
            pool.map(lambda made: prepare_slide(*made), [job(slide, tmp_path / "shared") for slide in slides] * 6)
        )
    alone = [prepare_slide(*job(slide, tmp_path / "own")).key for slide in slides]
    assert [slide.key for slide in made] == alone * 6
    names = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == names and len(names) == 8
    outlines = [json.loads(path.read_text()) for path in (tmp_path / "shared").glob("*.geojson")]
    assert [len(outline["features"]) for outline in outlines] == [1, 1]


def test_a_tile_index_saves_the_parsing(make_slide: MakeSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index tells of a slide's mpp too, where its user told it."""
    told, own = make_slide("a.svs"), make_slide("b.svs", "|MPP = 0.25")
    expected = [prepare_slide(*job(told, tmp_path / "one", 0.5)), prepare_slide(*job(own, tmp_path / "one"))]
    complete_tile_index(tmp_path / "tiles.index", {str(told): 0.5, str(own): None}, 1)
    rows = find_slides(tmp_path / "tiles.index").slides
    assert rows == [SlideRow(str(told), mpp=0.5), SlideRow(str(own))]
    monkeypatch.setattr("dinov2.data.online.prepare.index_slide", None)
    monkeypatch.setattr("dinov2.data.slides.reader.index_slide", None)
    cache = TissueCache(tmp_path / "two")
    for _ in range(2):  # examined, then recalled
        made = [prepare_slide(cache, TileOptions(), row) for row in rows]
        for slide, same in zip(made, expected, strict=True):
            assert (slide.key, slide.counts, slide.tile_bytes) == (same.key, same.counts, same.tile_bytes)
            index, other = load_plan(slide, 0.4).index, load_plan(same, 0.4).index
            np.testing.assert_array_equal(index.levels[0].offsets, other.levels[0].offsets)
    assert not list((tmp_path / "two").glob("*.tiles"))


def test_slides_that_give_nothing_say_why(make_slide: MakeSlide, tmp_path: Path) -> None:
    white, text = np.full((512, 512, 3), 255, np.uint8), tmp_path / "text.svs"
    pink = np.full((64, 64, 3), (225, 150, 190), np.uint8)
    text.write_text("not a slide")
    for path, mpp, reason, unreadable in (
        (make_slide("white.svs", "|MPP = 0.25", white), None, "shows no tissue", False),
        (make_slide("mute.svs"), None, "its resolution is unknown", False),
        (make_slide("coarse.svs", "|MPP = 3"), None, "coarser than every resolution", False),
        (make_slide("small.svs", "|MPP = 0.25", pink), None, "64x64", False),
        (tmp_path / "missing.svs", None, "No such file", True),
        (text, None, "not a", True),
    ):  # fmt: skip
        made = prepare_slide(*job(path, tmp_path / "cache", mpp))
        assert isinstance(made, Dropped) and reason in made.reason, made
        assert made.path == str(path) and made.unreadable is unreadable


def test_mpp_comes_from_the_table_then_the_slide_then_its_power(make_slide: MakeSlide, tmp_path: Path) -> None:
    for name, properties, given, source, side in (
        ("a.svs", "|AppMag = 20|MPP = 0.25", None, "slide", 224),
        ("b.svs", "|AppMag = 40", None, "appmag", 224),
        ("c.svs", "", 0.125, "user", 448),
        ("a.svs", "|AppMag = 20|MPP = 0.25", 0.125, "user", 448),  # from the cache
        ("d.svs", "|MPP = 0.2525", None, "slide", 222),  # within the tolerance
    ):
        made = prepare_slide(*job(make_slide(name, properties), tmp_path / "cache", given))
        assert (made.mpp_source, made.geometries[0].mpp, made.geometries[0].side) == (source, 0.25, side)
        assert bool(made.mpp_notes) == (name == "a.svs" and given is not None)

"""Previews: what they show, which files they replace, and that a restarted run draws those that are missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from PIL import Image

from dinov2.data.prepare.draw import Sampling, SlideDraw, SlideJob, draw_from_slide
from dinov2.data.prepare.preview import MARK, preview_figure, preview_mark, thumbnail
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tissue import TissueRule
from prepatching_scripts.create_sample_dataset_txt import main
from tests.helpers.slides import MakeSlide, damage_tile


def create(source: Path, output: Path, folder: Path, *options: str) -> int:
    return main([str(source), "--output", str(output), "--workers", "1", "--preview", str(folder), *options])


def test_thumbnail_is_the_level_shrunk_by_averaging(train_slide: Path, stored_levels: list[np.ndarray]) -> None:
    """Level 1, 1152 px wide, is the coarsest of at least 1000 px and is shown as it is."""
    image, scale = thumbnail(SlideReader(train_slide))
    np.testing.assert_array_equal(image, stored_levels[1])
    assert scale == 2


def test_thumbnail_of_a_large_level(make_slide: MakeSlide, tmp_path: Path) -> None:
    """3200x2304 px, of which tile 0 is missing: read in blocks, halved, then made 1500 px wide."""
    ramp = np.zeros((2304, 3200, 3), np.uint8) + np.linspace(40, 240, 3200).astype(np.uint8)[:, None]
    whole = make_slide("s.svs", image=ramp)
    image, scale = thumbnail(SlideReader(damage_tile(whole, tmp_path / "hole.svs", 0, empty=True)))
    assert image.shape == (1080, 1500, 3) and scale == pytest.approx(3200 / 1500)
    assert (image[:118, :118] == 225).all(), "what is missing is grey"
    expected = np.linspace(40, 240, 1500)[None, :, None]
    assert np.abs(image[125:].astype(float) - expected).max() < 4


def test_squares_lie_where_the_tiles_are(train_slide: Path) -> None:
    """Sides: 224 px of 0.5 um are 448 level-0 px of 0.25 um."""
    sampling = Sampling(TissueRule(), 0, None, 5, None, 224, (0.2, 0.5, 1.0))
    job = SlideJob(str(train_slide), "s", sampling)
    draw = draw_from_slide(job)
    figure = preview_figure(SlideReader(train_slide), job, draw)
    [axis] = figure.axes
    drawn = {}
    for squares in axis.collections:
        if isinstance(squares, PolyCollection):
            corners = np.array([path.vertices[:4] for path in squares.get_paths()])
            side = np.ptp(corners[:, :, 0], axis=1)
            assert 0 < squares.get_facecolor()[0, 3] < squares.get_edgecolor()[0, 3] < 1, "tissue shows through"
            drawn[int(side[0])] = sorted(map(tuple, corners[:, 0].astype(int).tolist()))
            assert (side == side[0]).all() and (np.ptp(corners[:, :, 1], axis=1) == side[0]).all()
    assert drawn == {
        side: sorted((x, y) for x, y, level in draw.rows.tolist() if level == at) for side, at in ((448, 1), (896, 2))
    }
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["tissue map", "0.5 µm/px (20x) from level 1: 5", "1 µm/px (10x) from level 2: 5",
                     "0.2 µm/px (50x): none"]  # fmt: skip
    title = figure.texts[0].get_text()
    assert title == "demo_train.svs\n2,304 x 1,776 px, 0.25 µm/px (slide); 10 tiles"
    bounds = axis.get_xlim(), axis.get_ylim()
    assert bounds == ((0, 2304), (1776, 0))


def test_slide_without_tissue_or_mpp_is_shown_too(make_slide: MakeSlide) -> None:
    blank = make_slide("blank.svs", image=np.full((300, 300, 3), 255, np.uint8))
    job = SlideJob(str(blank), "blank", Sampling(TissueRule(), 0, None, 5, None, 224))
    figure = preview_figure(SlideReader(blank), job, SlideDraw(failure="no tile passed the tissue rule"))
    figure.canvas.draw()
    assert "mpp unknown; no tile passed" in figure.texts[0].get_text()


def test_previews_of_a_run(train_slide: Path, make_slide: MakeSlide, tmp_path: Path, caplog) -> None:
    make_slide("slides/deep er/flat.svs")
    (tmp_path / "slides" / "train.svs").symlink_to(train_slide)
    (tmp_path / "slides" / "page.svs").write_text("<html>")
    folder, options = tmp_path / "previews", ("--per-level", "4", "--max-failed-share", "0.5")
    assert create(tmp_path / "slides", tmp_path / "list", folder, *options) == 0
    pictures = [folder / "deep er" / "flat.svs.png", folder / "train.svs.png"]
    page = folder / "index.html"
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted([*pictures, page])
    assert re.findall(r'src="([^"]+)"', page.read_text()) == ["deep%20er/flat.svs.png", "train.svs.png"]
    assert "page.svs" in page.read_text(), "a slide that cannot be read is named"
    with Image.open(pictures[1]) as image:
        assert image.width == 1152 and MARK in image.info
        colours = set(map(tuple, np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()))
        assert {(0x00, 0x7A, 0x33), (0x00, 0x47, 0xFF), (0xFF, 0x7A, 0x00)} <= colours
    before = preview_mark(pictures[1])
    assert create(tmp_path / "slides", tmp_path / "two", folder, *options, "--seed", "1") == 0
    assert preview_mark(pictures[1]) != before, "the preview of another run is replaced"
    page.write_text("mine")
    assert create(tmp_path / "slides", tmp_path / "again", folder, *options) == 0
    assert page.read_text() == "mine"

    pictures[0].write_bytes(b"mine")
    assert create(tmp_path / "slides", tmp_path / "three", folder, *options) == 2
    assert f"'{pictures[0]}' exists and is no preview" in caplog.text
    Image.new("RGB", (8, 8)).save(pictures[0])
    assert create(tmp_path / "slides", tmp_path / "three", folder, *options) == 2
    assert not list(tmp_path.glob("*three*")), "this is found before any slide is read"


def test_restarted_run_draws_the_missing_previews(
    demo_slides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run has no room for the previews; the second finds the parts and only draws."""
    source, folder = demo_slides[0].parent, tmp_path / "previews"
    options = ("--levels", "1", "--per-level", "3")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as tile:
        tile.setattr("matplotlib.figure.Figure.savefig", full)
        assert create(source, tmp_path / "list", folder, *options) == 2
    assert [path for path in folder.iterdir()] == [] and not (tmp_path / "list").exists()
    [parts] = tmp_path.glob(".list.parts-*")
    stamp = [path.stat().st_mtime_ns for path in parts.iterdir()]
    assert len(stamp) == 1
    assert create(source, tmp_path / "list", folder, *options) == 0
    assert len(list(folder.glob("*.png"))) == 2 and not parts.exists()
    assert json.loads((tmp_path / "list.meta.json").read_text())["num_patches"] == 6


def test_slides_of_one_name_get_a_preview_each(train_slide: Path, make_slide: MakeSlide, tmp_path: Path) -> None:
    other = make_slide(f"other/{train_slide.name}")
    names = tmp_path / "names"
    names.write_text(f"{train_slide}\n{other}\n")
    assert create(names, tmp_path / "list", tmp_path / "previews", "--per-level", "2") == 0
    sizes = [Image.open(path).size for path in (tmp_path / "previews").glob("*.png")]
    assert len(set(sizes)) == 2

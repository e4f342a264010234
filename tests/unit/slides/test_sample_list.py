"""Sample lists: what is drawn, that it can be drawn again, and what happens to slides that give nothing."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest
from skimage.color import rgb2hsv

from dinov2.data.slide_list import read_sample_list
from dinov2.data.tissue import TissueRule
from dinov2.data.tissue_sampling import Sampling
from prepatching_scripts.create_sample_dataset_txt import main
from tests.unit.slides.conftest import MakeSlide, damage_tile

Line = tuple[str, int, int, int]


def create(source: Path, output: Path, *options: str) -> int:
    return main([str(source), "--output", str(output), "--per-level", "12", "--workers", "1", *options])


def lines_of(path: Path) -> list[Line]:
    parts = (line.rsplit(" ", 3) for line in path.read_text().splitlines())
    return [(name, int(x), int(y), int(level)) for name, x, y, level in parts]


def meta_of(path: Path) -> dict:
    return json.loads(Path(f"{path}.meta.json").read_text())


def failures_of(path: Path) -> dict[str, str]:
    lines = Path(f"{path}.failures.jsonl").read_text().splitlines()
    return {record["slide"]: record["reason"] for record in map(json.loads, lines)}


def assert_tissue(lines: list[Line]) -> None:
    """Every patch lies on its level and is more than 60 % tissue, by OpenSlide and scikit-image."""
    for name, x, y, level in lines:
        with openslide.OpenSlide(name) as slide:
            downsample = slide.level_downsamples[level]
            for corner, side in zip((x, y), slide.level_dimensions[level], strict=True):
                assert 0 <= round(corner / downsample) <= side - 224
            patch = np.asarray(slide.read_region((x, y), level, (224, 224)).convert("RGB"))
        hsv = rgb2hsv(patch) * (180, 255, 255)
        tissue = (hsv >= (89.5, 7.5, 102.5)).all(-1) & (hsv[..., 0] < 179.5)  # bounds as they round to 8 bits
        assert tissue.mean() > 0.595


def test_every_patch_is_tissue_on_its_own_level(demo_slides: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "list.txt"
    assert create(demo_slides[0].parent, output, "--levels", "0", "1") == 0
    lines = lines_of(output)
    assert Counter((name, level) for name, _, _, level in lines) == {
        (str(slide), level): 12 for slide in demo_slides for level in (0, 1)
    }
    assert len(set(lines)) == len(lines)
    assert_tissue(lines)
    assert [name for name, *_ in lines] != sorted(name for name, *_ in lines), "the list should be shuffled"


def test_meta_tells_how_the_list_was_made(train_slide: Path, tmp_path: Path) -> None:
    output = tmp_path / "list.txt"
    options = ("--seed", "7", "--hsv-lower", "100", "10", "90", "--min-tissue", "0.5", "--levels", "1", "2")
    assert create(train_slide, output, *options, "--per-slide", "9") == 0
    meta = meta_of(output)
    assert meta["columns"] == ["path", "x", "y", "level"]
    assert meta["seed"] == 7 and meta["tile_size"] == 224
    assert meta["rule"] == {"lower": [100, 10, 90], "upper": [180, 255, 255], "min_fraction": 0.5}
    assert meta["num_patches_by_level"] == {"1": 5, "2": 4} and meta["num_patches"] == 9
    assert (meta["num_slides"], meta["num_slides_failed"]) == (1, 0)
    assert meta["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert failures_of(output) == {}


def test_list_depends_on_seed_and_slide_only(demo_slides: tuple[Path, Path], tmp_path: Path) -> None:
    folder = demo_slides[0].parent
    one, same, other, alone = (tmp_path / f"{name}.txt" for name in ("one", "same", "other", "alone"))
    assert (
        create(folder, one)
        == create(folder, same, "--workers", "2")
        == create(folder, other, "--seed", "1")
        == 0
    )
    assert create(demo_slides[1], alone) == 0
    assert one.read_bytes() == same.read_bytes()
    assert not set(lines_of(one)) & set(lines_of(other))
    assert set(lines_of(alone)) == {line for line in lines_of(one) if line[0] == str(demo_slides[1])}


def test_moved_slides_give_the_same_places(train_slide: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a folder" / train_slide.name
    moved.parent.mkdir()
    shutil.copy(train_slide, moved)
    there, here = tmp_path / "there.txt", tmp_path / "here.txt"
    assert create(train_slide, there, "--levels", "2") == create(moved, here, "--levels", "2") == 0
    assert [line[1:] for line in lines_of(here)] == [line[1:] for line in lines_of(there)]
    assert read_sample_list(here).slides == [str(moved)]


def test_bad_slides_are_listed_and_good_ones_complete(
    train_slide: Path, tmp_path: Path, make_slide: MakeSlide, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "slides"
    blank = make_slide("slides/deep/blank.svs", image=np.full((512, 512, 3), 255, np.uint8))
    (folder / "page.svs").write_text("<html>Not found</html>")
    (folder / "cut.svs").write_bytes(train_slide.read_bytes()[:200_000])
    (folder / "notes.txt").write_text("no slide")
    small = make_slide("slides/small.svs", image=np.full((128, 128, 3), (225, 150, 190), np.uint8))
    good = Path(shutil.copy(train_slide, folder / "good.SVS"))
    output = tmp_path / "list.txt"

    assert create(folder, output, "--levels", "0") == 1
    assert f"4 of 5 slides failed, see {output}.failures.jsonl." in caplog.text
    failures = failures_of(output)
    assert failures[str(blank)] == failures[str(small)] == "no patch passed the tissue rule"
    assert "not a whole slide" in failures[str(folder / "page.svs")]
    assert "not a whole slide" in failures[str(folder / "cut.svs")]
    assert {name for name, *_ in lines_of(output)} == {str(good)} and len(lines_of(output)) == 12
    assert create(folder, tmp_path / "again.txt", "--max-failed-share", "0.8") == 0
    assert create(good, tmp_path / "none.txt", "--levels", "3") == 1
    assert failures_of(tmp_path / "none.txt") == {str(good): "it has levels 0 to 2 only"}


def test_unreadable_places_are_avoided(train_slide: Path, tmp_path: Path) -> None:
    """Tile 22 (column 4, row 2 of 9 tiles a row) is tissue; no patch may touch it."""
    broken = damage_tile(train_slide, tmp_path / "broken.svs", 22, empty=True)
    output = tmp_path / "list.txt"
    assert create(broken, output, "--levels", "0") == 0
    assert len(lines_of(output)) == 12
    assert not any(1024 - 224 < x < 1280 and 512 - 224 < y < 768 for _, x, y, _ in lines_of(output))


def test_text_list_of_slides(demo_slides: tuple[Path, Path], tmp_path: Path) -> None:
    names = tmp_path / "slides.txt"
    names.write_text(f"# chosen\n{demo_slides[1]}\n\n{demo_slides[1]}\n{tmp_path / 'missing.svs'}\n")
    output = tmp_path / "list.txt"
    assert create(names, output, "--levels", "1", "--max-failed-share", "0.5") == 0
    assert meta_of(output)["num_slides"] == 2, "a slide named twice counts once"
    assert failures_of(output) == {str(tmp_path / "missing.svs"): "there is no such file"}


def test_quotas() -> None:
    def quotas(levels: tuple[int, ...] | None, per_slide: int | None, num_levels: int) -> dict[int, int]:
        return Sampling(TissueRule(), 0, levels, 100, per_slide, 224).quotas(num_levels)

    assert quotas(None, None, 3) == {0: 100, 1: 100, 2: 100}
    assert quotas((0, 2), None, 2) == {0: 100}
    assert quotas((1, 2), 101, 4) == {1: 51, 2: 50}
    assert quotas(None, 1000, 3) == {0: 100, 1: 100, 2: 100}
    assert quotas((4,), 10, 3) == {}


@pytest.mark.parametrize("existing", ["list.txt", "list.txt.meta.json", "list.txt.failures.jsonl"])
def test_existing_output_is_never_overwritten(
    train_slide: Path, tmp_path: Path, existing: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / existing).write_text("mine")
    assert create(train_slide, tmp_path / "list.txt") == 1
    assert f"{existing}' exists already; give another --output or move it away." in caplog.text
    assert (tmp_path / existing).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_missing_and_empty_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert create(tmp_path / "nowhere", tmp_path / "list.txt") == 1
    assert f"'{tmp_path}/nowhere' does not exist" in caplog.text
    (tmp_path / "empty").mkdir()
    assert create(tmp_path / "empty", tmp_path / "list.txt") == 1
    assert f"'{tmp_path}/empty' holds no slide; at least one .bif, " in caplog.text
    assert not list(tmp_path.glob("list.txt*"))


@pytest.mark.parametrize(
    "option", ["--per-level=0", "--tile-size=-1", "--workers=0", "--seed=-1", "--levels=-1"]
)
def test_impossible_options(train_slide: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit) as caught:
        create(train_slide, tmp_path / "list.txt", option)
    assert caught.value.code == 2


@pytest.mark.data
def test_real_slides(jpeg_slide: Path, jpeg2000_slide: Path, tmp_path: Path) -> None:
    output = tmp_path / "list.txt"
    assert create(jpeg_slide.parent, output) == 0
    lines = lines_of(output)
    assert Counter((Path(name).name, level) for name, _, _, level in lines) == {
        (jpeg_slide.name, 0): 12,
        (jpeg2000_slide.name, 0): 12,
        (jpeg2000_slide.name, 1): 12,
    }
    assert_tissue(lines)

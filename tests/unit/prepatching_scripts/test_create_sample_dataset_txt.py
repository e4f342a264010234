"""Sample lists: what is drawn, that it can be drawn again, and what happens to slides that give nothing."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage.color import rgb2hsv

from dinov2.data.prepare import parts as sample_parts
from dinov2.data.prepare.draw import Sampling, SlideDraw, SlideJob
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.sample_list import read_sample_list
from dinov2.data.slides.tissue import TissueRule
from prepatching_scripts.build_parquet_sample_dataset import main as build_parquet
from prepatching_scripts.create_sample_dataset_txt import main
from tests.helpers.slides import MakeSlide, damage_tile

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
    """Every tile lies on its level and is more than 60 % tissue, by OpenSlide and scikit-image."""
    for name, x, y, level in lines:
        with openslide.OpenSlide(name) as slide:
            downsample = slide.level_downsamples[level]
            for corner, side in zip((x, y), slide.level_dimensions[level], strict=True):
                assert 0 <= round(corner / downsample) <= side - 224
            tile = np.asarray(slide.read_region((x, y), level, (224, 224)).convert("RGB"))
        hsv = rgb2hsv(tile) * (180, 255, 255)
        tissue = (hsv >= (89.5, 7.5, 102.5)).all(-1) & (hsv[..., 0] < 179.5)  # bounds as they round to 8 bits
        assert tissue.mean() > 0.595


def test_every_tile_is_tissue_on_its_own_level(demo_slides: tuple[Path, Path], tmp_path: Path) -> None:
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
    assert meta["rule"] == {"name": "hsv", "options": {"lower": [100, 10, 90], "upper": [180, 255, 255]},
                            "min_fraction": 0.5, "reject_pen": False}  # fmt: skip
    assert meta["num_patches_by_level"] == {"1": 5, "2": 4} and meta["num_patches"] == 9
    assert (meta["num_slides"], meta["num_slides_failed"]) == (1, 0)
    assert meta["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert failures_of(output) == {}


def test_list_depends_on_seed_and_slide_only(demo_slides: tuple[Path, Path], tmp_path: Path) -> None:
    folder = demo_slides[0].parent
    one, same, other, alone = (tmp_path / f"{name}.txt" for name in ("one", "same", "other", "alone"))
    assert create(folder, one) == create(folder, same, "--workers", "2") == create(folder, other, "--seed", "1") == 0
    assert create(demo_slides[1], alone) == 0
    assert one.read_bytes() == same.read_bytes()
    assert not set(lines_of(one)) & set(lines_of(other))
    assert set(lines_of(alone)) == {line for line in lines_of(one) if line[0] == str(demo_slides[1])}


def test_moved_slides_give_the_same_positions(train_slide: Path, tmp_path: Path) -> None:
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
    assert "4 of 5 slides" in caplog.text and f"{output}.failures.jsonl" in caplog.text
    failures = failures_of(output)
    assert "tissue rule 'hsv'" in failures[str(blank)]
    assert "128x128" in failures[str(small)] and "224x224" in failures[str(small)]
    assert "<html>" in failures[str(folder / "page.svs")]
    assert "not a whole slide" in failures[str(folder / "cut.svs")]
    assert {name for name, *_ in lines_of(output)} == {str(good)} and len(lines_of(output)) == 12
    assert create(folder, tmp_path / "again.txt", "--max-failed-share", "0.8") == 0
    assert create(good, tmp_path / "none.txt", "--levels", "3") == 1
    assert failures_of(tmp_path / "none.txt") == {str(good): "it has levels 0 to 2 only"}


def test_unreadable_positions_are_avoided(train_slide: Path, tmp_path: Path) -> None:
    """Tile 22 (column 4, row 2 of 9 tiles a row) is tissue; no tile may touch it."""
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


def test_quotas(train_slide: Path) -> None:
    """The slide has levels 0 to 2 at 0.25, 0.5 and 1 um."""
    reader = SlideReader(train_slide)

    def quotas(levels: tuple[int, ...] | None, per_slide: int | None) -> dict[int, int]:
        sampling = Sampling(TissueRule(), 0, levels, 100, per_slide, 224)
        targets, skipped = sampling.targets(reader)
        assert not skipped and {(target.side, target.mpp) for target in targets} <= {(224, 0)}
        return dict(zip([target.level for target in targets], sampling.quotas(len(targets)), strict=True))

    assert quotas(None, None) == {0: 100, 1: 100, 2: 100}
    assert quotas((0, 5), None) == {0: 100}
    assert quotas((1, 2, 7), 101) == {1: 51, 2: 50}
    assert quotas(None, 1000) == {0: 100, 1: 100, 2: 100}
    assert quotas((4,), 10) == {}
    targets, skipped = Sampling(TissueRule(), 0, None, 9, 4, 100, (0.2, 0.25, 0.3, 0.5, 4.0)).targets(reader)
    assert [tuple(target) for target in targets] == [
        (0, 100, 0.25),
        (0, 120, np.float32(0.3)),
        (1, 100, 0.5),
        (2, 400, 4.0),
    ]
    assert list(skipped) == [0.2] and "level 0 has 0.25 um/px" in skipped[0.2]


def test_six_columns_by_mpp(demo_slides: tuple[Path, Path], tmp_path: Path) -> None:
    """Every tile is tissue as OpenSlide's level and Pillow's box filter make it, an independent path."""
    output = tmp_path / "list.txt"
    options = ("--mpp", "0.5", "0.35", "0.2", "--magnification", "20", "--per-mpp", "7")
    assert main([str(demo_slides[0].parent), "--output", str(output), "--workers", "1", *options]) == 0
    lines = [line.rsplit(" ", 5) for line in output.read_text().splitlines()]
    assert Counter((name, level, side) for name, _, _, level, side, _ in lines) == {
        (str(slide), *kind): 7 for slide in demo_slides for kind in (("0", "0.35"), ("1", "0.5"))
    }
    for name, x, y, level, side, other in lines:
        assert side == other
        size = round(224 * float(side) / (0.25 * 2 ** int(level)))
        with openslide.OpenSlide(name) as slide:
            tile = slide.read_region((int(x), int(y)), int(level), (size, size)).convert("RGB")
        hsv = rgb2hsv(np.asarray(tile.resize((224, 224), Image.Resampling.BOX))) * (180, 255, 255)
        assert ((hsv >= (89, 7, 102)).all(-1) & (hsv[..., 0] < 179.5)).mean() > 0.59
    meta = meta_of(output)
    assert meta["columns"] == ["path", "x", "y", "level", "mpp_x", "mpp_y"]
    assert meta["num_patches_by_mpp"] == {"0.35": 14, "0.5": 14} and meta["num_targets_skipped"] == 2
    assert meta["num_patches_by_level"] == {"0": 14, "1": 14} and meta["slide_mpp"] == {}
    records = [json.loads(line) for line in Path(f"{output}.failures.jsonl").read_text().splitlines()]
    assert [(record["slide"], record["mpp"]) for record in records] == [(str(s), 0.2) for s in sorted(demo_slides)]
    samples = read_sample_list(output)
    assert sorted(samples.mpp.tolist()) == [np.float32(0.35)] * 14 + [0.5] * 14


def test_slides_without_mpp_take_the_tables(make_slide: MakeSlide, tmp_path: Path, caplog) -> None:
    for name in ("slides/a.svs", "slides/b.svs"):
        make_slide(name)
    table, output = tmp_path / "mpp.csv", tmp_path / "list.txt"
    table.write_text("slide,mpp\na,0.5\n")
    options = ("--workers", "1", "--mpp", "1", "--per-mpp", "3", "--mpp-file", str(table))
    assert main([str(tmp_path / "slides"), "--output", str(output), *options]) == 1
    known, unknown = (str(tmp_path / "slides" / name) for name in ("a.svs", "b.svs"))
    assert failures_of(output) == {unknown: "its resolution is unknown; give an mpp for it"}
    assert meta_of(output)["slide_mpp"] == {known: 0.5}
    samples = read_sample_list(output)
    assert samples.slides == [known] and samples.mpp.tolist() == [1.0] * 3
    assert max(samples.x.max(), samples.y.max()) <= 512 - 448, "a tile takes 448 px of the level"
    assert "1 of 2 slides failed" in caplog.text


def test_slide_a_little_coarser_and_one_of_another_resolution(make_slide: MakeSlide, tmp_path: Path, caplog) -> None:
    """A 20x scanner's 0.5052 um serve 0.5; a table has the last word, and is needed no more when tiles are cut."""
    at2, wrong = make_slide("slides/at2.svs", "|AppMag = 20|MPP = 0.5052"), make_slide("slides/wrong.svs", "|MPP = 1.0")
    table, output = tmp_path / "mpp.csv", tmp_path / "list.txt"
    table.write_text("slide,mpp\nwrong,0.5\n")
    options = ("--workers", "1", "--magnification", "20", "--per-mpp", "3", "--mpp-file", str(table))
    assert main([str(tmp_path / "slides"), "--output", str(output), *options]) == 0
    meta = meta_of(output)
    assert meta["level0_mpp"] == {str(at2): 0.5052, str(wrong): 0.5} and meta["slide_mpp"] == {str(wrong): 0.5}
    assert set(meta["notes"]) == {str(at2), str(wrong)} and meta["mpp_tolerance"] == 0.2
    assert sum(str(slide) in caplog.text for slide in (at2, wrong)) == 2
    shards = tmp_path / "shards"
    assert build_parquet([str(output), "--output", str(shards), "--workers", "1"]) == 0
    rows = [row for file in sorted(shards.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    found = {
        (row["slide_id"], row["mpp"], round(row["level_mpp"], 4), row["mpp_source"], row["read_size"]) for row in rows
    }
    assert found == {("at2", 0.5, 0.5052, "slide", 222), ("wrong", 0.5, 0.5, "user", 224)}
    strict = tmp_path / "strict.txt"
    assert main([str(at2), "--output", str(strict), *options, "--mpp-tolerance", "0.01"]) == 1
    assert set(failures_of(strict)) == {str(at2)}


def test_duplicates_count_once(train_slide: Path, tmp_path: Path, caplog, monkeypatch) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "a.svs").symlink_to(train_slide)
    (folder / "b.svs").symlink_to(train_slide)
    names = tmp_path / "names"
    names.write_text(f"{train_slide}\na folder/b.svs\n{folder}/../a folder/a.svs\n{train_slide}\n")
    monkeypatch.chdir(tmp_path)
    for source, number in ((folder, 1), (names, 3)):
        output = tmp_path / f"{number}.txt"
        caplog.clear()
        assert create(source, output, "--levels", "2") == 0
        assert len(lines_of(output)) == 12 and meta_of(output)["num_slides"] == 1
        assert meta_of(output)["num_slides_duplicate"] == number
        assert f"{number} paths lead to slides that count already; the first is" in caplog.text
    assert read_sample_list(tmp_path / "1.txt").slides == [str(folder / "a.svs")]


def test_unreadable_folder(train_slide: Path, tmp_path: Path, caplog, monkeypatch) -> None:
    (tmp_path / "slides" / "locked").mkdir(parents=True)
    listed = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert create(tmp_path / "slides", tmp_path / "list.txt") == 2
    assert f"The folder '{tmp_path}/slides/locked' cannot be listed (Permission denied)" in caplog.text


def _run_until_rename(source: Path, output: Path, log: Path, renames: int) -> None:
    """Draw a list, note every slide that is drawn from, and die without notice at some rename."""
    replace, draw, left = Path.replace, sample_parts.draw_from_slide, [renames]

    def noted(job: SlideJob) -> SlideDraw:
        with log.open("a") as file:
            file.write(job.key + "\n")
        return draw(job)

    def dying(path: Path, target: Path) -> Path:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return replace(path, target)

    sample_parts.draw_from_slide, Path.replace = noted, dying
    raise SystemExit(create(source, output, "--levels", "0", "2"))


def test_killed_at_any_rename_the_list_comes_out_the_same(
    train_slide: Path, make_slide: MakeSlide, tmp_path: Path
) -> None:
    """Two parts are kept and three files placed: five renames, and a kill before each."""
    make_slide("slides/flat.svs", image=np.full((512, 512, 3), 255, np.uint8))
    (tmp_path / "slides" / "train.svs").symlink_to(train_slide)
    whole, output, log = (tmp_path / name for name in ("whole.txt", "list.txt", "log"))
    assert create(tmp_path / "slides", whole, "--levels", "0", "2", "--max-failed-share", "0.5") == 0
    other = tmp_path / ".list.txt.parts-0123456789abcdef"
    other.mkdir()
    exits = []
    for renames in range(9):
        child = multiprocessing.get_context("fork").Process(
            target=_run_until_rename, args=(tmp_path / "slides", output, log, renames)
        )
        child.start()
        child.join()
        exits.append(child.exitcode)
        if child.exitcode >= 0:
            break
        complete = [path.exists() for path in (output, Path(f"{output}.meta.json"))]
        assert complete in ([False, False], [False, True]), "the list is the last to get its name"
    assert exits == [-signal.SIGKILL] * (len(exits) - 1) + [1] and len(exits) == 4  # 1: a slide failed
    assert output.read_bytes() == whole.read_bytes()
    assert meta_of(output) == meta_of(whole) and len(failures_of(output)) == 1
    assert sorted(Counter(log.read_text().split()).items()) == [("flat.svs", 2), ("train.svs", 2)]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == [other]
    assert create(tmp_path / "slides", output, "--levels", "0", "2") == 2, "a finished list is never replaced"


def test_parts_of_other_options_or_slides_are_not_used(
    train_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copy(train_slide, tmp_path / "s.svs"))
    drawn, draw = [], sample_parts.draw_from_slide
    monkeypatch.setattr(sample_parts, "draw_from_slide", lambda job: drawn.append(job) or draw(job))

    def made(**changes: object) -> int:
        folder = tmp_path / "parts"
        folder.mkdir(exist_ok=True)
        job = SlideJob(str(copy), "s.svs", Sampling(TissueRule(), 0, (2,), 3, None, 224), None)
        sample_parts.make_part((replace(job, **changes), folder, None))
        return len(drawn)

    assert made() == made() == 1
    assert made(mpp=0.5) == 2 and made(key="t.svs") == 3
    os.utime(copy, (1, 1))
    assert made() == 4
    for part in (tmp_path / "parts").iterdir():
        part.write_bytes(part.read_bytes()[:50])
    assert made() == made() == 5
    assert not list((tmp_path / "parts").glob("*.part"))


def test_list_cannot_be_placed_over_a_file_of_the_user(
    train_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file appears while the slides are being drawn; what was drawn is kept."""
    output, meta = tmp_path / "list.txt", tmp_path / "list.txt.meta.json"
    drawn, draw = [], sample_parts.draw_from_slide

    def draw_and_disturb(job: SlideJob) -> SlideDraw:
        meta.write_text("mine")
        drawn.append(job.key)
        return draw(job)

    monkeypatch.setattr(sample_parts, "draw_from_slide", draw_and_disturb)
    for _ in range(2):
        assert create(train_slide, output, "--levels", "2") == 2
        assert f"'{meta}' exists already with other contents" in caplog.messages[-1]
        assert meta.read_text() == "mine" and not output.exists()
    meta.unlink()
    assert create(train_slide, output, "--levels", "2") == 0
    assert drawn == [train_slide.name] and len(lines_of(output)) == 12
    assert not list(tmp_path.glob(".list*"))


@pytest.mark.parametrize("existing", ["list.txt", "list.txt.meta.json", "list.txt.failures.jsonl"])
def test_existing_output_is_never_overwritten(
    train_slide: Path, tmp_path: Path, existing: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / existing).write_text("mine")
    assert create(train_slide, tmp_path / "list.txt") == 2
    assert f"{existing}' exists already; give another --output or move it away." in caplog.text
    assert (tmp_path / existing).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_missing_and_empty_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert create(tmp_path / "nowhere", tmp_path / "list.txt") == 2
    assert f"'{tmp_path}/nowhere' does not exist" in caplog.text
    (tmp_path / "empty").mkdir()
    assert create(tmp_path / "empty", tmp_path / "list.txt") == 2
    assert f"'{tmp_path}/empty' holds no slide" in caplog.text
    table = ("--mpp-file", str(tmp_path / "none.csv"))
    assert create(tmp_path / "empty", tmp_path / "list.txt", *table) == 2
    assert "There is no mpp table" in caplog.messages[-1]
    assert not list(tmp_path.glob("list.txt*"))


@pytest.mark.parametrize(
    "option",
    [
        "--per-level=0",
        "--tile-size=-1",
        "--workers=0",
        "--seed=-1",
        "--levels=-1",
        "--mpp=1",
        "--per-mpp=3",
        "--magnification=0",
        "--mpp=nan",
    ],
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


def test_a_slide_that_is_smaller_than_a_tile_gives_both_sizes(tmp_path: Path, make_slide: MakeSlide) -> None:
    small = make_slide("slides/small.svs", "|MPP = 0.5", image=np.full((300, 300, 3), (225, 150, 190), np.uint8))
    output = tmp_path / "list.txt"
    assert main([str(small), "--output", str(output), "--mpp", "0.5", "2", "--per-mpp", "3", "--workers", "1"]) == 0
    [failure] = [json.loads(line) for line in Path(f"{output}.failures.jsonl").read_text().splitlines()]
    assert failure["mpp"] == 2  # 224 px of 2 um are 896 px of 0.5 um
    assert all(value in failure["reason"] for value in ("300x300", "896x896", "224 px", "2 um"))

"""Shuffled shards: the order, the pixels behind it, bounded memory, failures, parts, and builds that were killed."""

import json
import random
from pathlib import Path

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest

from dinov2.data.prepare.shard import shuffled_rows
from prepatching_scripts.build_parquet_sample_dataset import main
from tests.helpers.builder_process import killer, run_builder
from tests.helpers.slides import damage_tile

SHUFFLE = ("--shuffle", "--seed", "5", "--rows-per-shard", "70", "--encoding", "raw", "--tile-size", "64")
TINY = 20 * 64 * 64 * 3 / 2**30  # GiB of 20 rows: many runs, several buckets for each shard


@pytest.fixture(scope="module")
def sample_list(demo_slides: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 positions on level 0 and 1 of two slides, slide after slide."""
    path = tmp_path_factory.mktemp("list") / "list.txt"
    positions = [(f"{slide} {400 + 3 * i} {450 + i % 7} {i % 2}\n") for slide in demo_slides for i in range(100)]
    path.write_text("".join(positions))
    return path


def build(sample_list: Path, output: Path, *options: str) -> int:
    return main([str(sample_list), "--output", str(output), "--workers", "1", *SHUFFLE, *options])


def rows_of(folder: Path) -> list[dict]:
    return [row for shard in sorted(folder.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def line(row: dict) -> str:
    return f"{row['slide_path']} {row['x']} {row['y']} {row['level']}"


@pytest.fixture(scope="module")
def whole(sample_list: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that nobody disturbed: shards of 70, 70 and 60 rows and their description."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert build(sample_list, folder) == 0
    assert sorted(contents(folder)) == [f"0000000{i}.parquet" for i in range(3)] + ["_build.json"]
    return folder


def in_tiny_runs(sample_list: Path, out: Path) -> list[str]:
    """Arguments of a shuffled build that spills many runs."""
    paths = [str(sample_list), "--output", str(out)]
    return [*paths, "--workers", "1", *SHUFFLE, "--memory-gib", str(TINY)]


def test_rows_are_those_of_a_permuted_list(sample_list: Path, whole: Path) -> None:
    order = np.random.Generator(np.random.Philox(key=5)).permutation(200)
    lines = sample_list.read_text().splitlines()
    rows = rows_of(whole)
    assert [line(row) for row in rows] == [lines[i] for i in order]
    for number, shard in enumerate(sorted(whole.glob("*.parquet"))):
        metadata = pq.read_metadata(shard)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        assert [group.num_rows for group in groups] == ([64, 6], [64, 6], [60])[number]
        assert {row["task_id"] for row in pq.read_table(shard).to_pylist()} == {shard.stem}
        for group in groups:  # readers learn from the statistics that a group holds several slides
            column = group.column(1)
            low, high = column.statistics.min, column.statistics.max
            assert column.path_in_schema == "slide_path" and low != high
            assert not group.column(8).is_stats_set


def test_pixels_are_those_of_the_row(whole: Path) -> None:
    for row in rows_of(whole)[::9]:
        with openslide.OpenSlide(row["slide_path"]) as slide:
            column, line_ = (round(row[axis] / 2 ** row["level"]) * 2 ** row["level"] for axis in "xy")
            image = slide.read_region((column, line_), row["level"], (64, 64)).convert("RGB")
        assert row["image_bytes"] == np.asarray(image).tobytes()
        assert row["slide_id"] == Path(row["slide_path"]).stem and row["level_downsample"] == 2 ** row["level"]


@pytest.mark.parametrize("memory", [TINY, 7 * TINY, TINY / 20])
def test_memory_does_not_change_the_shards(sample_list: Path, whole: Path, tmp_path: Path, memory: float) -> None:
    assert build(sample_list, tmp_path / "out", "--memory-gib", str(memory)) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_the_seed_decides_over_the_order(sample_list: Path, whole: Path, tmp_path: Path) -> None:
    assert build(sample_list, tmp_path / "out", "--seed", "6") == 0
    lines = [line(row) for row in rows_of(tmp_path / "out")]
    assert lines != [line(row) for row in rows_of(whole)] and sorted(lines) == sorted(map(line, rows_of(whole)))
    before = contents(tmp_path / "out")
    assert build(sample_list, tmp_path / "out") == 2, "another seed is another build"
    assert contents(tmp_path / "out") == before


def test_failed_rows_leave_no_holes(train_slide: Path, tmp_path: Path) -> None:
    broken = damage_tile(train_slide, tmp_path / "broken.svs", 22, empty=False)
    good = [f"{train_slide} {x} 500 0" for x in range(400, 500)]
    bad = [f"{broken} 1100 600 0", f"{tmp_path}/gone.svs 0 0 0", f"{broken} 1090 600 0"]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(bad[:2] + good + bad[2:]))
    assert build(listed, tmp_path / "out", "--memory-gib", str(TINY)) == 1
    order = np.random.Generator(np.random.Philox(key=5)).permutation(103)
    shuffled = [(bad[:2] + good + bad[2:])[i] for i in order]
    assert [line(row) for row in rows_of(tmp_path / "out")] == [text for text in shuffled if text not in bad]
    report = (tmp_path / "out" / "failures.jsonl").read_text()
    assert [line(json.loads(text)) for text in report.splitlines()] == [text for text in shuffled if text in bad]
    assert build(listed, tmp_path / "out", "--max-failed-share", "0.1") == 0
    assert (tmp_path / "out" / "failures.jsonl").read_text() == report


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_make_what_one_run_makes(sample_list: Path, whole: Path, tmp_path: Path, parts: int) -> None:
    for part in reversed(range(parts)):
        assert build(sample_list, tmp_path / "out", "--num-parts", str(parts), "--part", str(part)) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_a_run_without_parts_completes_the_rest(sample_list: Path, whole: Path, tmp_path: Path) -> None:
    assert build(sample_list, tmp_path / "out", "--num-parts", "3", "--part", "1") == 0
    assert sorted(contents(tmp_path / "out")) == ["00000001.parquet", "_build.json"]
    assert build(sample_list, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(whole)
    (tmp_path / "out" / "00000002.parquet").unlink()
    assert build(sample_list, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_builds_killed_at_random_moments_end_the_same(sample_list: Path, whole: Path, tmp_path: Path) -> None:
    out, draw = tmp_path / "out", random.Random(1)
    arguments = [
        str(sample_list),
        "--output",
        str(out),
        "--workers",
        "2",
        *SHUFFLE,
        "--memory-gib",
        str(TINY),
    ]
    with killer() as kill:
        for _ in range(6):
            kill(arguments, after=draw.uniform(0, 0.25))
            for shard in out.glob("*.parquet"):
                assert shard.read_bytes() == (whole / shard.name).read_bytes()
        assert run_builder(arguments) == 0
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("parts", [(), ("--num-parts", "2", "--part", "1")])
def test_every_change_to_the_folder_survives_a_kill(
    sample_list: Path, whole: Path, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    arguments = [
        str(sample_list),
        "--output",
        str(out),
        "--workers",
        "1",
        *SHUFFLE,
        "--memory-gib",
        str(4 * TINY),
    ]
    with killer() as kill:
        for change in range(0, 26):
            kill([*arguments, *parts], at_change=change)
    assert run_builder(arguments) == 0
    assert contents(out) == contents(whole)


def test_runs_of_another_build_are_not_used(sample_list: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = in_tiny_runs(sample_list, out)
    with killer() as kill:
        kill([*arguments, "--seed", "9"], at_change=40)
    assert len(list(out.glob(".shuffle-*/*.run"))) > 3 and not list(out.glob("*.parquet"))
    (out / "_build.json").unlink()
    assert main(arguments) == 0
    assert contents(out) == contents(whole)


def test_a_corrupt_run_is_named(sample_list: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    arguments = in_tiny_runs(sample_list, out)
    with killer() as kill:
        kill(arguments, at_change=40)
    run = sorted(out.glob(".shuffle-*/*.run"))[1]
    run.write_bytes(run.read_bytes()[:-5000])
    assert main(arguments) == 2
    assert f"The intermediate rows in '{run.parent}' are corrupt" in caplog.messages[-1]
    assert "delete that folder and start again" in caplog.messages[-1]


def test_the_order_mixes_slides_evenly() -> None:
    slides = np.repeat(np.arange(40), 2500)
    shards = shuffled_rows(len(slides), 5000, 0)
    for rows in shards:
        counts = np.bincount(slides[rows], minlength=40)
        assert counts.sum() == 5000 and np.abs(counts - 125).max() < 6 * np.sqrt(125)
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(slides)))

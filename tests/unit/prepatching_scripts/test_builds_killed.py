"""Builds of Parquet shards that were killed, split over machines, or ran out of disk."""

import logging
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from prepatching_scripts.build_parquet_sample_dataset import main
from tests.helpers.builder_process import build, contents, in_fork, killer, rows_of, run_builder

SMALL = ("--rows-per-shard", "16")


@pytest.fixture(scope="module")
def uninterrupted(short_list: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a build that nobody kills writes: eight shards and their description."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert build(short_list, folder, *SMALL) == 0
    assert len(contents(folder)) == 9
    return contents(folder)


def test_builds_killed_at_random_moments_end_the_same(
    short_list: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    out, draw = tmp_path / "out", random.Random(0)
    arguments = [str(short_list), "--output", str(out), *SMALL, "--workers", "2"]
    with killer() as kill:
        for _ in range(6):
            kill(arguments, after=draw.uniform(0, 0.4))
            for shard in out.glob("*.parquet"):
                assert shard.read_bytes() == uninterrupted[shard.name]
        assert run_builder(arguments) == 0
    assert contents(out) == uninterrupted


def test_every_moment_of_one_shard_survives_a_kill(
    short_list: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """A kill just before, and just after, each change that the builder makes to the folder."""
    out = tmp_path / "out"
    arguments = [str(short_list), "--output", str(out), *SMALL, "--workers", "1"]
    with killer() as kill:
        for change in range(12):
            kill(arguments, at_change=change)
            for shard in out.glob("*.parquet"):
                assert shard.read_bytes() == uninterrupted[shard.name]
    assert run_builder(arguments) == 0
    assert contents(out) == uninterrupted


@pytest.mark.parametrize("parts", [2, 3, 11])
def test_parts_of_a_build_make_what_one_run_makes(
    short_list: Path, uninterrupted: dict[str, bytes], tmp_path: Path, parts: int
) -> None:
    out = tmp_path / "out"
    made = []
    for part in range(parts):
        before = set(out.glob("*.parquet"))
        assert build(short_list, out, *SMALL, "--num-parts", str(parts), "--part", str(part)) == 0
        made.append(len(set(out.glob("*.parquet")) - before))
    assert sum(made) == 8 and max(made) <= -(-8 // parts), "disjoint, even shares"
    assert contents(out) == uninterrupted


def test_a_run_without_parts_completes_what_a_part_left(
    short_list: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for part in (0, 2):
        assert build(short_list, out, *SMALL, "--num-parts", "4", "--part", str(part)) == 0
    assert sorted(out.glob("*.parquet")) == [out / f"{number:08d}.parquet" for number in (0, 1, 4, 5)]
    assert build(short_list, out, *SMALL) == 0
    assert contents(out) == uninterrupted


def test_a_second_builder_of_the_same_shards_is_refused(
    short_list: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert build(short_list, out, *SMALL, "--num-parts", "4", "--part", "0") == 0
    code = f"""
import fcntl, sys
file = open({str(out / "_build.json")!r}, "r+b")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 2, 2)  # a builder of part 1
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for options in (("--num-parts", "4", "--part", "1"), ()):
            assert build(short_list, out, *SMALL, *options) == 2
            assert "Another builder is writing some of these shards" in caplog.messages[-1]
        assert build(short_list, out, *SMALL, "--num-parts", "4", "--part", "2") == 0
        other.stdin.close()
    assert build(short_list, out, *SMALL) == 0


@pytest.mark.parametrize("shuffle", [(), ("--shuffle",)])
def test_a_full_disk_is_said_so_and_leaves_nothing_half_written(
    short_list: Path, tmp_path: Path, shuffle: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    arguments = [str(short_list), "--output", str(out), "--workers", "1", "--encoding", "raw", *shuffle]

    def with_small_files() -> int:
        logging.getLogger("build_parquet_sample_dataset").addHandler(logging.FileHandler(tmp_path / "log"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        return main(arguments)

    assert in_fork(with_small_files) == 2
    said = (tmp_path / "log").read_text()
    assert said == f"No room left in '{out}'; make some, then run the same command again.\n"
    assert not list(out.glob("*.parquet")) and not list(out.rglob("*.run")) and not list(out.rglob(".*.part"))
    assert main(arguments) == 0 and len(rows_of(out)) == 128

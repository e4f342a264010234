"""Repacking: same rows, smaller row groups; restarts, corruption, refusals, full disks."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.data.parquet.index import load_index
from dinov2.data.repack import __main__ as repack
from dinov2.data.repack import shard as repacked_shard
from dinov2.data.repack.__main__ import main
from dinov2.data.repack.shard import RepackJob, repack_shard
from dinov2.data.storage.base import LocalStorage, StoredFile
from dinov2.utils.files import locked
from tests.helpers.remote import RemoteFolder
from tests.helpers.shards import encode, tile, write_dataset, write_nanopath, write_published


def run(source: Path | str, destination: Path | str, *options: str) -> int:
    return main([str(source), str(destination), "--workers", "1", *options])


def write_oversized(path: Path, rows: int = 200, **options: object) -> pa.Table:
    """Write a file as the published builder does: one row group, dictionary pages, a codec."""
    rng = np.random.default_rng(rows)
    table = pa.table(
        {
            "slide_path": pa.array([f"s{row // 50}" for row in range(rows)]).dictionary_encode(),
            "x": pa.array(range(rows), pa.int32()),
            "image_bytes": pa.array([rng.bytes(row % 7 * 100) for row in range(rows)], pa.binary()),
        }
    ).replace_schema_metadata({"image_encoding": "png", "tile_size": "8", "row_group_size": "1000"})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return table


def failures(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_oversized_row_group_becomes_small_ones(tmp_path: Path) -> None:
    table = write_oversized(tmp_path / "in" / "a.parquet", 200, compression="snappy")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["a.parquet"]
    repacked = pq.read_table(tmp_path / "out" / "a.parquet")
    assert repacked.equals(table)
    assert repacked.schema.field("slide_path") == table.schema.field("slide_path")
    expected = dict(table.schema.metadata) | {b"row_group_size": b"64"}
    metadata = dict(repacked.schema.metadata)
    assert json.loads(metadata.pop(b"repack_source"))["size"] == (tmp_path / "in" / "a.parquet").stat().st_size
    assert metadata == expected
    footer = pq.read_metadata(tmp_path / "out" / "a.parquet")
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    assert [group.num_rows for group in groups] == [64, 64, 64, 8]
    for group in groups:
        slide, _, image = (group.column(number) for number in range(3))
        assert (slide.compression, slide.has_dictionary_page) == ("SNAPPY", True)
        assert (image.compression, image.has_dictionary_page, image.has_offset_index) == (
            "UNCOMPRESSED",
            False,
            True,
        )


@pytest.mark.parametrize(("column", "image"), [("slide_path", "image_bytes"), ("path", "jpeg")])
def test_footers_tell_the_slides_so_that_no_slide_column_is_read(tmp_path: Path, column: str, image: str) -> None:
    names = pa.array([f"slide {row // 128}/{row}.jpg" if column == "path" else "slide" for row in range(256)])
    table = pa.table({column: names.dictionary_encode(), image: [b"x"] * 256})
    pq.write_table(table, tmp_path / "a.parquet", write_statistics=False)
    assert run(tmp_path / "a.parquet", tmp_path / "out") == 0
    before, after = (load_index(LocalStorage(str(tmp_path / name))) for name in ("a.parquet", "out"))
    assert before["group_slide"].to_pylist() == [[-1]]
    assert after["slides"].to_pylist() == [["slide"] if column == "slide_path" else ["slide 0", "slide 1"]]
    assert min(after["group_slide"].to_pylist()[0]) == 0


@pytest.mark.parametrize("kind", ["large_binary", "zstd", "lz4", "nested"])
def test_other_types_and_codecs_stay(tmp_path: Path, kind: str) -> None:
    rows = range(150)
    columns = {
        "jpeg": pa.array([None if row % 5 == 0 else b"x" * (row % 3) for row in rows], pa.large_binary()),
        "path": pa.array([f"s/{row}.jpg" for row in rows], pa.large_string()),
    }
    if kind == "nested":
        columns |= {"tags": [["a", "b"][: row % 3] for row in rows], "at": [{"x": row} for row in rows]}
    table, codec = pa.table(columns), kind if kind in ("zstd", "lz4") else "none"
    pq.write_table(table, tmp_path / "a.parquet", compression=codec, row_group_size=40)
    assert run(tmp_path / "a.parquet", tmp_path / "out", "--row-group-rows", "32", "--compression", "gzip") == 0
    repacked = pq.ParquetFile(tmp_path / "out" / "a.parquet")
    assert repacked.read().equals(table)
    groups = [repacked.metadata.row_group(number) for number in range(repacked.num_row_groups)]
    assert [group.num_rows for group in groups] == [32, 32, 32, 32, 22]
    before = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(1).compression
    assert [groups[0].column(0).compression, groups[0].column(1).compression] == ["GZIP", before]


def test_all_files_come_along_under_their_names(tmp_path: Path) -> None:
    source, destination = tmp_path / "in", tmp_path / "out"
    write_dataset(source, [9, 0, 70])
    write_nanopath(source / "sub" / "b.parquet", [encode(tile(1), "jpeg"), None, b""])
    write_published(source / "fine.parquet", [encode(tile(i), "png") for i in range(64)], 64)
    assert run(source, destination) == 0
    for path in source.rglob("*.parquet"):
        repacked = destination / path.relative_to(source)
        assert pq.read_table(repacked).equals(pq.read_table(path)), path
    assert len(list(destination.rglob("*.parquet"))) == 5
    assert pq.read_metadata(destination / "0001.parquet").num_row_groups == 0
    assert not (destination / "failures.jsonl").exists()


def test_nothing_is_written_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source, destination = write_dataset(tmp_path / "in", [5, 6]), tmp_path / "out"
    assert run(source, destination) == 0
    assert "2 files written, 0 were there: 11 rows, row groups 4 -> 2;" in caplog.text
    (destination / "0001.parquet").unlink()
    kept = (destination / "0000.parquet").stat()
    assert run(source, destination) == 0
    assert "1 files written, 1 were there: 11 rows, row groups 4 -> 2;" in caplog.text
    assert run(source, destination) == 0
    assert "nothing to do: 2 files with 11 rows are in place" in caplog.text
    assert (destination / "0000.parquet").stat().st_mtime_ns == kept.st_mtime_ns
    assert pq.read_table(destination / "0001.parquet").equals(pq.read_table(source / "0001.parquet"))


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    source, destination = tmp_path / "in", tmp_path / "out"
    tables = {}
    for number in range(60):
        name = f"{number % 3}/{number:02d}.parquet"
        tables[name] = write_oversized(source / name, 700 + number)
    command = [sys.executable, "-m", "dinov2.data.repack", str(source), str(destination), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while len(list(destination.rglob("*.parquet"))) < 4 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # the pipe closes when the orphaned workers have ended, too
    assert process.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in destination.rglob("*.parquet")}
    assert 4 <= len(finished) < 60
    (destination / "0" / f".00.parquet.{'0' * 32}.part").write_bytes(b"left over")
    assert run(source, destination) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    found = {str(path.relative_to(destination)) for path in destination.rglob("*") if path.is_file()}
    assert found == set(tables)
    assert all(pq.read_table(destination / name).equals(table) for name, table in tables.items())


def test_corrupt_shards_are_listed_and_the_others_done(tmp_path: Path) -> None:
    source, destination = write_dataset(tmp_path / "in", [8, 8, 8, 8]), tmp_path / "out"
    whole = {name: (source / name).read_bytes() for name in ("0000.parquet", "0001.parquet", "0002.parquet")}
    (source / "0000.parquet").write_bytes(whole["0000.parquet"][:-50])
    (source / "0001.parquet").write_bytes(b"PAR1 no, something else")
    start = pq.read_metadata(source / "0002.parquet").row_group(1).column(8).data_page_offset
    (source / "0002.parquet").write_bytes(
        whole["0002.parquet"][:start] + b"\xff" * 20 + whole["0002.parquet"][start + 20 :]
    )
    pq.write_table(pa.table({"x": [1]}), source / "other.parquet")
    assert run(source, destination) == 1
    assert [record["file"] for record in failures(destination)] == list(whole)
    assert all(record["reason"] for record in failures(destination))
    assert names(destination) == ["0003.parquet", "failures.jsonl"]
    for name, content in whole.items():
        (source / name).write_bytes(content)
    assert run(source, destination) == 0
    assert not (destination / "failures.jsonl").exists()
    assert pq.read_table(destination).num_rows == 32


def spoil_source(source: Path, destination: Path) -> None:
    write_published(source / "0000.parquet", [b"x"] * 5)


def spoil_result(source: Path, destination: Path) -> None:
    write_published(destination / "0000.parquet", [b"precious"])


def add_file(source: Path, destination: Path) -> None:
    (destination / "more.parquet").write_bytes(b"precious")


def add_failures(source: Path, destination: Path) -> None:
    (destination / "failures.jsonl").write_text('{"slide_path": "a", "reason": "b"}\n')


@pytest.mark.parametrize("change", [spoil_source, spoil_result, add_file, add_failures])
def test_what_is_not_ours_is_not_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Path, Path], None]
) -> None:
    source, destination = write_dataset(tmp_path / "in", [5, 6]), tmp_path / "out"
    assert run(source, destination) == 0
    change(source, destination)
    before = {path: path.read_bytes() for path in destination.iterdir()}
    assert run(source, destination) == 2
    assert "was not made by this command" in caplog.text
    assert {path: path.read_bytes() for path in destination.iterdir()} == before


def test_another_layout_does_not_mix_with_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_dataset(tmp_path / "in", [5, 6])
    assert run(source, tmp_path / "out") == 0
    assert run(source, tmp_path / "out", "--row-group-rows", "32") == 2
    assert "was not made by this command" in caplog.text


@pytest.mark.parametrize("where", ["in", "in/sub", ".", "in/../in"])
def test_source_and_destination_must_not_overlap(tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str) -> None:
    source = write_dataset(tmp_path / "in", [5])
    before = sorted(tmp_path.rglob("*"))
    assert run(source, tmp_path / where) == 2
    assert "overlap" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before


def test_one_file_may_be_repacked_into_a_folder_beside_it(tmp_path: Path) -> None:
    table = write_oversized(tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "out") == 0
    assert pq.read_table(tmp_path / "out" / "a.parquet").equals(table)


def hold(path: Path, channel: Connection) -> None:
    with locked(path):
        channel.send("locked")
        channel.recv()


def test_two_runs_at_once_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_dataset(tmp_path / "in", [5])
    (tmp_path / "out").mkdir()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold, args=(tmp_path / "out", theirs))
    other.start()
    ours.recv()
    assert run(source, tmp_path / "out") == 2
    assert "another repack is writing" in caplog.text
    ours.send("enough")
    other.join()
    assert run(source, tmp_path / "out") == 0


def test_a_full_disk_is_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(partial: Path, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write_dataset(tmp_path / "in", [5])
    with monkeypatch.context() as patch:
        patch.setattr(repacked_shard, "commit", full)
        assert run(source, tmp_path / "out") == 2
    assert "room left in" in caplog.text
    assert names(tmp_path / "out") == []
    assert run(source, tmp_path / "out") == 0


def test_what_does_not_read_back_gets_no_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite = repacked_shard._rewrite

    def flip_a_bit(job: RepackJob, partial: Path) -> str:
        digest = rewrite(job, partial)
        content = bytearray(partial.read_bytes())
        content[content.index(b"mark") + 5] ^= 1
        partial.write_bytes(content)
        return digest

    write_nanopath(tmp_path / "in" / "a.parquet", [b"mark" + bytes(100)])
    monkeypatch.setattr(repacked_shard, "_rewrite", flip_a_bit)
    assert run(tmp_path / "in", tmp_path / "out") == 2
    assert "does not read back as it was written" in caplog.text
    assert names(tmp_path / "out") == []


def test_rows_that_are_missing_count_as_corruption(tmp_path: Path) -> None:
    path = write_published(tmp_path / "a.parquet", [b"x"] * 5)
    file = StoredFile(path.name, path.stat().st_size, "")
    job = RepackJob(LocalStorage(str(path)), file, "image_bytes", 9, 2, "", tmp_path / "out" / "a.parquet")
    assert repack_shard(job) == "5 rows could be read, but the footer promises 9"
    assert names(tmp_path / "out") == []


def test_a_remote_source_is_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_oversized(tmp_path / "in" / "sub" / "a.parquet")
    monkeypatch.setattr(repack, "open_storage", lambda source: RemoteFolder(tmp_path / "in"))
    assert run("org/name", tmp_path / "out") == 0
    assert pq.read_table(tmp_path / "out" / "sub" / "a.parquet").equals(table)


def test_a_missing_source_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(tmp_path / "nothing", tmp_path / "out") == 2
    assert "nothing' does not exist" in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["in"],
        ["in", "s3://bucket/out"],
        ["in", "out", "--row-group-rows", "0"],
        ["in", "out", "--workers", "0"],
    ],
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_a_named_column_and_files_without_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    source.mkdir()
    images = [encode(tile(number), "png") for number in range(100)]
    pq.write_table(pa.table({"picture": images, "label": range(100)}), source / "a.parquet")
    pq.write_table(pa.table({"age": [1]}), source / "metadata.parquet")
    assert run(source, tmp_path / "unnamed") == 1
    assert run(source, tmp_path / "named", "--image-column", "picture") == 0
    assert names(tmp_path / "named") == ["a.parquet"] and "metadata.parquet" in caplog.text
    assert pq.read_metadata(tmp_path / "named/a.parquet").num_row_groups == 2
    assert pq.read_table(tmp_path / "named/a.parquet")["picture"].to_pylist() == images
    assert run(source / "metadata.parquet", tmp_path / "none") == 2

"""Listing, fingerprint, sidecar and refusals of the index of a local Parquet dataset."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.data.parquet_index import fingerprint, load_index
from dinov2.data.parquet_source import ParquetSource
from tests.helpers.shards import encode, tile, write_dataset, write_groups, write_nanopath, write_published


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "set", [9, 4, 6])


def names(pattern: Path | str) -> list[str]:
    return load_index(str(pattern))[1]["name"].to_pylist()


def test_folder_is_searched_with_subfolders_in_path_order_without_hidden_files(folder: Path) -> None:
    write_dataset(folder / "00", [2])
    write_dataset(folder / ".cache", [2])
    shutil.copy(folder / "0000.parquet", folder / "._0000.parquet")
    (folder / "notes.txt").write_text("x")
    (folder / "spark.parquet").mkdir()
    shutil.copy(folder / "0000.parquet", folder / "spark.parquet" / "part.parquet")
    expected = [
        "00/0000.parquet",
        "0000.parquet",
        "0001.parquet",
        "0002.parquet",
        "spark.parquet/part.parquet",
    ]
    assert names(folder) == expected


def test_glob_and_single_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(folder / "*[12].parquet") == ["0001.parquet", "0002.parquet"]
    assert names(folder / "0001.parquet") == ["0001.parquet"]
    assert names(folder.parent / "*" / "*1.parquet") == ["set/0001.parquet"]
    monkeypatch.chdir(folder)
    assert names("0001.parquet") == ["0001.parquet"]
    assert names("*1.parquet") == ["0001.parquet"]


def test_names_that_look_like_globs(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set[1]", [2, 2])
    assert len(names(folder)) == 2
    assert names((folder / "0000.parquet").rename(folder / "a[1].parquet")) == ["a[1].parquet"]


def test_units_are_row_groups(folder: Path) -> None:
    source = ParquetSource(str(folder))
    assert source.unit_rows.tolist() == [4, 4, 1, 4, 4, 2]
    assert source.num_rows == 19
    footers = [pq.read_metadata(shard) for shard in sorted(folder.glob("*.parquet"))]
    groups = [footer.row_group(group) for footer in footers for group in range(footer.num_row_groups)]
    assert source.unit_bytes.tolist() == [group.column(8).total_uncompressed_size for group in groups]


def test_fingerprint_survives_a_move(folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    assert ParquetSource(str(moved)).fingerprint == ParquetSource(str(folder)).fingerprint
    assert ParquetSource(str(moved / "*.parquet")).fingerprint == ParquetSource(str(folder)).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "0001.parquet").unlink(),
        lambda folder: shutil.copy(folder / "0001.parquet", folder / "0003.parquet"),
        lambda folder: (folder / "0001.parquet").rename(folder / "0009.parquet"),
        lambda folder: write_groups(
            folder / "0000.parquet", pq.read_table(folder / "0000.parquet"), [5, 3, 1]
        ),
        lambda folder: os.truncate(folder / "0001.parquet", 100),
        lambda folder: (folder / "0001.parquet").write_bytes(
            bytes((folder / "0001.parquet").stat().st_size)  # same size, no footer
        ),
    ],
    ids=["removed", "added", "renamed", "regrouped", "truncated", "overwritten"],
)
def test_fingerprint_tells_a_changed_dataset(folder: Path, change: Callable[[Path], object]) -> None:
    before = ParquetSource(str(folder)).fingerprint
    change(folder)
    assert ParquetSource(str(folder)).fingerprint != before


def test_fingerprint_tells_other_row_groups_in_files_of_equal_size(folder: Path) -> None:
    _, index = load_index(str(folder))
    groups = [[5, 3, 1], [4], [4, 2]]
    regrouped = index.set_column(index.schema.get_field_index("group_rows"), "group_rows", [groups])
    assert index["group_rows"].to_pylist() == [[4, 4, 1], [4], [4, 2]]
    assert fingerprint(regrouped) != fingerprint(index)


def test_sidecar_replaces_the_footers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = tmp_path / "run" / "index.parquet"
    (folder / "0001.parquet").write_bytes(b"")
    fresh = ParquetSource(str(folder), sidecar)
    assert [path.name for path in sidecar.parent.iterdir()] == ["index.parquet"]
    monkeypatch.setattr(pq, "read_metadata", None)
    cached = ParquetSource(str(folder), sidecar)
    assert cached.fingerprint == fresh.fingerprint
    np.testing.assert_array_equal(cached.unit_rows, fresh.unit_rows)
    np.testing.assert_array_equal(cached.unit_bytes, fresh.unit_bytes)
    assert cached.read(2, [0]) == fresh.read(2, [0])


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, _: os.utime(folder / "0001.parquet", (0, 0)),
        lambda folder, _: write_dataset(folder, [9, 4, 6, 1]),
        lambda _, sidecar: sidecar.write_bytes(b"PAR1 no longer"),
        lambda _, sidecar: pq.write_table(pa.table({"x": [1]}), sidecar),
    ],
    ids=["time", "more shards", "damaged sidecar", "other file"],
)
def test_outdated_sidecar_is_rebuilt(
    folder: Path, tmp_path: Path, change: Callable[[Path, Path], object]
) -> None:
    sidecar = tmp_path / "index.parquet"
    load_index(str(folder), sidecar)
    change(folder, sidecar)
    _, index = load_index(str(folder), sidecar)
    assert index.equals(load_index(str(folder))[1])
    assert pq.read_table(sidecar)["mtime_ns"].to_pylist() == index["mtime_ns"].to_pylist()


def test_shards_without_a_readable_footer_are_left_out_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(folder / "0001.parquet", 300)
    (folder / "0003.parquet").write_bytes(b"")
    (folder / "0004.parquet").write_bytes(b"<html>not found</html>")
    damaged = bytearray((folder / "0000.parquet").read_bytes())
    footer = int.from_bytes(damaged[-8:-4], "little")
    damaged[-8 - footer : -8] = b"\xff" * footer
    (folder / "0005.parquet").write_bytes(damaged)
    for sidecar in (None, tmp_path / "index", tmp_path / "index"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = ParquetSource(str(folder), sidecar)
        assert source.unit_rows.tolist() == [4, 4, 1, 4, 2]
        assert "left out 4 of 6 shards" in caplog.text
        assert all(name in caplog.text for name in ("0001", "0003", "0004", "0005"))


def test_a_failing_file_system_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pq, "read_metadata", fail)
    with pytest.raises(OSError, match="Input/output"):
        load_index(str(folder))


def test_places_without_shards_are_refused(tmp_path: Path) -> None:
    for pattern, message in (
        (tmp_path / "missing", "'.*missing' does not exist; give a folder"),
        (tmp_path, "holds no Parquet file"),
        (tmp_path / "*.parquet", "holds no Parquet file"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_index(str(pattern))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"x"), "none of the 1 Parquet files .* has a readable footer"),
        (lambda path: write_nanopath(path, []), "holds 0 rows in 1 shards"),
        (
            lambda path: pq.write_table(pa.table({"image": [b"x"], "y": [1]}), path),
            "shard '.*0.parquet' has columns image, y; 'image_bytes' or 'jpeg' is expected",
        ),
        (
            lambda path: pq.write_table(pa.table({"jpeg": ["x"]}), path),
            "column 'jpeg' of shard '.*0.parquet' has type string; binary is expected",
        ),
        (
            lambda path: pq.write_table(
                pa.table({"image_bytes": [b"x"]}).replace_schema_metadata({"image_encoding": "raw"}), path
            ),
            "raw shard '.*' has tile_size '' and image_dtype 'uint8'",
        ),
        (
            lambda path: pq.write_table(
                pa.table({"image_bytes": [b"x"]}).replace_schema_metadata(
                    {"image_encoding": "raw", "tile_size": "8", "image_dtype": "float32"}
                ),
                path,
            ),
            "image_dtype 'float32'",
        ),
        (
            lambda path: write_published(path, [encode(tile(0), "png")], encoding="webp"),
            "image_encoding 'webp'; png, jpeg or raw is expected",
        ),
    ],
    ids=["no footer", "no rows", "no image column", "text column", "no tile size", "float", "webp"],
)
def test_unusable_shards_are_refused_and_nothing_is_written(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "0.parquet")
    with pytest.raises(ValueError, match=message):
        load_index(str(tmp_path / "set"), tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]

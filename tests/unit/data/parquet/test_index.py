"""Row groups, fingerprint, sidecar and refusals of the index of a Parquet dataset."""

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

from dinov2.data.parquet import index as parquet_index
from dinov2.data.parquet.index import fingerprint, load_index
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.storage.base import LocalStorage, StoredFile
from tests.helpers.shards import encode, tile, write_dataset, write_groups, write_nanopath, write_published


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "set", [9, 4, 6])


def load(pattern: Path | str, sidecar: Path | None = None) -> pa.Table:
    return load_index(LocalStorage(str(pattern)), sidecar)


def names(pattern: Path | str) -> list[str]:
    return load(pattern)["name"].to_pylist()


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


def test_groups_are_row_groups(folder: Path) -> None:
    source = ParquetSource(str(folder))
    assert source.group_rows.tolist() == [4, 4, 1, 4, 4, 2]
    assert source.num_rows == 19
    footers = [pq.read_metadata(shard) for shard in sorted(folder.glob("*.parquet"))]
    groups = [footer.row_group(group) for footer in footers for group in range(footer.num_row_groups)]
    assert source.group_bytes.tolist() == [group.column(8).total_uncompressed_size for group in groups]


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
        lambda folder: write_groups(folder / "0000.parquet", pq.read_table(folder / "0000.parquet"), [5, 3, 1]),
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


def test_fingerprint_tells_a_rewritten_shard_of_equal_size(folder: Path) -> None:
    before, size = ParquetSource(str(folder)).fingerprint, (folder / "0001.parquet").stat().st_size
    table = pq.read_table(folder / "0001.parquet")
    slide = pa.array(["/slides/1000.svs"] * len(table))
    write_groups(folder / "0001.parquet", table.set_column(1, table.schema.field(1), slide), 4)
    assert (folder / "0001.parquet").stat().st_size == size
    assert ParquetSource(str(folder)).fingerprint != before


def test_fingerprint_tells_how_row_groups_are_cut(folder: Path) -> None:
    index = load(folder)
    assert fingerprint(index, np.array([4, 4, 1])) != fingerprint(index, np.array([4, 5]))


def test_sidecar_replaces_the_footers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = tmp_path / "run" / "index.parquet"
    (folder / "0001.parquet").write_bytes(b"")
    fresh = ParquetSource(str(folder), sidecar)
    assert [path.name for path in sidecar.parent.iterdir()] == ["index.parquet"]
    monkeypatch.setattr(parquet_index, "read_footer", None)
    monkeypatch.setattr(parquet_index, "write_sidecar", None)
    cached = ParquetSource(str(folder), sidecar)
    assert cached.fingerprint == fresh.fingerprint
    np.testing.assert_array_equal(cached.group_rows, fresh.group_rows)
    np.testing.assert_array_equal(cached.group_bytes, fresh.group_bytes)
    assert cached.read(2, [0]) == fresh.read(2, [0])


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, _: os.utime(folder / "0001.parquet", (0, 0)),
        lambda folder, _: write_dataset(folder, [9, 4, 6, 1]),
        lambda _, sidecar: sidecar.write_bytes(b"ARROW1 no longer"),
        lambda _, sidecar: os.truncate(sidecar, sidecar.stat().st_size - 100),
        lambda _, sidecar: pq.write_table(pa.table({"x": [1]}), sidecar),
    ],
    ids=["time", "more shards", "corrupt sidecar", "cut sidecar", "other file"],
)
def test_outdated_sidecar_is_rebuilt(folder: Path, tmp_path: Path, change: Callable[[Path, Path], object]) -> None:
    sidecar = tmp_path / "index.parquet"
    load(folder, sidecar)
    change(folder, sidecar)
    index = load(folder, sidecar)
    assert index.equals(load(folder))
    assert index["version"].to_pylist() == [str(shard.stat().st_mtime_ns) for shard in sorted(folder.iterdir())]
    assert pa.ipc.open_file(sidecar).read_all().equals(index)


class PinnedStorage(LocalStorage):
    """A folder that passes for a commit on the hub; counts listings and reads."""

    def __init__(self, folder: Path, commit: str = "0" * 40) -> None:
        super().__init__(str(folder))
        self.folder, self.location = self.location, f"hf://datasets/org/name@{commit}"
        self.listings, self.reads = 0, []

    def list_files(self) -> list[StoredFile]:
        self.listings += 1
        self.location, location = self.folder, self.location
        files = super().list_files()
        self.location = location
        return [file._replace(version="blob") for file in files]

    def read_range(self, name: str, start: int, length: int) -> bytes:
        self.reads.append((name, length))
        return (Path(self.folder) / name).read_bytes()[start : start + length]


def test_a_pinned_commit_needs_no_listing(folder: Path, tmp_path: Path) -> None:
    first, second = PinnedStorage(folder), PinnedStorage(folder)
    index = load_index(first, tmp_path / "index")
    assert load_index(second, tmp_path / "index").equals(index)
    assert (first.listings, len(first.reads)) == (1, 3)
    assert (second.listings, second.reads) == (0, [])
    same_files = PinnedStorage(folder, "1" * 40)
    assert load_index(same_files, tmp_path / "index").equals(index)
    assert (same_files.listings, same_files.reads) == (1, [])


def test_one_read_per_footer_and_two_for_a_long_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {shard.name: shard.stat().st_size for shard in folder.iterdir()}
    storage = PinnedStorage(folder)
    index = load_index(storage)
    assert sorted(storage.reads) == sorted(sizes.items())
    monkeypatch.setattr("dinov2.data.parquet.footer._TAIL", 100)
    storage = PinnedStorage(folder)
    assert load_index(storage).equals(index)
    footers = {name: int.from_bytes((folder / name).read_bytes()[-8:-4], "little") for name in sizes}
    assert sorted(storage.reads) == sorted(
        [(name, length) for name, footer in footers.items() for length in (100, footer + 8 - 100)]
    )


def test_a_sidecar_that_cannot_be_kept_is_only_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    index = load(folder, tmp_path / "file" / "index")
    assert index.equals(load(folder))
    assert "not kept for the next start" in caplog.text
    (tmp_path / "folder").mkdir()
    assert load(folder, tmp_path / "folder").equals(index)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "set"]


def test_a_long_indexing_is_reported(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_index, "_REPORT_EVERY", -1)
    with caplog.at_level(logging.INFO):
        load(folder)
    assert f"indexed 2 of 3 shards of '{folder}'" in caplog.text


def test_a_footer_that_points_out_of_its_file_is_damage(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = (folder / "0000.parquet").read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    (folder / "0000.parquet").write_bytes(content[-footer:])  # as if the beginning were lost
    assert ParquetSource(str(folder)).group_rows.tolist() == [4, 4, 2]
    assert "0000.parquet (it places" in caplog.text


def slides_of(path: Path, column: str, names: list[str | None], group: int, **options: object) -> list:
    """The slides that the index knows, per row group."""
    images = "jpeg" if column == "path" else "image_bytes"
    table = pa.table({column: pa.array(names, pa.string()), images: [b"x"] * len(names)})
    pq.write_table(table, path, row_group_size=group, **options)
    index = load(path)
    slides = index["slides"].to_pylist()[0]
    return [slides[number] if number >= 0 else None for number in index["group_slide"].to_pylist()[0]]


def test_slides_are_known_where_statistics_prove_them(tmp_path: Path) -> None:
    path, names = tmp_path / "a.parquet", ["a", "a", "b", "c", "b", "b", None, "a", "a"]
    assert slides_of(path, "slide_path", names, 2) == ["a", None, "b", None, "a"]
    assert slides_of(path, "slide_path", names, 2, write_statistics=False) == [None] * 5
    tiles = ["s/1.jpg", "s/2.jpg", "s/9.jpg", "t/1.jpg", "u/v/1.png", "u/v/2.PNG", "w", "w"]
    assert slides_of(path, "path", tiles, 2) == ["s", None, "u/v", None]


def test_shards_without_a_readable_footer_are_left_out_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(folder / "0001.parquet", 300)
    (folder / "0003.parquet").write_bytes(b"")
    (folder / "0004.parquet").write_bytes(b"<html>not found</html>")
    corrupt = bytearray((folder / "0000.parquet").read_bytes())
    footer = int.from_bytes(corrupt[-8:-4], "little")
    corrupt[-8 - footer : -8] = b"\xff" * footer
    (folder / "0005.parquet").write_bytes(corrupt)
    for sidecar in (None, tmp_path / "index", tmp_path / "index"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = ParquetSource(str(folder), sidecar)
        assert source.group_rows.tolist() == [4, 4, 1, 4, 2]
        assert "left out 4 of 6 shards" in caplog.text
        assert all(name in caplog.text for name in ("0001", "0003", "0004", "0005"))


def test_a_failing_file_system_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(LocalStorage, "read_range", fail)
    with pytest.raises(OSError, match="Input/output"):
        load(folder)


def test_locations_without_shards_are_refused(tmp_path: Path) -> None:
    for pattern, message in (
        (tmp_path / "missing", "'.*missing' does not exist; give a folder"),
        (tmp_path, "holds no Parquet file"),
        (tmp_path / "*.parquet", "holds no Parquet file"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load(pattern)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"x"), "none of the 1 Parquet files .* has a readable footer"),
        (lambda path: write_nanopath(path, []), "holds 0 rows in 1 shards"),
        (
            lambda path: pq.write_table(pa.table({"picture": [b"x"], "y": [1]}), path),
            "shard '.*0.parquet' has columns picture, y; .*data.image_column, perhaps 'picture'",
        ),
        (
            lambda path: pq.write_table(pa.table({"jpeg": ["x"]}), path),
            "column 'jpeg' of shard '.*0.parquet' has type string; binary is expected",
        ),
        (
            lambda path: pq.write_table(pa.table({"jpeg": pa.array([b"xyz"], pa.binary(3))}), path),
            r"has type fixed_size_binary\[3\]; binary is expected, an image file in each row",
        ),
        (
            lambda path: pq.write_table(pa.table({"image_bytes": [{"bytes": "x", "path": "p"}]}), path),
            "has type struct<bytes: string, path: string>; binary is expected",
        ),
        (
            lambda path: pq.write_table(pa.table({"image_bytes": [b"x"], "slide_path": [1]}), path),
            "column 'slide_path' of shard '.*0.parquet' has type int64; string is expected",
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
            lambda path: write_published(path, [encode(tile(0), "png")], encoding="zlib"),
            "image_encoding 'zlib'; .* or raw is expected",
        ),
    ],
    ids=[
        "no footer",
        "no rows",
        "no image column",
        "text column",
        "fixed size",
        "struct",
        "numbers",
        "no tile size",
        "float",
        "webp",
    ],
)
def test_unusable_shards_are_refused_and_nothing_is_written(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "0.parquet")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "set", tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]

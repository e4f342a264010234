"""Rows of shards, local and remote: both schemas, all encodings, giant row groups, damage."""

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import DecodeError, EncodedSample
from dinov2.data.storage.base import LocalStorage, StoredFile
from tests.helpers.shards import TILE, encode, tile, write_groups, write_nanopath, write_published


def decode(source: ParquetSource, unit: int, row: int) -> np.ndarray:
    [(slide, data)] = source.read(unit, [row])
    return source.decode(EncodedSample(0, unit, row, slide, data))


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_published_schema(tmp_path: Path, encoding: str) -> None:
    path = write_published(
        tmp_path / "a.parquet", [encode(tile(i), encoding) for i in range(10)], 4, encoding
    )
    source = ParquetSource(str(path))
    for number in range(10):
        np.testing.assert_array_equal(decode(source, *divmod(number, 4)), tile(number))
    assert source.read(1, [0])[0][0] == "/slides/a.svs"


def test_nanopath_schema(tmp_path: Path) -> None:
    path = write_nanopath(tmp_path / "slide-7.parquet", [encode(tile(i), "jpeg") for i in range(3)])
    source = ParquetSource(str(path))
    assert source.read(0, [2]) == [("slide-7", encode(tile(2), "jpeg"))]
    assert decode(source, 0, 2).shape == (TILE, TILE, 3)


def test_first_bytes_decide_where_the_metadata_is_wrong(tmp_path: Path) -> None:
    path = write_published(tmp_path / "a.parquet", [encode(tile(0), "png")], encoding="jpeg")
    np.testing.assert_array_equal(decode(ParquetSource(str(path)), 0, 0), tile(0))


def test_rows_come_in_the_order_asked_for_from_a_giant_compressed_group(tmp_path: Path) -> None:
    images = [b"%d" % number for number in range(1000)]
    table = pa.table({"path": [f"s{number}/t.jpg" for number in range(1000)], "jpeg": images})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    rows = np.random.default_rng(0).permutation(1000)[:300].tolist()
    found = ParquetSource(str(tmp_path)).read(0, rows)
    assert found == [(f"s{row}", images[row]) for row in rows]


def test_a_shard_without_slide_names_is_its_own_slide(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpeg": [b"x"]}), tmp_path / "a.parquet")
    assert ParquetSource(str(tmp_path)).read(0, [0]) == [("a.parquet", b"x")]


def test_a_null_image_is_empty_bytes(tmp_path: Path) -> None:
    write_nanopath(tmp_path / "a.parquet", [None, b"x"])
    assert [data for _, data in ParquetSource(str(tmp_path)).read(0, [0, 1])] == [b"", b"x"]


def test_schemas_mix_in_one_dataset(tmp_path: Path) -> None:
    write_published(tmp_path / "a.parquet", [tile(0).tobytes()], encoding="raw")
    write_published(tmp_path / "b.parquet", [encode(tile(1), "png")])
    write_nanopath(tmp_path / "c.parquet", [encode(tile(2), "png")])
    source = pickle.loads(pickle.dumps(ParquetSource(str(tmp_path))))
    for unit in range(3):
        np.testing.assert_array_equal(decode(source, unit, 0), tile(unit))


def test_a_damaged_page_gives_no_image_and_the_rest_still_comes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_groups(path, pa.table({"jpeg": [b"x" * 50] * 8}), 4)
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    source = ParquetSource(str(path))
    assert source.read(0, [0, 3]) == [("a.parquet", b"x" * 50)] * 2
    assert source.read(1, [0, 1]) == [("a.parquet", b"")] * 2
    with pytest.raises(DecodeError, match=r"nothing is stored there \(a null, or a damaged page"):
        decode(source, 1, 0)


def test_a_shard_that_is_gone_or_became_shorter_is_named(tmp_path: Path) -> None:
    path = write_nanopath(tmp_path / "a.parquet", [b"x" * 5000] * 8)
    source = ParquetSource(str(path))
    os.truncate(path, 30_000)
    assert len(source.read(0, [0])) == 1
    with pytest.raises(OSError, match=r"a\.parquet' ends at byte"):
        source.read(1, [0])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.parquet"):
        source.read(0, [0])


class RemoteStorage:
    """A folder that is no local storage; counts reads, and fails when told to."""

    def __init__(self, folder: Path) -> None:
        self._inside, self.place = LocalStorage(str(folder)), "memory://set"
        self.reads, self.failure = [], None

    def list_files(self) -> list[StoredFile]:
        return self._inside.list_files()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        if self.failure:
            raise self.failure
        self.reads.append((start, length))
        return self._inside.read_range(name, start, length)

    def locate(self, name: str) -> str:
        return f"{self.place}/{name}"


def test_a_remote_unit_is_one_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "slide_path": ["a", "a", "a", "b"] * 4,
            "x": range(16),
            "image_bytes": [b"%d" % i for i in range(16)],
        }
    )
    write_groups(tmp_path / "a.parquet", table, 4)
    storage = RemoteStorage(tmp_path)
    source = ParquetSource.from_storage(storage)
    assert (source.place, source.is_remote) == ("memory://set", True)
    storage.reads.clear()
    assert source.read(2, [3, 1]) == [("b", b"11"), ("a", b"9")]
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(2)
    first, last = group.column(0).data_page_offset, group.column(2)
    assert storage.reads == [(first, last.data_page_offset + last.total_compressed_size - first)]
    assert source.describe(2) == "row group 2 of shard 'memory://set/a.parquet'"
    assert source.describe(2, 3) == "row 3 of row group 2 of shard 'memory://set/a.parquet'"
    assert source.fingerprint == ParquetSource(str(tmp_path)).fingerprint


def test_slides_are_read_only_where_the_index_does_not_know_them(tmp_path: Path) -> None:
    table = pa.table({"slide_path": ["a", "a", "b", "c", None], "image_bytes": [bytes(1000)] * 5})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    write_nanopath(tmp_path / "b.parquet", [b"x"] * 3, 2)
    storage = RemoteStorage(tmp_path)
    source = ParquetSource.from_storage(storage)
    storage.reads.clear()
    assert [source.slides(unit) for unit in range(5)] == [["a"] * 2, ["b", "c"], [""], ["b"] * 2, ["b"]]
    assert len(storage.reads) == 2
    assert all(length < 200 for _, length in storage.reads)
    storage.reads.clear()
    source.read(0, [0])
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(1)
    assert storage.reads == [(group.dictionary_page_offset, group.total_compressed_size)]


@pytest.mark.parametrize("remote", [True, False])
def test_what_only_pyarrow_can_read(tmp_path: Path, remote: bool) -> None:
    images, slides = [b"%d" % i * 20 for i in range(200)], [f"slide {i // 3}" for i in range(200)]
    table = pa.table({"slide_path": slides, "image_bytes": pa.array([*images[:-1], None], pa.binary())})
    encodings = {"slide_path": "DELTA_BYTE_ARRAY", "image_bytes": "DELTA_LENGTH_BYTE_ARRAY"}
    options = {"column_encoding": encodings, "use_dictionary": False, "row_group_size": 150}
    pq.write_table(table, tmp_path / "a.parquet", **options)
    storage = RemoteStorage(tmp_path) if remote else LocalStorage(str(tmp_path))
    source = ParquetSource.from_storage(storage)
    images[-1] = b""
    assert source.read(0, [149, 0, 70]) == [(slides[row], images[row]) for row in (149, 0, 70)]
    assert source.read(1, range(50)) == list(zip(slides[150:], images[150:], strict=True))
    assert source.slides(1) == slides[150:]
    if remote:
        storage.failure = TimeoutError("the server is asleep")
        with pytest.raises(TimeoutError, match="asleep"):
            source.read(0, [0])


def test_damage_that_pyarrow_finds_raises_nothing(tmp_path: Path) -> None:
    table = pa.table({"image_bytes": [b"%d" % i * 20 for i in range(100)]})
    options = {"column_encoding": {"image_bytes": "DELTA_LENGTH_BYTE_ARRAY"}, "use_dictionary": False}
    pq.write_table(table, tmp_path / "a.parquet", **options)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:30] = b"\xff" * 26
    (tmp_path / "a.parquet").write_bytes(content)
    assert ParquetSource(str(tmp_path)).read(0, [0, 99]) == [("a.parquet", b"")] * 2


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY"])
def test_giant_local_groups_are_cut_into_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr("dinov2.data.parquet.source._GIANT_BYTES", 1000)
    images, slides = [b"%d" % i * 5 for i in range(700)], ["a"] * 300 + ["b"] * 400
    table = pa.table({"slide_path": slides, "image_bytes": images})
    options = {"column_encoding": {"image_bytes": encoding}, "use_dictionary": ["slide_path"]}
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=400, **options)
    source = pickle.loads(pickle.dumps(ParquetSource(str(tmp_path))))
    assert source.unit_rows.tolist() == [64] * 6 + [16] + [64] * 4 + [44]
    assert source.num_rows == 700
    sizes = [
        pq.read_metadata(tmp_path / "a.parquet").row_group(g).column(1).total_uncompressed_size
        for g in (0, 1)
    ]
    assert 0 <= source.unit_bytes.sum() - sum(sizes) <= 12
    found = [row for unit in range(12) for row in source.read(unit, range(int(source.unit_rows[unit])))]
    assert found == list(zip(slides, images, strict=True))
    assert [slide for unit in range(12) for slide in source.slides(unit)] == slides
    assert source.read(6, [15, 0]) == [("b", images[399]), ("b", images[384])]
    assert source.describe(8).startswith("rows 64 to 127 of row group 1 of shard '")
    assert source.describe(11, 43).startswith("row 299 of row group 1 of shard '")
    remote = ParquetSource.from_storage(RemoteStorage(tmp_path))
    assert remote.unit_rows.tolist() == [400, 300]
    assert remote.fingerprint != source.fingerprint


def test_groups_of_few_rows_or_bytes_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2.data.parquet.source._GIANT_BYTES", 256 * 100)
    write_groups(tmp_path / "a.parquet", pa.table({"jpeg": [bytes(200)] * 256}), 256)
    write_groups(tmp_path / "b.parquet", pa.table({"jpeg": [bytes(50)] * 257}), 257)
    write_groups(tmp_path / "c.parquet", pa.table({"jpeg": [bytes(200)] * 257}), 257)
    assert ParquetSource(str(tmp_path)).unit_rows.tolist() == [256, 257, 64, 64, 64, 64, 1]

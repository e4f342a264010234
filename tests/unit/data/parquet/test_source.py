"""Rows of shards, local and remote: both schemas, all encodings, oversized row groups, corruption."""

import os
import pickle
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data.parquet import source as parquet_source
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import DecodeError, EncodedSample
from dinov2.data.storage.base import LocalStorage
from tests.helpers.remote import RemoteFolder
from tests.helpers.shards import TILE, encode, tile, write_groups, write_nanopath, write_published


def decode(source: ParquetSource, group: int, row: int) -> np.ndarray:
    [(slide, data)] = source.read(group, [row])
    return source.decode(EncodedSample(0, group, row, slide, data))


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_published_schema(tmp_path: Path, encoding: str) -> None:
    path = write_published(tmp_path / "a.parquet", [encode(tile(i), encoding) for i in range(10)], 4, encoding)
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


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
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
    for group in range(3):
        np.testing.assert_array_equal(decode(source, group, 0), tile(group))


def test_a_corrupt_page_gives_no_image_and_the_rest_still_comes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_groups(path, pa.table({"jpeg": [b"x" * 50] * 8}), 4)
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    source = ParquetSource(str(path))
    assert source.read(0, [0, 3]) == [("a.parquet", b"x" * 50)] * 2
    assert source.read(1, [0, 1]) == [("a.parquet", b"")] * 2
    with pytest.raises(DecodeError):
        decode(source, 1, 0)


def test_a_shard_that_is_gone_or_changed_is_named(tmp_path: Path) -> None:
    path = write_nanopath(tmp_path / "a.parquet", [b"x" * 5000] * 8)
    content = path.read_bytes()
    changes = {
        "shorter": lambda: os.truncate(path, 30_000),
        "other bytes": lambda: path.write_bytes(bytes(len(content))),
        "other row groups": lambda: write_nanopath(path, [b"x" * 5000] * 8, 8),
        "gone": path.unlink,
    }
    for change in changes.values():
        path.write_bytes(content)
        source = ParquetSource(str(path))
        change()
        with pytest.raises(OSError, match=r"a\.parquet"):
            source.read(1, [0])


def test_a_remote_group_is_one_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "slide_path": ["a", "a", "a", "b"] * 4,
            "x": range(16),
            "image_bytes": [b"%d" % i for i in range(16)],
        }
    )
    write_groups(tmp_path / "a.parquet", table, 4)
    storage = RemoteFolder(tmp_path)
    source = ParquetSource(storage)
    assert (source.location, source.is_remote) == ("memory://set", True)
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
    storage = RemoteFolder(tmp_path)
    source = ParquetSource(storage)
    storage.reads.clear()
    assert [source.slides(group) for group in range(5)] == [["a"] * 2, ["b", "c"], [""], ["b"] * 2, ["b"]]
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
    storage = RemoteFolder(tmp_path) if remote else LocalStorage(str(tmp_path))
    source = ParquetSource(storage)
    images[-1] = b""
    assert source.read(0, [149, 0, 70]) == [(slides[row], images[row]) for row in (149, 0, 70)]
    assert source.read(1, range(50)) == list(zip(slides[150:], images[150:], strict=True))
    assert source.slides(1) == slides[150:]
    if remote:
        storage.failure = TimeoutError("the server is asleep")
        with pytest.raises(TimeoutError, match="asleep"):
            source.read(0, [0])


@pytest.mark.parametrize("remote", [True, False])
def test_an_oversized_row_group_is_read_in_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setattr(parquet_source, "OVERSIZED", 40_000)
    monkeypatch.setattr(parquet_source, "_WINDOW", 20_000)
    images, slides = [b"%d" % i * 50 for i in range(1500)], ["a"] * 300 + ["b"] * 1200
    table = pa.table({"slide_path": slides, "image_bytes": images})
    options = {"use_dictionary": ["slide_path"], "data_page_size": 100, "write_batch_size": 100}
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=900, compression="none", **options)
    storage = RemoteFolder(tmp_path) if remote else LocalStorage(str(tmp_path))
    source = ParquetSource(storage)
    assert source.group_rows.tolist() == [900, 600]
    rows = [899, 0, 3, 450]
    if remote:
        storage.reads.clear()
    assert source.read(0, rows) == [(slides[row], images[row]) for row in rows]
    if remote:
        assert 1 < len(storage.reads) < 20
        assert max(length for _, length in storage.reads) <= 20_000
        storage.failure = TimeoutError("the server is asleep")
        with pytest.raises(TimeoutError, match="asleep"):
            source.read(0, [0])


def test_oversized_row_groups_come_with_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_groups(tmp_path / "the set" / "a.parquet", pa.table({"jpeg": [bytes(200)] * 128}), 64)
    assert ParquetSource(str(tmp_path / "the set")).repack_advice() == ""
    monkeypatch.setattr(parquet_source, "OVERSIZED", 1000)
    assert ParquetSource(str(tmp_path / "the set")).repack_advice() == ""  # not to be made smaller
    write_groups(tmp_path / "the set" / "a.parquet", pa.table({"jpeg": [bytes(200)] * 128}), 128)
    for pattern, target in (("the set", "the set"), ("the set/a.parquet", "the set/a"), ("*/*.parquet", "")):
        advice = ParquetSource(str(tmp_path / pattern)).repack_advice()
        command = f"python -m dinov2.data.repack '{tmp_path / pattern}' "
        assert command in advice
        assert shlex.split(advice[advice.index(command) :])[4] == f"{tmp_path / target}-repacked"
    advice = ParquetSource(RemoteFolder(tmp_path)).repack_advice()
    assert "python -m dinov2.data.repack memory://set set-repacked" in advice


CODECS = ["none", "snappy", "gzip", "brotli", "zstd", "lz4"]
KINDS = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]


@st.composite
def columns(draw: st.DrawFn) -> tuple[pa.Array, dict]:
    """An image column and how to write it."""
    pool = draw(st.lists(st.binary(max_size=60), min_size=1, max_size=40))
    nulls = draw(st.sampled_from([0, 0.1, 1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(1, 400))
    picked = [None if rng.random() < nulls else pool[rng.integers(len(pool))] for _ in range(size)]
    return pa.array(picked, draw(st.sampled_from(KINDS))), {
        "compression": draw(st.sampled_from(CODECS)),
        "use_dictionary": draw(st.booleans()),
        "dictionary_pagesize_limit": draw(st.sampled_from([1, 100, 1 << 20])),
        "data_page_size": draw(st.sampled_from([1, 200, 1 << 20])),
        "write_batch_size": draw(st.sampled_from([1, 7, 64, 1024])),
        "data_page_version": draw(st.sampled_from(["1.0", "2.0"])),
        "row_group_size": draw(st.sampled_from([50, 1000])),
    }


@settings(max_examples=60, deadline=None)
@given(columns(), st.integers(0, 2**32))
def test_rows_are_what_was_written_and_corruption_raises_nothing(table: tuple[pa.Array, dict], seed: int) -> None:
    values, options = table
    rng = np.random.default_rng(seed)
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        pq.write_table(pa.table({"jpeg": values}), path, **options)
        source = ParquetSource(folder)
        expected = [value or b"" for value in values.to_pylist()]
        for group, count in enumerate(source.group_rows.tolist()):
            rows = rng.integers(0, count, 5).tolist()  # in any order, some twice
            first = int(source.group_rows[:group].sum())
            assert source.read(group, range(count)) == [
                ("a.parquet", value) for value in expected[first : first + count]
            ]
            assert source.read(group, rows) == [("a.parquet", expected[first + row]) for row in rows]
        content = bytearray(path.read_bytes())
        end = len(content) - int.from_bytes(content[-8:-4], "little") - 8
        for _ in range(int(rng.integers(1, 4))):
            start = int(rng.integers(end))
            length = min(int(rng.integers(1, 9)), end - start)
            content[start : start + length] = rng.bytes(length)
        path.write_bytes(content)
        found = [
            data
            for group in range(len(source.group_rows))
            for _, data in source.read(group, range(source.group_rows[group]))
        ]
        assert len(found) == len(expected)
        assert all(isinstance(data, bytes) for data in found)


def test_what_precedes_a_corrupt_page_still_comes(tmp_path: Path) -> None:
    images = [b"value-%04d" % number for number in range(400)]
    options = {"use_dictionary": False, "write_batch_size": 64, "data_page_size": 1, "compression": "none"}
    pq.write_table(pa.table({"jpeg": images}), tmp_path / "a.parquet", **options)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[content.index(images[200]) - 1] = 0x7F  # a length
    (tmp_path / "a.parquet").write_bytes(content)
    found = [data for _, data in ParquetSource(str(tmp_path)).read(0, range(400))]
    assert found == images[:192] + [b""] * 208


def test_damage_that_pyarrow_finds_raises_nothing(tmp_path: Path) -> None:
    table = pa.table({"image_bytes": [b"%d" % i * 20 for i in range(100)]})
    options = {"column_encoding": {"image_bytes": "DELTA_LENGTH_BYTE_ARRAY"}, "use_dictionary": False}
    pq.write_table(table, tmp_path / "a.parquet", **options)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:30] = b"\xff" * 26
    (tmp_path / "a.parquet").write_bytes(content)
    assert ParquetSource(str(tmp_path)).read(0, [0, 99]) == [("a.parquet", b"")] * 2

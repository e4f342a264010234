"""Rows of local shards: both schemas, all encodings, damage."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.data.parquet_source import ParquetSource
from dinov2.data.sample import EncodedSample
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


def test_an_unreadable_row_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_groups(path, pa.table({"jpeg": [b"x" * 50] * 8}), 4)
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    source = ParquetSource(str(path))
    assert len(source.read(0, [0, 3])) == 2
    with pytest.raises(ValueError, match=r"row group 1 of shard '.*a.parquet' cannot be read \("):
        source.read(1, [0])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.parquet"):
        source.read(0, [0])

"""Columns of patients and sites: what is told of each row, and at which price."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.data.parquet.source import ParquetSource
from dinov2.data.storage.base import LocalStorage

IMAGE = 300_000  # bytes of a row, more than is read over to save a request
ROWS = 12


class Watched(LocalStorage):
    """A folder that notes what is read of it."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.ranges: list[tuple[str, int, int]] = []

    def read_range(self, name: str, start: int, length: int) -> bytes:
        self.ranges.append((name, start, start + length))
        return super().read_range(name, start, length)


def write(path: Path, slides: Sequence[str], group: int = 4, images: int = 4, nanopath: bool = False, **columns: Any):
    """A shard of bytes that are no images, `images` of them per row; further columns stand behind them."""
    data = pa.array([bytes(images)] * len(slides), pa.binary())
    names = [f"{slide}/{n}_0_1.jpg" for n, slide in enumerate(slides)] if nanopath else slides
    first = {"path": names, "jpeg": data} if nanopath else {"slide_path": names, "image_bytes": data}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({**first, **columns}), path, row_group_size=group, compression="none", use_dictionary=list(columns)
    )
    return path


def told(source: ParquetSource) -> list[tuple[str, str, str]]:
    return [tuple(origin) for group in range(len(source.group_rows)) for origin in source.origins(group)]


MIXED = ["p1", "p2", None, "p1", "", "p3", "p3", "p3", "p9", "p9", "p9", "p9"]
ONE_EACH = ["p1"] * 4 + ["p2"] * 4 + ["p1"] * 4
SITES = ["s"] * 4 + [None] * 4 + ["s", "t", None, "t"]


@pytest.mark.parametrize("nanopath", [False, True])
@pytest.mark.parametrize("patients", [MIXED, ONE_EACH], ids=["mixed", "one each"])
@pytest.mark.parametrize("slides", [["a"] * ROWS, list("ababaabbcccc")], ids=["one slide", "several"])
@pytest.mark.parametrize("statistics", [True, False])
def test_rows_tell_what_was_written(
    tmp_path: Path, slides: list[str], patients: list[str | None], nanopath: bool, statistics: bool
) -> None:
    path = write(tmp_path / "a.parquet", slides, nanopath=nanopath, patient=patients, site=SITES)
    if not statistics:
        pq.write_table(pq.read_table(path), path, row_group_size=4, write_statistics=False)
    expected = [(s, p or "", at or "") for s, p, at in zip(slides, patients, SITES, strict=True)]
    assert told(ParquetSource(str(tmp_path))) == expected


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.int64(), pa.int16()], ids=str
)
@pytest.mark.parametrize("values", [[3, 3, 3, 3, 4, 5, None, 4], [None] * 8])
def test_texts_and_whole_numbers_are_names(tmp_path: Path, kind: pa.DataType, values: list[int | None]) -> None:
    whole = pa.types.is_integer(kind)
    site = pa.array([value if whole or value is None else str(value) for value in values], kind)
    write(tmp_path / "a.parquet", ["x"] * 8, site=site)
    assert told(ParquetSource(str(tmp_path))) == [("x", "", "" if v is None else str(v)) for v in values]


def test_each_shard_tells_what_it_has(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["x"] * 4, patient=["p"] * 4)
    write(tmp_path / "b.parquet", ["y", "z"])
    write(tmp_path / "c.parquet", ["w"], site=["s"], patient=pa.nulls(1))
    expected = [("x", "p", "")] * 4 + [("y", "", ""), ("z", "", ""), ("w", "", "s")]
    assert told(ParquetSource(str(tmp_path))) == expected


def test_no_image_is_read_and_nothing_that_statistics_tell(tmp_path: Path) -> None:
    single, mixed = ["p"] * 4 + ["q"] * 4, ["p", "q"] * 4
    write(tmp_path / "single.parquet", ["a"] * 8, images=IMAGE, patient=single)
    write(tmp_path / "mixed.parquet", ["a"] * 8, images=IMAGE, patient=mixed, site=mixed)
    write(tmp_path / "without.parquet", ["a"] * 8, images=IMAGE)
    storage = Watched(str(tmp_path))
    source = ParquetSource(storage)
    storage.ranges.clear()
    assert [patient for _, patient, _ in told(source)] == mixed + single + [""] * 8
    by_name = {name: [r[1:] for r in storage.ranges if r[0] == name] for name, _, _ in storage.ranges}
    assert set(by_name) == {"single.parquet", "mixed.parquet"}
    for name, ranges in by_name.items():
        metadata, size = pq.read_metadata(tmp_path / name), (tmp_path / name).stat().st_size
        images = [metadata.row_group(group).column(1) for group in range(2)]
        for start, end in ranges:
            assert all(end <= i.data_page_offset or start >= i.data_page_offset + 4 * IMAGE for i in images)
        footer = [(start, end) for start, end in ranges if end == size]
        assert len(footer) == 1 and (len(ranges) > 1) == (name == "mixed.parquet")


def test_opening_reads_no_more_for_the_columns(tmp_path: Path) -> None:
    """A start from the sidecar reads nothing at all; the first one each footer, and no column."""
    write(tmp_path / "shards" / "a.parquet", ["a"] * 8, patient=["p", "q"] * 4)
    storage = Watched(str(tmp_path / "shards"))
    first = ParquetSource(storage, tmp_path / "index")
    assert len(storage.ranges) == 1
    again = ParquetSource(storage, tmp_path / "index")
    assert len(storage.ranges) == 1 and again.fingerprint == first.fingerprint
    assert told(again) == told(first) == [("a", "p", ""), ("a", "q", "")] * 4


@pytest.mark.parametrize(
    "values", [pa.array([1.5]), pa.array([["p"]]), pa.array([b"p"])], ids=["float", "list", "bytes"]
)
def test_other_types_are_refused_only_where_they_are_needed(tmp_path: Path, values: pa.Array) -> None:
    write(tmp_path / "a.parquet", ["x"], patient=values)
    source = ParquetSource(str(tmp_path))
    assert source.slides(0) == ["x"] and source.read(0, [0])
    with pytest.raises(ValueError, match="patient"):
        source.origins(0)


def test_a_corrupt_column_tells_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["x"] * 4, patient=list("pqrs"))
    chunk = pq.read_metadata(path).row_group(0).column(2)
    data, start = bytearray(path.read_bytes()), chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    assert told(ParquetSource(str(tmp_path))) == [("x", "", "")] * 4

"""Values cut out of stored column chunks against pyarrow, and against bytes made by hand."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data.parquet.chunk_bytes import takes
from dinov2.data.parquet.header import DATA_PAGE, DATA_PAGE_V2, DamagedPage, PageHeader, parse_page_header
from dinov2.data.parquet.pages import Column, hybrid, page_headers, read_rows

CODECS = ["none", "snappy", "gzip", "brotli", "zstd", "lz4"]
KINDS = [
    pa.binary(),
    pa.large_binary(),
    pa.string(),
    pa.large_string(),
    pa.dictionary(pa.int32(), pa.string()),
]


def column_of(file: io.BytesIO, group: int = 0) -> tuple[memoryview, int, Column]:
    """The stored bytes of the first column of a row group, its rows, and how it is stored."""
    footer = pq.read_metadata(file)
    chunk = footer.row_group(group).column(0)
    start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
    data = memoryview(file.getvalue())[start : start + chunk.total_compressed_size]
    optional = footer.schema.column(0).max_definition_level == 1
    return data, footer.row_group(group).num_rows, Column(chunk.compression, optional)


def read(data: memoryview, num_rows: int, column: Column, rows: list[int]) -> list[bytes]:
    return read_rows(lambda position, length: data[position:][:length], len(data), num_rows, rows, column)


def written(values: pa.Array, nullable: bool = True, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(pa.table([values], pa.schema([pa.field("x", values.type, nullable)])), file, **options)
    return file


def as_bytes(values: pa.Array) -> list[bytes]:
    found = [value or b"" for value in values.to_pylist()]
    return [value.encode() if isinstance(value, str) else value for value in found]


@st.composite
def columns(draw: st.DrawFn) -> tuple[pa.Array, dict]:
    pool = draw(st.lists(st.text(max_size=60), min_size=1, max_size=40))
    nulls = draw(st.sampled_from([0, 0.1, 1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(1, 400))
    picked = [
        None if rng.random() < nulls else pool[rng.integers(len(pool))] * int(rng.integers(1, 4))
        for _ in range(size)
    ]
    kind = draw(st.sampled_from(KINDS))
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    values = pa.array([p.encode() if binary and p is not None else p for p in picked], kind)
    return values, {
        "nullable": bool(nulls) or draw(st.booleans()),
        "compression": draw(st.sampled_from(CODECS)),
        "use_dictionary": draw(st.booleans()),
        "dictionary_pagesize_limit": draw(st.sampled_from([1, 100, 1000, 1 << 20])),
        "data_page_size": draw(st.sampled_from([1, 200, 1 << 20])),
        "write_batch_size": draw(st.sampled_from([1, 7, 64, 1024])),
        "data_page_version": draw(st.sampled_from(["1.0", "2.0"])),
        "row_group_size": draw(st.sampled_from([50, 1000])),
        "write_statistics": draw(st.booleans()),
        "write_page_checksum": draw(st.booleans()),
    }


@settings(max_examples=120, deadline=None)
@given(columns(), st.integers(0, 2**32))
def test_equals_pyarrow(table: tuple[pa.Array, dict], seed: int) -> None:
    values, options = table
    file = written(values, **options)
    first = 0
    for group in range(pq.read_metadata(file).num_row_groups):
        data, num_rows, column = column_of(file, group)
        expected = as_bytes(pq.ParquetFile(file).read_row_group(group)["x"])
        assert expected == as_bytes(values[first : first + num_rows])
        assert read(data, num_rows, column, list(range(num_rows))) == expected
        rows = np.random.default_rng(seed).integers(0, num_rows, 5).tolist()  # in any order, some twice
        assert read(data, num_rows, column, rows) == [expected[row] for row in rows]
        first += num_rows


ROWS = [b"value-%03d" % number for number in range(40)]  # pages of 8


def in_pages(**options: object) -> tuple[bytearray, Column]:
    """A chunk of unique values in pages of 8 rows."""
    options = {"compression": "none", "use_dictionary": False, "nullable": False} | options
    options |= {"write_batch_size": 8, "data_page_size": 1, "write_statistics": False}
    file = written(pa.array(ROWS, pa.binary()), **options)
    data, _, column = column_of(file)
    return bytearray(data), column


def read_all(data: bytearray, column: Column) -> list[bytes]:
    return read(memoryview(data), len(ROWS), column, list(range(len(ROWS))))


def headers_of(data: bytearray) -> list[PageHeader]:
    return list(page_headers(lambda position, size: memoryview(data)[position:][:size], len(data)))


def test_a_damaged_header_costs_its_page_and_those_behind_it() -> None:
    data, column = in_pages()
    data[data.find(ROWS[15]) + len(ROWS[15])] ^= 0xFF
    assert read_all(data, column) == ROWS[:16] + [b""] * 24


def test_a_damaged_length_costs_the_rest_of_its_page() -> None:
    data, column = in_pages()
    data[data.find(ROWS[19]) - 1] = 0x7F
    assert read_all(data, column) == ROWS[:19] + [b""] * 5 + ROWS[24:]


def test_a_page_that_does_not_decompress_costs_itself() -> None:
    for codec in ("snappy", "zstd", "gzip", "brotli", "lz4"):
        data, column = in_pages(compression=codec)
        second = headers_of(data)[1]
        data[second.body : second.end] = b"\xff" * second.stored
        assert read_all(data, column) == ROWS[:8] + [b""] * 8 + ROWS[16:], codec


def test_damaged_levels_cost_their_page() -> None:
    data, column = in_pages(nullable=True)
    first = data.find(ROWS[8])
    data[first - 10 : first - 4] = b"\xff" * 6  # their length, and the one run
    assert read_all(data, column) == ROWS[:8] + [b""] * 8 + ROWS[16:]


def test_a_damaged_dictionary_costs_the_pages_that_use_it() -> None:
    options = {"use_dictionary": True, "dictionary_pagesize_limit": 100}  # full after the first page
    data, column = in_pages(**options)
    assert read_all(data, column) == ROWS
    data[data.find(ROWS[0]) - 1] = 0x7F
    assert read_all(data, column) == [b""] * 8 + ROWS[8:]


def test_a_wrong_count_of_rows_gives_none_rather_than_shifted_ones() -> None:
    data, column = in_pages()
    start = headers_of(data)[0].end
    for wrong in (7, 9):
        changed = bytearray(data)
        field = changed.index(bytes([16, 0x15]), start)  # zigzag of 8, and the next field's head
        changed[field] = 2 * wrong
        assert read_all(changed, column) == [b""] * len(ROWS)


def test_a_chunk_cut_short_gives_what_is_there() -> None:
    data, column = in_pages()
    assert read_all(data[: data.find(ROWS[30])], column) == ROWS[:24] + [b""] * 16
    assert read_all(bytearray(), column) == [b""] * len(ROWS)


@settings(max_examples=150, deadline=None)
@given(columns(), st.integers(0, 2**32))
def test_no_damage_raises(table: tuple[pa.Array, dict], seed: int) -> None:
    values, options = table
    data, num_rows, column = column_of(written(values, **options))
    expected = as_bytes(values[:num_rows])
    rng = np.random.default_rng(seed)
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        start = int(rng.integers(len(damaged)))
        length = min(int(rng.integers(1, 9)), len(damaged) - start)
        damaged[start : start + length] = rng.bytes(length)
    found = read(memoryview(damaged), num_rows, column, list(range(num_rows)))
    assert len(found) == len(expected)
    assert all(isinstance(value, bytes) for value in found)


def test_equal_values_of_a_dictionary_are_one_object() -> None:
    data, num_rows, column = column_of(written(pa.array([b"same image"] * 9, pa.binary())))
    assert len({id(value) for value in read(data, num_rows, column, list(range(9)))}) == 1


def test_integers_in_runs_and_packed_bits() -> None:
    packed = bytes([0b11, 0x88, 0xC6, 0xFA])  # the format's own example: 0 to 7 in 3 bits
    assert hybrid(memoryview(packed), 3, 8).tolist() == list(range(8))
    assert hybrid(memoryview(packed), 3, 5).tolist() == list(range(5))
    run = bytes([0xD0, 0x0F, 0x34, 0x12])  # 1,000 times 0x1234
    assert hybrid(memoryview(run), 13, 1000).tolist() == [0x1234] * 1000
    assert hybrid(memoryview(bytes([6, 5]) + packed), 3, 7).tolist() == [5, 5, 5, 0, 1, 2, 3]
    assert hybrid(memoryview(b""), 0, 3).tolist() == [0, 0, 0]
    for bad, width in ((b"", 3), (b"\x00\x05", 3), (b"\x03\x88", 3), (b"\x04", 3), (b"\x04\x05", 33)):
        with pytest.raises((DamagedPage, IndexError)):
            hybrid(memoryview(bad), width, 8)


def field(delta: int, kind: int, payload: bytes = b"") -> bytes:
    return bytes([delta << 4 | kind]) + payload


def number(value: int) -> bytes:
    """Zigzag varint of a small integer."""
    assert 0 <= value < 8192
    return bytes([2 * value]) if value < 64 else bytes([2 * value & 0x7F | 0x80, 2 * value >> 7])


def test_headers_made_by_hand() -> None:
    sizes = field(1, 5, number(1000)) + field(1, 5, number(300))
    statistics = field(1, 12, field(1, 8, b"\x03abc") + field(2, 6, number(0)) + b"\0")
    v1 = field(1, 5, number(40)) + field(1, 5, number(8)) + field(1, 5, number(3)) + field(1, 5, number(3))
    data = field(1, 5, number(0)) + sizes + field(1, 5, number(77)) + field(1, 12, v1 + statistics + b"\0")
    expected = PageHeader(DATA_PAGE, len(data) + 3, 300, 1000, 40, 8, 0, True)
    assert parse_page_header(b"??" + data + b"\0", 2) == expected
    v2 = field(1, 5, number(40)) + field(1, 5, number(2)) + field(1, 5, number(40)) + field(1, 5, number(0))
    v2 += field(1, 5, number(6)) + field(1, 5, number(0))
    for is_compressed, kind in ((True, b""), (True, field(1, 1)), (False, field(1, 2))):
        data = field(1, 5, number(3)) + sizes + field(0, 12, number(8)) + v2 + kind + b"\0\0"
        assert parse_page_header(data, 0) == PageHeader(
            DATA_PAGE_V2, len(data), 300, 1000, 40, 0, 6, is_compressed
        )
    for cut in range(len(data)):
        with pytest.raises((DamagedPage, IndexError)):
            parse_page_header(data[:cut], 0)
    index_page = field(1, 5, number(1)) + sizes + b"\0"
    assert parse_page_header(index_page, 0)[:3] == (1, len(index_page), 300)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\0", "lacks a field"),
        (field(1, 5, number(0)) + field(1, 5, number(1)) + field(1, 5, number(1)) + b"\0", "lacks a field"),
        (field(1, 5, number(1)) + field(1, 5, b"\x01") + field(1, 5, number(1)) + b"\0", "cannot be"),
        (
            field(1, 5, number(2))
            + field(1, 5, number(1))
            + field(1, 5, number(1))
            + field(4, 12, field(1, 5, number(1)) + field(1, 12, b"\0") + b"\0")
            + b"\0",
            "cannot be",
        ),  # an encoding that is a struct
        (b"\x1c" * 100, "deep"),
        (b"\x19" + bytes(9), "type 9"),
        (b"\x15" + b"\xff" * 20, "more than 10 bytes"),
    ],
)
def test_other_bytes_are_no_header(header: bytes, message: str) -> None:
    with pytest.raises(DamagedPage, match=message):
        parse_page_header(header, 0)


class CountedReads:
    """One stored file that notes its ranged reads."""

    def __init__(self, content: bytes) -> None:
        self.content, self.reads = content, []

    def read_range(self, name: str, start: int, length: int) -> bytes:
        assert name == "a" and start + length <= len(self.content)
        self.reads.append((start, length))
        return self.content[start : start + length]


def test_near_chunks_take_one_read_and_far_ones_two() -> None:
    storage = CountedReads(bytes(range(256)) * 4096)
    found = takes(storage, "a", {"image": [1000, 5000], "slide": [600, 300]})
    assert storage.reads == [(600, 5400)]
    assert found["image"](10, 2) == storage.content[1010:1012]
    assert found["slide"](0, 300) == storage.content[600:900]
    storage.reads.clear()
    takes(storage, "a", {"image": [10, 5000], "slide": [900_000, 300]})
    assert storage.reads == [(10, 5000), (900_000, 300)]


def test_a_long_chunk_is_read_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2.data.parquet.chunk_bytes._WHOLE", 100)
    monkeypatch.setattr("dinov2.data.parquet.chunk_bytes._WINDOW", 150)
    monkeypatch.setattr("dinov2.data.parquet.pages._HEADER", 40)
    for codec in ("none", "snappy"):
        file = written(pa.array(ROWS, pa.binary()), compression=codec, write_batch_size=8, data_page_size=1)
        data, num_rows, column = column_of(file)
        storage = CountedReads(b"?" * 7 + data)
        take = takes(storage, "a", {"image": [7, len(data)]})["image"]
        assert read_rows(take, len(data), num_rows, range(num_rows), column) == ROWS
        assert len(storage.reads) > 3
        assert sum(length for _, length in storage.reads) < 3 * len(data)


def test_a_header_longer_than_what_is_read_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2.data.parquet.pages._HEADER", 5)
    data, column = in_pages()
    assert read_all(data, column) == ROWS

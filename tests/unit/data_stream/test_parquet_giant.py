"""Rows out of large pages of local files against what was written, and what that takes."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.data.parquet import giant as parquet_giant
from dinov2.data.parquet.giant import GiantChunk, GiantReader
from dinov2.data.parquet.pages import Column


@pytest.fixture(autouse=True)
def _every_page_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_giant, "_SMALL_PAGE", 0)


def images(count: int, seed: int = 0) -> list[bytes]:
    """Incompressible values with a common start, some of them longer than a block of snappy."""
    rng = np.random.default_rng(seed)
    start = bytes(600)
    return [start + rng.bytes(int(rng.choice([0, 100, 3000, 70_000], p=[0.1, 0.5, 0.37, 0.03])))
            for _ in range(count)]  # fmt: skip


def write(path: Path, values: list[bytes | None], nullable: bool = True, **options: object) -> GiantChunk:
    table = pa.table([pa.array(values, pa.binary())], pa.schema([pa.field("x", pa.binary(), nullable)]))
    pq.write_table(table, path, **options)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
    column = Column(chunk.compression, nullable)
    return GiantChunk(str(path), start, chunk.total_compressed_size, len(values), column)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("nulls", [True, False])
def test_rows_equal_what_was_written(
    tmp_path: Path, version: str, codec: str, dictionary: bool, nulls: bool
) -> None:
    values = [None if nulls and number % 7 == 3 else value for number, value in enumerate(images(700))]
    values[100:110] = [values[100]] * 10
    options = {"use_dictionary": dictionary, "dictionary_pagesize_limit": 300_000, "write_batch_size": 200}
    chunk = write(tmp_path / "a", values, nulls, compression=codec, data_page_version=version, **options)
    reader = GiantReader()
    rows = np.random.default_rng(1).permutation(700)
    for some in (rows[:20].tolist(), rows.tolist(), [699, 0, 0, 104]):
        assert reader.read_rows(chunk, some) == [values[row] or b"" for row in some]


def test_repetitive_values_are_read_too(tmp_path: Path) -> None:
    values = [bytes(3 * number) + b"%d" % number for number in range(2000)]
    chunk = write(tmp_path / "a", values, use_dictionary=False, compression="snappy")
    assert GiantReader().read_rows(chunk, range(2000)) == values


class Reads:
    """Counts what is read from files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda *args: self.sizes.append(args[1]) or pread(*args))


@pytest.mark.parametrize("codec", ["none", "snappy"])
def test_little_more_than_the_rows_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    rng = np.random.default_rng(0)
    values = [rng.bytes(30_000) for _ in range(300)]
    chunk = write(tmp_path / "a", values, compression=codec)  # a dictionary page of 9 MB
    reader, reads = GiantReader(), Reads(monkeypatch)
    assert reader.read_rows(chunk, range(100, 110)) == values[100:110]
    reads.sizes.clear()
    assert reader.read_rows(chunk, range(200, 210)) == values[200:210]
    assert max(reads.sizes) < 200_000
    assert sum(reads.sizes) < 2_000_000
    assert pickle.loads(pickle.dumps(reader)).read_rows(chunk, [7]) == [values[7]]


def test_threads_share_a_reader(tmp_path: Path) -> None:
    values = images(400)
    chunk, reader = write(tmp_path / "a", values, compression="snappy"), GiantReader()
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda start: reader.read_rows(chunk, range(start, start + 20)), range(0, 400, 20))
        assert [value for part in parts for value in part] == values


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_damage_costs_rows_but_raises_nothing(tmp_path: Path, codec: str) -> None:
    values = images(120)
    chunk = write(tmp_path / "a", values, compression=codec, write_batch_size=30, data_page_size=1,
                  use_dictionary=False)  # fmt: skip
    content = (tmp_path / "a").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            start = chunk.start + int(rng.integers(chunk.length - 8))
            damaged[start : start + 8] = rng.bytes(8)
        (tmp_path / "a").write_bytes(damaged)
        found = GiantReader().read_rows(chunk, range(120))
        assert len(found) == 120
        assert sum(map(len, found)) <= 2 * sum(map(len, values))


def test_a_damaged_header_costs_what_lies_behind_it(tmp_path: Path) -> None:
    chunk = write(tmp_path / "a", images(300), compression="snappy", use_dictionary=False)
    content = bytearray((tmp_path / "a").read_bytes())
    content[chunk.start] = 0xFF
    (tmp_path / "a").write_bytes(content)
    assert GiantReader().read_rows(chunk, [0, 299]) == [b"", b""]


def test_levels_that_claim_more_than_the_file_cost_their_page(tmp_path: Path) -> None:
    values = [b"value-%03d" % number for number in range(300)]
    options = {
        "use_dictionary": False,
        "write_statistics": False,
        "write_batch_size": 100,
        "data_page_size": 1,
    }
    chunk = write(tmp_path / "a", values, compression="none", **options)
    content = bytearray((tmp_path / "a").read_bytes())
    first = content.find(values[100])
    assert content[first - 11 : first - 4] == b"\x03\0\0\0\xc8\x01\x01"  # 3 bytes: 100 times 1
    content[first - 8] = 0x7F
    (tmp_path / "a").write_bytes(content)
    assert GiantReader().read_rows(chunk, range(300)) == values[:100] + [b""] * 100 + values[200:]


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_file_that_became_shorter_is_named(tmp_path: Path, dictionary: bool) -> None:
    chunk = write(tmp_path / "a", images(100), use_dictionary=dictionary)
    reader = GiantReader()
    assert len(reader.read_rows(chunk, [99])[0]) >= 600
    os.truncate(tmp_path / "a", 3000)
    for some in (reader, GiantReader()):
        with pytest.raises(OSError, match=r"/a' ends before byte \d+, which it had when it was indexed"):
            some.read_rows(chunk, [99])
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError, match=r"/a'"):
        reader.read_rows(chunk, [99])


@pytest.mark.parametrize(
    "elements",
    [
        [b"\xf0\x0chello, world!", b"\x15\x0d", b"\x1a\x05\x00", b"\x1b\x07\x00\x00\x00"],
        [b"\x00a", b"\xfe\x01\x00"],  # one letter, 64 times
        [b"\xf4\x03\x01" + bytes(range(256)) + b"abcd", b"\x21\x03"],
    ],
)
def test_elements_of_snappy_made_by_hand(elements: list[bytes]) -> None:
    stream, decoded = b"".join(elements), 0
    position = 0
    for element in elements:
        length, taken, back = parquet_giant._snappy_element(memoryview(stream), position)
        assert taken == len(element)
        assert back <= decoded
        decoded += length
        position += taken
        content = bytes([decoded & 0x7F | 0x80, decoded >> 7]) + stream[:position]
        assert pa.decompress(content, decoded, "snappy", asbytes=True)

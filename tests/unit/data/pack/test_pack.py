"""Shards made of collections: the same tiles, bytes and origins; restartable; what cannot be read is listed."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dinov2.build.data import open_data
from dinov2.configs import load_config
from dinov2.data.pack.__main__ import main as pack
from dinov2.data.source import EncodedSample, Source, origins_of
from tests.helpers.collections import KINDS, tiles, write_collection
from tests.helpers.shards import tile_number

FILES = tiles(200)


def rows_of(source: Source) -> list[tuple[int, str, str, str, bytes]]:
    found = []
    for group, rows in enumerate(source.group_rows.tolist()):
        read = source.read(group, range(rows))
        for row, (origin, (slide, data)) in enumerate(zip(origins_of(source, group), read, strict=True)):
            found.append((tile_number(source.decode(EncodedSample(0, group, row, slide, data))), *origin, data))
    return found


def opened(path: object) -> Source:
    return open_data(load_config(None, [f"data.path={path}"])).source


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_the_tiles_of_any_kind(kind: str, tmp_path: Path) -> None:
    path = write_collection(kind, tmp_path / "set", FILES)
    assert pack([path, str(tmp_path / "out"), "--workers", "1"]) == 0
    before, after = rows_of(opened(path)), rows_of(opened(tmp_path / "out"))
    if kind == "hdf5":  # pixels, which become PNG
        before, after = ([row[:4] for row in rows] for rows in (before, after))
    assert after == before and len(after) == 200
    for shard in (tmp_path / "out").glob("*.parquet"):
        metadata = pq.read_metadata(shard)
        assert max(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)) <= 64


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    files = tiles(300, side=64)
    files[next(iter(files))] = b"no image"
    path, out = write_collection("images", tmp_path / "set", files), tmp_path / "out"
    arguments = [path, str(out), "--workers", "1", "--shard-mb", "1"]
    assert pack(arguments) == 1
    shards = {shard.name: shard.read_bytes() for shard in out.glob("*.parquet")}
    assert len(shards) > 2
    (failure,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert next(iter(files)) in failure["tile"]
    last = sorted(shards)[-1]
    (out / last).unlink()
    (out / f".{last}.{'0' * 32}.part").write_bytes(b"half a shard")
    assert pack(arguments) == 1
    assert {shard.name: shard.read_bytes() for shard in out.glob("*.parquet")} == shards
    assert len((out / "failures.jsonl").read_text().splitlines()) == 1 and not list(out.glob(".*.part"))
    (Path(path) / "new.png").write_bytes(next(reversed(files.values())))
    assert pack(arguments) == 2
    assert {shard.name: shard.read_bytes() for shard in out.glob("*.parquet")} == shards


@pytest.mark.parametrize("destination", ["set", "set/shards", "."])
def test_shards_lie_apart_from_what_is_packed(tmp_path: Path, destination: str) -> None:
    path = write_collection("images", tmp_path / "set", FILES)
    assert pack([path, str(tmp_path / destination), "--workers", "1"]) == 2
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_report_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = write_collection("tar", tmp_path / "set", FILES)
    report = tmp_path / "out" / "failures.jsonl"
    report.parent.mkdir()
    report.write_text('{"mine": 1}\n')
    assert pack([path, str(report.parent), "--workers", "1"]) == 2
    assert report.read_text() == '{"mine": 1}\n'


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    name = os.fsencode(folder) + b"/\xff.png"
    for path, data in ((name, tiles(1).popitem()[1]), (name + b".bmp", b"no image")):
        with open(path, "wb") as file:
            file.write(data)
    assert pack([str(folder), str(tmp_path / "out"), "--workers", "1"]) == 1
    assert pq.read_table(next((tmp_path / "out").glob("*.parquet")))["tile"].to_pylist() == [
        f"'{folder}/\N{REPLACEMENT CHARACTER}.png'"
    ]

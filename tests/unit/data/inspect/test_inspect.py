"""The report on a dataset: figures against pyarrow's, mixing against a count of the real stream, verdicts."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.data.inspect import __main__ as inspection
from dinov2.data.inspect.__main__ import distinct_if_uniform, main
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.reader import RankReader
from tests.helpers.remote import RemoteFolder
from tests.helpers.shards import TILE, encode, tile, write_dataset, write_nanopath, write_published

SMALL = ("--batch", "8", "--ranks", "2")
FOLDER = Path(inspection.__file__).parent


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(source: Path | str, *options: str, status: int = 0) -> dict[str, Any]:
        assert main([str(source), "--json", "-", *SMALL, *options]) == status
        return json.loads(capsys.readouterr().out)

    return run


def codes(findings: list[dict[str, str]]) -> list[str]:
    return [finding["code"] for finding in findings]


def test_layout(report: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [9, 0, 31])
    found = report(folder)
    files = sorted(folder.glob("*.parquet"))
    footers = [pq.read_metadata(path) for path in files]
    groups = [footer.row_group(number) for footer in footers for number in range(footer.num_row_groups)]
    sizes = [group.column(8).total_uncompressed_size for group in groups]
    assert (found["files"], found["bytes"]) == (3, sum(path.stat().st_size for path in files))
    assert found["rows"] == 40
    assert found["row_groups"] == {
        "count": 11,
        "rows": {"min": 1, "median": 4.0, "max": 4},
        "image_bytes": {"min": min(sizes), "median": np.median(sizes), "max": max(sizes)},
        "repack": "",
    }
    schema = pq.read_schema(files[0])
    assert found["schemas"] == [{"files": 3, "columns": {field.name: str(field.type) for field in schema}}]
    stored = found["stored"]
    assert stored["columns"] == {"image_bytes": 3}
    assert (stored["compression"], stored["with_dictionary"], stored["with_page_index"]) == (
        {"UNCOMPRESSED": 11},
        0,
        0,
    )
    assert stored["bytes_per_image"] == round(sum(sizes) / 40)
    assert found["images"]["kinds"].keys() == {"png"}
    assert found["images"]["sizes"] == {f"{TILE}x{TILE}": found["images"]["sampled"]}
    assert found["images"]["corrupt"] == []
    assert found["slides"] == {
        "distinct": 2,
        "per_file": {"min": 1, "median": 1.0, "max": 1},
        "mixed_row_groups": 0,
        "unknown_row_groups": 0,
    }


def test_dictionary_codec_and_page_index_are_seen(report: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    images = [encode(tile(number % 5), "png") for number in range(40)]
    table = pa.table({"path": [f"s/{number}_0_1.jpg" for number in range(40)], "jpeg": images})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", write_page_index=True, row_group_size=20)
    stored = report(tmp_path)["stored"]
    assert (stored["compression"], stored["with_dictionary"], stored["with_page_index"]) == (
        {"ZSTD": 2},
        2,
        2,
    )
    assert all("DICTIONARY" in encoding for encoding in stored["encodings"])


def write_mixed(folder: Path, **options: Any) -> list[str]:
    """Write both schemas, some row groups with one slide and some with several; returns all slides by row."""
    names = [f"/slides/{number // 11}.svs" for number in range(60)]
    images = [encode(tile(number), "png") for number in range(60)]
    folder.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"slide_path": names, "image_bytes": images}),
        folder / "a.parquet",
        row_group_size=5,
        **options,
    )
    write_nanopath(folder / "b.parquet", images[:13])
    tiles = [f"t{number % 3}/{number}_0_1.jpg" for number in range(17)]
    pq.write_table(pa.table({"path": tiles, "jpeg": images[:17]}), folder / "c.parquet", row_group_size=4, **options)
    return names + ["b"] * 13 + [name.split("/")[0] for name in tiles]


@pytest.mark.parametrize("options", [{}, {"write_statistics": False}])
def test_slides(report: Callable[..., dict[str, Any]], tmp_path: Path, options: dict[str, Any]) -> None:
    slides = write_mixed(tmp_path, **options)
    groups = [slides[start : start + 5] for start in range(0, 60, 5)]
    groups += [slides[start : start + 4] for start in range(73, 90, 4)]
    found = report(tmp_path)["slides"]
    assert found["distinct"] == len(set(slides))
    assert found["per_file"] == {"min": 1, "median": 3.0, "max": len(set(slides[:60]))}
    assert found["mixed_row_groups"] == sum(len(set(group)) > 1 for group in groups)
    assert found["unknown_row_groups"] == 0


def test_slide_columns_are_not_read_without_end(
    report: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mixed(tmp_path, write_statistics=False)
    monkeypatch.setattr(inspection, "_READ_GROUPS", 3)
    assert report(tmp_path)["slides"]["unknown_row_groups"] == 12 + 5 - 3


def test_mixing_is_that_of_the_stream(report: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    write_mixed(tmp_path)
    found = report(tmp_path, "--lanes", "16", "--block-rows", "4")["stream"]
    source = ParquetSource(str(tmp_path))
    order = SampleOrder(source.group_rows, seed=0, lanes=16, block_rows=4)
    steps = iter(RankReader(source, order, global_batch=8, rank=0, world_size=1, start_sample=0))
    slides = [[sample.slide for sample in next(steps)] for _ in range(100)]
    steps.close()
    for row in found["distinct"]:
        windows = [slides[i : i + row["steps"]] for i in range(0, 100, row["steps"])]
        counts = [len({slide for step in window for slide in step}) for window in windows]
        assert row["stream"] == pytest.approx(np.mean(counts))


def test_uniform_sampling() -> None:
    sizes = [1, 1, 4, 7, 7, 30, 0]
    for draws in (1, 5, 20, 49, 50, 1000):
        n = min(draws, 50)
        expected = sum(1 - math.comb(50 - size, n) / math.comb(50, n) for size in sizes)
        assert distinct_if_uniform(np.array(sizes), draws) == pytest.approx(expected, rel=1e-12)
    huge = distinct_if_uniform(np.full(12_000, 9_500), 384)
    assert huge == pytest.approx(12_000 * (1 - (1 - 1 / 12_000) ** 384), rel=1e-4)


def test_memory_limits_the_lanes(report: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for number in range(40):
        write_nanopath(tmp_path / f"{number:02d}.parquet", [encode(tile(i), "png") for i in range(60)], 60)
    generous = report(tmp_path)["stream"]
    assert generous["lanes"] == 32  # of 8 x 8 and its halves the first that 40 row groups feed
    limit = generous["memory_bytes_per_rank"] * 0.4
    limited = report(tmp_path, "--memory-gib", str(limit / 2**30))
    assert limited["stream"]["lanes"] < 20
    assert limited["stream"]["memory_bytes_per_rank"] <= limit
    assert "lanes" in codes(limited["verdict"]["advice"])
    refused = report(tmp_path, "--memory-gib", "1e-6", status=1)
    assert codes(refused["verdict"]["reasons"]) == ["refused"]


def truncate(folder: Path) -> None:
    os.truncate(folder / "0000.parquet", 500)


def garbage(folder: Path) -> None:
    (folder / "0000.parquet").write_bytes(b"no Parquet at all")


def all_corrupt(folder: Path) -> None:
    for path in folder.glob("*.parquet"):
        path.write_bytes(b"")


def foreign(folder: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), folder / "other.parquet")


def other_schema(folder: Path) -> None:
    pq.write_table(pa.table({"x": [b"1"]}), folder / "other.parquet")


def only_empty(folder: Path) -> None:
    for path in folder.glob("*.parquet"):
        write_published(path, [])


def undecodable(folder: Path) -> None:
    for path in folder.glob("*.parquet"):
        write_published(path, [b"x", b"", None])


def one_undecodable(folder: Path) -> None:
    write_published(folder / "0000.parquet", [encode(tile(0), "png")[:-20], None])


def corrupt_page(folder: Path) -> None:
    path = folder / "0000.parquet"
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(8).data_page_offset
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)


def jpegs(folder: Path) -> None:
    write_nanopath(folder / "j.parquet", [encode(np.repeat(tile(0), 2, axis=0), "jpeg")] * 400)


def raw(folder: Path) -> None:
    for path in folder.glob("*.parquet"):
        write_published(path, [tile(0).tobytes()] * 40, encoding="raw")


def compressed(folder: Path) -> None:
    for path in folder.glob("*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=4)


def few_slides_at_a_time(folder: Path) -> None:
    for path in folder.glob("*.parquet"):
        path.unlink()
    for number in range(30):
        write_published(folder / f"{number}.parquet", [encode(tile(0), "png")] * 40, 40)


@pytest.mark.parametrize(
    ("change", "options", "reasons", "advice"),
    [
        (None, "", [], ["png"]),
        (None, "--lanes 601", ["refused"], ["mixing", "png"]),
        (None, "--batch 100", [], ["few_rows", "png"]),
        (truncate, "", [], ["corrupt_files", "png"]),
        (garbage, "", [], ["corrupt_files", "png"]),
        (all_corrupt, "", ["no_readable_file"], []),
        (other_schema, "", ["wrong_schema"], ["png"]),
        (foreign, "", [], ["png"]),
        (only_empty, "", ["no_rows"], []),
        (undecodable, "", ["undecodable"], ["few_rows"]),
        (one_undecodable, "", [], ["corrupt_images", "png", "mixed_images"]),
        (corrupt_page, "", [], ["corrupt_images", "png"]),
        (jpegs, "", [], ["png", "mixed_images"]),
        (raw, "", [], []),
        (compressed, "", [], ["compression", "png"]),
        (few_slides_at_a_time, "--lanes 2", [], ["lanes", "mixing", "png"]),
    ],
)
def test_verdicts(
    report: Callable[..., dict[str, Any]],
    tmp_path: Path,
    change: Callable[[Path], None] | None,
    options: str,
    reasons: list[str],
    advice: list[str],
) -> None:
    write_dataset(tmp_path, [100] * 6)
    if change:
        change(tmp_path)
    found = report(tmp_path, *options.split(), status=1 if reasons else 0)["verdict"]
    assert found["usable"] == (not reasons)
    assert (codes(found["reasons"]), codes(found["advice"])) == (reasons, advice)


def test_oversized_row_groups(
    report: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_published(tmp_path / "a.parquet", [encode(tile(number), "png") for number in range(500)], 500)
    monkeypatch.setattr("dinov2.data.parquet.source.OVERSIZED", 50_000)
    advice = report(tmp_path)["verdict"]["advice"]
    [repack] = [finding["text"] for finding in advice if finding["code"] == "repack"]
    assert f"python -m dinov2.data.repack {tmp_path} {tmp_path}-repacked" in repack


def test_remote_datasets(
    report: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mixed(tmp_path)
    (tmp_path / "z.parquet").write_bytes(b"PAR1")
    local = report(tmp_path)
    monkeypatch.setattr(
        inspection, "open_storage", lambda *_, **__: RemoteFolder(tmp_path, f"remote://tiles@{'0' * 40}")
    )
    remote = report("org/name")
    assert remote["place"] == f"remote://tiles@{'0' * 40}"
    assert [shard["name"] for shard in remote["unreadable"]] == ["z.parquet"]
    for key in ("rows", "row_groups", "schemas", "stored", "images", "slides", "unreadable"):
        assert remote[key] == local[key]
    assert remote["stream"]["distinct"] == local["stream"]["distinct"]


def test_text_says_what_the_json_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "set", [60, 60])
    (tmp_path / "set" / "bad.parquet").write_bytes(b"")
    assert main([str(tmp_path / "set"), *SMALL, "--json", str(tmp_path / "report.json")]) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == 120
    for part in (
        "bad.parquet: Parquet file size is 0 bytes",
        "30 of 4 rows",
        "image_bytes binary",
        "16 lanes",
    ):
        assert part in text
    assert all(finding["text"] in text for finding in report["verdict"]["advice"])
    assert "usable for training" in text


def test_no_dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--json", "-"]) == 2
    assert "nothing' does not exist" in caplog.text
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "options",
    [
        "--batch 0",
        "--batch 10 --ranks 4",
        "--lanes -1",
        "--block-rows 0",
        "--memory-gib 0",
        "--json kept.json",
        "--no",
    ],
)
def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    monkeypatch.chdir(write_dataset(tmp_path, [5]))
    Path("kept.json").write_text("precious")
    with pytest.raises(SystemExit) as stopped:
        main([".", *options.split()])
    assert stopped.value.code == 2
    assert Path("kept.json").read_text() == "precious"

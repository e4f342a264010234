"""Parquet shards: the published schema, exact pixels, failures, and builds that were killed."""

import hashlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import openslide
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image, JpegImagePlugin

from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import EncodedSample
from prepatching_scripts.create_sample_dataset_txt import main as create_list
from tests.helpers.builder_process import build, contents, rows_of
from tests.helpers.slides import MakeSlide, damage_tile

PUBLISHED = {
    "task_id": pa.string(),
    "slide_path": pa.string(),
    "x": pa.int32(),
    "y": pa.int32(),
    "level": pa.int32(),
    "tile_size": pa.int32(),
    "level_downsample": pa.float32(),
    "image_dtype": pa.string(),
    "image_bytes": pa.binary(),
}
ADDED = {
    "slide_id": pa.string(),
    "mpp": pa.float32(),
    "mpp_source": pa.string(),
    "read_size": pa.int32(),
    "tissue_frac": pa.float32(),
    "level_mpp": pa.float32(),
}


def cut(row: dict) -> np.ndarray:
    with openslide.OpenSlide(row["slide_path"]) as slide:
        size = (row["tile_size"], row["tile_size"])
        return np.asarray(slide.read_region((row["x"], row["y"]), row["level"], size).convert("RGB"))


def test_schema_layout_and_metadata(sample_list: Path, demo_slides: tuple[Path, Path], tmp_path: Path) -> None:
    assert build(sample_list, tmp_path / "out") == 0
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    assert [shard.name for shard in shards] == ["00000000.parquet", "00000001.parquet"]
    for shard in shards:
        file = pq.ParquetFile(shard)
        assert dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True)) == PUBLISHED | ADDED
        assert file.schema_arrow.names[:9] == list(PUBLISHED)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        assert [group.num_rows for group in groups] == [64, 64, 22]
        for group in groups:
            columns = [group.column(i) for i in range(group.num_columns)]
            image = columns[8]
            assert image.path_in_schema == "image_bytes"
            assert not image.is_stats_set and not image.has_dictionary_page
            assert {column.compression for column in columns} == {"UNCOMPRESSED"}
        metadata = file.schema_arrow.metadata
        assert (metadata[b"image_encoding"], metadata[b"tile_size"]) == (b"png", b"224")
        assert (metadata[b"schema_version"], metadata[b"seed"]) == (b"1", b"3")
        rows = file.read().to_pylist()
        assert {row["task_id"] for row in rows} == {shard.stem}
        assert len({row["slide_path"] for row in rows}) == 1, "one slide per shard"
    listed = {tuple(line.rsplit(" ", 3)) for line in sample_list.read_text().splitlines()}
    written = [(r["slide_path"], str(r["x"]), str(r["y"]), str(r["level"])) for r in rows_of(tmp_path / "out")]
    assert len(written) == 300 and set(written) == listed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000000.parquet", "00000001.parquet", "_build.json"
    ]  # fmt: skip
    assert pq.read_table(tmp_path / "out").num_rows == 300, "nothing else lies in a reader's way"
    described = json.loads((tmp_path / "out" / "_build.json").read_text())
    assert described["list_sha256"] == hashlib.sha256(sample_list.read_bytes()).hexdigest()
    assert (described["num_patches"], described["num_shards"]) == (300, 2)
    assert described["versions"]["pyarrow"] == pa.__version__


def test_png_rows_hold_the_slides_pixels(sample_list: Path, tmp_path: Path) -> None:
    assert build(sample_list, tmp_path / "out") == 0
    for row in rows_of(tmp_path / "out")[::10]:
        image = np.asarray(Image.open(io.BytesIO(row["image_bytes"])))
        np.testing.assert_array_equal(image, cut(row))
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        tissue = (hsv >= (90, 8, 103)).all(-1) & (hsv <= (180, 255, 255)).all(-1)
        assert row["tissue_frac"] == pytest.approx(tissue.mean()) and row["tissue_frac"] > 0.6
        assert row["slide_id"] == Path(row["slide_path"]).stem
        assert (row["level_downsample"], row["mpp"]) == ((1, 0.25), (2, 0.5))[row["level"]]
        assert (row["mpp_source"], row["image_dtype"]) == ("slide", "uint8")
        assert (row["tile_size"], row["read_size"]) == (224, 224)


def test_jpeg_and_raw(sample_list: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("".join(sample_list.read_text().splitlines(keepends=True)[:8]))
    assert build(short, tmp_path / "raw", "--encoding", "raw") == 0
    raw = rows_of(tmp_path / "raw")
    for row in raw:
        assert row["image_bytes"] == cut(row).tobytes()
    for options, quality, sampling in (
        ((), 95, 2),
        (("--jpeg-quality", "90", "--jpeg-subsampling", "4:4:4"), 90, 0),
    ):
        folder = tmp_path / f"jpeg{quality}"
        assert build(short, folder, "--encoding", "jpeg", *options) == 0
        reference = io.BytesIO()
        Image.new("RGB", (16, 16)).save(reference, "jpeg", quality=quality)
        for row, exact in zip(rows_of(folder), raw, strict=True):
            image = Image.open(io.BytesIO(row["image_bytes"]))
            assert image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == sampling
            assert image.quantization == Image.open(reference).quantization
            pixels = np.frombuffer(exact["image_bytes"], np.uint8).reshape(224, 224, 3)
            assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 3
        metadata = pq.read_schema(folder / "00000000.parquet").metadata
        assert metadata[b"image_encoding"] == b"jpeg" and metadata[b"jpeg_quality"] == str(quality).encode()


def test_training_source_reads_the_shards(sample_list: Path, tmp_path: Path) -> None:
    for encoding in ("png", "raw"):
        folder = tmp_path / encoding
        assert build(sample_list, folder, "--encoding", encoding, "--rows-per-shard", "200") == 0
        source = ParquetSource(str(folder))
        assert source.group_rows.tolist() == [64, 64, 64, 8, 64, 36]
        row = pq.ParquetFile(folder / "00000001.parquet").read_row_group(1).to_pylist()[35]
        [(slide, data)] = source.read(5, [35])
        assert slide == row["slide_path"]
        np.testing.assert_array_equal(source.decode(EncodedSample(0, 5, 35, slide, data)), cut(row))


def test_unreadable_tiles_are_listed_and_leave_no_row(
    train_slide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = damage_tile(train_slide, tmp_path / "broken.svs", 22, empty=False)
    listed = tmp_path / "list.txt"
    good = [f"{train_slide} {x} 500 0\n" for x in range(400, 500)]
    bad = [
        f"{broken} 1100 600 0\n",
        f"{broken} 2200 600 0\n",
        f"{broken} 0 0 9\n",
        f"{tmp_path}/gone.svs 0 0 0\n",
    ]
    listed.write_text("".join(good[:50] + bad + good[50:] + [f"{broken} 400 500 0\n"]))
    assert build(listed, tmp_path / "out") == 1
    assert "4 of 105 tiles" in caplog.text and str(tmp_path / "out" / "failures.jsonl") in caplog.text
    records = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [(Path(r["slide_path"]).name, r["x"], r["level"]) for r in records] == [
        ("broken.svs", 1100, 0), ("broken.svs", 2200, 0), ("broken.svs", 0, 9), ("gone.svs", 0, 0)
    ]  # fmt: skip
    expected = ["cannot be decoded", "leaves the level", "levels 0 to 2", "no such file"]
    assert all(reason in record["reason"] for reason, record in zip(expected, records, strict=True))
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 101 and [row["x"] for row in rows[:100]] == list(range(400, 500))
    assert not (tmp_path / "out" / "00000002.parquet").exists(), "a slide without a row leaves no shard"
    before = contents(tmp_path / "out")
    assert build(listed, tmp_path / "out", "--max-failed-share", "0.05") == 0
    assert contents(tmp_path / "out") == before, "a second run must not lose the record of what failed"


def test_resolution_by_option_takes_the_place_of_the_slides_own(make_slide: MakeSlide, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{make_slide('a b.svs')} 0 0 0\n{make_slide('appmag.svs', '|AppMag = 20')} 0 0 0\n")
    assert build(listed, tmp_path / "none") == build(listed, tmp_path / "given", "--mpp", "0.3") == 0
    given = (pytest.approx(0.3), "user")
    for folder, expected in (("none", [(None, "none"), (0.5, "appmag")]), ("given", [given, given])):
        assert [(row["mpp"], row["mpp_source"]) for row in rows_of(tmp_path / folder)] == expected


def test_moved_slides_and_other_tile_sizes(train_slide: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"/data/TCGA/{train_slide.name} 640 640 1\n")
    assert build(listed, tmp_path / "out", "--slide-root", str(train_slide.parent), "--tile-size", "96") == 0
    [row] = rows_of(tmp_path / "out")
    assert row["slide_path"] == f"/data/TCGA/{train_slide.name}" and row["tile_size"] == 96
    exact = cut(row | {"slide_path": str(train_slide)})
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image_bytes"]))), exact)


SMALL = ("--rows-per-shard", "16")


def test_a_corrupt_shard_is_named(short_list: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    assert build(short_list, out, *SMALL) == 0
    whole = contents(out)
    corrupt = out / "00000003.parquet"
    corrupt.write_bytes(whole[corrupt.name][:-100])
    assert build(short_list, out, *SMALL) == 2
    assert f"'{corrupt}' is corrupt" in caplog.messages[-1] and "move it away" in caplog.messages[-1]
    corrupt.unlink()
    assert build(short_list, out, *SMALL) == 0 and contents(out) == whole
    (out / "_build.json").write_text("{}")
    assert build(short_list, out, *SMALL) == 2 and "_build.json' does not describe a build" in caplog.messages[-1]
    (out / "_build.json").unlink()
    (out / "failures.jsonl").write_text("mine\n")
    assert build(short_list, out, *SMALL) == 2 and "failures.jsonl' was not made by this" in caplog.messages[-1]


def test_a_slide_that_keeps_failing_is_given_up(train_slide: Path, tmp_path: Path) -> None:
    broken = damage_tile(train_slide, tmp_path / "broken.svs", 22, empty=False)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{broken} {x} 600 0\n" for x in range(1100, 1110)) + f"{broken} 9999999 0 0\n")
    assert build(listed, tmp_path / "out", "--max-slide-failures", "3", "--max-failed-share", "1") == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    reasons = [record["reason"] for record in records]
    assert len(records) == 11 and [record["x"] for record in records[:-1]] == list(range(1100, 1110))
    assert reasons[3:10] == ["given up after 3 unreadable tiles"] * 7 and "leaves the level" in reasons[10]
    assert "given up" not in "".join(reasons[:3])
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_six_columns_give_tiles_of_the_listed_resolution(train_slide: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list 6.txt"
    positions = [(400, 600, 0, 0.25), (640, 640, 1, 0.5), (600, 500, 0, 0.4), (400, 400, 1, 0.75)]
    listed.write_text("".join(f"{train_slide} {x} {y} {level} {mpp} {mpp}\n" for x, y, level, mpp in positions))
    assert build(listed, tmp_path / "out", "--columns", "6", "--encoding", "raw") == 0
    rows = rows_of(tmp_path / "out")
    assert [(r["x"], r["y"], r["level"]) for r in rows] == [place[:3] for place in positions]
    assert [r["mpp"] for r in rows] == pytest.approx([0.25, 0.5, 0.4, 0.75])
    assert [r["read_size"] for r in rows] == [224, 224, 358, 336]
    assert [r["level_downsample"] for r in rows] == [1, 2, 1, 2]
    for row in rows:
        side = row["read_size"]
        with openslide.OpenSlide(train_slide) as slide:
            region = np.asarray(slide.read_region((row["x"], row["y"]), row["level"], (side, side)).convert("RGB"))
        edges, pixel = np.linspace(0, side, 225), np.arange(side)
        overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        shares = overlap.clip(0) * 224 / side
        exact = np.einsum("ri,cj,ijk->rck", shares, shares, region.astype(float), optimize=True)
        pixels = np.frombuffer(row["image_bytes"], np.uint8).reshape(224, 224, 3)
        assert np.abs(pixels - exact).max() <= 0.51


def test_resolutions_from_a_table(make_slide: MakeSlide, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed, table = tmp_path / "list.txt", tmp_path / "mpp.csv"
    listed.write_text("".join(f"{make_slide(name)} 0 0 0\n" for name in ("a.svs", "b.svs")))
    table.write_text("slide,mpp\na,0.3\n")
    options = ("--mpp-file", str(table), "--mpp", "0.6")
    assert build(listed, tmp_path / "out", *options) == 0
    found = [(row["mpp"], row["mpp_source"]) for row in rows_of(tmp_path / "out")]
    assert found == [(pytest.approx(0.3), "user"), (pytest.approx(0.6), "user")]
    table.write_text("slide,mpp\na,0.4\n")
    assert build(listed, tmp_path / "out", *options) == 2 and "holds a build with mpp" in caplog.messages[-1]
    assert build(listed, tmp_path / "new", "--mpp-file", str(tmp_path / "none.csv")) == 2
    assert "There is no mpp table" in caplog.messages[-1]


def test_shards_of_another_build_are_neither_mixed_nor_overwritten(
    sample_list: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(sample_list.read_text().splitlines(keepends=True)[0])
    assert build(short, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    for options in (
        ("--encoding", "raw"),
        ("--tile-size", "100"),
        ("--mpp", "0.5"),
        ("--rows-per-shard", "7"),
    ):
        assert build(short, tmp_path / "out", *options) == 2
    assert build(sample_list, tmp_path / "out") == 2
    for text in (
        "image_encoding 'png', not 'raw'",
        "tile_size '224', not '100'",
        "rows_per_shard None, not 7",
    ):
        assert f"'{tmp_path / 'out'}' holds a build with {text}; give another --output" in caplog.text
    assert "holds a build with sample_list '" in caplog.messages[-1]
    assert contents(tmp_path / "out") == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.parquet").write_bytes(b"not even Parquet")
    assert build(short, tmp_path / "foreign") == 2
    assert contents(tmp_path / "foreign") == {"mine.parquet": b"not even Parquet"}


def test_bad_lists_are_refused_in_one_sentence(
    sample_list: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert build(tmp_path / "none.txt", tmp_path / "out") == 2
    assert "There is no sample list" in caplog.messages[-1]
    listed = tmp_path / "list.txt"
    listed.write_text("a.svs 1 2\n")
    assert build(listed, tmp_path / "out") == 2 and "Line 1 of sample list" in caplog.messages[-1]
    assert build(sample_list, tmp_path / "out", "--tile-size", "256") == 2
    assert "was drawn for tiles of 224 px, not 256 px" in caplog.messages[-1]
    (tmp_path / "list.txt.meta.json").write_text("[1]")
    listed.write_text("a.svs 1 2 0\n")
    assert build(listed, tmp_path / "out") == 2 and "does not describe a sample list" in caplog.messages[-1]
    assert not (tmp_path / "out").exists()
    for option in (
        "--part=1",
        "--num-parts=0",
        "--rows-per-shard=0",
        "--jpeg-quality=101",
        "--encoding=webp",
    ):
        with pytest.raises(SystemExit):
            build(listed, tmp_path / "out", option)


@pytest.mark.data
def test_real_slides(jpeg_slide: Path, jpeg2000_slide: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    assert create_list([str(jpeg_slide.parent), "--output", str(listed), "--per-level", "10", "--workers", "1"]) == 0
    assert build(listed, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 30
    with tifffile.TiffFile(jpeg2000_slide) as tiff:
        coarse = [page.asarray() for page in tiff.pages if page.is_tiled][1]
    for row in rows:
        exact = cut(row)
        if row["level"] == 1:  # where OpenSlide interpolates, since the downsample is 2.0005
            column, line = (round(row[axis] / row["level_downsample"]) for axis in "xy")
            exact = coarse[line : line + 224, column : column + 224]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image_bytes"]))), exact)
        says = row["slide_id"] == jpeg_slide.stem
        assert (row["mpp"], row["mpp_source"]) == ((pytest.approx(0.499), "slide") if says else (None, "none"))

"""Shards as other tools write them: columns of images by other names, in structs, beside files without images."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2.data.inspect.__main__ import Training, inspect_dataset
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.repack.__main__ import main as repack
from dinov2.data.source import DecodeError, EncodedSample
from tests.helpers.shards import encode, tile, tile_number, write_dataset

IMAGES = [encode(tile(number), "png") for number in range(6)]
HF_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def struct(images: list[bytes | None]) -> pa.Array:
    rows = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    return pa.array(rows, HF_IMAGE)


def read(source: ParquetSource) -> list[tuple[int, str]]:
    """Number and slide of every tile."""
    found = []
    for group, count in enumerate(source.group_rows):
        for row, (slide, data) in enumerate(source.read(group, range(count))):
            found.append((tile_number(source.decode(EncodedSample(0, group, row, slide, data))), slide))
        assert [slide for _, slide in found[-count:]] == source.slides(group)
        assert [origin.slide for origin in source.origins(group)] == source.slides(group)
    return found


@pytest.mark.parametrize("column", ["image_bytes", "image", "bytes", "jpg", "png", "img_bytes"])
@pytest.mark.parametrize("stored", ["binary", "large", "struct", "dictionary"])
def test_known_columns(tmp_path: Path, column: str, stored: str) -> None:
    values = {
        "binary": pa.array(IMAGES),
        "large": pa.array(IMAGES, pa.large_binary()),
        "struct": struct(IMAGES),
        "dictionary": pa.array(IMAGES).dictionary_encode(),
    }[stored]
    path = write(tmp_path / "a.parquet", label=[0] * 6, **{column: values})
    assert read(ParquetSource(str(path))) == [(number, "a.parquet") for number in range(6)]


@pytest.mark.parametrize("slide", ["slide_path", "slide", "slide_id"])
def test_columns_of_slides(tmp_path: Path, slide: str) -> None:
    names = ["a.svs"] * 4 + ["b.svs", "c.svs"]
    path = write(tmp_path / "a.parquet", image=struct(IMAGES), **{slide: names})
    assert read(ParquetSource(str(path))) == list(enumerate(names))


def test_numbers_are_no_slides(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", image=struct(IMAGES), slide=list(range(6)))
    assert {slide for _, slide in read(ParquetSource(str(path)))} == {"a.parquet"}


def test_a_column_by_its_own_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "set/a.parquet", picture=IMAGES[:3]).parent
    with pytest.raises(ValueError, match="perhaps 'picture'"):
        ParquetSource(str(folder))
    write(folder / "b.parquet", image=struct(IMAGES[3:]))
    sidecar = tmp_path / "index"
    found = read(ParquetSource(str(folder), sidecar, "picture"))
    assert [number for number, _ in found] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="picture"):  # not from the index of another name
        ParquetSource(str(folder), sidecar)
    with pytest.raises(ValueError, match="string; binary"):
        ParquetSource(str(write(tmp_path / "c.parquet", text=["x"], image=IMAGES[:1])), None, "text")


def test_null_structs_and_null_bytes_are_corrupt_rows(tmp_path: Path) -> None:
    rows = pa.array([None, {"bytes": None, "path": "x"}, {"bytes": IMAGES[2], "path": None}], HF_IMAGE)
    source = ParquetSource(str(write(tmp_path / "a.parquet", image=rows)))
    stored = source.read(0, [0, 1, 2])
    assert [data for _, data in stored] == [b"", b"", IMAGES[2]]
    with pytest.raises(DecodeError):
        source.decode(EncodedSample(0, 0, 0, *stored[0]))


@pytest.mark.parametrize(
    "columns", [{"key": ["license"], "value": ["CC0"]}, {"image": ["a.png"], "label": [1]}, {"x": [1]}, {}]
)
def test_a_file_without_images_is_left_out_and_named(
    tmp_path: Path, columns: dict, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_dataset(tmp_path / "set", [9, 4])
    before = ParquetSource(str(folder)).fingerprint
    write(folder / "metadata.parquet", **columns)
    for sidecar in (None, tmp_path / "index", tmp_path / "index"):
        caplog.clear()
        source = ParquetSource(str(folder), sidecar)
        assert [number for number, _ in read(source)] == list(range(13))
        assert [record.getMessage() for record in caplog.records if "metadata.parquet" in record.getMessage()]
    assert source.fingerprint == before  # it is no part of the data
    with pytest.raises(ValueError, match="binary column of images"):
        ParquetSource(str(folder / "metadata.parquet"))


def test_inspect_and_repack_read_structs(tmp_path: Path) -> None:
    folder = write(tmp_path / "set/a.parquet", image=struct([*IMAGES, None])).parent
    report = inspect_dataset(str(folder), Training(batch=2, ranks=1))
    assert report["verdict"]["usable"]
    assert report["images"]["kinds"]["png"] >= 4
    assert repack([str(folder), str(tmp_path / "new"), "--row-group-rows", "2"]) == 0
    source = ParquetSource(str(tmp_path / "new"))
    assert source.group_rows.tolist() == [2, 2, 2, 1]
    assert source.read(0, [1])[0][1] == IMAGES[1]
    assert pq.read_table(tmp_path / "new/a.parquet").equals(pq.read_table(folder / "a.parquet"))


def test_inspect_takes_the_name_of_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", picture=IMAGES)
    assert not inspect_dataset(str(path), Training(batch=2, ranks=1))["verdict"]["usable"]
    assert inspect_dataset(str(path), Training(batch=2, ranks=1), "picture")["verdict"]["usable"]


def test_webp_in_shards(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(tile(7)).save(buffer, "WEBP", lossless=True)
    source = ParquetSource(str(write(tmp_path / "a.parquet", image_bytes=[buffer.getvalue()])))
    np.testing.assert_array_equal(source.decode(EncodedSample(0, 0, 0, *source.read(0, [0])[0])), tile(7))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table([[b"x"], [b"y"]], names=["image", "image"]), "two columns 'image'"),
        (pa.table({"image": ["a.png"]}), r"image \(string\)"),
        (pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}], HF_IMAGE)}), "paths of images"),
    ],
    ids=["twice", "text", "paths"],
)
def test_image_columns_that_hold_none(table: pa.Table, words: str, tmp_path: Path) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=words):
        ParquetSource(str(tmp_path))
    inspect_dataset(str(tmp_path), Training(batch=2, ranks=1))

"""Kinds are told apart by what lies at a path."""

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.build.data import open_data, recognise
from dinov2.configs import load_config
from tests.helpers.collections import write_folder, write_tar, write_zip
from tests.helpers.shards import encode, tile

PNG = encode(tile(0), "png")


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["a.png"], "images"),
        (["deep/er/A.JPEG", "notes.txt"], "images"),
        (["a.tar"], "tar"),
        (["a.tar.gz"], "tar"),
        (["a.zip", "preview.png"], "zip"),
        (["a.h5", "preview.png"], "hdf5"),
        (["a.parquet", "a.png"], "parquet"),
        (["metadata.parquet", "a.png"], "images"),
        (["metadata.parquet"], "parquet"),
        (["a.svs", "a.png", "b.h5", "c.zip"], "slides"),
    ],
)
def test_folders(tmp_path: Path, files: list[str], kind: str) -> None:
    write_folder(tmp_path, dict.fromkeys(files, b"x"))
    assert recognise(str(tmp_path)) == kind
    assert recognise(f"file://{tmp_path}") == kind


@pytest.mark.parametrize(
    ("url", "kind"),
    [("s3://bucket/a.tar", "tar"), ("https://host/x.zip", "zip"), ("s3://bucket/*/*.png", "images"),
     ("s3://bucket/list.csv", "image_list"), ("s3://bucket/tiles", "parquet"), ("https://host/a.svs", "slides")],
)  # fmt: skip
def test_urls(url: str, kind: str) -> None:
    assert recognise(url) == kind


def test_tiff_tiles_are_no_slides(tmp_path: Path) -> None:
    image = np.zeros((64, 48, 3), np.uint8)
    (tmp_path / "tiles").mkdir()
    Image.fromarray(image).save(tmp_path / "tiles/a.tif")
    assert recognise(str(tmp_path / "tiles")) == recognise(str(tmp_path / "tiles/a.tif")) == "images"
    for name, options in {"blocks": {"tile": (16, 16)}, "pages": {}, "large": {}}.items():
        (tmp_path / name).mkdir()
        with tifffile.TiffWriter(tmp_path / name / "a.tif") as file:
            file.write(np.zeros((8, 5000, 3), np.uint8) if name == "large" else image, photometric="rgb", **options)
            if name == "pages":
                file.write(image[::2, ::2], photometric="rgb")
        assert recognise(str(tmp_path / name)) == "slides", name
    (tmp_path / "list.csv").write_text("path\ntiles/a.tif\n")
    (tmp_path / "slides.csv").write_text("path\nblocks/a.tif\n")
    assert recognise(str(tmp_path / "list.csv")) == "image_list"
    assert recognise(str(tmp_path / "slides.csv")) == "slides"


def test_links_are_followed_once_and_hidden_files_skipped(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"a/1.png": PNG, "a/._1.png": b"x", ".cache/2.png": PNG, "b/3.png": PNG})
    write_folder(tmp_path / "elsewhere", {"4.png": PNG})
    (folder / "a/loop").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked again").symlink_to(tmp_path / "elsewhere")
    (folder / "5.png").symlink_to(folder / "b/3.png")
    (folder / "6.png").symlink_to(tmp_path / "elsewhere/4.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_data(load_config(None, [f"data.path={folder}"])).source
    assert recognise(str(folder)) == "images"
    names = [source.describe(0, row) for row in range(source.num_rows)]
    assert names == [f"'{folder}/{name}'" for name in ("a/1.png", "b/3.png", "linked/4.png")]


def test_of_splits_train_is_taken(tmp_path: Path) -> None:
    names = [f"{split}/{kind}/interval {n}.png" for split in ("train", "test") for kind in "ab" for n in range(2)]
    write_folder(tmp_path / "set", dict.fromkeys(names, PNG))
    assert open_data(load_config(None, [f"data.path={tmp_path}/set"])).source.num_rows == 4
    write_folder(tmp_path / "plain", dict.fromkeys(["a/test 1.png", "a/val.png", "train.png"], PNG))
    assert open_data(load_config(None, [f"data.path={tmp_path}/plain"])).source.num_rows == 3


def test_wrong_kinds_name_the_right_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {"a.png": PNG})
    with pytest.raises(FileNotFoundError, match=r"images"):
        open_data(load_config(None, [f"data.path={tmp_path}/set", "data.kind=parquet"]))
    with pytest.raises(FileNotFoundError, match=r"images"):
        open_data(load_config(None, [f"data.path={tmp_path}/set", "data.kind=tar"]))
    write_folder(tmp_path / "packed", {"a.tar.gz": b"x"})
    with pytest.raises(ValueError, match="compressed"):
        open_data(load_config(None, [f"data.path={tmp_path}/packed"]))
    write_tar(tmp_path / "empty.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match="image"):
        open_data(load_config(None, [f"data.path={tmp_path}/empty.tar"]))


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["masks.zip", "a.png"], "images"),
        (["a.tar", "b.tar.gz"], r"\*\.tar\.gz"),
        (["a.png", "b.gif", "c.HEIC", "notes.txt"], r"\*\.gif, \*\.heic"),
        (["a.png", "metadata.parquet", "labels.csv"], ""),
    ],
)
def test_what_a_folder_holds_besides_is_said(
    files: list[str], named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, dict.fromkeys(files, PNG))
    write_tar(tmp_path / "a.tar", {"a.png": PNG}) if "a.tar" in files else None
    write_zip(tmp_path / "masks.zip", {"a.png": PNG}) if "masks.zip" in files else None
    open_data(load_config(None, [f"data.path={tmp_path}"]))
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == bool(named) and all(re.search(named, text) for text in said)
    caplog.clear()
    kind = recognise(str(tmp_path))
    open_data(load_config(None, [f"data.path={tmp_path}", f"data.kind={kind}"]))
    assert "left out" not in caplog.text


@pytest.mark.parametrize(("file", "advice"), [("a.arrow", "to_parquet"), ("a.gif", "gif"), ("a.xyz", "data.kind")])
def test_the_way_is_named_for_what_is_not_read(file: str, advice: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {file: b"x"})
    for path in (tmp_path, tmp_path / file):
        with pytest.raises(ValueError, match=advice):
            recognise(str(path))


def test_slides_of_a_format_without_a_reader_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.isyntax").write_bytes(b"<DataObject")
    for path in (tmp_path, tmp_path / "a.isyntax"):
        with pytest.raises(ValueError, match=r"a\.isyntax.*iSyntax"):
            recognise(str(path))

"""Containers: conventions of tar shards, zip archives and HDF5 files, and the index that is kept of them."""

import gzip
import io
import logging
import os
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from dinov2.data.images.hdf5 import Hdf5Tiles
from dinov2.data.images.index import load_index
from dinov2.data.images.source import ImageSource
from dinov2.data.images.tar import TarShards
from dinov2.data.images.zip import ZipArchives
from dinov2.data.source import DecodeError, EncodedSample
from dinov2.data.storage.base import LocalStorage
from tests.helpers.collections import tiles, write_hdf5, write_tar, write_zip
from tests.helpers.shards import encode, tile, tile_number

PNG = [encode(tile(number), "png") for number in range(100)]


def source_of(path: Path, container: object, sidecar: Path | None = None) -> ImageSource:
    storage = LocalStorage(str(path), files=container.files)
    return ImageSource(storage, load_index(storage, container, storage.list_files(), sidecar), container)


def decoded(source: ImageSource) -> list[int | None]:
    """Number of each tile; None where it is corrupt."""
    found = []
    for group, rows in enumerate(source.group_rows.tolist()):
        for row, (slide, data) in enumerate(source.read(group, range(rows))):
            try:
                found.append(tile_number(source.decode(EncodedSample(0, group, row, slide, data))))
            except DecodeError:
                found.append(None)
    return found


def test_a_sample_of_a_tar_shard_is_its_first_image_of_the_shortest_ending(tmp_path: Path) -> None:
    members = {
        "./a/1.mask.png": PNG[90], "./a/1.png": PNG[1], "./a/1.json": b"{}", "./a/1.cls": b"3",
        "a/2.jpg": PNG[2], "a/2.png": PNG[91], "a/3.txt": b"no image", "b/2.PNG": PNG[3],
        ".hidden/4.png": PNG[92], "a/._5.png": PNG[93], "a/6.seg.png": PNG[6],
    }  # fmt: skip
    source = source_of(write_tar(tmp_path / "a.tar", members), TarShards())
    assert decoded(source) == [1, 2, 3, 6]
    assert source.slides(0) == ["a", "a", "b", "a"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_long_names(tmp_path: Path, form: int) -> None:
    names = [f"{'deep/' * 20}{number}.png" for number in range(3)] + ["ä/µ.png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        archive.addfile(link)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(PNG[number])
            archive.addfile(member, io.BytesIO(PNG[number]))
    source = source_of(tmp_path / "a.tar", TarShards())
    assert decoded(source) == [0, 1, 2, 3]
    assert source.slides(0)[3] == "ä"


def test_of_a_tar_shard_that_is_cut_short_the_whole_tiles_are_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "b.tar", {f"{number}.png": PNG[number] for number in range(9)})
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": PNG[number] for number in range(9)})
    path.write_bytes(path.read_bytes()[: 512 * 2 * 4 + 512 + 100])
    with caplog.at_level(logging.WARNING):
        assert decoded(source_of(tmp_path, TarShards())) == [*range(4), *range(9)]
    assert "a.tar" in caplog.text and "b.tar" not in caplog.text


def test_members_of_zip_archives(tmp_path: Path) -> None:
    """Stored and deflated ones, folders, comments, data descriptors, and headers unlike those of the directory."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.comment = b"made by hand"
        archive.writestr("in/", b"")
        for number in range(4):
            info = zipfile.ZipInfo(f"in/{number}.png")
            info.compress_type = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=number > 1) as file:  # puts a field into the own header only
                file.write(PNG[number])
        archive.writestr("__MACOSX/in/0.png", b"no image")
        archive.writestr("notes.txt", b"no image")
    assert decoded(source_of(tmp_path / "a.zip", ZipArchives())) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_checksum_tells_corrupt_members(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "a.zip", {f"{number}.png": PNG[number] for number in range(5)}, method)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("2.png").header_offset
    data = bytearray(path.read_bytes())
    data[start + 30 + 5 + 120] ^= 1
    path.write_bytes(data)
    assert decoded(source_of(path, ZipArchives())) == [0, 1, None, 3, 4]


def test_zip_archives_that_cannot_be_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_zip(tmp_path / "good.zip", {"1.png": PNG[1]})
    (tmp_path / "cut.zip").write_bytes((tmp_path / "good.zip").read_bytes()[:-40])
    write_zip(tmp_path / "lzma.zip", {"1.png": PNG[1]}, zipfile.ZIP_LZMA)
    locked = bytearray((tmp_path / "good.zip").read_bytes())
    locked[locked.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    with caplog.at_level(logging.WARNING):
        assert decoded(source_of(tmp_path, ZipArchives())) == [1]
    assert all(name in caplog.text for name in ("cut.zip", "lzma.zip", "locked.zip")) and "good" not in caplog.text
    (tmp_path / "good.zip").unlink()
    with pytest.raises(ValueError, match=r"3 zip files"):
        source_of(tmp_path, ZipArchives())


def test_the_dataset_of_an_hdf5_file_is_found_by_its_shape_and_name(tmp_path: Path) -> None:
    stack = np.stack([tile(number) for number in range(5)])
    layouts = {
        "known": {"imgs": stack, "masks": stack[..., :1], "coords": np.zeros((5, 2))},
        "first of two": {"other": stack[::-1], "x": stack},
        "only": {"deep/rgb": stack, "labels": np.zeros(5)},
        "in a group": {"20x/patches": stack, "thumbnail": stack[:1]},
    }
    for name, datasets in layouts.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, values in datasets.items():
                file[key] = values
        assert decoded(source_of(tmp_path / f"{name}.h5", Hdf5Tiles())) == list(range(5)), name
    assert decoded(source_of(tmp_path / "first of two.h5", Hdf5Tiles("other"))) == [4, 3, 2, 1, 0]
    for name, datasets in {"two": {"a": stack, "b": stack}, "coords": {"coords": np.zeros((5, 2))}, "none": {}}.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, values in datasets.items():
                file[key] = values
        with pytest.raises(ValueError, match="datasets"):
            source_of(tmp_path / f"{name}.h5", Hdf5Tiles())
    (tmp_path / "no.h5").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="HDF5"):
        source_of(tmp_path / "no.h5", Hdf5Tiles())


@pytest.mark.parametrize("layout", ["channels first", "alpha", "grey"])
def test_other_layouts_of_pixels_in_hdf5(tmp_path: Path, layout: str) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (5, 6, 9, 3), np.uint8)
    grey = np.repeat(stack[..., :1], 3, axis=3)
    stored, expected = {
        "channels first": (np.moveaxis(stack, 3, 1), stack),
        "alpha": (np.concatenate([stack, stack[..., :1]], axis=3), stack),
        "grey": (stack[..., :1], grey),
    }[layout]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["imgs"] = stored
    source = source_of(tmp_path / "a.h5", Hdf5Tiles())
    for row, (slide, data) in enumerate(source.read(0, range(5))):
        np.testing.assert_array_equal(source.decode(EncodedSample(0, 0, row, slide, data)), expected[row])
        assert len(data) <= source.group_bytes[0]


@pytest.mark.parametrize("name", ["several of one name", "float", "empty tiles"])
def test_datasets_of_hdf5_that_are_refused(tmp_path: Path, name: str) -> None:
    stack = np.zeros((5, 8, 8, 3), np.uint8)
    datasets = {
        "several of one name": {"a/imgs": stack, "b/imgs": stack},
        "float": {"imgs": stack / 255},
        "empty tiles": {"imgs": stack[:, :0]},
    }[name]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for key, values in datasets.items():
            file[key] = values
    with pytest.raises(ValueError, match="a/imgs, b/imgs" if "several" in name else r"imgs .*\(5, "):
        source_of(tmp_path / "a.h5", Hdf5Tiles())
    if "several" in name:
        assert source_of(tmp_path / "a.h5", Hdf5Tiles("b/imgs")).num_rows == 5


def test_compressed_tar_files_and_empty_archives_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": PNG[1]})
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(ValueError, match="gzip"):
        source_of(tmp_path / "a.tar", TarShards())
    write_zip(tmp_path / "a.zip", {})
    with pytest.raises(ValueError, match=r"holds an image; "):
        source_of(tmp_path / "a.zip", ZipArchives())


def test_tiles_of_hdf5_need_not_be_square(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (70, 6, 9, 3), np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("imgs", data=stack, chunks=(1, 6, 9, 3), compression="gzip")
    source = source_of(tmp_path / "a.h5", Hdf5Tiles())
    for group, first in enumerate((0, 64)):
        rows = [5, 0, 3]
        for row, (slide, data) in zip(rows, source.read(group, rows), strict=True):
            image = source.decode(EncodedSample(0, group, row, slide, data))
            np.testing.assert_array_equal(image, stack[first + row])
            assert slide == "a"


def test_a_corrupt_chunk_of_hdf5_spoils_its_own_rows_only(tmp_path: Path) -> None:
    path, stack = tmp_path / "a.h5", np.stack([tile(number) for number in range(8)])
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("imgs", data=stack, chunks=(2, 8, 8, 3), fletcher32=True)
        place = dataset.id.get_chunk_info(1)
    data = bytearray(path.read_bytes())
    data[place.byte_offset + 9] ^= 1
    path.write_bytes(data)
    assert decoded(source_of(path, Hdf5Tiles())) == [0, 1, None, None, 4, 5, 6, 7]


class Counted(TarShards):
    """Notes which files are indexed."""

    def __init__(self) -> None:
        self.indexed: list[str] = []

    def contents(self, storage, file):
        self.indexed.append(file.name)
        return super().contents(storage, file)


def test_only_what_changed_is_indexed_anew(tmp_path: Path) -> None:
    folder, sidecar = tmp_path / "set", tmp_path / "run/index"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number}.tar", {f"{10 * number + row}.png": PNG[10 * number + row] for row in range(4)})

    def opened() -> tuple[list[str], ImageSource]:
        container = Counted()
        source = source_of(folder, container, sidecar)
        return container.indexed, source

    indexed, first = opened()
    assert indexed == ["0.tar", "1.tar", "2.tar"]
    indexed, again = opened()
    assert indexed == [] and again.fingerprint == first.fingerprint and decoded(again) == decoded(first)
    write_tar(folder / "1.tar", {"50.png": PNG[50]})
    (folder / "2.tar").unlink()
    write_tar(folder / "0a.tar", {"60.png": PNG[60]})
    indexed, changed = opened()
    assert sorted(indexed) == ["0a.tar", "1.tar"] and changed.fingerprint != first.fingerprint
    assert decoded(changed) == [0, 1, 2, 3, 60, 50]
    sidecar.write_bytes(b"no index")
    assert opened()[1].fingerprint == changed.fingerprint


def test_indexes_of_other_containers_and_datasets_are_not_taken(tmp_path: Path) -> None:
    files = tiles(5)
    path = write_hdf5(tmp_path / "a.h5", files, encoded=False)
    with h5py.File(path, "a") as file:
        file["more"] = file["imgs"][:][::-1]
    storage = LocalStorage(str(path), files=Hdf5Tiles.files)
    found = []
    for named in ("", "more", ""):
        container = Hdf5Tiles(named)
        index = load_index(storage, container, storage.list_files(), tmp_path / "index", named)
        found.append(decoded(ImageSource(storage, index, container)))
    assert found == [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]]


def test_folders_hold_every_format(tmp_path: Path) -> None:
    from dinov2.build.data import open_data
    from dinov2.configs import load_config

    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    endings = {"png": {}, "jpg": {}, "JPEG": {}, "tif": {}, "tiff": {"compression": "tiff_lzw"},
               "webp": {"lossless": True}, "bmp": {}, "jp2": {}}  # fmt: skip
    for ending, options in endings.items():
        kind = {"jpg": "JPEG", "jp2": "JPEG2000", "tif": "TIFF"}.get(ending, ending.upper())
        Image.fromarray(image).save(tmp_path / f"a.{ending}", kind, **options)
    source = open_data(load_config(None, [f"data.path={tmp_path}"])).source
    assert source.num_rows == len(endings)
    for row, (slide, data) in enumerate(source.read(0, range(len(endings)))):
        name = source.describe(0, row).strip("'")
        expected = np.asarray(Image.open(name).convert("RGB")).astype(int)
        found = source.decode(EncodedSample(0, 0, row, slide, data))
        assert np.abs(found - expected).max() <= (3 if name.lower().endswith(("jpg", "jpeg")) else 0), name


def test_a_file_that_is_gone_is_a_corrupt_row(tmp_path: Path) -> None:
    from dinov2.build.data import open_data
    from dinov2.configs import load_config

    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(PNG[number])
    source = open_data(load_config(None, [f"data.path={tmp_path}"])).source
    os.remove(tmp_path / "2.png")
    assert decoded(source) == [0, 1, None, 3]

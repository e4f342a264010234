"""The index of a collection gives the readers what the slides would, and is completed after a stop."""

import json
import pickle
from pathlib import Path

import fsspec
import imagecodecs.numcodecs
import numpy as np
import pytest
import tifffile
import zarr

from dinov2.data.slides import index
from dinov2.data.slides.blocks import TileIndex
from dinov2.data.slides.index import TileIndexes
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tiff import index_slide
from prepatching_scripts import index_slides
from tests.helpers.slides import MakeSlide


@pytest.fixture
def folder(tmp_path: Path, train_slide: Path, make_slide: MakeSlide) -> Path:
    """Two slides, of which one does not say its mpp, and a file that is none."""
    make_slide("slides/deep/plain.svs")
    (tmp_path / "slides/train.svs").write_bytes(train_slide.read_bytes())
    (tmp_path / "slides/broken.svs").write_text("<html>")
    return tmp_path / "slides"


def run(source: Path, output: Path, *options: str) -> int:
    return index_slides.main([str(source), "--output", str(output), "--workers", "1", *options])


def assert_same(index: TileIndex, expected: TileIndex) -> None:
    assert (index.path, index.size, index.downsamples) == (expected.path, expected.size, expected.downsamples)
    assert (index.mpp, index.mpp_source) == (expected.mpp, expected.mpp_source)
    for level, other in zip(index.levels, expected.levels, strict=True):
        np.testing.assert_array_equal(level.offsets, other.offsets)
        np.testing.assert_array_equal(level.lengths, other.lengths)
        plain = ("width", "height", "tile_width", "tile_height", "compression", "photometric", "jpeg_tables")
        assert all(getattr(level, name) == getattr(other, name) for name in plain)


def test_collection_gives_every_slides_index(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text("slide,mpp\nplain,0.5\ntrain,3\n")
    output = tmp_path / "index"
    assert run(folder, output, "--mpp-file", str(tmp_path / "mpp.csv")) == 1  # a third of the slides failed
    assert run(folder, output, "--mpp-file", str(tmp_path / "mpp.csv"), "--max-failed-share", "0.5") == 0
    failure = json.loads((output / "failures.jsonl").read_text())
    assert failure["slide"] == str(folder / "broken.svs") and "not a TIFF file (6 bytes" in failure["reason"]
    indexes = TileIndexes(output / "tiles.index")
    assert set(indexes) == {str(folder / "deep/plain.svs"), str(folder / "train.svs")}
    for slide in indexes:
        assert_same(indexes[slide], index_slide(slide, 0.5 if slide.endswith("plain.svs") else 3))
        outline = indexes.outline(slide)
        for level, whole in zip(outline.levels, indexes[slide].levels, strict=True):
            assert level.lengths.tolist() == [[whole.lengths.max()]] and level.tile_width == whole.tile_width
    assert indexes[str(folder / "deep/plain.svs")].mpp_source == "user"
    assert str(folder / "none.svs") not in indexes
    copy = pickle.loads(pickle.dumps(indexes))
    assert_same(copy[str(folder / "train.svs")], index_slide(folder / "train.svs", 3))
    assert [path.name for path in output.iterdir() if path.name.endswith(".part")] == []


def test_reader_does_not_parse_an_indexed_slide(
    folder: Path, tmp_path: Path, stored_levels: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path / "index")
    indexes = TileIndexes(tmp_path / "index/tiles.index")
    monkeypatch.setattr("dinov2.data.slides.reader.index_slide", None)
    slide = str(folder / "train.svs")
    reader = SlideReader(slide, index=indexes[slide])
    np.testing.assert_array_equal(reader.read_region(1, 9, 8, 500, 400), stored_levels[1][8:408, 9:509])
    moved = (folder / "train.svs").rename(folder / "moved.svs")
    np.testing.assert_array_equal(
        SlideReader(moved, index=indexes[slide]).read_region(1, 9, 8, 500, 400),
        stored_levels[1][8:408, 9:509],
    )
    moved.rename(slide)
    plain = SlideReader(folder / "deep/plain.svs", mpp=0.7, index=indexes[str(folder / "deep/plain.svs")])
    assert (plain.mpp, plain.mpp_source) == (0.7, "user")
    again = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again.read_region(2, 0, 0, 50, 40), stored_levels[2][:40, :50])


def test_run_that_was_stopped_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def parse(path: str, mpp: float | None = None) -> TileIndex:
        parsed.append(Path(path).name)
        if parsed == ["plain.svs", "train.svs"]:
            raise KeyboardInterrupt
        return index_slide(path, mpp)

    monkeypatch.setattr(index, "index_slide", parse)
    (folder / "broken.svs").unlink()
    output = tmp_path / "index"
    assert run(folder, output) == 130
    assert [path.name for path in output.iterdir()] == ["tiles.index.part"]
    assert run(folder, output) == 0
    assert parsed == ["plain.svs", "train.svs", "train.svs"]
    assert set(TileIndexes(output / "tiles.index")) == {str(folder / name) for name in ("deep/plain.svs", "train.svs")}


@pytest.mark.parametrize(("cut", "expected"), [(0.9, ["train.svs"]), (0.05, ["plain.svs", "train.svs"]), (0, None)])
def test_corrupt_part_of_a_stopped_run_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: float, expected: list[str] | None
) -> None:
    (folder / "broken.svs").unlink()
    run(folder, tmp_path / "index")
    finished = tmp_path / "index/tiles.index"
    whole = finished.read_bytes()
    corrupt = whole[: int(len(whole) * cut)] if cut else whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]
    finished.with_name("tiles.index.part").write_bytes(corrupt)
    finished.unlink()
    parsed: list[str] = []
    parse = lambda path, mpp=None: parsed.append(Path(path).name) or index_slide(path, mpp)  # noqa: E731
    monkeypatch.setattr(index, "index_slide", parse)
    assert run(folder, tmp_path / "index") == 0
    assert parsed == (expected or ["plain.svs", "train.svs"]) and finished.read_bytes() == whole


def test_only_what_changed_is_parsed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_slide: MakeSlide
) -> None:
    parsed: list[str] = []
    parse = lambda path, mpp=None: parsed.append(Path(path).name) or index_slide(path, mpp)  # noqa: E731
    (folder / "broken.svs").unlink()
    run(folder, tmp_path / "index")
    monkeypatch.setattr(index, "index_slide", parse)
    assert run(folder, tmp_path / "index") == 0 and parsed == []
    make_slide("slides/new.svs", "|MPP = 0.3")
    with (folder / "train.svs").open("ab") as file:
        file.write(b"longer")
    (tmp_path / "mpp.csv").write_text("slide,mpp\nplain.svs,0.5\nnew.svs,0.5\n")
    assert run(folder, tmp_path / "index", "--mpp-file", str(tmp_path / "mpp.csv")) == 0
    assert sorted(parsed) == ["new.svs", "train.svs"]
    parsed.clear()
    assert run(folder, tmp_path / "index", "--mpp-file", str(tmp_path / "mpp.csv")) == 0 and parsed == []
    indexes = TileIndexes(tmp_path / "index/tiles.index")
    assert {Path(slide).name: indexes[slide].mpp for slide in indexes} == {
        "plain.svs": 0.5, "new.svs": 0.5, "train.svs": 0.25}  # fmt: skip


def test_zarr_references_lead_to_the_tiles(folder: Path, tmp_path: Path, stored_levels: list[np.ndarray]) -> None:
    assert run(folder, tmp_path / "index", "--zarr", "--max-failed-share", "0.5") == 0
    path = tmp_path / "index/zarr/train.svs.json"
    assert (tmp_path / "index/zarr/deep/plain.svs.json").is_file()
    reference = fsspec.filesystem("reference", fo=str(path))
    whole = (folder / "train.svs").read_bytes()
    for number, level in enumerate(index_slide(folder / "train.svs").levels):
        array = json.loads(reference.cat(f"{number}/.zarray"))
        assert array["shape"] == [*stored_levels[number].shape] and array["chunks"] == [256, 256, 3]
        assert array["compressor"]["id"] == "imagecodecs_jpeg"
        last = tuple(side - 1 for side in level.offsets.shape)
        start = int(level.offsets[last])
        chunk = reference.cat(f"{number}/{last[0]}.{last[1]}.0")
        assert chunk == whole[start : start + int(level.lengths[last])]
    assert "0.25" in reference.cat(".zattrs").decode()


def test_zarr_arrays_hold_the_stored_pixels(folder: Path, tmp_path: Path, stored_levels: list[np.ndarray]) -> None:
    imagecodecs.numcodecs.register_codecs(verbose=False)
    run(folder, tmp_path / "index", "--zarr")
    options = {"fo": str(tmp_path / "index/zarr/train.svs.json"), "remote_protocol": "file"}
    store = zarr.storage.FsspecStore.from_url("reference://", storage_options=options, read_only=True)
    group = zarr.open_group(store, mode="r", zarr_format=2)
    for number, stored in enumerate(stored_levels):
        np.testing.assert_array_equal(group[str(number)][:], stored)


@pytest.mark.parametrize("codec", ["webp", "png", "jpeg2000"])
def test_zarr_arrays_of_other_codecs(tmp_path: Path, stored_levels: list[np.ndarray], codec: str) -> None:
    imagecodecs.numcodecs.register_codecs(verbose=False)
    (tmp_path / "slides").mkdir()
    slide = tmp_path / "slides/slide.tif"
    tifffile.imwrite(slide, stored_levels[2], tile=(128, 128), compression=codec, photometric="rgb", metadata=None)
    assert run(tmp_path / "slides", tmp_path / "index", "--zarr") == 0
    options = {"fo": str(tmp_path / "index/zarr/slide.tif.json"), "remote_protocol": "file"}
    store = zarr.storage.FsspecStore.from_url("reference://", storage_options=options, read_only=True)
    np.testing.assert_array_equal(zarr.open_group(store, mode="r", zarr_format=2)["0"][:], tifffile.imread(slide))


def test_another_resolution_of_the_user_needs_no_parsing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.svs").unlink()
    run(folder, tmp_path / "index")
    monkeypatch.setattr(index, "index_slide", None)
    (tmp_path / "mpp.csv").write_text("slide,mpp\ntrain,0.5\n")
    slide = str(folder / "train.svs")
    assert run(folder, tmp_path / "index", "--mpp-file", str(tmp_path / "mpp.csv")) == 0
    found = TileIndexes(tmp_path / "index/tiles.index")[slide]
    assert (found.mpp, found.mpp_source, found.resolution.own) == (0.5, "user", 0.25)
    assert run(folder, tmp_path / "index") == 0
    found = TileIndexes(tmp_path / "index/tiles.index")[slide]
    assert (found.mpp, found.mpp_source) == (0.25, "slide")


def test_faulty_calls_are_refused(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "index") == 2
    assert "nowhere' does not exist" in caplog.text
    names = tmp_path / "names.txt"
    (folder / "plain.svs").write_bytes((folder / "train.svs").read_bytes())
    names.write_text(f"{folder}/plain.svs\n{folder}/deep/plain.svs\n")
    assert run(folder, tmp_path / "index", "--mpp-file", str(tmp_path / "none.csv")) == 2
    assert run(names, tmp_path / "index", "--zarr") == 2
    assert "are named 'plain.svs'" in caplog.text
    (tmp_path / "empty").write_bytes(b"")
    for path in (tmp_path / "empty", folder / "train.svs"):
        with pytest.raises(ValueError, match="is not a finished tile index"):
            TileIndexes(path)
    with pytest.raises(FileNotFoundError, match="There is no tile index"):
        TileIndexes(tmp_path / "none")

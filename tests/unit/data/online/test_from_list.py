"""Training straight from a sample list: its row groups, and the tiles it yields."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinov2.data.augment.collate import Sample
from dinov2.data.online.from_list import SlideListSource
from dinov2.data.slides.find import locate
from dinov2.data.source import DecodeError, EncodedSample
from dinov2.data.stream.loader import TrainLoader
from dinov2.data.stream.order import SampleOrder
from tests.helpers.slides import MakeSlide, damage_tile


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def sample_at(source: SlideListSource, group: int, row: int) -> EncodedSample:
    [(slide, data)] = source.read(group, [row])
    return EncodedSample(0, group, row, slide, data)


def test_groups_are_64_consecutive_lines(train_slide: Path, tmp_path: Path) -> None:
    source = SlideListSource(write(tmp_path / "list", *(f"{train_slide} {i} 0 0" for i in range(150))))
    assert source.group_rows.dtype == np.int64 and source.group_rows.tolist() == [64, 64, 22]
    assert source.num_rows == 150 and source.group_bytes.shape == (3,)
    assert source.read(2, [21, 0]) == [(str(train_slide), b"149 0 0"), (str(train_slide), b"128 0 0")]
    assert source.describe(2) == f"tiles 129 to 150 of sample list '{tmp_path / 'list'}'"


def test_tiles_are_the_stored_pixels_at_the_snapped_position(
    train_slide: Path, stored_levels: list[np.ndarray], tmp_path: Path
) -> None:
    """Level-0 positions between pixels of level 1 (601, 703) and 2 (602, 701) go to the nearest pixel."""
    lines = (f"{train_slide} {x} {y} {level}" for x, y, level in [(601, 703, 0), (602, 703, 1), (603, 701, 2)])
    source = SlideListSource(write(tmp_path / "list", *lines), tile_size=96)
    for row, (column, top) in enumerate([(601, 703), (301, 352), (151, 175)]):
        expected = stored_levels[row][top : top + 96, column : column + 96]
        np.testing.assert_array_equal(source.decode(sample_at(source, 0, row)), expected)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.decode(sample_at(copy, 0, 2)), expected)


def test_six_column_tiles_are_cut_at_their_mpp(
    train_slide: Path, stored_levels: list[np.ndarray], tmp_path: Path
) -> None:
    """Levels 0, 1, 2 have 0.25, 0.5, 1 um: 2 um takes 192 px of level 2 and averages four into one."""
    lines = [f"{train_slide} 600 700 0 0.5 0.5", f"{train_slide} 400 400 0 2 2"]
    listed = write(tmp_path / "list", *lines)
    source = SlideListSource(listed, tile_size=96, columns=6)
    assert source.read(0, [1]) == [(str(train_slide), b"400 400 0 2.0")]
    same = stored_levels[1][350:446, 300:396]
    np.testing.assert_array_equal(source.decode(sample_at(source, 0, 0)), same)
    half = stored_levels[2][100:292, 100:292].reshape(96, 2, 96, 2, 3).mean((1, 3))
    tile = pickle.loads(pickle.dumps(source)).decode(sample_at(source, 0, 1))
    np.testing.assert_allclose(tile, half, atol=0.51)
    prints = {source.fingerprint, SlideListSource(listed, tile_size=64, columns=6).fingerprint}
    assert len(prints | {SlideListSource(write(listed, *lines[:1]), columns=6, tile_size=96).fingerprint}) == 3


def test_six_columns_need_every_slides_mpp(train_slide: Path, make_slide: MakeSlide, tmp_path: Path) -> None:
    mute = make_slide("m 1.svs")
    listed = write(tmp_path / "list", f"{train_slide} 600 700 0 1 1", f"{mute} 10 12 0 1 1")
    with pytest.raises(ValueError, match=rf"1 slides of sample list .* the first is '{mute}'"):
        SlideListSource(listed, columns=6)
    table = write(tmp_path / "mpp.csv", "slide,mpp", "m 1,0.5")
    source = SlideListSource(listed, columns=6, mpp_file=table, tile_size=64)
    with tifffile.TiffFile(mute) as tiff:
        stored = tiff.pages[0].asarray()
    half = stored[12:140, 10:138].reshape(64, 2, 64, 2, 3).mean((1, 3))
    np.testing.assert_allclose(source.decode(sample_at(source, 0, 1)), half, atol=0.51)
    other = SlideListSource(listed, columns=6, mpp_file=write(table, "slide,mpp", "m 1,1.0"), tile_size=64)
    assert other.fingerprint != source.fingerprint
    np.testing.assert_array_equal(other.decode(sample_at(other, 0, 1)), stored[12:76, 10:74])
    made = {"columns": ["path", "x", "y", "level", "mpp_x", "mpp_y"], "slide_mpp": {str(mute): 0.5}}
    Path(f"{listed}.meta.json").write_text(json.dumps(made))
    assert SlideListSource(listed, tile_size=64).fingerprint == source.fingerprint
    four = write(tmp_path / "four", f"{mute} 10 12 0")
    assert SlideListSource(four).num_rows == 1, "lists of four columns need no mpp"


def test_unreadable_tiles_are_decode_errors_that_name_the_position(train_slide: Path, tmp_path: Path) -> None:
    broken = damage_tile(train_slide, tmp_path / "broken.svs", 0, empty=True)
    source = SlideListSource(
        write(
            tmp_path / "list",
            f"{broken} 0 0 0",
            f"{broken} 2200 0 0",
            f"{broken} 0 0 7",
            f"{broken} 400 400 0",
        )
    )
    reasons = [
        "level 0, column 0, row 0, .*missing from the file",
        "column 2200, .*leaves the level",
        "level 7",
    ]
    for row, reason in enumerate(reasons):
        with pytest.raises(DecodeError, match=f"broken.svs', .*{reason}"):
            source.decode(sample_at(source, 0, row))
    assert source.decode(sample_at(source, 0, 3)).shape == (224, 224, 3)


def test_slide_root_finds_moved_slides(train_slide: Path, tmp_path: Path) -> None:
    moved = tmp_path / "mnt" / "batch 1" / "s.svs"
    moved.parent.mkdir(parents=True)
    shutil.copy(train_slide, moved)
    for name in ("/data/TCGA/batch 1/s.svs", "batch 1/s.svs", str(moved)):
        assert locate(name, "list", tmp_path / "mnt") == str(moved)
    assert locate("/data/other/t.svs", "list", tmp_path / "mnt") == str(tmp_path / "mnt" / "data/other/t.svs")
    assert locate("/data/s.svs", "list") == "/data/s.svs"
    listed = write(tmp_path / "list", "/data/TCGA/batch 1/s.svs 600 700 0")
    source = SlideListSource(listed, slide_root=tmp_path / "mnt")
    assert source.read(0, [0])[0][0] == "/data/TCGA/batch 1/s.svs"
    assert source.decode(sample_at(source, 0, 0)).shape == (224, 224, 3)
    assert source.fingerprint == SlideListSource(listed, slide_root=tmp_path / "mnt").fingerprint
    assert source.fingerprint != SlideListSource(listed, slide_root=tmp_path / "mnt", tile_size=256).fingerprint


def test_missing_slides_are_found_before_training(train_slide: Path, tmp_path: Path) -> None:
    listed = write(tmp_path / "list", f"{train_slide} 0 0 0", "/no/a.svs 0 0 0", "/no/b.svs 0 0 0")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 slides of sample list .* the first is '/no/a.svs'"):
        SlideListSource(listed)


def _identity(image: np.ndarray, index: int) -> np.ndarray:
    return image


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples


def test_loader_cuts_tiles_in_the_order_of_any_other_source(
    train_slide: Path, stored_levels: list[np.ndarray], tmp_path: Path
) -> None:
    broken = damage_tile(train_slide, tmp_path / "broken.svs", 0, empty=True)
    lines = [f"{train_slide} {400 + 2 * i} {600 + 4 * i} {i % 2}" for i in range(95)] + [f"{broken} 0 0 0"]
    source = SlideListSource(write(tmp_path / "list", *lines), tile_size=64)
    order = SampleOrder(source.group_rows, seed=5, lanes=8, block_rows=16)
    loader = TrainLoader(
        source, _identity, _as_list, global_batch=8, rank=0, world_size=1, start_sample=16, order=order,
        num_workers=2,
    )  # fmt: skip
    batches = iter(loader)
    samples = [sample for _ in range(10) for sample in next(batches)]
    assert [sample.index for sample in samples] == list(range(16, 96))
    positions = order.locate(np.arange(16, 96))
    for sample, line in zip(samples, 64 * positions.group + positions.row, strict=True):
        assert sample.replaced == (line == 95)
        i = 64 if line == 95 else line  # the next row of the row group, which wraps to its first line
        x, y, level = 400 + 2 * i, 600 + 4 * i, i % 2
        y, x = y >> level, x >> level
        np.testing.assert_array_equal(sample.crops, stored_levels[level][y : y + 64, x : x + 64])
    damages = [sample.fault for sample in samples if sample.replaced]
    assert len(damages) == 1 and "broken.svs', level 0, column 0" in damages[0]

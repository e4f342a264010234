"""Regions come out exactly as stored, or with an error that names slide, level and place."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from dinov2.data.slide_reader import SlideOpenError, SlideRangeError, SlideReader, SlideReadError
from tests.unit.slides.conftest import MakeSlide, damage_tile


def region_by_openslide(path: Path, x: int, y: int, level: int, size: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((x, y), level, (size, size)).convert("RGB"))


def test_demo_slide_is_read_as_stored_at_every_level(
    train_slide: Path, stored_levels: list[np.ndarray]
) -> None:
    reader = SlideReader(train_slide)
    for level, (stored, size) in enumerate(zip(stored_levels, reader.level_dimensions, strict=True)):
        assert stored.shape == (size[1], size[0], 3)
        region = reader.read_region(level, 57, 101, 224, 150)
        assert region.dtype == np.uint8 and region.flags.c_contiguous
        np.testing.assert_array_equal(region, stored[101:251, 57:281])


def test_last_pixels_of_a_level_are_read(train_slide: Path, stored_levels: list[np.ndarray]) -> None:
    reader = SlideReader(train_slide)
    for level, (width, height) in enumerate(reader.level_dimensions):
        region = reader.read_region(level, width - 64, height - 64, 64, 64)
        np.testing.assert_array_equal(region, stored_levels[level][-64:, -64:])


@pytest.mark.data
def test_jpeg_slide_equals_openslide(jpeg_slide: Path) -> None:
    reader = SlideReader(jpeg_slide)
    for x, y in ((0, 0), (333, 1777), (2220 - 224, 2967 - 224)):
        np.testing.assert_array_equal(
            reader.read_region(0, x, y, 224, 224), region_by_openslide(jpeg_slide, x, y, 0, 224)
        )
    assert reader.mpp == pytest.approx(0.499) and reader.mpp_source == "slide"


@pytest.mark.data
def test_jpeg2000_slide_equals_openslide(jpeg2000_slide: Path) -> None:
    reader = SlideReader(jpeg2000_slide)
    assert (reader.mpp, reader.mpp_source) == (None, "none")
    np.testing.assert_array_equal(
        reader.read_region(0, 1201, 901, 224, 224), region_by_openslide(jpeg2000_slide, 1201, 901, 0, 224)
    )
    column, row = reader.snap(1, 1201, 901)
    x, y = reader.origin(1, column, row)
    np.testing.assert_array_equal(
        reader.read_region(1, column, row, 224, 224), region_by_openslide(jpeg2000_slide, x, y, 1, 224)
    )


@pytest.mark.data
def test_snapping_comes_closer_to_the_stored_pixels(jpeg2000_slide: Path) -> None:
    """Between pixels OpenSlide interpolates; here (downsample 2.0005) snapping leaves a small offset."""
    with tifffile.TiffFile(jpeg2000_slide) as tiff:
        stored = [page.asarray() for page in tiff.pages if page.is_tiled][1]
    reader = SlideReader(jpeg2000_slide)
    column, row = reader.snap(1, 1201, 1001)
    truth = stored[row : row + 224, column : column + 224].astype(int)
    snapped = np.abs(reader.read_region(1, column, row, 224, 224) - truth).mean()
    between = np.abs(region_by_openslide(jpeg2000_slide, 1201, 1001, 1, 224) - truth).mean()
    assert snapped < 0.5 * between


@pytest.mark.parametrize("downsample", [1.0, 2.0, 2.0005055500659967, 4.0, 15.9973])
def test_snap_takes_origin_back_to_the_same_pixel(train_slide: Path, downsample: float) -> None:
    reader = SlideReader(train_slide)
    reader.level_downsamples = (downsample,)
    for column in [*range(1000), 12345, 65535]:
        x, y = reader.origin(0, column, column + 1)
        assert abs(x - column * downsample) <= 0.5
        assert reader.snap(0, x, y) == (column, column + 1)


@pytest.mark.parametrize(
    ("properties", "given", "expected"),
    [
        ("|AppMag = 20|MPP = 0.4990", None, (0.499, "slide")),
        ("|AppMag = 20|MPP = 0.4990", 0.3, (0.499, "slide")),
        ("|AppMag = 40.000000", None, (0.25, "appmag")),
        ("|AppMag = 40", 0.3, (0.25, "appmag")),
        ("|AppMag = 20|MPP = 352.8", None, (0.5, "appmag")),  # 72 dots per inch is no scanner's resolution
        ("|AppMag = none|MPP = unknown", 0.3, (0.3, "user")),
        ("|AppMag = 0", None, (None, "none")),
        ("", None, (None, "none")),
    ],
)
def test_resolution_and_where_it_comes_from(
    make_slide: MakeSlide, properties: str, given: float | None, expected: tuple[float | None, str]
) -> None:
    reader = SlideReader(make_slide("slide.svs", properties), mpp=given)
    assert (reader.mpp, reader.mpp_source) == (pytest.approx(expected[0]), expected[1])


def test_implausible_resolution_is_refused(train_slide: Path) -> None:
    with pytest.raises(
        ValueError, match=r"mpp given for slide .* is 40, but it must lie within \(0.1, 4.0\)"
    ):
        SlideReader(train_slide, mpp=40)


@pytest.mark.parametrize(
    ("level", "column", "row", "size"),
    [
        (0, -1, 0, 224),
        (0, 0, -1, 224),
        (0, 2304 - 223, 0, 224),
        (1, 0, 888 - 223, 224),
        (2, 0, 0, 600),
        (0, 0, 0, 0),
    ],
)
def test_region_off_the_slide_is_refused(
    train_slide: Path, level: int, column: int, row: int, size: int
) -> None:
    with pytest.raises(SlideRangeError) as caught:
        SlideReader(train_slide).read_region(level, column, row, size, size)
    assert caught.value.slide == str(train_slide)
    assert caught.value.place == f"level {level}, column {column}, row {row}, {size}x{size} px"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("level", [-1, 3])
def test_level_out_of_range_is_refused(train_slide: Path, level: int) -> None:
    with pytest.raises(SlideRangeError, match=f"level {level}: the slide has levels 0 to 2"):
        SlideReader(train_slide).read_region(level, 0, 0, 10, 10)


def test_missing_tile_is_no_black_patch(train_slide: Path, tmp_path: Path) -> None:
    reader = SlideReader(damage_tile(train_slide, tmp_path / "hole.svs", 0, empty=True))
    with pytest.raises(SlideReadError, match="level 0, column 200, row 200, 224x224 px: 3136 of its pixels"):
        reader.read_region(0, 200, 200, 224, 224)  # 56 x 56 px of it lie on the missing tile
    pixels, known = reader.read_known(0, 200, 200, 224, 224)
    assert known.sum() == 224 * 224 - 56 * 56 and not pixels[~known].any()


def test_garbage_tile_is_an_error_and_spares_its_neighbours(
    train_slide: Path, tmp_path: Path, stored_levels: list[np.ndarray]
) -> None:
    reader = SlideReader(damage_tile(train_slide, tmp_path / "garbage.svs", 0, empty=False))
    with pytest.raises(SlideReadError, match=r"garbage.svs', level 0, .*cannot be decoded"):
        reader.read_region(0, 0, 0, 224, 224)
    np.testing.assert_array_equal(reader.read_region(0, 256, 0, 224, 224), stored_levels[0][:224, 256:480])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"<html>Not found</html>", "22 bytes"),
        (None, "there is no such file"),
        (0.5, "not a whole slide"),
    ],
)
def test_what_is_no_slide_is_refused_at_once(
    train_slide: Path, tmp_path: Path, content: object, reason: str
) -> None:
    path = tmp_path / "broken.svs"
    if isinstance(content, float):
        whole = train_slide.read_bytes()
        content = whole[: int(len(whole) * content)]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SlideOpenError, match=reason) as caught:
        SlideReader(path)
    assert str(path) in str(caught.value)


def _digest(reader: SlideReader, queue: multiprocessing.Queue) -> None:
    queue.put(reader.read_region(1, 300, 300, 224, 224).tobytes())


def test_reader_works_in_a_forked_child_and_after_pickling(train_slide: Path) -> None:
    reader = SlideReader(train_slide)
    expected = reader.read_region(1, 300, 300, 224, 224)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_digest, args=(reader, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=30) for _ in children] == [expected.tobytes()] * 2
    for child in children:
        child.join()
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.read_region(1, 300, 300, 224, 224), expected)


def test_handle_is_opened_once_and_again_after_close(
    train_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = openslide.OpenSlide
    monkeypatch.setattr(openslide, "OpenSlide", lambda path: opened.append(path) or original(path))
    reader = SlideReader(train_slide)
    for _ in range(3):
        reader.read_region(0, 0, 0, 32, 32)
    assert len(opened) == 1
    reader.close()
    reader.read_region(0, 0, 0, 32, 32)
    assert len(opened) == 2


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(SlideReadError("a.svs", "no pixels", "level 1")))
    assert type(error) is SlideReadError and str(error) == "Slide 'a.svs', level 1: no pixels."

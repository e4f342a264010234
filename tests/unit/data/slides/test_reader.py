"""Regions come out exactly as stored, or with an error that names slide, level and position."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from dinov2.data.slides.errors import SlideOpenError, SlideRangeError, SlideReadError
from dinov2.data.slides.ranges import SlideBytes
from dinov2.data.slides.reader import SlideReader
from tests.helpers.slides import MakeSlide, damage_tile


def region_by_openslide(path: Path, x: int, y: int, level: int, size: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((x, y), level, (size, size)).convert("RGB"))


def test_demo_slide_is_read_as_stored_at_every_level(train_slide: Path, stored_levels: list[np.ndarray]) -> None:
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


@pytest.mark.data
def test_pixels_above_level_0_are_the_stored_ones(jpeg2000_slide: Path) -> None:
    """OpenSlide interpolates there, since the downsample is 2.0005."""
    with tifffile.TiffFile(jpeg2000_slide) as tiff:
        stored = [page.asarray() for page in tiff.pages if page.is_tiled][1]
    reader = SlideReader(jpeg2000_slide)
    column, row = reader.snap(1, 1201, 1001)
    np.testing.assert_array_equal(
        reader.read_region(1, column, row, 224, 224), stored[row : row + 224, column : column + 224]
    )


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
        ("|AppMag = 20|MPP = 0.4990", 0.3, (0.3, "user")),
        ("|AppMag = 40.000000", None, (0.25, "appmag")),
        ("|AppMag = 40", 0.3, (0.3, "user")),
        ("|AppMag = 100|MPP = 0.0685", None, (0.0685, "slide")),
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
    with pytest.raises(ValueError, match=r"mpp given for slide .* is 40"):
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
def test_region_off_the_slide_is_refused(train_slide: Path, level: int, column: int, row: int, size: int) -> None:
    with pytest.raises(SlideRangeError) as caught:
        SlideReader(train_slide).read_region(level, column, row, size, size)
    assert caught.value.slide == str(train_slide)
    assert caught.value.location == f"level {level}, column {column}, row {row}, {size}x{size} px"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("level", [-1, 3])
def test_level_out_of_range_is_refused(train_slide: Path, level: int) -> None:
    with pytest.raises(SlideRangeError, match=f"level {level}: the slide has levels 0 to 2"):
        SlideReader(train_slide).read_region(level, 0, 0, 10, 10)


def test_missing_tile_is_no_black_tile(train_slide: Path, tmp_path: Path) -> None:
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
def test_what_is_no_slide_is_refused_at_once(train_slide: Path, tmp_path: Path, content: object, reason: str) -> None:
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


def test_openslide_serves_what_is_not_read_from_bytes(openslide_only: tuple[Path, np.ndarray]) -> None:
    path, image = openslide_only
    reader = SlideReader(path)
    assert reader.level_dimensions == ((500, 600), (250, 300)) and reader.level_downsamples == (1.0, 2.0)
    assert (reader.mpp, reader.mpp_source) == (pytest.approx(0.5), "slide")
    pixels, known = reader.read_known(0, 100, 200, 300, 310)
    np.testing.assert_array_equal(pixels, image[200:510, 100:400])
    assert known.all() and known.shape == (310, 300) and pixels.flags.c_contiguous
    np.testing.assert_array_equal(reader.read_region(1, 3, 5, 64, 64), image[10:138:2, 6:134:2])
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.read_region(0, 0, 0, 500, 600), image)


def test_openslide_handle_is_opened_once_and_again_after_close(
    openslide_only: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = openslide.OpenSlide
    monkeypatch.setattr(openslide, "OpenSlide", lambda path: opened.append(path) or original(path))
    reader = SlideReader(openslide_only[0])
    for _ in range(3):
        reader.read_region(0, 0, 0, 32, 32)
    assert len(opened) == 1
    reader.close()
    reader.read_region(0, 0, 0, 32, 32)
    assert len(opened) == 2


def test_garbage_that_openslide_meets_is_an_error(openslide_only: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, image = openslide_only
    reader = SlideReader(damage_tile(path, tmp_path / "garbage.tif", 0, empty=False))
    with pytest.raises(SlideReadError, match=r"garbage.tif', level 0, .*cannot be decoded"):
        reader.read_region(0, 0, 0, 224, 224)
    np.testing.assert_array_equal(reader.read_region(0, 256, 0, 224, 224), image[:224, 256:480])


def test_file_is_not_parsed_or_opened_for_every_read(train_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, opened = SlideReader(train_slide), []
    original = open
    monkeypatch.setattr("builtins.open", lambda *args, **kw: opened.append(args[0]) or original(*args, **kw))
    for column in range(0, 900, 300):
        reader.read_region(0, column, 0, 32, 32)
    assert opened == [str(train_slide)]
    reader.close()
    reader.read_region(0, 0, 0, 32, 32)
    assert opened == [str(train_slide)] * 2


def test_tiles_are_kept_up_to_the_limit(train_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = SlideBytes.read
    monkeypatch.setattr(SlideBytes, "read", lambda self, r: asked.append(len(r)) or original(self, r))
    reader = SlideReader(train_slide, cache_bytes=2 * 3 * 256**2)
    for column in (0, 256, 0, 512, 0, 256):  # 256 was used before 0 when 512 came
        reader.read_region(0, column, 0, 256, 256)
    assert asked == [1, 1, 0, 1, 0, 1]
    asked.clear()
    without = SlideReader(train_slide, cache_bytes=0)
    for _ in range(2):
        without.read_region(0, 100, 100, 224, 224)
    assert asked == [4, 4]


def test_passing_trouble_with_the_file_is_met_by_a_fresh_handle(
    train_slide: Path, stored_levels: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles = iter([OSError(116, "Stale file handle")])
    original = SlideBytes.read

    def read(self: SlideBytes, ranges: list) -> list[bytes]:
        for trouble in troubles:
            raise trouble
        return original(self, ranges)

    monkeypatch.setattr(SlideBytes, "read", read)
    reader = SlideReader(train_slide)
    np.testing.assert_array_equal(reader.read_region(0, 0, 0, 64, 64), stored_levels[0][:64, :64])
    troubles = iter([OSError(116, "Stale file handle")] * 2)
    with pytest.raises(SlideReadError, match=r"level 0, .*bytes cannot be read .*Stale file handle"):
        reader.read_region(0, 300, 300, 64, 64)


def test_file_that_is_not_the_indexed_one_is_refused(train_slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    path.write_bytes(train_slide.read_bytes())
    reader = SlideReader(path)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(SlideOpenError, match=r"it has \d+ bytes, but \d+ when it was indexed"):
        reader.read_region(0, 0, 0, 32, 32)


def test_threads_share_a_reader_that_one_of_them_closes(train_slide: Path, stored_levels: list[np.ndarray]) -> None:
    reader = SlideReader(train_slide, cache_bytes=6 * 3 * 256**2)

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for turn in range(40):
            column, row = (int(rng.integers(0, side - 224)) for side in (2304, 1776))
            region = reader.read_region(0, column, row, 224, 224)
            np.testing.assert_array_equal(region, stored_levels[0][row : row + 224, column : column + 224])
            if seed == 0 and turn % 4 == 0:
                reader.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_level_for_takes_the_coarsest_that_is_fine_enough(train_slide: Path) -> None:
    reader = SlideReader(train_slide)  # 0.25, 0.5 and 1 um/px
    targets = (0.2476, 0.25, 0.49, 0.4951, 0.5, 0.75, 1.0, 8.0)
    assert [reader.level_for(target) for target in targets] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [reader.level_for(target) for target in (0.247, 0.21)] == [0, 0]  # within the tolerance of 20 %
    with pytest.raises(SlideRangeError):
        reader.level_for(0.208)
    with pytest.raises(SlideRangeError):
        SlideReader(train_slide, mpp_tolerance=0).level_for(0.247)
    assert reader.tile_side(224, 0.5) == 448.0


def test_tile_needs_a_resolution(make_slide: MakeSlide) -> None:
    path = make_slide("unknown.svs")
    for ask in (SlideReader(path).level_for, lambda mpp: SlideReader(path).tile_side(64, mpp)):
        with pytest.raises(SlideRangeError, match="its resolution is unknown; give an mpp for it"):
            ask(0.5)
    assert SlideReader(path, mpp=0.5).read_tile(0, 0, 64, 0.5).shape == (64, 64, 3)


def test_tile_is_the_mean_of_the_pixels_it_covers(train_slide: Path, stored_levels: list[np.ndarray]) -> None:
    tile = SlideReader(train_slide).read_tile(402, 801, 100, 2.0)  # 200 px of 1 um/px, from column 100.5, row 200.25
    stored = stored_levels[2][200:400, 100:300].astype(float)
    expected = stored.reshape(100, 2, 100, 2, 3).mean((1, 3))
    assert tile.dtype == np.uint8 and np.abs(tile - expected).max() <= 0.5
    same = SlideReader(train_slide).read_tile(402, 801, 100, 0.25)
    np.testing.assert_array_equal(same, stored_levels[0][801:901, 402:502])
    odd = SlideReader(train_slide).read_tile(0, 0, 96, 0.4)  # 154 px of 0.25 um/px
    assert odd.shape == (96, 96, 3)


def test_tile_is_moved_back_by_rounding_only(train_slide: Path, stored_levels: list[np.ndarray]) -> None:
    reader = SlideReader(train_slide)
    last = reader.read_tile(2304 - 223 * 4 - 2, 0, 223, 1.0)  # column 352.5 becomes 352; 353 is the last
    assert last.shape == (223, 223, 3)
    np.testing.assert_array_equal(reader.read_tile(2304 - 223 * 4 + 2, 0, 223, 1.0), stored_levels[2][:223, -223:])
    for x in (2304 - 223 * 4 + 12, -4):
        with pytest.raises(SlideRangeError, match="the region leaves the level of 576x444 px"):
            reader.read_tile(x, 0, 223, 1.0)


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(SlideReadError("a.svs", "no pixels", "level 1")))
    assert type(error) is SlideReadError and str(error) == "Slide 'a.svs', level 1: no pixels."

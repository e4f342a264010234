"""Tile indexes against tifffile and OpenSlide; damage and other kinds of files are told apart."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import fsspec
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile

from dinov2.data.slides.blocks import Region, TileIndex, assemble, ranges
from dinov2.data.slides.errors import SlideOpenError, SlideRangeError, SlideReadError, UnsupportedTiles
from dinov2.data.slides.ranges import SlideBytes
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tiff import index_slide
from tests.helpers.slides import MakeSlide, damage_tile, overwrite, write_encoded


def read(index: TileIndex, region: Region) -> np.ndarray:
    return assemble(index, region, SlideBytes(index.path).read(ranges(index, region)))


def level_0_by_openslide(path: Path) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (256, 256, 3), np.uint8)


def jpeg2000(pixels: np.ndarray, *, mixed: bool = True) -> bytes:
    return imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", reversible=True, mct=mixed)


def test_index_holds_what_the_file_says(train_slide: Path) -> None:
    index = index_slide(train_slide)
    with tifffile.TiffFile(train_slide) as tiff:
        pages = [page for page in tiff.pages if page.is_tiled]
        for level, page in zip(index.levels, pages, strict=True):
            assert (level.height, level.width) == page.shape[:2]
            assert (level.tile_height, level.tile_width) == (256, 256)
            assert level.offsets.ravel().tolist() == list(page.dataoffsets)
            assert level.lengths.ravel().tolist() == list(page.databytecounts)
            assert level.offsets.shape == (-(-level.height // 256), -(-level.width // 256))
    assert index.path == str(train_slide) and index.size == train_slide.stat().st_size
    assert index.downsamples == (1.0, 2.0, 4.0) and (index.mpp, index.mpp_source) == (0.25, "slide")
    level = index.levels[0]
    assert ranges(index, Region(0, 300, 500, 300, 20)) == [
        (level.offsets[row, column], level.lengths[row, column]) for row in (1, 2) for column in (1, 2)
    ]


def test_copy_of_an_index_gives_the_same_pixels(train_slide: Path, stored_levels: list[np.ndarray]) -> None:
    copy = pickle.loads(pickle.dumps(index_slide(train_slide)))
    for level, stored in enumerate(stored_levels):
        height, width = stored.shape[:2]
        np.testing.assert_array_equal(read(copy, Region(level, 0, 0, width, height)), stored)
        np.testing.assert_array_equal(read(copy, Region(level, width - 1, height - 1, 1, 1)), stored[-1:, -1:])


@pytest.mark.data
@pytest.mark.parametrize("name", ["jpeg_slide", "jpeg2000_slide"])
def test_whole_real_slide_equals_openslide(name: str, request: pytest.FixtureRequest) -> None:
    index = index_slide(request.getfixturevalue(name))
    level = index.levels[0]
    pixels = read(index, Region(0, 0, 0, level.width, level.height))
    np.testing.assert_array_equal(pixels, level_0_by_openslide(Path(index.path)))


@pytest.mark.parametrize(("compression", "difference"), [(33003, 1), (33005, 0)])
def test_jpeg_2000_in_either_colour_space(tmp_path: Path, compression: int, difference: int) -> None:
    """OpenSlide rounds single shades of green otherwise."""
    tiles = [jpeg2000(noise(i), mixed=compression == 33005) for i in range(4)]
    path = write_encoded(tmp_path / "slide.svs", tiles, compression)
    pixels, expected = read(index_slide(path), Region(0, 0, 0, 500, 300)), level_0_by_openslide(path)
    assert np.abs(pixels.astype(int) - expected).max() <= difference


@pytest.mark.parametrize(("photometric", "colours"), [(2, "rgb"), (6, "ycbcr")])
@pytest.mark.parametrize("stored", ["rgb", "ycbcr"])
def test_colours_are_what_the_file_says_whatever_the_tile_says(
    tmp_path: Path, photometric: int, colours: str, stored: str
) -> None:
    tiles = [imagecodecs.jpeg8_encode(noise(i), 95, colorspace="rgb", outcolorspace=stored) for i in range(4)]
    assert all(b"JFIF" in tile[:20] if stored == "ycbcr" else b"Adobe" in tile[:20] for tile in tiles)
    path = write_encoded(tmp_path / "slide.svs", tiles, 7)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(photometric)
    index = index_slide(path)
    assert index.levels[0].photometric == colours
    np.testing.assert_array_equal(read(index, Region(0, 0, 0, 500, 300)), level_0_by_openslide(path))


def test_missing_tile_is_named(train_slide: Path, tmp_path: Path) -> None:
    index = index_slide(damage_tile(train_slide, tmp_path / "hole.svs", 10, empty=True))  # nine in a row
    region = Region(0, 200, 200, 224, 224)
    assert [length > 0 for _, length in ranges(index, region)] == [True, True, True, False]
    with pytest.raises(SlideReadError, match=r"hole.svs', level 0, tile row 1, tile column 1: the tile is missing"):
        read(index, region)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "second half zero": lambda tile: tile[: len(tile) // 2] + bytes(len(tile) - len(tile) // 2),
    "first half zero": lambda tile: bytes(len(tile) // 2) + tile[len(tile) // 2 :],
    "hole": lambda tile: tile[:2000] + bytes(1024) + tile[3024:],
    "cut": lambda tile: tile[: len(tile) // 2],
    "end cut": lambda tile: tile[:-2],
    "two bytes": lambda tile: tile[:2],
    "marker": lambda tile: tile[:2] + b"\xff",
    "garbage": lambda tile: b"\x89" * len(tile),
    "text": lambda tile: b"<html>" + tile[6:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("compression", [7, 33005])
def test_corrupt_tile_is_never_decoded(tmp_path: Path, compression: int, damage: str) -> None:
    encode = jpeg2000 if compression == 33005 else lambda pixels: imagecodecs.jpeg8_encode(pixels, 95)
    path = write_encoded(tmp_path / "slide.svs", [encode(noise(i)) for i in range(4)], compression)
    index, region = index_slide(path), Region(0, 0, 0, 500, 300)
    tiles = SlideBytes(path).read(ranges(index, region))
    assemble(index, region, tiles)
    tiles[1] = DAMAGES[damage](tiles[1])
    with pytest.raises(SlideReadError, match=r"slide.svs', level 0, tile row 0, tile column 1: its pixels cannot"):
        assemble(index, region, tiles)


@pytest.mark.parametrize("compression", [7, 33005])
def test_tile_of_another_size_is_refused(tmp_path: Path, compression: int) -> None:
    encode = jpeg2000 if compression == 33005 else lambda pixels: imagecodecs.jpeg8_encode(pixels, 95)
    tiles = [encode(noise(i)[:, : 256 - 8 * (i == 3)].copy()) for i in range(4)]
    index = index_slide(write_encoded(tmp_path / "slide.svs", tiles, compression))
    with pytest.raises(SlideReadError, match=r"tile column 1: .*uint8 \(256, 248, 3\), not uint8 \(256, 256, 3\)"):
        read(index, Region(0, 0, 0, 500, 300))


def test_tiles_beyond_the_end_are_found_at_once(train_slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.svs"
    path.write_bytes(train_slide.read_bytes()[:-5000])
    with pytest.raises(SlideOpenError, match=r"level 2: not a whole slide, its tiles reach to byte \d+ of \d+"):
        index_slide(path)
    with pytest.raises(SlideOpenError, match="not a whole slide"):
        SlideReader(path)


@pytest.mark.parametrize("target", [1 << 40, 2 << 20, 40_000])
def test_chain_of_pages_that_breaks_off_loses_no_level(train_slide: Path, tmp_path: Path, target: int) -> None:
    """The link to the second page leads beyond the file, or into pixels."""
    with tifffile.TiffFile(train_slide) as tiff:
        page = tiff.pages[0]
        link = page.offset + 8 + 20 * len(page.tags)
        assert struct.unpack("<Q", train_slide.read_bytes()[link : link + 8])[0] == tiff.pages[1].offset
    path = overwrite(train_slide, tmp_path / "broken.svs", link, struct.pack("<Q", target))
    with pytest.raises(SlideOpenError):
        SlideReader(path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compression": "lzw", "photometric": "rgb"}, "level 0: compression 5, photometric 2, 8 bits x 3"),
        ({"compression": "jpeg", "photometric": "minisblack"}, "photometric 1"),
        ({"compression": None, "photometric": "rgb"}, "compression 1"),
    ],
)
def test_other_kinds_of_tiles_have_no_index(tmp_path: Path, options: dict, reason: str) -> None:
    image = noise(0)[..., 0].copy() if options["photometric"] == "minisblack" else noise(0)
    tifffile.imwrite(tmp_path / "slide.tif", image, tile=(256, 256), metadata=None, **options)
    with pytest.raises(UnsupportedTiles, match=reason):
        index_slide(tmp_path / "slide.tif")


def test_overlapping_tiles_are_left_to_openslide(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "slide.tif", noise(0), tile=(256, 256), compression="jpeg", photometric="rgb",
                     metadata=None, software="MedScan 1.0")  # fmt: skip
    with pytest.raises(UnsupportedTiles, match="its pages are no plain pyramid"):
        index_slide(tmp_path / "slide.tif")


def test_strips_and_other_files_have_no_tile_index(tmp_path: Path) -> None:
    plain = {"compression": "jpeg", "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "strips.tif", noise(0), rowsperstrip=16, **plain)
    with pytest.raises(UnsupportedTiles):
        index_slide(tmp_path / "strips.tif")
    (tmp_path / "page.html").write_text("<html>Not found</html>")
    with pytest.raises(UnsupportedTiles):
        index_slide(tmp_path / "page.html")


def test_jpeg_2000_with_coarser_chroma_is_left_to_openslide(tmp_path: Path) -> None:
    tile = bytearray(jpeg2000(noise(0), mixed=False))
    tile[46:48] = b"\x02\x01"  # the second component's spacing
    path = write_encoded(tmp_path / "slide.svs", [bytes(tile)] * 4, 33003)
    with pytest.raises(UnsupportedTiles, match="components of different sizes"):
        index_slide(path)


def test_resolution_of_a_plain_pyramid_is_in_its_tags(tmp_path: Path) -> None:
    for unit, per_unit, expected in (("INCH", 50800, 0.5), ("CENTIMETER", 40000, 0.25), ("INCH", 72, None)):
        path = tmp_path / f"{per_unit}.tif"
        tifffile.imwrite(path, noise(0), tile=(256, 256), compression="jpeg", photometric="rgb", metadata=None,
                         resolution=(per_unit, per_unit), resolutionunit=unit)  # fmt: skip
        assert index_slide(path).mpp == (expected if expected is None else pytest.approx(expected))


def test_slide_on_a_server_gives_the_same_pixels(
    train_slide: Path, stored_levels: list[np.ndarray], make_slide: MakeSlide
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/slides/train.svs", train_slide.read_bytes())
    memory.pipe("/slides/none.ndpi", b"II*\0")
    try:
        reader = SlideReader("memory://slides/train.svs")
        assert reader.path == "memory://slides/train.svs" and reader.mpp == 0.25
        np.testing.assert_array_equal(reader.read_region(1, 200, 300, 300, 200), stored_levels[1][300:500, 200:500])
        with pytest.raises(SlideOpenError, match=r"memory://slides/missing.svs': there is no such file"):
            SlideReader("memory://slides/missing.svs")
        with pytest.raises(SlideOpenError, match=r"memory://slides/none.ndpi"):
            SlideReader("memory://slides/none.ndpi")
    finally:
        memory.rm("/slides", recursive=True)


def test_region_off_the_level_is_refused_before_reading(train_slide: Path) -> None:
    reader = SlideReader("file://" + str(train_slide))
    with pytest.raises(SlideRangeError):
        reader.read_region(2, 500, 0, 100, 100)

"""Slides in every format that people bring, pixel by pixel against tifffile, Pillow and OpenSlide."""

import multiprocessing
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from dinov2.data.slides import image as image_module
from dinov2.data.slides import pages
from dinov2.data.slides.errors import SlideOpenError, SlideReadError
from dinov2.data.slides.image import ImageReader
from dinov2.data.slides.index import TileIndexes, write_tile_index
from dinov2.data.slides.reader import OpenSlideReader, SlideReader, TileReader
from dinov2.data.slides.tiff import index_slide
from tests.helpers.slides import damage_tile

TILED = {"tile": (128, 128), "photometric": "rgb", "metadata": None}


@pytest.fixture(scope="module")
def picture(stored_levels: list[np.ndarray]) -> np.ndarray:
    """500 x 400 px of tissue."""
    return np.ascontiguousarray(stored_levels[0][600:1000, 700:1200])


def whole(path: Path, level: int = 0) -> np.ndarray:
    reader = SlideReader(path)
    return reader.read_region(level, 0, 0, *reader.level_dimensions[level])


def by_openslide(path: Path) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def write_pyramid(path: Path, levels: Sequence[np.ndarray], *, flagged: bool, **options: Any) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            tiff.write(level, subfiletype=int(flagged and number > 0), **(TILED | options))
    return path


@pytest.mark.parametrize(
    ("codec", "predictor"),
    [
        *((codec, False) for codec in ("jpeg", "webp", "jpeg2000", "png", "zstd", "lzw", "deflate", "lzma", None)),
        *((codec, True) for codec in ("zstd", "lzw", "deflate", "lzma")),
    ],
)
def test_codecs_of_tiled_tiff(tmp_path: Path, picture: np.ndarray, codec: str | None, predictor: bool) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, picture, compression=codec, predictor=predictor, resolution=(20000, 20000),
                     resolutionunit="CENTIMETER", **TILED)  # fmt: skip
    np.testing.assert_array_equal(whole(path), tifffile.imread(path))
    reader = SlideReader(path)
    np.testing.assert_array_equal(reader.read_region(0, 100, 90, 224, 200), tifffile.imread(path)[90:290, 100:324])
    assert (reader.mpp, reader.mpp_source) == (pytest.approx(0.5), "slide")


@pytest.mark.parametrize("compression", [50002, 52546])
def test_jpeg_xl(tmp_path: Path, picture: np.ndarray, compression: int) -> None:
    blocks = [picture[y : y + 128, x : x + 128] for y in range(0, 384, 128) for x in range(0, 384, 128)]
    tiles = [imagecodecs.jpegxl_encode(np.ascontiguousarray(block), lossless=True) for block in blocks]
    tifffile.imwrite(
        tmp_path / "slide.tif", iter(tiles), shape=(384, 384, 3), dtype=np.uint8, compression=50002, **TILED
    )
    with tifffile.TiffFile(tmp_path / "slide.tif", mode="r+") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(compression)
    np.testing.assert_array_equal(whole(tmp_path / "slide.tif"), picture[:384, :384])


@pytest.mark.parametrize("codec", ["webp", "png", "jpeg2000"])
def test_tile_index_holds_new_codecs_and_finds_their_damage(tmp_path: Path, picture: np.ndarray, codec: str) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, picture, compression=codec, **TILED)
    write_tile_index(tmp_path / "tiles.index", index_slide(path))
    reader = SlideReader(path, index=TileIndexes(tmp_path / "tiles.index")[str(path)])
    np.testing.assert_array_equal(reader.read_region(0, 0, 0, 500, 400), tifffile.imread(path))
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    data = bytearray(path.read_bytes())
    data[offset + count // 2 : offset + count] = bytes(count - count // 2)
    path.write_bytes(data)
    with pytest.raises(SlideReadError):
        SlideReader(path).read_region(0, 0, 0, 100, 100)


@pytest.mark.parametrize("width", [120, 136])
def test_tile_of_another_size_is_refused(tmp_path: Path, picture: np.ndarray, width: int) -> None:
    path, grey = tmp_path / "slide.tif", picture[..., 0]
    tiles = [imagecodecs.jpeg8_encode(np.ascontiguousarray(grey[:128, : width if n == 1 else 128])) for n in range(4)]
    tifffile.imwrite(path, iter(tiles), shape=(256, 256), dtype=np.uint8, compression="jpeg", tile=(128, 128),
                     photometric="minisblack", metadata=None)  # fmt: skip
    reader = SlideReader(path)
    assert reader.read_region(0, 0, 0, 128, 128).shape == (128, 128, 3)
    with pytest.raises(SlideReadError):
        reader.read_region(0, 100, 0, 128, 128)


def test_garbage_in_any_codec_is_an_error(tmp_path: Path, picture: np.ndarray) -> None:
    for codec in ("zstd", "lzw", "deflate", "webp", "png", "jpeg2000"):
        path = tmp_path / f"{codec}.tif"
        tifffile.imwrite(path, picture, compression=codec, **TILED)
        reader = SlideReader(damage_tile(path, tmp_path / f"bad_{codec}.tif", 0, empty=False))
        with pytest.raises(SlideReadError):
            reader.read_region(0, 0, 0, 100, 100)
        assert reader.read_region(0, 128, 0, 100, 100).shape == (100, 100, 3)
        hole = SlideReader(damage_tile(path, tmp_path / f"hole_{codec}.tif", 0, empty=True))
        assert not hole.read_known(0, 0, 0, 100, 100)[1].any()


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("codec", ["jpeg", "webp", "lzw"])
def test_pyramid_with_and_without_the_flag(tmp_path: Path, picture: np.ndarray, codec: str, flagged: bool) -> None:
    levels = [picture, picture[::2, ::2].copy(), picture[::4, ::4].copy()]
    path = write_pyramid(tmp_path / "slide.tif", levels, flagged=flagged, compression=codec)
    reader = SlideReader(path)
    assert reader.level_dimensions == ((500, 400), (250, 200), (125, 100)) and reader.resolution.notes == ()
    for level in range(3):
        np.testing.assert_array_equal(whole(path, level), tifffile.imread(path, key=level))


def test_last_levels_that_do_not_fall_are_left_out(tmp_path: Path, picture: np.ndarray) -> None:
    odd = [picture[:399, :499], picture[:200, :250], picture[:100, :125], picture[:100, :125]]
    reader = SlideReader(write_pyramid(tmp_path / "equal.tif", odd, flagged=True, compression="jpeg"))
    assert reader.level_dimensions == ((499, 399), (250, 200), (125, 100))
    thin = [picture[:4], picture[:2, :250], picture[:1, :125], picture[:1, :62]]
    reader = SlideReader(write_pyramid(tmp_path / "thin.tif", thin, flagged=True, compression="lzw"))
    assert reader.level_dimensions == ((500, 4), (250, 2), (125, 1))


def test_images_beside_the_slide_are_no_levels(tmp_path: Path, picture: np.ndarray) -> None:
    label = picture[:300, :100]
    path = write_pyramid(tmp_path / "slide.tif", [picture, picture[::2, ::2], label], flagged=False, compression="jpeg")
    reader = SlideReader(path)
    assert reader.level_dimensions == ((500, 400), (250, 200)) and len(reader.resolution.notes) == 1


def test_channels_of_fluorescence_are_refused(tmp_path: Path, picture: np.ndarray) -> None:
    planes = [picture[..., channel].copy() for channel in range(3)]
    path = write_pyramid(tmp_path / "a.qptiff", planes, flagged=False, photometric="minisblack", compression="lzw")
    with pytest.raises(SlideOpenError):
        SlideReader(path)


@pytest.mark.parametrize("compression", ["jpeg", "lzw", "zstd", "jpeg2000", "webp"])
def test_ome_tiff_with_levels_in_sub_ifds(tmp_path: Path, picture: np.ndarray, compression: str) -> None:
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        size = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
        common = {"tile": (128, 128), "photometric": "rgb", "compression": compression}
        tiff.write(picture[:60, :50], metadata={"axes": "YXS"}, **common)  # a label comes first
        tiff.write(picture, subifds=2, metadata={"axes": "YXS", **size}, **common)
        tiff.write(picture[::2, ::2].copy(), subfiletype=1, metadata=None, **common)
        tiff.write(picture[::4, ::4].copy(), subfiletype=1, metadata=None, **common)
    reader = SlideReader(path)
    assert reader.level_dimensions == ((500, 400), (250, 200), (125, 100))
    assert (reader.mpp, reader.mpp_source) == (0.25, "slide")
    for level in range(3):
        np.testing.assert_array_equal(whole(path, level), tifffile.imread(path, series=1, level=level))


@pytest.mark.parametrize("compression", ["lzw", "jpeg", "deflate"])
@pytest.mark.parametrize("kind", ["planes of a page", "pages"])
def test_ome_tiff_with_separate_planes(tmp_path: Path, picture: np.ndarray, compression: str, kind: str) -> None:
    path, is_pages = tmp_path / "slide.ome.tif", kind == "pages"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        colours = {"photometric": "minisblack"} if is_pages else {"photometric": "rgb", "planarconfig": "separate"}
        common = {"tile": (128, 128), "compression": compression, **colours}
        planes = np.moveaxis(picture, 2, 0)
        size = {"PhysicalSizeX": 250, "PhysicalSizeY": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm"}
        tiff.write(planes, subifds=1, metadata={"axes": "CYX" if is_pages else "SYX", **size}, **common)
        tiff.write(planes[:, ::2, ::2], subfiletype=1, metadata=None, **common)
    reader = SlideReader(path)
    assert reader.level_dimensions == ((500, 400), (250, 200))
    assert reader.mpp == pytest.approx(0.375)
    assert len(reader.resolution.notes) == 1 + is_pages  # pixels are not square; channels have no names
    for level in range(2):
        np.testing.assert_array_equal(whole(path, level), np.moveaxis(tifffile.imread(path, level=level), 0, 2))


@pytest.mark.parametrize(
    ("shape", "dtype", "metadata"),
    [
        ((2, 200, 300), "uint8", {"axes": "CYX"}),
        ((3, 200, 300), "uint16", {"axes": "CYX"}),
        ((3, 200, 300), "uint8", {"axes": "ZYX"}),
        ((3, 200, 300), "uint8", {"axes": "CYX", "Channel": {"Name": ["DAPI", "CD3", "CD8"]}}),
    ],
)
def test_ome_tiff_of_another_kind_is_refused_and_never_read_in_part(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, metadata: dict
) -> None:
    path = tmp_path / "slide.ome.tif"
    tifffile.imwrite(path, np.ones(shape, dtype), tile=(128, 128), photometric="minisblack", metadata=metadata)
    with pytest.raises(SlideOpenError):
        SlideReader(path)


def test_units_of_ome_in_latin_1(tmp_path: Path, picture: np.ndarray) -> None:
    path = tmp_path / "slide.ome.tif"
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "\u00b5m"}
    tifffile.imwrite(path, picture, tile=(128, 128), photometric="rgb", metadata=metadata, resolution=(72, 72))
    assert SlideReader(path).mpp == 0.5
    data = path.read_bytes()
    assert '\u00b5m"'.encode() in data
    path.write_bytes(data.replace('\u00b5m"'.encode(), b'\xb5m" ', 1))  # of the same length
    assert SlideReader(path).mpp == 0.5


@pytest.mark.parametrize("first_line", ["Aperio Leica Biosystems GT450 v1.0.1", "Aperio Image Library v10", "Aperio X"])
@pytest.mark.parametrize("flagged", [False, True])
def test_aperio_by_every_first_line(tmp_path: Path, picture: np.ndarray, first_line: str, flagged: bool) -> None:
    description = f"{first_line}\r\n500x400 (128x128) JPEG/YCC Q=91|AppMag = 40|MPP = 0.26259"
    path = write_pyramid(tmp_path / "slide.svs", [picture, picture[::4, ::4].copy()], flagged=flagged,
                         compression="jpeg", description=description)  # fmt: skip
    index = index_slide(path)
    assert index.mpp == 0.26259 and len(index.levels) == 2
    np.testing.assert_array_equal(whole(path), by_openslide(path))


@pytest.mark.parametrize("suffix", [".btf", ".qptiff", ".tiff"])
def test_big_tiff_by_any_ending(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"slide{suffix}"
    tifffile.imwrite(path, picture, bigtiff=True, compression="jpeg", **TILED)
    np.testing.assert_array_equal(whole(path), by_openslide(path))


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg", "deflate"])
@pytest.mark.parametrize("rows", [1, 16, 400])
def test_strips_are_one_level(tmp_path: Path, picture: np.ndarray, compression: str | None, rows: int) -> None:
    path = tmp_path / "slide.tif"
    rows = 8 if compression == "jpeg" and rows == 1 else rows
    tifffile.imwrite(path, picture, rowsperstrip=rows, compression=compression, photometric="rgb", metadata=None,
                     resolution=(101600, 101600), resolutionunit="INCH")  # fmt: skip
    reader = SlideReader(path)
    expected = tifffile.imread(path)
    assert reader.level_dimensions == ((500, 400),) and reader.mpp == pytest.approx(0.25)
    np.testing.assert_array_equal(reader.read_region(0, 33, 44, 300, 320), expected[44:364, 33:333])
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.read_region(0, 0, 0, 500, 400), expected)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jp2", "webp", "bmp"])
def test_image_in_one_piece_is_one_level(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"slide.{suffix}"
    Image.fromarray(picture).save(path)
    reader = SlideReader(path, mpp=0.5)
    assert reader.level_dimensions == ((500, 400),) and (reader.mpp, reader.mpp_source) == (0.5, "user")
    with Image.open(path) as stored:
        expected = np.asarray(stored.convert("RGB")).astype(int)
    assert np.abs(reader.read_region(0, 10, 20, 300, 200) - expected[20:220, 10:310]).max() <= 1  # two JPEG decoders
    assert SlideReader(path).mpp is None


def test_turned_photograph_has_the_sides_of_its_pixels(tmp_path: Path, picture: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "slide.png", exif=exif)
    reader = SlideReader(tmp_path / "slide.png")
    np.testing.assert_array_equal(reader.read_region(0, 0, 0, *reader.level_dimensions[0]), np.rot90(picture, -1))


def test_images_above_the_bound_of_memory_are_refused(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture).save(tmp_path / "slide.png")
    tifffile.imwrite(tmp_path / "slide.tif", picture, photometric="rgb", metadata=None)
    tifffile.imwrite(tmp_path / "tiled.tif", picture, **TILED)
    monkeypatch.setattr(pages, "MAX_WHOLE_BYTES", picture.nbytes - 1)
    for name in ("slide.png", "slide.tif"):
        with pytest.raises(SlideOpenError):
            SlideReader(tmp_path / name)
    SlideReader(tmp_path / "tiled.tif")


def test_a_process_holds_few_whole_images(tmp_path: Path, picture: np.ndarray) -> None:
    for number in range(5):
        Image.fromarray(picture[number:]).save(tmp_path / f"{number}.png")
    readers = [SlideReader(tmp_path / f"{number}.png") for number in range(5)]
    for number, reader in enumerate(readers):
        np.testing.assert_array_equal(reader.read_region(0, 0, 0, 9, 9), picture[number : number + 9, :9])
    assert image_module._decoded.cache_info().currsize <= 2


def test_grey_and_alpha(tmp_path: Path, picture: np.ndarray) -> None:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    for photometric, expected in (("minisblack", grey), ("miniswhite", 255 - grey)):
        path = tmp_path / f"{photometric}.tif"
        tifffile.imwrite(path, grey, tile=(128, 128), compression="lzw", photometric=photometric, metadata=None)
        np.testing.assert_array_equal(whole(path), np.repeat(expected[..., None], 3, 2))
    rgba = np.dstack([picture, np.full(grey.shape, 255, np.uint8)])
    tifffile.imwrite(tmp_path / "a.tif", rgba, compression="lzw", extrasamples=["unassalpha"], **TILED)
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), picture)


def test_what_is_no_slide_is_said_in_one_sentence(tmp_path: Path) -> None:
    for name, data in (("a.czi", b"ZISRAWFILE" + bytes(range(256)) * 9), ("a.svs", b"<html>"), ("a.xyz", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SlideOpenError):
            SlideReader(tmp_path / name)


def test_readers_by_speed(tmp_path: Path, picture: np.ndarray, openslide_only: tuple[Path, np.ndarray]) -> None:
    """Blocks are decoded here wherever they can be; OpenSlide has what tifffile does not read."""
    tifffile.imwrite(tmp_path / "j2k.tif", picture, compression="jpeg2000", **TILED)
    tifffile.imwrite(tmp_path / "strips.tif", picture, photometric="rgb", metadata=None)
    kinds = {tmp_path / "j2k.tif": TileReader, tmp_path / "strips.tif": ImageReader, openslide_only[0]: OpenSlideReader}
    assert {path: type(SlideReader(path)._pixels) for path in kinds} == kinds


def _read(reader: SlideReader, queue: Any) -> None:
    queue.put(reader.read_region(0, 100, 90, 224, 200).tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pages_of_tifffile_travel_between_processes(tmp_path: Path, picture: np.ndarray, method: str) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, picture, compression="lzw", **TILED)
    reader = SlideReader(path)
    reader.read_region(0, 0, 0, 50, 50)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read, args=(reader, queue))
    child.start()
    assert queue.get(timeout=60) == picture[90:290, 100:324].tobytes()
    child.join()


def test_slide_a_little_coarser_is_resampled_to_what_is_asked(tmp_path: Path, picture: np.ndarray) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, picture, **TILED)
    reader = SlideReader(path, mpp=0.5052)
    tile = reader.read_tile(10, 20, 224, 0.5)  # 222 px
    expected = Image.fromarray(picture[20:242, 10:232]).resize((224, 224), Image.BICUBIC)
    assert tile.shape == (224, 224, 3) and np.abs(tile - np.asarray(expected).astype(float)).mean() < 1
    assert reader.resampling(0.5) and not reader.resampling(0.5052) and not reader.resampling(1.0)


@pytest.mark.parametrize("tile", [None, (128, 128)])
@pytest.mark.parametrize("codec", [None, "lzw", "deflate"])
@pytest.mark.parametrize("colours", ["rgb", "minisblack", "miniswhite"])
def test_16_bits_are_scaled_alike_in_tiles_strips_and_png(
    tmp_path: Path, picture: np.ndarray, tile: tuple[int, int] | None, codec: str | None, colours: str
) -> None:
    eight = picture if colours == "rgb" else picture[..., 1]
    stored = eight.astype(np.uint16) << 8 | np.random.default_rng(0).integers(0, 256, eight.shape, np.uint16)
    expected = eight if colours == "rgb" else np.dstack([eight] * 3)
    cv2.imwrite(str(tmp_path / "a.png"), stored[..., ::-1] if colours == "rgb" else stored)
    np.testing.assert_array_equal(whole(tmp_path / "a.png"), expected)
    stored = 65535 - stored if colours == "miniswhite" else stored
    tifffile.imwrite(tmp_path / "a.tif", stored, tile=tile, compression=codec, photometric=colours, rowsperstrip=50)
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), expected)


def test_12_bits_in_16_are_refused_not_read_as_black(tmp_path: Path, picture: np.ndarray) -> None:
    for tile in (None, (128, 128)):
        tifffile.imwrite(tmp_path / "a.tif", picture.astype(np.uint16) << 4, tile=tile, photometric="rgb")
        with pytest.raises(SlideOpenError, match="12 bits"):
            SlideReader(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "YCbCr"])
def test_strips_of_other_colours_are_as_pillow_has_them(tmp_path: Path, picture: np.ndarray, mode: str) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(picture).convert(mode).save(path, dpi=(50800, 50800))
    with Image.open(path) as image:
        np.testing.assert_array_equal(whole(path), np.asarray(image.convert("RGB")))
    assert SlideReader(path).mpp == pytest.approx(0.5)


def test_the_largest_page_is_the_slide_wherever_it_lies(tmp_path: Path, picture: np.ndarray) -> None:
    half, thumbnail = picture[::2, ::2].copy(), picture[::8, ::8].copy()
    with tifffile.TiffWriter(tmp_path / "thumbnail_first.tif") as tiff:
        tiff.write(thumbnail, photometric="rgb")
        tiff.write(picture, compression="deflate", **TILED)
    write_pyramid(tmp_path / "rising.tif", [half, picture], flagged=False, compression="deflate")
    for name in ("thumbnail_first", "rising"):
        np.testing.assert_array_equal(whole(tmp_path / f"{name}.tif"), picture)
    np.testing.assert_array_equal(whole(tmp_path / "rising.tif", 1), half)


def test_a_label_flagged_as_reduced_is_no_level(tmp_path: Path, picture: np.ndarray) -> None:
    label = np.zeros((90, 200, 3), np.uint8)
    path = write_pyramid(tmp_path / "a.tif", [picture, label, picture[::2, ::2].copy()], flagged=True)
    assert SlideReader(path).level_dimensions == ((500, 400), (250, 200))


@pytest.mark.parametrize("unit", ["um", "micron", "\\u00B5m"])
def test_imagej_says_the_unit_beside_the_tags(tmp_path: Path, picture: np.ndarray, unit: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture, imagej=True, resolution=(4, 4), metadata={"unit": unit})
    assert SlideReader(tmp_path / "a.tif").mpp == pytest.approx(0.25)


@pytest.mark.parametrize("channels", [3, 5])
def test_channels_that_are_no_colours_are_refused(tmp_path: Path, picture: np.ndarray, channels: int) -> None:
    pixels = np.dstack([picture, picture])[..., :channels].copy()
    options = {"photometric": "minisblack", "planarconfig": "contig", "metadata": None}
    for tile in (None, (128, 128)):
        tifffile.imwrite(tmp_path / "a.tif", pixels, tile=tile, **options)
        with pytest.raises(SlideOpenError, match=f"{channels} channels"):
            SlideReader(tmp_path / "a.tif")

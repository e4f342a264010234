"""Tiles of every format and depth of samples: the pixels that other libraries read, or a refusal."""

import io

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from dinov2.data.source import FORMATS, DecodeError, decode_image, image_format

SMOOTH = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).resize((64, 48)))
DEEP = SMOOTH.astype(np.uint16) * 257
OPAQUE = np.full((48, 64, 1), 65535, np.uint16)
GREY = np.repeat(SMOOTH[..., :1], 3, axis=2)


def encoded(image: np.ndarray | Image.Image, encoding: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def tiff(samples: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, **options)
    return buffer.getvalue()


def by_opencv(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def check(data: bytes, expected: np.ndarray) -> None:
    image = decode_image(data)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    np.testing.assert_array_equal(image, expected)


JPEG = encoded(SMOOTH, "JPEG", quality=95)


@pytest.mark.parametrize("encoding", ["WEBP", "BMP", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_other_formats_equal_opencv(encoding: str, mode: str) -> None:
    image = Image.fromarray(SMOOTH).convert(mode)
    if (encoding, mode) in {("BMP", "LA"), ("JPEG2000", "P"), ("JPEG2000", "1")}:
        pytest.skip("Pillow does not write these")
    data = encoded(image, encoding, **({"lossless": True} if encoding == "WEBP" else {}))
    assert image_format(data) in FORMATS
    check(data, by_opencv(data) if mode not in ("1", "LA") else np.asarray(image.convert("RGB")))


def test_lossy_webp_equals_opencv() -> None:
    data = encoded(SMOOTH, "WEBP", quality=80)
    check(data, by_opencv(data))


@pytest.mark.parametrize("transform", [0, 2], ids=["cmyk", "ycck"])
def test_four_coloured_jpeg_equals_pillow(transform: int) -> None:
    data = bytearray(encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = transform  # of the colours, as the decoder is told
    difference = decode_image(bytes(data)).astype(int) - by_pillow(bytes(data))
    assert np.abs(difference).max() <= 1  # roundings
    assert np.ptp(by_pillow(bytes(data))) > 100


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_pillow_does(encoding: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(SMOOTH, encoding, exif=exif, **({"lossless": True} if encoding == "WEBP" else {}))
    check(data, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))


@pytest.mark.parametrize("padding", [b"\0", b"\xff", b"\n", b"junk"])
@pytest.mark.parametrize("times", [1, 2, 255, 256, 257, 1024, 100_000])
@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000"])
def test_bytes_after_the_image_do_not_matter(encoding: str, padding: bytes, times: int) -> None:
    data = encoded(SMOOTH, encoding)
    check(data + padding * times, by_pillow(data))


def test_a_second_jpeg_behind_the_first_is_not_looked_at() -> None:
    check(JPEG + encoded(255 - SMOOTH, "JPEG") + bytes(500), by_pillow(JPEG))


@pytest.mark.parametrize("padding", [0, 1, 300])
@pytest.mark.parametrize("kept", [-2, -1])
def test_a_jpeg_without_its_end_mark_alone_is_whole(kept: int, padding: int) -> None:
    check(JPEG[:kept] + bytes(padding), by_pillow(JPEG))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("padding", [0, 300])
def test_a_jpeg_cut_anywhere_is_refused(progressive: bool, padding: int) -> None:
    data = encoded(SMOOTH, "JPEG", quality=95, progressive=progressive)
    for kept in [*range(4, len(data) - 4, 37), *range(len(data) - 30, len(data) - 3)]:
        with pytest.raises(DecodeError):
            decode_image(data[:kept] + bytes(padding))


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95, 0.99])
@pytest.mark.parametrize("encoding", ["WEBP", "BMP", "TIFF", "JPEG2000"])
def test_other_formats_cut_short_are_refused(encoding: str, kept: float) -> None:
    data = encoded(SMOOTH, encoding)
    with pytest.raises(DecodeError):
        decode_image(data[: int(kept * len(data))])


WIDE = {
    "grey": DEEP[..., 0].copy(),
    "grey and alpha": np.concatenate([DEEP[..., :1], OPAQUE], axis=2),
    "RGB": DEEP,
    "RGBA": np.concatenate([DEEP, OPAQUE], axis=2),
}


@pytest.mark.parametrize("colours", WIDE)
def test_16_bit_png_keeps_the_upper_8_bits(colours: str) -> None:
    check(imagecodecs.png_encode(WIDE[colours]), SMOOTH if "RGB" in colours else GREY)


@pytest.mark.parametrize("codec", [None, "lzw", "deflate", "zstd", "packbits"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("colours", WIDE)
def test_16_bit_tiff_is_scaled_as_png_is(colours: str, order: str, codec: str | None) -> None:
    alpha = {"extrasamples": ["unassalpha"], "planarconfig": "contig"} if "A" in colours or "alpha" in colours else {}
    kind = "rgb" if "RGB" in colours else "minisblack"
    data = tiff(WIDE[colours], compression=codec, byteorder=order, photometric=kind, **alpha)
    check(data, decode_image(imagecodecs.png_encode(WIDE[colours])))


@pytest.mark.parametrize(
    ("samples", "options", "expected"),
    [
        (65535 - DEEP[..., 0], {"photometric": "miniswhite"}, GREY),
        (255 - SMOOTH[..., 0], {"photometric": "miniswhite"}, GREY),
        (np.moveaxis(DEEP, 2, 0), {"photometric": "rgb", "planarconfig": "separate"}, SMOOTH),
        (np.moveaxis(SMOOTH, 2, 0), {"photometric": "rgb", "planarconfig": "separate"}, SMOOTH),
        (DEEP[..., 0], {"compression": "lzw", "predictor": True}, GREY),
        (DEEP, {"photometric": "rgb", "tile": (16, 16)}, SMOOTH),
        (SMOOTH, {"photometric": "rgb", "bigtiff": True}, SMOOTH),
        (np.stack([SMOOTH, 255 - SMOOTH]), {"photometric": "rgb"}, SMOOTH),
        (DEEP[..., 0] >> 4, {"bitspersample": 12}, GREY),
        *(
            (SMOOTH, {"photometric": "rgb", "compression": codec}, SMOOTH)
            for codec in ("png", "jpeg2000", "zstd", "lzma")
        ),
    ],
)
def test_kinds_of_tiff(samples: np.ndarray, options: dict, expected: np.ndarray) -> None:
    check(tiff(np.ascontiguousarray(samples), **options), expected)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_lossy_tiff_equals_tifffile(codec: str) -> None:
    data = tiff(SMOOTH, photometric="rgb", compression=codec)
    expected = tifffile.imread(io.BytesIO(data))
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 3  # two builds of one decoder


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
@pytest.mark.parametrize("container", ["jp2", "j2k"])
@pytest.mark.parametrize("colours", ["grey", "RGB"])
def test_jpeg_2000_of_any_depth_is_scaled_by_its_header(colours: str, container: str, bits: int) -> None:
    options = {"level": 0, "bitspersample": bits, "codecformat": container}
    check(imagecodecs.jpeg2k_encode(WIDE[colours] >> (16 - bits), **options), SMOOTH if colours == "RGB" else GREY)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("colours", ["grey", "RGB"])
def test_fewer_bits_in_16_are_refused_since_their_scale_is_unknown(colours: str, bits: int) -> None:
    samples = WIDE[colours] >> (16 - bits)
    jpeg_2000 = imagecodecs.jpeg2k_encode(samples, level=0, codecformat="jp2")
    for data in (imagecodecs.png_encode(samples), tiff(samples), jpeg_2000):
        with pytest.raises(DecodeError, match=f"{bits} bits"):
            decode_image(data)


def test_a_black_tile_of_16_bits_is_black() -> None:
    check(imagecodecs.png_encode(np.zeros((48, 64), np.uint16)), np.zeros_like(SMOOTH))


@pytest.mark.parametrize(
    "samples",
    [SMOOTH[..., 0] / np.float32(255), SMOOTH / 255, DEEP.astype(np.int16), DEEP.astype(np.uint32)],
    ids=["float32", "float64", "int16", "uint32"],
)
def test_tiff_of_other_samples_is_named(samples: np.ndarray) -> None:
    with pytest.raises(DecodeError, match=str(samples.dtype)) as caught:
        decode_image(tiff(samples, photometric="rgb" if samples.ndim == 3 else None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        imagecodecs.jpeg8_encode(DEEP >> 4, bitspersample=12),
        imagecodecs.ljpeg_encode(SMOOTH[..., 0]),
        encoded(SMOOTH, "GIF"),
        encoded(SMOOTH, "PPM"),
        imagecodecs.jpegxl_encode(SMOOTH),
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"BM" + bytes(60),
        b"II*\0" + bytes(60),
        b"\xff\x4f\xff\x51" + bytes(60),
    ],
)
def test_what_is_not_read_is_refused_in_one_sentence(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("codec", ["jp2", "j2k"])
@pytest.mark.parametrize("bits", [1, 2, 4, 7])
@pytest.mark.parametrize("colours", [1, 3])
def test_jpeg_2000_of_few_bits_is_scaled(bits: int, colours: int, codec: str) -> None:
    samples = np.ascontiguousarray(np.squeeze(SMOOTH[..., :colours] >> (8 - bits)))
    data = imagecodecs.jpeg2k_encode(samples, level=0, codecformat=codec, reversible=True, bitspersample=bits)
    assert imagecodecs.jpeg2k_decode(data).max() < 1 << bits
    expected = np.rint(np.atleast_3d(samples) * (255 / ((1 << bits) - 1))).astype(np.uint8)
    check(data, np.broadcast_to(expected, SMOOTH.shape))


def test_signed_tiff_of_8_bits_is_refused() -> None:
    with pytest.raises(DecodeError, match="int8"):
        decode_image(tiff(SMOOTH[..., 0].astype(np.int8)))

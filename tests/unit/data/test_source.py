"""Decoding against Pillow, and bytes that must not pass for an image."""

import io

import numpy as np
import pytest
from PIL import Image

from dinov2.data.source import DecodeError, decode_image

SMOOTH = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).resize((64, 48)))


def encoded(image: Image.Image, encoding: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


JPEG = encoded(Image.fromarray(SMOOTH), "JPEG", quality=95)
PNG = encoded(Image.fromarray(SMOOTH), "PNG")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_equals_pillow(mode: str) -> None:
    data = encoded(Image.fromarray(SMOOTH).convert(mode), "PNG")
    image = decode_image(data)
    assert image.dtype == np.uint8
    assert image.shape == (48, 64, 3)
    assert image.flags.c_contiguous
    assert image.flags.writeable
    np.testing.assert_array_equal(image, by_pillow(data))


@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"progressive": True}],
    ids=["420", "444", "prog"],
)
def test_jpeg_equals_pillow(options: dict) -> None:
    data = encoded(Image.fromarray(SMOOTH), "JPEG", quality=95, **options)
    np.testing.assert_array_equal(decode_image(data), by_pillow(data))


def test_grey_and_cmyk_jpeg_become_rgb() -> None:
    grey = encoded(Image.fromarray(SMOOTH).convert("L"), "JPEG")
    np.testing.assert_array_equal(decode_image(grey), by_pillow(grey))
    cmyk = encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG")
    np.testing.assert_allclose(decode_image(cmyk), by_pillow(cmyk), atol=1)  # roundings differ by one level


def test_16_bit_png_keeps_the_upper_8_bits() -> None:
    grey = SMOOTH[..., 0]
    data = encoded(Image.fromarray(grey.astype(np.uint16) * 256 + 77), "PNG")
    np.testing.assert_array_equal(decode_image(data), np.repeat(grey[..., None], 3, axis=2))


def test_raw_pixels_come_back_unchanged() -> None:
    square = np.ascontiguousarray(SMOOTH[:48, :48])
    image = decode_image(square.tobytes(), raw_size=48)
    np.testing.assert_array_equal(image, square)
    assert image.flags.writeable


@pytest.mark.parametrize("data", [JPEG, PNG], ids=["jpeg", "png"])
def test_padding_after_the_image_is_no_damage(data: bytes) -> None:
    np.testing.assert_array_equal(decode_image(data + bytes(32)), decode_image(data))


@pytest.mark.parametrize("data", [JPEG, PNG], ids=["jpeg", "png"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.99])
def test_a_file_cut_short_is_an_error(data: bytes, kept: float) -> None:
    with pytest.raises(DecodeError):
        decode_image(data[: int(kept * len(data))])


def test_a_png_without_its_end_mark_is_an_error() -> None:
    with pytest.raises(DecodeError):
        decode_image(PNG[:-2])


def test_an_end_mark_in_a_comment_does_not_end_a_jpeg() -> None:
    commented = JPEG[:2] + b"\xff\xfe\x00\x04\xff\xd9" + JPEG[2:]
    np.testing.assert_array_equal(decode_image(commented + bytes(999)), by_pillow(JPEG))
    with pytest.raises(DecodeError):
        decode_image(commented[:-400] + bytes(999))


def test_a_png_with_flipped_bits_is_an_error() -> None:
    corrupt = bytearray(PNG)
    corrupt[len(PNG) // 2] ^= 0xFF
    with pytest.raises(DecodeError):
        decode_image(bytes(corrupt))


@pytest.mark.parametrize(
    "data", [b"", b"<html><body>429</body></html>", b"GIF89a" + bytes(20), JPEG[:3] + bytes(40) + b"\xff\xd9"]
)
def test_other_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_image(data)


def test_raw_pixels_of_the_wrong_size_are_an_error() -> None:
    with pytest.raises(DecodeError, match="47x47x3 = 6627"):
        decode_image(bytes(48 * 48 * 3), raw_size=47)

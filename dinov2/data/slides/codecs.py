"""Compressed tiles of slides, decoded exactly or not at all."""

import numpy as np

_SOI = b"\xff\xd8"
# Says how colours are stored; without it decoders take three components for YCbCr, which RGB tiles are not.
_ADOBE = {
    "rgb": b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00",
    "ycbcr": b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01",
}
# JPEG 2000 has no checks of its own. Runs of zeros are short, unless a block of the disk was never written.
_HOLE = bytes(512)
_J2K_START, _J2K_TILE_PART, _J2K_END = b"\xff\x4f\xff\x51", b"\xff\x90", b"\xff\xd9"


def decode_tile(
    tile: bytes, compression: str, photometric: str, jpeg_tables: bytes, width: int, height: int
) -> np.ndarray:
    """Decode one tile.

    Args:
        tile: as stored in the file.
        compression: "jpeg" or "j2k" (a JPEG 2000 codestream).
        photometric: "rgb" or "ycbcr", how the stored components are meant.
        jpeg_tables: the file's JPEGTables, b"" if the tiles are whole JPEGs.
        width, height: px that the tile must have.

    Returns:
        uint8 (height, width, 3) RGB.

    Raises:
        ValueError: if the tile is cut, damaged, or of another size.
        ImportError: if a decoder is not installed.
    """
    try:
        pixels = _jpeg(tile, photometric, jpeg_tables) if compression == "jpeg" else _jpeg2000(tile, photometric)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"the tile decodes to {pixels.dtype} {pixels.shape}, not uint8 {(height, width, 3)}")
    return pixels


def _jpeg(tile: bytes, photometric: str, tables: bytes) -> np.ndarray:
    try:
        import simplejpeg  # refuses damage that other decoders hide behind grey
    except ImportError as error:
        raise ImportError("JPEG slides need simplejpeg (the 'slides' extra).") from error
    if tile[:2] != _SOI:
        raise ValueError("the tile is no JPEG")
    parts = _SOI, _without_applications(tables[2:-2]), _ADOBE[photometric], _without_applications(tile[2:])
    return simplejpeg.decode_jpeg(b"".join(parts), strict=True)


def _without_applications(segments: bytes) -> bytes:
    """Leave out leading JFIF, Adobe and other application segments: how colours are stored, the TIFF tag says."""
    place = 0
    while segments[place : place + 1] == b"\xff" and b"\xe0" <= segments[place + 1 : place + 2] <= b"\xef":
        place += 2 + int.from_bytes(segments[place + 2 : place + 4], "big")
    return segments[place:] if place else segments


def _jpeg2000(tile: bytes, photometric: str) -> np.ndarray:
    try:
        import imagecodecs
    except ImportError as error:
        raise ImportError("JPEG 2000 slides need imagecodecs (the 'slides' extra).") from error
    _check_codestream(tile)
    pixels = imagecodecs.jpeg2k_decode(tile)
    return _rgb_of_ycbcr(pixels) if photometric == "ycbcr" and pixels.ndim == 3 else pixels


def _check_codestream(tile: bytes) -> None:
    """Walk a codestream's parts to its end marker: the decoder itself fills what is missing."""
    if tile[:4] != _J2K_START:
        raise ValueError("the tile is no JPEG 2000 codestream")
    place = 2
    while tile[place : place + 1] == b"\xff" and tile[place : place + 2] != _J2K_TILE_PART:
        place += 2 + int.from_bytes(tile[place + 2 : place + 4], "big")
    while tile[place : place + 2] == _J2K_TILE_PART:
        length = int.from_bytes(tile[place + 6 : place + 10], "big")
        place = place + length if length else len(tile.rstrip(b"\x00")) - 2  # 0: up to the end marker
        if 0 < length < 14:
            raise ValueError("the tile is a damaged JPEG 2000 codestream")
    if tile[place : place + 2] != _J2K_END:
        raise ValueError("the tile is a JPEG 2000 codestream without its end")
    if _HOLE in tile:
        raise ValueError("the tile is a JPEG 2000 codestream with a hole of zeros")


def _rgb_of_ycbcr(pixels: np.ndarray) -> np.ndarray:
    """BT.601, full range, in 16-bit fixed point."""
    one, half = 1 << 16, 1 << 15
    luma = pixels[..., 0].astype(np.int32)
    blue, red = pixels[..., 1].astype(np.int32) - 128, pixels[..., 2].astype(np.int32) - 128
    channels = (
        luma + ((round(1.40200 * one) * red + half) >> 16),
        luma + ((half - round(0.344136 * one) * blue - round(0.714136 * one) * red) >> 16),
        luma + ((round(1.77200 * one) * blue + half) >> 16),
    )
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)

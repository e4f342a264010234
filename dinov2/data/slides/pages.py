"""Levels of TIFF slides that tifffile decodes: any of its codecs, strips, separate planes of colour, grey, 16 bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.slides.blocks import Block, TileIndex, TileLevel, check_codestream, decode_jpeg
from dinov2.data.slides.errors import SlideOpenError, UnsupportedTiles
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.tiff import Pages, parse_tiff, segment_table

MAX_WHOLE_BYTES = 512 << 20  # of decoded pixels of an image without tiles, which is held in memory; 179 million px
STORE_IN_TILES = "store it in tiles (vips tiffsave --tile --pyramid)"
_WHITE_IS_0, _BLACK_IS_0, _RGB, _YCBCR = 0, 1, 2, 6  # photometric
_JPEG_COLOURS = {_WHITE_IS_0: "grey", _BLACK_IS_0: "grey", _RGB: "rgb", _YCBCR: "ycbcr"}
_SEPARATE = 2  # planar configuration
_JPEG, _JPEG_2000, _APERIO_JPEG_2000 = 7, (33003, 33004, 33005, 34712), (33003, 33005)  # compression
_J2K_START = b"\xff\x4f"
_UNSIGNED = (1, 4)  # sample formats, the latter untold
_SCALED_BITS, _LOOKED_AT = 15, 16  # least number of bits of the largest of 16-bit samples; tiles that tell it


@dataclass(frozen=True, eq=False)
class PageLevel(TileLevel):
    """One level whose tiles, or strips as wide as the level, are decoded by tifffile, plane by plane."""

    path: str | Path = ""  # of the file
    number: int = 0  # of the level
    pages: Pages = ()
    planes: tuple[tuple[int, np.ndarray, np.ndarray], ...] = ()  # page, offsets and lengths of each plane of colour
    is_whole: bool = False  # whether it is strips of other colours, which are decoded as an image in one piece

    @property
    def is_tiled(self) -> bool:
        """Whether it is stored in tiles; else in strips."""
        return self.pages[0].keyframe.is_tiled

    @property
    def last_byte(self) -> int:
        """End of the last tile in the file."""
        return max(int(np.max(offsets + lengths)) for _, offsets, lengths in self.planes)

    def segments(self, block: Block) -> list[tuple[int, int]]:
        """(offset, length) in the file of the bytes of each plane of one of its tiles."""
        return [(int(offsets[block]), int(lengths[block])) for _, offsets, lengths in self.planes]

    def join(self, block: Block, data: Sequence[bytes]) -> np.ndarray:
        """Decode what `segments` named: uint8 (H, W, 3) RGB, at the level's edges perhaps without the padding."""
        rows, columns = self.offsets.shape
        planes = []
        for number, ((page, _, _), tile) in enumerate(zip(self.planes, data, strict=True)):
            key = self.pages[page].keyframe
            plane = number if len(self.pages) == 1 else 0
            planes.append(_decode(key, tile, (plane * rows + block.row) * columns + block.column))
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes[:3], axis=2)
        whole = self.tile_height, self.tile_width
        cropped = self.height - block.row * self.tile_height, self.width - block.column * self.tile_width
        if any(side not in sides for side, *sides in zip(pixels.shape, whole, cropped, strict=False)):
            raise ValueError(f"the tile decodes to {pixels.shape[1]} x {pixels.shape[0]} px")
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        if int(self.pages[0].keyframe.photometric) == _WHITE_IS_0:
            pixels = 255 - pixels
        colours = pixels[..., : 3 if pixels.shape[2] >= 3 else 1]  # without alpha
        return np.ascontiguousarray(np.broadcast_to(colours, (*pixels.shape[:2], 3)))

    def __reduce__(self) -> tuple[Any, ...]:  # pages do not travel between processes
        return _level_again, (self.path, self.number)


def _level_again(path: str | Path, number: int) -> PageLevel:
    return index_pages(path).levels[number]


def _decode(page: Any, tile: bytes, segment: int) -> np.ndarray:
    """Decode a segment: uint8 or uint16 (H, W, samples); ValueError if it is cut or corrupt."""
    try:
        if page.compression == _JPEG and page.samplesperpixel in (1, 3):
            separate = int(page.planarconfig) == _SEPARATE
            return decode_jpeg(
                tile, page.jpegtables or b"", "grey" if separate else _JPEG_COLOURS[int(page.photometric)]
            )
        if page.compression in _JPEG_2000 and tile.startswith(_J2K_START):
            check_codestream(tile)
        pixels = page.decode(tile, segment, jpegtables=page.jpegtables)[0]
    except ValueError:
        raise
    except Exception as error:  # each codec has errors of its own
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return pixels[0]  # the only image plane


def index_pages(path: str | Path, mpp: float | None = None) -> TileIndex:
    """Find the tiles of a slide that tifffile decodes: RGB or grey of 8 or 16 bits in a TIFF file.

    Of 16-bit samples the upper 8 bits count. Arguments and errors are those of `index_slide`. An image without tiles is
    refused above `MAX_WHOLE_BYTES`, and so are signed samples, those of more bits, and 16-bit ones that seem to hold
    values of fewer bits, whose scale cannot be known.
    """
    return parse_tiff(path, mpp, _page_level)


def _page_level(path: str | Path, pages: Pages, level: int) -> PageLevel:
    page = pages[0].keyframe
    photometric, samples, separate = int(page.photometric), page.samplesperpixel, int(page.planarconfig) == _SEPARATE
    grey = photometric in (_WHITE_IS_0, _BLACK_IS_0) and (samples in (1, 2) if len(pages) == 1 else samples == 1)
    colour = photometric == _RGB and samples in (3, 4)
    ycbcr = photometric == _YCBCR and page.compression == _JPEG and not separate and samples == 3
    bits, found = page.bitspersample, f"photometric {photometric}, {page.bitspersample} bits x {samples}"
    if page.sampleformat not in _UNSIGNED or bits > 16:
        kind = f"samples of the type {page.dtype}" if page.dtype else found
        raise SlideOpenError(path, f"its image has {kind}; unsigned ones of 8 or 16 bits are expected")
    if samples > {_WHITE_IS_0: 2, _BLACK_IS_0: 2, _RGB: 4}.get(photometric, samples):  # OpenSlide would show the first
        raise SlideOpenError(path, f"its image has {samples} channels ({found}); one in RGB or grey is expected")
    is_plain = bits in (8, 16) and (grey or colour or ycbcr)
    is_whole = not is_plain and not page.is_tiled and len(pages) == 1 and page.index == 0 and not is_remote(path)
    if not (is_plain or is_whole) or page.tiledepth > 1 or page.imagedepth > 1:
        raise UnsupportedTiles(path, f"{found}: no RGB or grey of 8 or 16 bits", f"level {level}")
    if page.compression in _APERIO_JPEG_2000:  # `index_slide` has refused it for what OpenSlide can read
        raise UnsupportedTiles(path, "its JPEG 2000 tiles have components of different sizes")
    tables = [segment_table(path, one, level) for one in pages]
    planes = tuple(
        (number, offsets[plane], lengths[plane])
        for number, (offsets, lengths) in enumerate(tables)
        for plane in range(len(offsets))
    )
    width, height = page.imagewidth, page.imagelength
    tile_width, tile_height = (page.tilewidth, page.tilelength) if page.is_tiled else (width, page.rowsperstrip)
    check_whole(path, *((tile_width, tile_height) if page.is_tiled else (width, height)))
    _ = page.decode  # made of tags that cannot be read once the file is closed
    if bits == 16 and is_plain and not level:
        _check_scale(path, page, tables[0])
    return PageLevel(
        width, height, tile_width, tile_height, planes[0][1], np.minimum.reduce([lengths for _, _, lengths in planes]),
        "other", "rgb", page.jpegtables or b"", path, level, pages, planes, is_whole,
    )  # fmt: skip


def _check_scale(path: str | Path, page: Any, table: tuple[np.ndarray, np.ndarray]) -> None:
    """Refuse 16-bit samples that are of 8 to 14 bits, not scaled: slides hold bright pixels, glass or fluorescence."""
    offsets, lengths = (column.ravel() for column in table)
    stored, largest = np.flatnonzero(lengths), 0
    for number in stored[np.linspace(0, len(stored) - 1, min(_LOOKED_AT, len(stored)), dtype=int)].tolist():
        handle = page.parent.filehandle
        handle.seek(int(offsets[number]))
        largest = max(largest, int(_decode(page, handle.read(int(lengths[number])), number).max()))
    if 0 < largest.bit_length() < _SCALED_BITS:
        found = f"its 16-bit samples reach {largest} only, as of {largest.bit_length()} bits that are not scaled"
        raise SlideOpenError(path, f"{found}; 8-bit samples, or 16-bit ones that reach up to 65535, are expected")


def check_whole(path: str | Path, width: int, height: int) -> None:
    """Raise SlideOpenError for an image in one piece that takes too much memory."""
    if 3 * width * height > MAX_WHOLE_BYTES:
        size = f"{width} x {height} px in one piece take {3 * width * height / 2**30:.1f} GiB of memory"
        most = f"at most {MAX_WHOLE_BYTES / 2**30:g} GiB are allowed"
        raise SlideOpenError(path, f"its {size}, where {most}; {STORE_IN_TILES}")

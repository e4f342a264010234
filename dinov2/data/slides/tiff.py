"""Tile indexes of TIFF slides, from their pages as tifffile parses them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dinov2.data.slides.blocks import TileIndex, TileLevel
from dinov2.data.slides.errors import SlideOpenError, UnsupportedTiles, import_package
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.resolution import check_user_mpp, number, resolve_mpp
from dinov2.data.storage.base import public_name
from dinov2.data.storage.fsspec import filesystem
from dinov2.data.storage.retry import RemoteError, Retries, reason

_APERIO, _TRESTLE = "Aperio Image", "MedScan"  # tiles of the latter overlap
_REDUCED = 1  # bit of subfiletype
_BLOCK_BYTES = 1 << 20  # a server's file is parsed through a cache of such blocks
# Compression and photometric of the tags: kind of the tiles and of their colours.
_KINDS = {(7, 2): ("jpeg", "rgb"), (7, 6): ("jpeg", "ycbcr")}
_KINDS |= {(33003, None): ("j2k", "ycbcr"), (33005, None): ("j2k", "rgb")}


def index_slide(path: str | Path, mpp: float | None = None) -> TileIndex:
    """Find the tiles of a slide: 8-bit RGB or YCbCr in JPEG or JPEG 2000 (Aperio 33003, 33005), in a tiled TIFF.

    `path` may be an fsspec URL; `mpp`, in micrometres per level-0 px, is used only when the slide does not say.
    SlideOpenError if the file is missing, cut, or its levels make no sense; UnsupportedTiles if it is of another kind,
    which OpenSlide may read; RemoteError if the server cannot be read; ValueError if `mpp` is implausible.
    """
    check_user_mpp(path, mpp)
    tifffile = import_package("tifffile", "Slides need tifffile")
    retries = Retries()

    def parse() -> TileIndex:
        with _opened(path, retries) as (file, size):
            try:
                with tifffile.TiffFile(file) as tiff:
                    return _index(path, tiff, size, mpp)
            except tifffile.TiffFileError as error:
                raise UnsupportedTiles(path, f"not a TIFF file ({size} bytes; {error})") from error

    try:
        return retries.call(public_name(path), parse) if is_remote(path) else parse()
    except FileNotFoundError as error:
        raise SlideOpenError(path, "there is no such file") from error
    except (ImportError, RemoteError, SlideOpenError):
        raise
    except OSError as error:
        raise SlideOpenError(path, f"its file cannot be read ({reason(error)})") from error
    except Exception as error:  # tifffile meets corrupt files with many kinds of errors
        raise UnsupportedTiles(path, f"not a TIFF file that can be parsed ({reason(error)})") from error


@contextmanager
def _opened(path: str | Path, retries: Retries) -> Iterator[tuple[BinaryIO, int]]:
    if is_remote(path):
        fs, inner = filesystem(str(path), retries)
        with fs.open(inner, "rb", block_size=_BLOCK_BYTES, cache_type="blockcache") as file:
            if file.size is None:
                raise RemoteError(f"the server does not tell the size of '{public_name(path)}'; use a local copy")
            yield file, file.size
        return
    with open(path, "rb") as file:
        yield file, os.fstat(file.fileno()).st_size


def _index(path: str | Path, tiff: Any, size: int, mpp: float | None) -> TileIndex:
    pages = list(tiff.pages)
    if not pages:
        raise SlideOpenError(path, "not a whole slide, it has no page")
    first = pages[0]
    aperio = first.description.startswith(_APERIO)
    kinds = tiff.is_scn, tiff.is_bif, tiff.is_philips, tiff.is_ndpi, tiff.is_ome
    if not aperio and (any(kinds) or first.subifds or first.software.startswith(_TRESTLE)):
        raise UnsupportedTiles(path, "its pages are no plain pyramid")
    handle, form = tiff.filehandle, tiff.tiff
    handle.seek(tiff.pages.next_page_offset)
    if int.from_bytes(handle.read(form.offsetsize), "little" if form.byteorder == "<" else "big"):
        # The chain of pages breaks off: levels would be missing without a word.
        raise SlideOpenError(path, f"not a whole slide, its pages break off after {len(pages)}")
    tiled = [page for page in pages if page.is_tiled]
    if not tiled or tiled[0] is not first:
        raise UnsupportedTiles(path, "its first page has no tiles")
    if not aperio and not all(page.subfiletype & _REDUCED for page in tiled[1:]):
        raise UnsupportedTiles(path, "its tiled pages are several images")
    levels = tuple(_level(path, page, number) for number, page in enumerate(tiled))
    _check_sampling(path, handle, levels[0])
    items = (item.partition("=") for item in first.description.split("|")[1:] if aperio)
    properties = {key.strip(): value.strip() for key, _, value in items}
    sides = (number(properties.get("MPP")),) * 2 if aperio else _sides_of_tags(first)
    width, height = levels[0].width, levels[0].height
    downsamples = tuple((width / level.width + height / level.height) / 2 for level in levels)
    return TileIndex(str(path), size, levels, downsamples, *resolve_mpp(sides, number(properties.get("AppMag")), mpp))


def _level(path: str | Path, page: Any, level: int) -> TileLevel:
    compression, photometric = int(page.compression), int(page.photometric)
    # The tag tells the colours of JPEG, the compression those of JPEG 2000.
    kind = _KINDS.get((compression, photometric)) or _KINDS.get((compression, None))
    plain = page.bitspersample == 8 and page.samplesperpixel == 3 and int(page.planarconfig) == 1
    if kind is None or not plain or page.tiledepth != 1 or page.imagedepth != 1:
        found = f"compression {compression}, photometric {photometric}, {page.bitspersample} bits"
        reason = f"{found} x {page.samplesperpixel}: no JPEG or JPEG 2000 in RGB"
        raise UnsupportedTiles(path, reason, f"level {level}")
    rows, columns = -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
    offsets, lengths = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    if len(offsets) != rows * columns or len(lengths) != rows * columns:
        reason = f"it has {len(offsets)} tiles with {len(lengths)} lengths instead of {rows * columns}"
        raise SlideOpenError(path, reason, f"level {level}")
    if lengths.max() > np.iinfo(np.int32).max:
        raise SlideOpenError(path, f"a tile of {lengths.max()} bytes", f"level {level}")
    lengths[offsets == 0] = 0
    return TileLevel(
        page.imagewidth, page.imagelength, page.tilewidth, page.tilelength,
        offsets.reshape(rows, columns), lengths.astype(np.int32).reshape(rows, columns),
        *kind, page.jpegtables or b"",
    )  # fmt: skip


def _check_sampling(path: str | Path, handle: Any, level: TileLevel) -> None:
    """Refuse JPEG 2000 with coarser chroma: the decoder takes components of one size only."""
    stored = np.flatnonzero(level.lengths)
    if level.compression != "j2k" or not len(stored):
        return
    handle.seek(int(level.offsets.flat[stored[0]]))
    header = handle.read(64)  # SOC, then SIZ: 38 bytes, then 3 for each component
    count = int.from_bytes(header[40:42], "big")
    if count != 3 or any(header[43 + 3 * i : 45 + 3 * i] != b"\x01\x01" for i in range(count)):
        raise UnsupportedTiles(path, "its JPEG 2000 tiles have components of different sizes")


def _sides_of_tags(page: Any) -> list[float | None]:
    um_per_unit = {2: 25400.0, 3: 10000.0}.get(page.tags.valueof("ResolutionUnit", default=2))  # inch, centimetre
    ratios = (page.tags.valueof(name, default=(0, 1)) for name in ("XResolution", "YResolution"))
    return [um_per_unit / (above / below) if um_per_unit and above and below else None for above, below in ratios]

"""The tiled pages of a TIFF slide, as tifffile parses them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dinov2.data.slides.blocks import TileLevel
from dinov2.data.slides.errors import SlideOpenError, UnsupportedTiles, public_name
from dinov2.data.slides.ranges import filesystem, is_remote
from dinov2.data.slides.resolution import MppSource, number, resolve_mpp
from dinov2.data.storage.retry import RemoteError, Retries, reason

_APERIO = "Aperio Image"
_TRESTLE = "MedScan"  # its tiles overlap
_REDUCED = 1  # bit of subfiletype
_UM_PER_UNIT = {2: 25400.0, 3: 10000.0}  # ResolutionUnit: inch, centimetre
_BLOCK_BYTES = 1 << 20  # a server's file is parsed through a cache of such blocks
_COMPRESSIONS = {7: "jpeg", 33003: "j2k", 33005: "j2k"}
_COLOURS = {(7, 2): "rgb", (7, 6): "ycbcr"}  # (compression, photometric)


@dataclass(frozen=True)
class TiffLevels:
    """Levels of a TIFF slide, the file's size in bytes, and what its first page says of the resolution."""

    levels: tuple[TileLevel, ...]
    size: int
    mpp_sides: tuple[float | None, float | None]
    power: float | None

    def resolution(self, user_mpp: float | None) -> tuple[float | None, MppSource]:
        """mpp and its source, see `resolve_mpp`."""
        return resolve_mpp(self.mpp_sides, self.power, user_mpp)


def read_tiff_levels(path: str | Path) -> TiffLevels:
    """Parse a file once; see `tile_index.index_slide`."""
    try:
        import tifffile
    except ImportError as error:
        raise ImportError("Slides need tifffile (the 'slides' extra).") from error

    def parse() -> TiffLevels:
        with _opened(path, retries) as (file, size):
            try:
                with tifffile.TiffFile(file) as tiff:
                    return _levels(path, tiff, size)
            except tifffile.TiffFileError as error:
                raise UnsupportedTiles(path, f"not a TIFF file ({size} bytes; {error})") from error

    retries = Retries()
    try:
        return retries.call(public_name(path), parse) if is_remote(path) else parse()
    except FileNotFoundError as error:
        raise SlideOpenError(path, "there is no such file") from error
    except (ImportError, RemoteError, SlideOpenError):
        raise
    except OSError as error:
        raise SlideOpenError(path, f"its file cannot be read ({reason(error)})") from error
    except Exception as error:  # tifffile meets damage with many kinds of errors
        raise UnsupportedTiles(path, f"not a TIFF file that can be parsed ({reason(error)})") from error


@contextmanager
def _opened(path: str | Path, retries: Retries) -> Iterator[tuple[BinaryIO, int]]:
    if is_remote(path):
        fs, inner = filesystem(str(path), retries)
        with fs.open(inner, "rb", block_size=_BLOCK_BYTES, cache_type="blockcache") as file:
            if file.size is None:
                raise RemoteError(
                    f"the server does not tell the size of '{public_name(path)}'; use a local copy"
                )
            yield file, file.size
        return
    if not Path(path).is_file():
        raise SlideOpenError(path, "there is no such file")
    with open(path, "rb") as file:
        yield file, os.fstat(file.fileno()).st_size


def _levels(path: str | Path, tiff: Any, size: int) -> TiffLevels:
    pages = list(tiff.pages)
    if not pages:
        raise SlideOpenError(path, "not a whole slide, it has no page")
    first = pages[0]
    aperio = first.description.startswith(_APERIO)
    kinds = (
        tiff.is_scn,
        tiff.is_bif,
        tiff.is_philips,
        tiff.is_ndpi,
        tiff.is_ome,
        first.subifds,
        first.software.startswith(_TRESTLE),
    )
    if not aperio and any(kinds):
        raise UnsupportedTiles(path, "its pages are no plain pyramid")
    _check_chain(path, tiff, len(pages))
    tiled = [page for page in pages if page.is_tiled]
    if not tiled or tiled[0] is not first:
        raise UnsupportedTiles(path, "its first page has no tiles")
    if not aperio and not all(page.subfiletype & _REDUCED for page in tiled[1:]):
        raise UnsupportedTiles(path, "its tiled pages are several images")
    levels = tuple(_level(path, page, place) for place, page in enumerate(tiled))
    _check_sampling(path, tiff.filehandle, levels[0])
    properties = _aperio_properties(first.description) if aperio else {}
    sides = (number(properties.get("MPP")),) * 2 if aperio else _sides_of_tags(first)
    return TiffLevels(levels, size, sides, number(properties.get("AppMag")))


def _check_chain(path: str | Path, tiff: Any, num_pages: int) -> None:
    """Refuse a chain of pages that breaks off: its levels would be missing without a word."""
    handle, form = tiff.filehandle, tiff.tiff
    handle.seek(tiff.pages.next_page_offset)
    if int.from_bytes(handle.read(form.offsetsize), "little" if form.byteorder == "<" else "big"):
        raise SlideOpenError(path, f"not a whole slide, its pages break off after {num_pages}")


def _level(path: str | Path, page: Any, place: int) -> TileLevel:
    compression = int(page.compression)
    colours = {33003: "ycbcr", 33005: "rgb"}.get(compression) or _COLOURS.get(
        (compression, int(page.photometric))
    )
    plain = page.bitspersample == 8 and page.samplesperpixel == 3 and int(page.planarconfig) == 1
    if colours is None or not plain or page.tiledepth != 1 or page.imagedepth != 1:
        kind = f"compression {compression}, photometric {int(page.photometric)}, {page.bitspersample} bits"
        raise UnsupportedTiles(
            path, f"{kind} x {page.samplesperpixel}: no JPEG or JPEG 2000 in RGB", f"level {place}"
        )
    rows, columns = -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
    offsets, lengths = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    if len(offsets) != rows * columns or len(lengths) != rows * columns:
        reason = f"it has {len(offsets)} tiles with {len(lengths)} lengths instead of {rows * columns}"
        raise SlideOpenError(path, reason, f"level {place}")
    if lengths.max() > np.iinfo(np.int32).max:
        raise SlideOpenError(path, f"a tile of {lengths.max()} bytes", f"level {place}")
    lengths[offsets == 0] = 0
    return TileLevel(
        width=page.imagewidth,
        height=page.imagelength,
        tile_width=page.tilewidth,
        tile_height=page.tilelength,
        offsets=offsets.reshape(rows, columns),
        lengths=lengths.astype(np.int32).reshape(rows, columns),
        compression=_COMPRESSIONS[compression],
        photometric=colours,
        jpeg_tables=page.jpegtables or b"",
    )


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


def _aperio_properties(description: str) -> dict[str, str]:
    pairs = (item.partition("=") for item in description.split("|")[1:])
    return {key.strip(): value.strip() for key, _, value in pairs}


def _sides_of_tags(page: Any) -> tuple[float | None, float | None]:
    unit = page.tags.valueof("ResolutionUnit", default=2)
    sides = []
    for name in ("XResolution", "YResolution"):
        above, below = page.tags.valueof(name, default=(0, 1))
        per_unit = above / below if below else 0.0
        sides.append(_UM_PER_UNIT[unit] / per_unit if per_unit and unit in _UM_PER_UNIT else None)
    return tuple(sides)

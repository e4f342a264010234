"""Tile indexes of TIFF slides, from their pages as tifffile parses them."""

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dinov2.data.slides.blocks import TileIndex, TileLevel, falling
from dinov2.data.slides.errors import SlideOpenError, UnsupportedTiles, import_package
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.resolution import Mpp, check_user_mpp, micrometres, number, power_of, resolve_mpp
from dinov2.data.storage.base import public_name
from dinov2.data.storage.fsspec import filesystem
from dinov2.data.storage.retry import RemoteError, Retries, reason

_APERIO, _TRESTLE = "Aperio", "MedScan"  # tiles of the latter overlap
_REDUCED = 1  # bit of subfiletype
_BLOCK_BYTES = 1 << 20  # a server's file is parsed through a cache of such blocks
# Compression and photometric of the tags: kind of the tiles and of their colours.
_KINDS = {(7, 2): ("jpeg", "rgb"), (7, 6): ("jpeg", "ycbcr")}
_KINDS |= {(33003, None): ("j2k", "ycbcr"), (33004, 2): ("j2k", "rgb"), (33005, None): ("j2k", "rgb")}
_KINDS |= {(34712, 2): ("j2k", "rgb"), (34933, 2): ("png", "rgb"), (50001, 2): ("webp", "rgb")}
_KINDS |= {(50002, 2): ("jxl", "rgb"), (52546, 2): ("jxl", "rgb")}
_J2K_START = b"\xff\x4f\xff\x51"
_RGB_NAMES = ({"r", "red"}, {"g", "green"}, {"b", "blue"})

Pages = tuple[Any, ...]  # that make one level: one page of tifffile's, or one for each plane of colour
MakeLevel = Callable[[str | Path, Pages, int], TileLevel]


class Pyramid(NamedTuple):
    """The pages of a slide, and what its file says of their resolution."""

    levels: list[Pages]  # finest first
    sides: tuple[Mpp, Mpp]  # um per px along x and y
    power: float | None  # of the objective
    explicit: bool  # whether `sides` are meant for a microscope's image
    notes: tuple[str, ...] = ()  # what a user should know


def index_slide(path: str | Path, mpp: float | None = None) -> TileIndex:
    """Find the tiles of a slide: 8-bit RGB or YCbCr in JPEG, JPEG 2000, JPEG XL, PNG or WebP, in a tiled TIFF.

    `path` may be an fsspec URL; `mpp`, in micrometres per level-0 px, takes the place of the slide's own.
    SlideOpenError if the file is missing, cut, or its levels make no sense; UnsupportedTiles if it is of another kind,
    which tifffile or OpenSlide may read; RemoteError if the server cannot be read; ValueError if `mpp` is implausible.
    """
    return parse_tiff(path, mpp, _level)


def parse_tiff(path: str | Path, mpp: float | None, make_level: MakeLevel) -> TileIndex:
    """As `index_slide`, with levels made of pages by `make_level`."""
    check_user_mpp(path, mpp)
    tifffile = import_package("tifffile", "Slides need tifffile")
    retries = Retries()

    def parse() -> TileIndex:
        with _opened(path, retries) as (file, size):
            try:
                # Its name would lead tifffile to the other files of a set, which are not this slide's bytes.
                with tifffile.TiffFile(file, name="slide.tif", _multifile=False) as tiff:
                    return _index(path, tiff, size, mpp, make_level)
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


def _index(path: str | Path, tiff: Any, size: int, mpp: float | None, make_level: MakeLevel) -> TileIndex:
    pyramid = _pyramid(path, tiff)
    levels = tuple(make_level(path, pages, number) for number, pages in enumerate(pyramid.levels))
    _check_codestreams(path, tiff.filehandle, levels[0])
    width, height = levels[0].width, levels[0].height
    downsamples = tuple((width / level.width + height / level.height) / 2 for level in levels)
    resolution = resolve_mpp(pyramid.sides, pyramid.power, explicit=pyramid.explicit, notes=pyramid.notes)
    return TileIndex(str(path), size, levels, downsamples, resolution.given(mpp))


def _pyramid(path: str | Path, tiff: Any) -> Pyramid:
    pages = list(tiff.pages)
    if not pages:
        raise SlideOpenError(path, "not a whole slide, it has no page")
    first = pages[0]
    aperio = first.description.startswith(_APERIO)
    if not aperio:
        vendors = tiff.is_scn, tiff.is_bif, tiff.is_philips, tiff.is_ndpi
        if any(vendors) or first.software.startswith(_TRESTLE):
            raise UnsupportedTiles(path, "its pages are no plain pyramid")
    handle, form = tiff.filehandle, tiff.tiff
    handle.seek(tiff.pages.next_page_offset)
    if int.from_bytes(handle.read(form.offsetsize), "little" if form.byteorder == "<" else "big"):
        # The chain of pages breaks off: levels would be missing without a word.
        raise SlideOpenError(path, f"not a whole slide, its pages break off after {len(pages)}")
    if aperio:
        items = (item.partition("=") for item in first.description.split("|")[1:])
        said = {key.strip(): value.strip() for key, _, value in items}
        levels = _whole_levels([(page,) for page in pages if page.is_tiled])
        if not first.is_tiled:
            raise UnsupportedTiles(path, "its first page has no tiles")
        mpp = number(said.get("MPP"))
        notes = (f"its MPP is '{said['MPP']}', which is no number",) if said.get("MPP") and mpp is None else ()
        return Pyramid(levels, (mpp, mpp), power_of(said.get("AppMag")), explicit=True, notes=notes)
    if tiff.is_ome:
        return _ome_pyramid(path, tiff)
    first = max(pages, key=_area)  # of equal ones the first in the file; a thumbnail may lie before it
    if first.subifds:
        candidates, rest = list(first.pages), []
    else:
        others = [page for page in pages if page is not first]
        same_kind = [page for page in others if page.is_tiled == first.is_tiled and _is_colour(page, first)]
        candidates = [page for page in same_kind if _reduces(page, first)]
        rest = [page for page in same_kind if page not in candidates]
    levels = _whole_levels([(page,) for page in (first, *sorted(candidates, key=_area, reverse=True))])
    if rest and first.samplesperpixel < 3:  # channels of fluorescence, of which the first alone is no slide
        found = f"it holds {1 + len(rest)} images of one channel"
        raise SlideOpenError(path, f"{found}; one 8-bit image in RGB is expected")
    notes = (f"it holds {1 + len(rest)} images of which the largest, or of equal ones the first, is read",) * bool(rest)
    sides = _sides_of_tags(first, (tiff.imagej_metadata or {}).get("unit") if tiff.is_imagej else None)
    return Pyramid(levels, sides, None, explicit=False, notes=notes)


def _is_colour(page: Any, first: Any) -> bool:
    return (page.samplesperpixel, page.bitspersample) == (first.samplesperpixel, first.bitspersample)


def _area(page: Any) -> int:
    return page.imagewidth * page.imagelength


def _reduces(page: Any, first: Any) -> bool:
    """Whether a page may be a smaller copy of the first: its sides are in the same proportion.

    Within a pixel; within 4 px or 5 % where the file says so, since writers round at each level and flag labels too.
    """
    (w, h), (width, height) = (page.imagewidth, page.imagelength), (first.imagewidth, first.imagelength)
    off, is_flagged = abs(w * height - h * width), page.subfiletype & _REDUCED
    return (
        w <= width
        and h <= height
        and (w, h) != (width, height)
        and (off <= (4 if is_flagged else 1) * (width + height) or (is_flagged and off <= 0.05 * w * height))
    )


def _whole_levels(levels: list[Pages]) -> list[Pages]:
    return levels[: falling([(pages[0].imagewidth, pages[0].imagelength) for pages in levels])]


def _ome_pyramid(path: str | Path, tiff: Any) -> Pyramid:
    """The largest image of an OME-TIFF file; it is never left to a reader that would see a part of it."""
    series = max(tiff.series, key=lambda series: series.keyframe.imagewidth * series.keyframe.imagelength)
    first, axes = series.keyframe, series.axes
    planes = {"YXS": 1, "YX": 1, "SYX": 1, "CYX": 3}.get(axes)
    if planes is None or (axes == "CYX" and series.shape[0] != 3) or first.bitspersample != 8:
        found = f"axes {axes} of {' x '.join(map(str, series.shape))}, {first.bitspersample} bits"
        raise SlideOpenError(path, f"its OME-TIFF image has the {found}; one 8-bit image in RGB is expected")
    levels = []
    for level in series.levels:
        pages = tuple(level.pages)[:planes]
        if len(pages) < planes or None in pages:
            raise SlideOpenError(path, "its OME-TIFF image lies in several files; one that holds all of it is expected")
        levels.append(pages)
    size, notes = (first.imagewidth, first.imagelength), ()
    try:
        described = ET.fromstring(tiff.pages[0].description)
    except ET.ParseError as error:
        raise SlideOpenError(path, f"its OME-XML cannot be parsed ({error})") from error
    images = [image for image in described.iterfind(".//{*}Pixels") if (_whole(image, "X"), _whole(image, "Y")) == size]
    said = images[0] if images else described
    if planes == 3:
        notes = _check_channels(path, said)
    sides = tuple(micrometres(said.get(f"PhysicalSize{axis}"), said.get(f"PhysicalSize{axis}Unit")) for axis in "XY")
    objective = described.find(".//{*}Objective")
    power = None if objective is None else number(objective.get("NominalMagnification"))
    if sides == (None, None):
        return Pyramid(_whole_levels(levels), _sides_of_tags(first), power, explicit=False, notes=notes)
    return Pyramid(_whole_levels(levels), sides, power, explicit=True, notes=notes)


def _whole(pixels: ET.Element, axis: str) -> int | None:
    length = number(pixels.get(f"Size{axis}"))
    return None if length is None else int(length)


def _check_channels(path: str | Path, pixels: ET.Element) -> tuple[str, ...]:
    """Refuse three channels that are named otherwise than colours; unnamed ones are what converters write."""
    names = [channel.get("Name", "").strip().lower() for channel in pixels.iterfind("{*}Channel")]
    if len(names) == 3 and all(name in colours for name, colours in zip(names, _RGB_NAMES, strict=True)):
        return ()
    if any(names):
        raise SlideOpenError(path, f"its channels are {', '.join(names)}; red, green and blue are expected")
    return ("its three channels have no names and are taken for red, green and blue",)


def _level(path: str | Path, pages: Pages, level: int) -> TileLevel:
    page = pages[0]
    compression, photometric = int(page.compression), int(page.photometric)
    if not page.is_tiled:
        raise UnsupportedTiles(path, "its first page has no tiles")
    # The tag tells the colours of JPEG, the compression those of JPEG 2000.
    kind = _KINDS.get((compression, photometric)) or _KINDS.get((compression, None))
    plain = page.bitspersample == 8 and page.samplesperpixel == 3 and int(page.planarconfig) == 1
    if kind is None or not plain or len(pages) > 1 or page.tiledepth != 1 or page.imagedepth != 1:
        found = f"compression {compression}, photometric {photometric}, {page.bitspersample} bits"
        reason = f"{found} x {page.samplesperpixel}: no tiles of one codec in RGB"
        raise UnsupportedTiles(path, reason, f"level {level}")
    offsets, lengths = segment_table(path, page, level)
    return TileLevel(
        page.imagewidth, page.imagelength, page.tilewidth, page.tilelength,
        offsets[0], lengths[0], *kind, page.jpegtables or b"",
    )  # fmt: skip


def segment_table(path: str | Path, page: Any, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the segments of a page lie: first bytes, int64, and numbers of bytes, int32, (planes, rows, columns) each.

    `page` may be a `TiffFrame`; SlideOpenError unless there is a segment for each place, 0 bytes where none is stored.
    """
    key = page.keyframe
    height, width = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
    planes = key.samplesperpixel if int(key.planarconfig) == 2 else 1
    shape = planes, -(-key.imagelength // height), -(-key.imagewidth // width)
    offsets, lengths = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    total = int(np.prod(shape))
    if len(offsets) != total or len(lengths) != total:
        reason = f"it has {len(offsets)} tiles with {len(lengths)} lengths instead of {total}"
        raise SlideOpenError(path, reason, f"level {level}")
    if lengths.max() > np.iinfo(np.int32).max:
        raise SlideOpenError(path, f"a tile of {lengths.max()} bytes", f"level {level}")
    lengths[offsets == 0] = 0
    return offsets.reshape(shape), lengths.astype(np.int32).reshape(shape)


def _check_codestreams(path: str | Path, handle: Any, level: TileLevel) -> None:
    """Refuse JPEG 2000 in a box, or with coarser chroma: the decoder takes components of one size only."""
    stored = np.flatnonzero(level.lengths)
    if level.compression != "j2k" or not len(stored):
        return
    handle.seek(int(level.offsets.flat[stored[0]]))
    header = handle.read(64)  # SOC, then SIZ: 38 bytes, then 3 for each component
    count = int.from_bytes(header[40:42], "big")
    if not header.startswith(_J2K_START):
        raise UnsupportedTiles(path, "its JPEG 2000 tiles are no codestreams")
    if count != 3 or any(header[43 + 3 * i : 45 + 3 * i] != b"\x01\x01" for i in range(count)):
        raise UnsupportedTiles(path, "its JPEG 2000 tiles have components of different sizes")


def _sides_of_tags(page: Any, unit: str | None = None) -> tuple[Mpp, Mpp]:
    """um per px of the tags of resolution, in the unit of length that ImageJ gives beside them or the tag's own."""
    um_per_unit = {2: 25400.0, 3: 10000.0}.get(page.tags.valueof("ResolutionUnit", default=2))  # inch, centimetre
    um_per_unit = (micrometres(1, unit) if unit else None) or um_per_unit
    ratios = (page.tags.valueof(name, default=(0, 1)) for name in ("XResolution", "YResolution"))
    return tuple(um_per_unit / (above / below) if um_per_unit and above and below else None for above, below in ratios)

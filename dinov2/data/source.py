"""Sources of tiles: their protocol, the rows they hand out, and the decoding of stored bytes."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dinov2.configs import Config
from dinov2.utils.provenance import how_to_install

_JPEG_2000_SIZES = b"\xff\x4f\xff\x51"  # begins the codestream
_STARTS = (  # first bytes of a file, its format
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    *((start, "TIFF") for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"BM", "BMP"),
    *((start, "JPEG 2000") for start in (b"\0\0\0\x0cjP  \r\n\x87\n", _JPEG_2000_SIZES)),
)
FORMATS = ("JPEG", "PNG", "TIFF", "WebP", "BMP", "JPEG 2000")
_PNG_END, _JPEG_SCAN, _JPEG_END = b"IEND\xaeB`\x82", b"\xff\xda", b"\xff\xd9"
_TIFF_BITS, _TIFF_CODEC, _TIFF_SAMPLES = 258, 259, 339  # tags
_PILLOW_TIFF_CODECS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946)  # none, CCITT, LZW, JPEG, PackBits, deflate
_TIFFFILE_COLOURS = ("MINISBLACK", "MINISWHITE", "RGB", "YCBCR")
_TAIL = 256  # bytes in which an end mark is looked for first, since most files end with it
_SCALED_BITS = (
    15  # that the largest of 16-bit samples needs; tissue has no tile whose brightest pixel is below a quarter
)


class DecodeError(ValueError):
    """The stored bytes of one row are not an image we can read."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One row as stored, on its way from the rank's reader to a decode worker."""

    index: int  # global sample index g; it alone fixes the row and the augmentation
    group: int  # number of the row group in the source
    row: int  # within the row group
    slide: str  # that the tile was cut from
    data: bytes


class Origin(NamedTuple):
    """Slide, patient and site of a tile; the last two are empty where the dataset does not tell them."""

    slide: str
    patient: str = ""
    site: str = ""


def as_origins(slides: Sequence[str], *others: Sequence[str]) -> list[Origin]:
    """Origins of rows from the columns slide, patient and site; rows of one origin share the object."""
    if not others and slides.count(slides[0] if slides else "") == len(slides):
        return [Origin(slides[0])] * len(slides) if slides else []
    rows = list(zip(slides, *others, strict=True))
    made = {row: Origin(*row) for row in set(rows)}
    return [made[row] for row in rows]


class Source(Protocol):
    """A dataset whose rows can be read in any order: the one interface between data and the sample order.

    The rows lie in numbered row groups, each of which is fetched in one go: those of Parquet shards, some tiles of a
    slide, a shard of a tar file. The order is computed from `group_rows` alone, so it is the same for everything
    that has equal ones; a row group of some 64 rows mixes well and costs few requests.

    The reader's threads call `read`, decode workers `decode`, in other processes, too, than the one that made the
    source. So it must be fit for pickling, forking and threads, and hold no open file, connection or lock.

    A source may also have ``location``, the path or URL that it was found at, with the commit where there is one;
    ``summary``, what it holds in a few words for the log; and ``is_endless``, true where it is drawn without end
    and therefore cannot be mixed with others; ``order(seed, lanes, block_rows)``, an order of its own; and
    ``origins(group)``, an `Origin` of every row of a row group, where the dataset knows more than the slide.
    """

    group_rows: np.ndarray
    """Rows of each row group, int64 (G,); zeros are allowed, but not only zeros."""
    group_bytes: np.ndarray
    """Bytes that the samples of each row group take in memory, int64 (G,); an upper estimate."""
    fingerprint: str
    """Digest of names, sizes and layout, not of the location: equal ones mean equal samples in equal order."""
    num_rows: int
    """Sum of `group_rows`."""
    is_remote: bool
    """Whether a read waits for a network, so that many reads at a time pay."""

    def read(self, group: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the slide name and stored bytes of some rows of a row group, in the order asked for.

        What is corrupt comes as bytes that `decode` refuses; another row then stands in. An OSError ends the run.
        """

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Turn a sample's bytes into uint8 (H, W, 3) RGB; raises DecodeError where they are no image."""

    def describe(self, group: int, row: int | None = None) -> str:
        """Name a row group, or one of its rows as it is stored, for a message to the user."""

    def slides(self, group: int) -> list[str]:
        """Name the slide of every row of a row group, without reading images where that can be."""


def origins_of(source: Source, group: int) -> list[Origin]:
    """Origin of every row of a row group, whether or not the source knows more than the slide."""
    return source.origins(group) if hasattr(source, "origins") else as_origins(source.slides(group))


def image_format(data: bytes) -> str:
    """One of `FORMATS` by the first bytes; empty if it is none of them."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in _STARTS if data.startswith(start)), "")


def decode_image(data: bytes, raw_size: int = 0) -> np.ndarray:
    """Decode one tile to uint8 (H, W, 3) RGB, C-contiguous and writable.

    Grey, palette and CMYK images become RGB, alpha is dropped, 16-bit samples keep their upper 8 bits, EXIF orientation
    is applied, of several pages the first is taken. Bytes after the image do not matter. DecodeError if `data` is no
    such image, is cut short, or has samples whose scale is unknown.

    Args:
        data: a whole file of one of `FORMATS`, told apart by their first bytes, or raw pixels.
        raw_size: side in pixels of a raw uint8 RGB tile; 0 if `data` is a file.
    """
    if raw_size:
        if len(data) != raw_size * raw_size * 3:
            expected = f"{raw_size}x{raw_size}x3 = {raw_size * raw_size * 3}"
            raise DecodeError(f"{len(data)} raw bytes where a uint8 RGB tile takes {expected}")
        return np.frombuffer(data, np.uint8).reshape(raw_size, raw_size, 3).copy()
    name = image_format(data)
    if not name:
        accepted = f"{', '.join(FORMATS[:-1])} and {FORMATS[-1]} are accepted"
        raise DecodeError(f"{len(data)} bytes beginning {data[:8]!r} are no image that is known; {accepted}")
    if name == "JPEG":
        return _by_opencv(name, _whole_jpeg(data), cv2.IMREAD_COLOR)
    if name != "PNG":
        return _by_pillow(name, data)
    # OpenCV and libpng fill in what is missing from a truncated file, some versions silently.
    if _PNG_END not in data[-_TAIL:] and _PNG_END not in data:
        raise _cut_short(name, data)
    if data[24:25] == b"\x10":  # bits of a sample
        return _upper_8_bits(name, _by_opencv(name, data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH))
    return _by_opencv(name, data, cv2.IMREAD_COLOR)


def _by_opencv(name: str, data: bytes, flags: int) -> np.ndarray:
    refused = f"OpenCV cannot decode a {name} file of {len(data)} bytes"
    if name == "JPEG":
        refused += "; 8-bit samples, baseline or progressive, are accepted"
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DecodeError(f"{refused} ({error.err})") from error
    if image is None:
        raise DecodeError(refused)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _by_pillow(name: str, data: bytes) -> np.ndarray:
    """Decode a file of a format that Pillow tells from a truncated one; of TIFF, what it reads rightly."""
    try:
        with Image.open(io.BytesIO(data), formats=[name.replace(" ", "")]) as image:
            tags = getattr(image, "tag_v2", {})
            # Pillow takes some codecs for uncompressed data, signed samples for unsigned ones, and 16 bits for 8.
            is_unsigned = set(tags.get(_TIFF_SAMPLES, (1,))) <= {1, 4}
            if is_unsigned and max(tags.get(_TIFF_BITS, (1,))) <= 8 and tags.get(_TIFF_CODEC, 1) in _PILLOW_TIFF_CODECS:
                if name != "JPEG 2000" or (bits := _jpeg_2000_bits(data)) <= 8:
                    pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
                    return pixels if name != "JPEG 2000" or bits == 8 else _of_few_bits(pixels, bits)
                if image.mode.startswith("I;16"):  # scaled to 16 bits
                    return _upper_8_bits(name, np.asarray(image))
                # In colours Pillow rounds 255.5 to 0.
                samples = _by_opencv(name, data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
                return _upper_8_bits(name, samples << (16 - bits))
        return _by_tifffile(data)
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        if name == "TIFF":
            return _by_tifffile(data)
        raise DecodeError(f"Pillow cannot decode a {name} file of {len(data)} bytes") from error
    except Exception as error:  # its parsers let through whatever corrupt bytes make them stumble over
        raise DecodeError(f"Pillow cannot decode a {name} file of {len(data)} bytes ({error})") from error


def _of_few_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of up to 7 bits, which Pillow has shifted to the upper end of uint8, scaled to 0 to 255."""
    return np.rint((samples >> (8 - bits)) * (255 / ((1 << bits) - 1))).astype(np.uint8)


def _jpeg_2000_bits(data: bytes) -> int:
    """Bits of a sample, from the byte for the first component in the codestream's header."""
    return data[data.index(_JPEG_2000_SIZES) + 42] % 128 + 1


def _by_tifffile(data: bytes) -> np.ndarray:
    """Decode a TIFF file of 16-bit samples or of a recent codec."""
    try:
        import tifffile
    except ImportError as error:
        raise DecodeError(f"this kind of TIFF file needs tifffile; {how_to_install('slides')}") from error
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            page = tiff.pages[0]
            samples, axes = page.asarray(), page.axes
            kind, bits = tifffile.PHOTOMETRIC(page.photometric).name, page.bitspersample
            turned = page.tags.valueof("Orientation", 1) != 1
    except Exception as error:  # as in `_by_pillow`
        raise DecodeError(f"tifffile cannot decode a TIFF file of {len(data)} bytes ({error})") from error
    if samples.dtype not in (np.uint8, np.uint16) or kind not in _TIFFFILE_COLOURS or turned:
        found = f"a TIFF file of {samples.dtype} samples, colours {kind}" + ", to be turned" * turned
        raise DecodeError(f"{found}; uint8 and uint16, {', '.join(_TIFFFILE_COLOURS)}, upright, are accepted")
    if axes[0] == "S":
        samples = np.moveaxis(samples, 0, 2)
    if kind == "MINISWHITE":
        samples = (1 << bits) - 1 - samples
    samples = np.atleast_3d(samples)
    colours = samples[..., : 3 if samples.shape[2] >= 3 else 1]
    if samples.dtype == np.uint8:
        return np.array(np.broadcast_to(colours, (*colours.shape[:2], 3)), order="C")
    return _upper_8_bits("TIFF", colours << (16 - bits))


def _upper_8_bits(name: str, samples: np.ndarray) -> np.ndarray:
    """Samples uint16 (H, W) or (H, W, 3) as uint8 RGB; DecodeError where they seem to be of fewer bits, not scaled."""
    bits = (largest := int(samples.max())).bit_length()
    if 0 < bits < _SCALED_BITS:
        found = f"a {name} file of 16-bit samples up to {largest}, as of {bits} bits that are not scaled"
        raise DecodeError(f"{found}; 8-bit samples, or 16-bit ones that reach up to 65535, are accepted")
    return np.array(np.broadcast_to(np.atleast_3d(samples >> 8), (*samples.shape[:2], 3)), np.uint8, order="C")


def _whole_jpeg(data: bytes) -> bytes:
    """Return a JPEG file, ended where only its end mark is missing; DecodeError if it is cut short.

    OpenCV and libjpeg fill in what is missing from a truncated file, some versions silently. The data of a scan hold no
    mark, so an end mark behind the last scan's beginning is the image's own, whatever follows it.
    """
    if _JPEG_END in data[-_TAIL:] or data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN):
        return data
    padded = data.rstrip(b"\0")
    if padded.endswith(b"\xff"):  # in a scan a byte of 255 is stored with a zero after it
        padded = data[: len(padded) + 1]
    kept = padded.rstrip(b"\xff")  # half an end mark
    # If the only scan is whole, no pixel depends on what follows it. Pillow, since libjpeg would write to stderr.
    ends = (kept + filler * 64 + _JPEG_END for filler in (b"\x55", b"\xaa"))
    try:
        first, second = (Image.open(io.BytesIO(end), formats=["JPEG"]).tobytes() for end in ends)
    except Exception as error:  # as in `_by_pillow`
        raise _cut_short("JPEG", data) from error
    if first != second or data.count(_JPEG_SCAN) != 1:
        raise _cut_short("JPEG", data)
    return kept + _JPEG_END


def _cut_short(name: str, data: bytes) -> DecodeError:
    return DecodeError(f"a {name} file of {len(data)} bytes is cut short")


@dataclass(frozen=True)
class SourceRequest:
    """Dataset that a kind of data is to open."""

    path: str  # as configured
    revision: str  # branch, tag or commit of it; in a resumed run the commit of its first launch
    config: Config
    options: Any  # the kind's section in data.options, or its defaults; None where it has no Options
    cache: Path | None  # file that this dataset has to itself in the run's folder, for an index; None keeps none
    # Whether a slide is trained on, by its name and, where that is told, its patient. A kind asks it of every slide, or
    # of none, as most do: the rows of patients that are excluded or kept for validation are then left out of what it
    # opened.
    keep: Callable[..., bool]


class SourceKind(Protocol):
    """A kind of data, registered in `dinov2.extensions.SOURCES` by the name that ``data.kind`` has for it.

    Its class may hold a dataclass ``Options``, the keys of its section ``data.options.NAME``. The module is
    imported whenever a path is to be recognised; what takes long to import belongs into `open`.
    """

    accepts: str  # the paths that it can open, in words: "tiles in tar files (a folder, glob or URL of them)"

    def recognises(self, path: str) -> bool:
        """Whether a path is of this kind, by names and first bytes alone; nothing is asked of a network."""

    def open(self, request: SourceRequest) -> Source:
        """Open a dataset; FileNotFoundError, ValueError or OSError say in one sentence why it cannot be."""

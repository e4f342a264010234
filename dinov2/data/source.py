"""Sources of tiles: their protocol, the rows they hand out, and the decoding of stored bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from dinov2.configs import Config

_MARKS = {  # format: first bytes, last bytes
    "JPEG": (b"\xff\xd8\xff", b"\xff\xd9"),
    "PNG": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
}
_TAIL = 256  # bytes in which to look for the end mark, since some writers pad their files


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
    """Tell PNG from JPEG by the first bytes; empty if they are neither."""
    return next((name for name, (start, _) in _MARKS.items() if data.startswith(start)), "")


def decode_image(data: bytes, raw_size: int = 0) -> np.ndarray:
    """Decode one tile to uint8 (H, W, 3) RGB, C-contiguous and writable.

    Grey and palette images become RGB, alpha is dropped, 16-bit samples keep their upper 8 bits, and EXIF
    orientation is ignored. DecodeError if `data` is no such image, or is cut short.

    Args:
        data: a whole PNG or JPEG file, told apart by their first bytes, or raw pixels.
        raw_size: side in pixels of a raw uint8 RGB tile; 0 if `data` is a PNG or JPEG file.
    """
    if raw_size:
        if len(data) != raw_size * raw_size * 3:
            expected = f"{raw_size}x{raw_size}x3 = {raw_size * raw_size * 3}"
            raise DecodeError(f"{len(data)} raw bytes where a uint8 RGB tile takes {expected}")
        return np.frombuffer(data, np.uint8).reshape(raw_size, raw_size, 3).copy()
    name = image_format(data)
    if not name:
        raise DecodeError(f"{len(data)} bytes beginning {data[:8]!r} are neither PNG nor JPEG")
    # OpenCV and libjpeg fill in what is missing from a truncated file, some versions silently.
    if _MARKS[name][1] not in data[-_TAIL:]:
        raise DecodeError(f"a {name} file of {len(data)} bytes is cut short")
    refused = f"OpenCV cannot decode a {name} file of {len(data)} bytes"
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise DecodeError(f"{refused} ({error.err})") from error
    if image is None:
        raise DecodeError(refused)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


@dataclass(frozen=True)
class SourceRequest:
    """Dataset that a kind of data is to open."""

    path: str  # as configured
    revision: str  # branch, tag or commit of it; in a resumed run the commit of its first launch
    config: Config
    options: Any  # the kind's section in data.options, or its defaults; None where it has no Options
    cache: Path | None  # file that this dataset has to itself in the run's folder, for an index; None keeps none
    # Whether a slide is trained on. A kind asks it of every slide, or, as most do, of none: the rows of patients that
    # are excluded or kept for validation are then left out of what it opened.
    keep: Callable[[str], bool]


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

"""What a source of data is, what it hands out, and how stored bytes become pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

_MARKS = {  # format: first bytes, last bytes
    "JPEG": (b"\xff\xd8\xff", b"\xff\xd9"),
    "PNG": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
}
_TAIL = 256  # bytes in which to look for the end mark, since some writers pad their files


class DecodeError(ValueError):
    """The stored bytes of one row are not an image we can read."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One row as stored, on its way from the rank's reader to a decode worker.

    Attributes:
        index: Global sample index g; it alone fixes the row and the augmentation.
        unit: Unit (row group) number in the source.
        row: Row within the unit.
        slide: Slide the tile was cut from.
        data: The stored bytes.
    """

    index: int
    unit: int
    row: int
    slide: str
    data: bytes


class Source(Protocol):
    """A dataset cut into units, each fetched in one go; methods may be called from any thread or process.

    Attributes:
        unit_rows: Rows of each unit, int64 (U,); zeros are allowed, but not only zeros.
        unit_bytes: Bytes that the samples of each unit take in memory, int64 (U,); an upper estimate.
        fingerprint: Identifies names, sizes and layout: equal fingerprints mean equal samples in equal order.
        num_rows: Sum of `unit_rows`.
        is_remote: Whether a read waits for a network.
    """

    unit_rows: np.ndarray
    unit_bytes: np.ndarray
    fingerprint: str
    num_rows: int
    is_remote: bool

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the slide name and stored bytes of some rows of a unit, in the order asked for."""

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Turn a sample's bytes into uint8 (H, W, 3) RGB; raises DecodeError where they are no image."""

    def describe(self, unit: int, row: int | None = None) -> str:
        """Name a unit, or one of its rows as it is stored, for a message to the user."""

    def slides(self, unit: int) -> list[str]:
        """Name the slide of every row of a unit, without reading images where that can be."""


def decode_image(data: bytes, raw_size: int = 0) -> np.ndarray:
    """Decode one tile to uint8 (H, W, 3) RGB, C-contiguous and writable.

    Grey and palette images become RGB, alpha is dropped, 16-bit samples keep their upper 8 bits, and EXIF
    orientation is ignored. OpenCV and libjpeg fill in what is missing from a truncated file, some versions
    silently, so the end mark is checked first.

    Args:
        data: A whole PNG or JPEG file, told apart by their first bytes, or raw pixels.
        raw_size: Side in pixels of a raw uint8 RGB tile; 0 if `data` is a PNG or JPEG file.

    Raises:
        DecodeError: If `data` is neither, or is cut short.
    """
    if raw_size:
        if len(data) != raw_size * raw_size * 3:
            expected = f"{raw_size}x{raw_size}x3 = {raw_size * raw_size * 3}"
            raise DecodeError(f"{len(data)} raw bytes where a uint8 RGB tile takes {expected}")
        return np.frombuffer(data, np.uint8).reshape(raw_size, raw_size, 3).copy()
    name = next((name for name, (start, _) in _MARKS.items() if data.startswith(start)), None)
    if name is None:
        raise DecodeError(f"{len(data)} bytes beginning {data[:8]!r} are neither PNG nor JPEG")
    if _MARKS[name][1] not in data[-_TAIL:]:
        raise DecodeError(f"a {name} file of {len(data)} bytes is cut short")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise DecodeError(f"OpenCV cannot decode a {name} file of {len(data)} bytes ({error.err})") from error
    if image is None:
        raise DecodeError(f"OpenCV cannot decode a {name} file of {len(data)} bytes")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)

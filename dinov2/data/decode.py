"""Stored bytes to pixels: PNG, JPEG or raw."""

import cv2
import numpy as np

from dinov2.data.source import DecodeError

_MARKS = {  # format: first bytes, last bytes
    "JPEG": (b"\xff\xd8\xff", b"\xff\xd9"),
    "PNG": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
}
_TAIL = 256  # bytes in which to look for the end mark, since some writers pad their files


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

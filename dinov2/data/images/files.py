"""Files of images by their names."""

from dinov2.data.storage.base import FileType

IMAGES = FileType(
    "image", (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".jp2", ".j2k"), True
)
"""Formats that `dinov2.data.source.decode_image` reads; the first bytes of a file decide, not its name."""


UNREAD = (".gif", ".avif", ".heic", ".heif", ".jxl", ".jxr", ".jls", ".ppm", ".pgm", ".pnm", ".tga")
"""Endings of images in formats that `decode_image` does not read."""

_HIDDEN = ("/.", "/__MACOSX/")


def is_image(name: str) -> bool:
    """Whether a member of an archive is an image, and neither it nor a folder that it lies in is hidden."""
    return IMAGES.fits(name) and not any(part in f"/{name}".replace("/./", "/") for part in _HIDDEN)

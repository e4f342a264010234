"""Files that no reader opens: the sentence names what they are."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.data.slides.errors import SlideOpenError
from dinov2.data.slides.reader import SlideReader


def _gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "gif")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.czi", b"ZISRAWFILE" + bytes(range(256)) * 9, "CZI"),
        ("a.isyntax", b"<DataObject" + bytes(range(256)), "Philips iSyntax"),
        ("a.svs", gzip.compress(b"II*\0", mtime=0), "gzip"),
        ("a.png", _gif(), "GIF"),
        ("a.svs", b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "version https"),
        ("a.tif", bytes(9000), "9000 bytes"),
        ("a.mrxs", b"\x89junk\0" * 9, "Slidedat.ini"),
        ("a.vms", b"[Virtual Microscope Specimen]\nImageFile=one.jpg\nMapFile=two.jpg\n", "one.jpg"),
    ],
)
def test_what_it_is_is_named(tmp_path: Path, name: str, content: bytes, named: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideOpenError, match=named):
        SlideReader(tmp_path / name)


@pytest.mark.parametrize("kind", ["float32", "int16", "uint32"])
@pytest.mark.parametrize("tile", [None, (256, 256)])
def test_samples_without_a_known_scale_are_refused_when_opened(tmp_path: Path, kind: str, tile: object):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 300, 3)).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=tile)
    with pytest.raises(SlideOpenError, match=kind):
        SlideReader(tmp_path / "a.tif")

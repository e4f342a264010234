"""Slides for the tests: the demo's, small ones made here, corrupt ones, and real ones where there are any."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from prepatching_scripts.create_sample_dataset_txt import main as create_list
from prepatching_scripts.make_demo_slide import make_demo_slides

MakeSlide = Callable[..., Path]

cv2.setNumThreads(1)  # OpenCV's threads do not survive a fork, and some of these tests fork


@pytest.fixture(scope="session")
def demo_slides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's train and hold-out slide."""
    return make_demo_slides(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def train_slide(demo_slides: tuple[Path, Path]) -> Path:
    """The demo's train slide: three levels, 0.25 um/px."""
    return demo_slides[0]


@pytest.fixture(scope="session")
def stored_levels(train_slide: Path) -> list[np.ndarray]:
    """Every pyramid level of the train slide as tifffile decodes it, independently of OpenSlide."""
    with tifffile.TiffFile(train_slide) as tiff:
        return [page.asarray() for page in tiff.pages if page.is_tiled]


def real_slide(name: str) -> Path:
    """A slide from the folder in PATHFM_SLIDES_DIR; skips the test where there is none."""
    slide = Path(os.environ.get("PATHFM_SLIDES_DIR", ""), name).resolve()
    if not slide.is_file():
        pytest.skip(f"there is no {slide}")
    return slide


@pytest.fixture
def jpeg_slide() -> Path:
    """A real slide with one JPEG level at 0.499 um/px."""
    return real_slide("cmu-1-small-region.svs")


@pytest.fixture
def jpeg2000_slide() -> Path:
    """A real slide with two JPEG 2000 levels that does not say its resolution."""
    return real_slide("tcga-cr-7395-01a-01-ts1.svs")


@pytest.fixture
def make_slide(tmp_path: Path) -> MakeSlide:
    """Write a one-level Aperio file with a chosen description; the image is pink by default."""

    def make(name: str, properties: str = "", image: np.ndarray | None = None) -> Path:
        image = np.full((512, 512, 3), (225, 150, 190), np.uint8) if image is None else image
        height, width = image.shape[:2]
        size = f"{width}x{height}"
        description = f"Aperio Image Library v12.0.15 \r\n{size} [0,0 {size}] (256x256) {properties}"
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, image, tile=(256, 256), description=description, metadata=None, software=None,
                         photometric="rgb", compression="jpeg")  # fmt: skip
        return path

    return make


def damage_tile(slide: Path, copy: Path, tile: int, *, empty: bool) -> Path:
    """Copy a slide and make one level-0 tile of it zero bytes long, or fill it with garbage."""
    copy.write_bytes(slide.read_bytes())
    with tifffile.TiffFile(copy, mode="r+") as tiff:
        counts, offset = list(tiff.pages[0].databytecounts), tiff.pages[0].dataoffsets[tile]
        if empty:
            tiff.pages[0].tags["TileByteCounts"].overwrite([0 if i == tile else n for i, n in enumerate(counts)])
    if not empty:
        with copy.open("r+b") as file:
            file.seek(offset)
            file.write(b"\x89" * counts[tile])
    return copy


def write_encoded(path: Path, tiles: Iterable[bytes], compression: int, description: str = "") -> Path:
    """Write a level of 500x300 px from encoded 256x256 tiles (four); TIFF compression 7, 33003 or 33005."""
    size = "500x300"
    description = description or f"Aperio Image Library v12.0.15 \r\n{size} [0,0 {size}] (256x256)|AppMag = 20"
    tifffile.imwrite(path, iter(tiles), shape=(300, 500, 3), dtype=np.uint8, tile=(256, 256), metadata=None,
                     compression=compression, photometric="rgb", description=description, software=None)  # fmt: skip
    return path


@pytest.fixture
def openslide_only(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A slide of two levels that only OpenSlide reads (palette), 0.5 um/px, and its first level in RGB."""
    path, rng = tmp_path / "palette.tif", np.random.default_rng(0)
    image, colours = rng.integers(0, 256, (600, 500), np.uint8), rng.integers(0, 256, (256, 3), np.uint8)
    table = colours.T.astype(np.uint16) * 257
    plain = {"tile": (256, 256), "compression": "lzw", "photometric": "palette", "colormap": table, "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, resolution=(20000, 20000), resolutionunit="CENTIMETER", **plain)
        tiff.write(image[::2, ::2].copy(), subfiletype=1, **plain)
    return path, colours[image]


def overwrite(slide: Path, copy: Path, start: int, data: bytes) -> Path:
    """Copy a slide and put other bytes into it."""
    whole = bytearray(slide.read_bytes())
    whole[start : start + len(data)] = data
    copy.write_bytes(whole)
    return copy


@pytest.fixture(scope="session")
def sample_list(demo_slides: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 tiles on each of two levels of each demo slide."""
    path = tmp_path_factory.mktemp("list") / "list.txt"
    options = ["--levels", "0", "1", "--per-level", "75", "--seed", "3", "--workers", "1"]
    assert create_list([str(demo_slides[0].parent), "--output", str(path), *options]) == 0
    return path


@pytest.fixture(scope="session")
def short_list(sample_list: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 128 of these tiles."""
    path = tmp_path_factory.mktemp("short") / "list.txt"
    path.write_text("".join(sample_list.read_text().splitlines(keepends=True)[:128]))
    return path

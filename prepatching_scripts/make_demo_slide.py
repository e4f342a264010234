"""Make two small haematoxylin-eosin slides for the demo and tests, from a micrograph in scikit-image.

The micrograph is stained with haematoxylin and DAB. Colour deconvolution takes the two stains apart, and each
is painted again in the colours of a haematoxylin-eosin slide. `demo_train.svs` shows the upper part of the
tissue, `demo_holdout.svs` the lower part: no pixel is in both.

DAB marks glands, so that the micrograph also says what tissue the tiles of the lower part show: `--labelled FOLDER`
writes such tiles as PNG, and their classes into `labels.csv`.
"""

import csv
import io
import logging
from itertools import product
from pathlib import Path

import cv2
import numpy as np

from dinov2.utils.cli import command_parser, run_command
from dinov2.utils.files import replacing, write_text

logger = logging.getLogger("make_demo_slide")

TRAIN_ROWS, HOLDOUT_ROWS = slice(0, 336), slice(344, 512)  # rows of the micrograph, a gap between them
ENLARGEMENT = 3
MARGIN_PX = 384  # white canvas on every side, which the tissue rule has to reject
DOWNSAMPLES = (1, 2, 4)
MPP_UM, OBJECTIVE_POWER = 0.25, 40
TILE_PX, JPEG_QUALITY = 256, 90

DAB_OD = 0.4  # optical density above which a pixel counts as stained with DAB
STROMA_BELOW, GLAND_ABOVE = 0.35, 0.65  # fraction of such pixels; tiles between the two are left out
LABELLED_PX, STRIDE_PX = 32, 16  # of the micrograph: side of a tile, grid
REGION_PX = 84, 64  # height and width of a region

# Optical density per unit of stain, for red, green and blue light.
HAEMATOXYLIN_OD = np.array([0.65, 0.70, 0.29])
EOSIN_OD = np.array([0.18, 0.85, 0.45])


def render_haematoxylin_eosin(micrograph: np.ndarray) -> np.ndarray:
    """Repaint a haematoxylin-DAB micrograph as haematoxylin-eosin.

    Nuclei keep their haematoxylin. DAB marks the cytoplasm of glands and becomes eosin; blurred haematoxylin
    stands in for the stroma, which DAB leaves colourless. Eosin saturates: e = 0.55 (1 - exp(-x)). Both images are
    uint8 (H, W, 3) RGB.
    """
    from skimage.color import rgb2hed

    density = rgb2hed(micrograph) * -np.log(1e-6)  # scikit-image counts stain in units of ln(1e6)
    nuclei = np.clip(density[..., 0] - 0.10, 0, None)
    gland = np.clip(density[..., 2] - 0.13, 0, None)
    stroma = cv2.GaussianBlur(nuclei, (0, 0), 3)
    eosin = 0.55 * (1 - np.exp(-(0.75 * gland + 2.2 * stroma)))
    optical_density = 1.9 * nuclei[..., None] * HAEMATOXYLIN_OD + eosin[..., None] * EOSIN_OD
    return np.rint(255 * np.exp(-optical_density)).astype(np.uint8)


def set_on_canvas(tissue: np.ndarray) -> np.ndarray:
    """Enlarge a uint8 (H, W, 3) image and centre it on white; every downsample divides the new sides."""
    height, width = (ENLARGEMENT * side for side in tissue.shape[:2])
    enlarged = cv2.resize(tissue, (width, height), interpolation=cv2.INTER_CUBIC)
    step = max(DOWNSAMPLES)
    canvas_height, canvas_width = (-(-(side + 2 * MARGIN_PX) // step) * step for side in (height, width))
    canvas = np.full((canvas_height, canvas_width, 3), 255, np.uint8)
    canvas[MARGIN_PX : MARGIN_PX + height, MARGIN_PX : MARGIN_PX + width] = enlarged
    return canvas


def write_aperio_slide(path: Path, image: np.ndarray) -> None:
    """Write a uint8 (H, W, 3) RGB image as a pyramidal Aperio-style SVS with JPEG tiles.

    The file is whole or absent. Page 1 is the stripped thumbnail that readers of SVS expect.
    """
    from tifffile import TiffWriter

    height, width = image.shape[:2]
    levels = [cv2.resize(image, (width // d, height // d), interpolation=cv2.INTER_AREA) for d in DOWNSAMPLES]
    thumbnail = cv2.resize(image, (width // 8, height // 8), interpolation=cv2.INTER_AREA)
    source = f"Aperio Image Library v12.0.15 \r\n{width}x{height} [0,0 {width}x{height}]"
    tiled = f"{source} ({TILE_PX}x{TILE_PX})"
    # "rgb" is what goes in; tifffile stores JPEG as YCbCr and tags it so.
    jpeg = {"photometric": "rgb", "subsampling": (2, 2), "compression": "jpeg"}
    jpeg |= {"compressionargs": {"level": JPEG_QUALITY}, "subfiletype": 0, "metadata": None, "software": None}
    scale = f"AppMag = {OBJECTIVE_POWER}|MPP = {MPP_UM}"
    with replacing(path) as partial, TiffWriter(partial, bigtiff=True) as tiff:
        for index, level in enumerate(levels):
            size = "" if index == 0 else f" -> {level.shape[1]}x{level.shape[0]}"
            description = f"{tiled}{size} JPEG/RGB Q={JPEG_QUALITY}|{scale}"
            tiff.write(level, tile=(TILE_PX, TILE_PX), description=description, **jpeg)
            if index == 0:
                size = f" -> {thumbnail.shape[1]}x{thumbnail.shape[0]}"
                tiff.write(thumbnail, rowsperstrip=16, description=f"{source}{size} - |{scale}", **jpeg)


def make_demo_slides(output_dir: Path) -> tuple[Path, Path]:
    """Write `demo_train.svs` and `demo_holdout.svs` into a folder; FileExistsError if one of them is there already."""
    from skimage.data import immunohistochemistry

    paths = output_dir / "demo_train.svs", output_dir / "demo_holdout.svs"
    for path in paths:
        if path.exists():
            raise FileExistsError(f"'{path}' exists already; name another --output-dir or move it away.")
    output_dir.mkdir(parents=True, exist_ok=True)
    stained = render_haematoxylin_eosin(immunohistochemistry())
    for path, rows in zip(paths, (TRAIN_ROWS, HOLDOUT_ROWS), strict=True):
        write_aperio_slide(path, set_on_canvas(stained[rows]))
        logger.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    return paths


def write_labelled_tiles(folder: Path) -> None:
    """Write tiles of the hold-out part into a new folder, with ``labels.csv`` (file, label, patient).

    A ``patient`` is a region of the micrograph. Tiles overlap within a region, and no pixel is in two regions: what is
    fitted on some regions can be judged on the others.
    """
    from skimage.color import rgb2hed
    from skimage.data import immunohistochemistry

    micrograph = immunohistochemistry()
    is_gland = (rgb2hed(micrograph)[..., 2] * -np.log(1e-6) > DAB_OD)[HOLDOUT_ROWS]
    tissue = render_haematoxylin_eosin(micrograph)[HOLDOUT_ROWS]
    enlarged = cv2.resize(tissue, None, fx=ENLARGEMENT, fy=ENLARGEMENT, interpolation=cv2.INTER_CUBIC)
    folder.mkdir(parents=True)
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(("file", "label", "patient"))
    for number, (top, left) in enumerate(product(*map(_starts, is_gland.shape, REGION_PX, REGION_PX))):
        for y, x in product(*(_starts(side, LABELLED_PX, STRIDE_PX) for side in REGION_PX)):
            rows, columns = (slice(start, start + LABELLED_PX) for start in (top + y, left + x))
            stained = is_gland[rows, columns].mean()
            if STROMA_BELOW <= stained <= GLAND_ABOVE:
                continue
            name = f"{rows.start:03}_{columns.start:03}.png"
            rows, columns = (slice(ENLARGEMENT * part.start, ENLARGEMENT * part.stop) for part in (rows, columns))
            cv2.imwrite(str(folder / name), enlarged[rows, columns, ::-1])
            lines.writerow((name, "gland" if stained > GLAND_ABOVE else "stroma", f"region {number}"))
    write_text(folder / "labels.csv", [table.getvalue()])


def _starts(length: int, side: int, step: int) -> range:
    """Where parts of a side begin that lie wholly within a length."""
    return range(0, length - side + 1, step)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns an exit status of `dinov2.utils.cli`."""
    parser = command_parser(
        "python prepatching_scripts/make_demo_slide.py",
        __doc__.splitlines()[0],
        "--output-dir slides --labelled labelled",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the two slides")
    parser.add_argument("--labelled", type=Path, metavar="FOLDER", help="new folder for labelled tiles")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def body() -> None:
        make_demo_slides(args.output_dir)
        if args.labelled:
            write_labelled_tiles(args.labelled)

    return run_command(body, logger)


if __name__ == "__main__":
    raise SystemExit(main())

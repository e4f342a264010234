"""Previews of what was drawn from slides: thumbnail, outline of the tissue, squares of the tiles."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from dinov2.data.prepare.draw import SlideDraw, SlideJob
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tissue import TissueMap
from dinov2.utils.files import replacing, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

INDEX = "index.html"
MARK = "Path-FM preview"  # text chunk of the PNG: what it shows
THUMBNAIL_PX, MIN_THUMBNAIL_PX = 1500, 1000
COLOURS = ("#007a33", "#0047ff", "#ff7a00", "#00a3b4", "#111111", "#c00000")  # none is of the stain
_DPI, _BLOCK_PX = 100, 2048
_CROWDED = 3  # times that the squares of a kind cover the slide, from which their lines are thin
_MISSING = 225  # grey of pixels that the file does not hold
_FILL, _LINE = 0.12, 0.7  # opacity of squares: tissue and overlaps are seen through them
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ mark }}</title>
<style>
body { font: 15px sans-serif; margin: 1em }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(18em, 1fr)); gap: 1em }
img { width: 100% }
figure { margin: 0 }
</style></head>
<body><h1>Slides, their tissue and their tiles</h1>
<main>{% for name, told in slides %}
<figure>{% if told %}<b>{{ name }}</b>: {{ told }}{% else %}<a href="{{ name | urlencode }}.png">
<img loading="lazy" alt="{{ name }}" src="{{ name | urlencode }}.png"></a>
<figcaption>{{ name }}</figcaption>{% endif %}</figure>{% endfor %}
</main></body></html>
"""


def preview_mark(path: Path) -> str | None:
    """Contents of the preview at `path`, None where there is no file; FileExistsError if the file is no preview."""
    try:
        with Image.open(path) as image:
            mark = image.info.get(MARK)
    except FileNotFoundError:
        return None
    except UnidentifiedImageError:
        mark = None
    if mark is None:
        raise FileExistsError(f"'{path}' exists and is no preview; give another --preview or move it away.")
    return mark


def draw_preview(job: SlideJob, draw: SlideDraw, path: Path, mark: str) -> None:
    """Write the preview of a slide as PNG, unless the one at `path` bears the mark of all that it depends on."""
    if preview_mark(path) == mark:
        return
    figure = preview_figure(SlideReader(job.path, job.mpp), job, draw)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=_DPI, metadata={MARK: mark})


def write_index(folder: Path, slides: Sequence[tuple[str, str]]) -> None:
    """Write a page of all previews of a folder, unless a file of its name is another's.

    Args:
        slides: path of each preview below the folder, without its ending, and why it is missing, if it is.
    """
    from jinja2 import Environment

    path = folder / INDEX
    if path.exists() and f"<title>{MARK}</title>" not in path.read_text(errors="replace"):
        logger.warning("'%s' is not of previews, and is left as it is.", path)
        return
    folder.mkdir(parents=True, exist_ok=True)
    page = Environment(autoescape=True).from_string(_PAGE)
    write_text(path, page.render(mark=MARK, slides=slides))


def preview_figure(reader: SlideReader, job: SlideJob, draw: SlideDraw) -> Figure:
    """Thumbnail with the outline of the tissue map and one square per tile, coloured by level or mpp."""
    from matplotlib.figure import Figure

    image, scale = thumbnail(reader)
    height, width = (side / _DPI for side in image.shape[:2])
    kinds = sorted({(float(mpp), int(row[2])) for row, mpp in zip(draw.rows, draw.mpp, strict=True)})
    page_width, head, foot = max(width, 8.0), 0.65, 0.3 * -(-(len(kinds) + len(draw.skipped) + 1) // 3) + 0.2
    page_height = height + head + foot
    figure = Figure(figsize=(page_width, page_height), facecolor="white")
    left = (page_width - width) / 2 / page_width
    axis = figure.add_axes((left, foot / page_height, width / page_width, height / page_height))
    extent = (0, image.shape[1] * scale, image.shape[0] * scale, 0)
    axis.imshow(image, extent=extent, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("lightgrey")
    _outline(axis, TissueMap(reader, job.sampling.rule), job.sampling.rule.min_fraction)
    for (mpp, level), colour in zip(kinds, COLOURS * len(kinds), strict=False):
        rows = draw.rows[(draw.mpp == np.float32(mpp)) & (draw.rows[:, 2] == level)]
        size = job.sampling.tile_size
        side = reader.tile_side(size, mpp) if mpp else size * reader.level_downsamples[level]
        _squares(axis, rows[:, :2], side, colour, f"{_kind(reader, mpp, level)}: {len(rows)}")
    for mpp in draw.skipped:
        axis.plot([], [], " ", label=f"{_kind(reader, mpp, None)}: none")
    axis.set(xlim=extent[:2], ylim=extent[2:])
    if reader.mpp is not None:
        _scale_bar(axis, reader.mpp, extent[1])
    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 0), "ncols": 3}
    figure.legend(*axis.get_legend_handles_labels(), fontsize=9, frameon=False, **where)
    own = "mpp unknown" if reader.mpp is None else f"{reader.mpp:.4g} µm/px ({reader.mpp_source})"
    found = f"{len(draw.rows):,} tiles" if len(draw.rows) else draw.failure
    title = "{}\n{:,} x {:,} px, {}; {}".format(Path(reader.path).name, *reader.level_dimensions[0], own, found)
    figure.text(0.5, 1 - 0.12 / page_height, title, ha="center", va="top", fontsize=10)
    return figure


def thumbnail(reader: SlideReader) -> tuple[np.ndarray, float]:
    """The slide at most 1500 px wide and high, uint8 (H, W, 3) RGB, and the level-0 px per px of it."""
    sides = [max(size) for size in reader.level_dimensions]
    level = max((i for i, side in enumerate(sides) if side >= MIN_THUMBNAIL_PX), default=0)
    shrink = max(1, sides[level] // THUMBNAIL_PX)
    width, height = (side // shrink * shrink for side in reader.level_dimensions[level])
    image = np.empty((height // shrink, width // shrink, 3), np.uint8)
    for column, row, pixels, known in reader.read_blocks(level, max(1, _BLOCK_PX // shrink) * shrink):
        # A remainder at the right and lower edge, less than a pixel of the thumbnail, is left out.
        shape = tuple(side // shrink for side in known.shape)
        if min(shape):
            pixels = np.where(known[..., None], pixels, np.uint8(_MISSING))[: shape[0] * shrink, : shape[1] * shrink]
            top, left = row // shrink, column // shrink
            small = cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_AREA)
            image[top : top + shape[0], left : left + shape[1]] = small
    rest = min(1.0, THUMBNAIL_PX / max(image.shape))
    if rest < 1:
        shape = tuple(max(1, round(rest * side)) for side in image.shape[1::-1])
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
    return image, reader.level_downsamples[level] * width / image.shape[1]


def _outline(axis: Axes, tissue: TissueMap, threshold: float) -> None:
    rows, columns = tissue.cells.shape
    shrink = max(1, max(rows, columns) // THUMBNAIL_PX)
    cells = cv2.resize(tissue.cells, (-(-columns // shrink), -(-rows // shrink)), interpolation=cv2.INTER_AREA)
    fractions = np.pad(cv2.GaussianBlur(cells, (0, 0), 1), 1)  # the border closes outlines at the slide's edge
    axis.plot([], [], color="black", lw=1, label="tissue map")
    if fractions.max() > threshold:
        y, x = ((np.arange(-1, n + 1) + 0.5) * tissue.cell_px * shrink for n in cells.shape)
        axis.contour(x, y, fractions, levels=[threshold], colors="black", linewidths=1)


def _squares(axis: Axes, corners: np.ndarray, side: float, colour: str, label: str) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    outlines = corners[:, None, :] + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * side
    width = 0.5 if len(corners) * side**2 > _CROWDED * axis.get_xlim()[1] * axis.get_ylim()[0] else 1
    colours = {"facecolors": to_rgba(colour, _FILL), "edgecolors": to_rgba(colour, _LINE)}
    style = {**colours, "linewidths": width, "zorder": 2 + 1 / side}
    axis.add_collection(PolyCollection(outlines, **style))
    axis.plot([], [], "s", color="none", markeredgecolor=colour, markeredgewidth=1.5, label=label)


def _scale_bar(axis: Axes, mpp: float, width: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten, between a twelfth and a fifth of the width."""
    limit = width * mpp / 5
    length = max(step * 10.0**power for power in range(-3, 6) for step in (1, 2, 5) if step * 10.0**power <= limit)
    words = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
    style = {"xycoords": "axes fraction", "fontsize": 9, "ha": "right", "va": "bottom", "bbox": box}
    axis.annotate(words, (0.985, 0.03), **style)
    ends = [0.985 - length / mpp / width, 0.985]
    axis.plot(ends, [0.02, 0.02], color="black", lw=3, transform=axis.transAxes, solid_capstyle="butt")


def _kind(reader: SlideReader, mpp: float, level: int | None) -> str:
    if mpp:
        return f"{mpp:g} µm/px ({10 / mpp:g}x)" + ("" if level is None else f" from level {level}")
    own = "" if reader.mpp is None else f", {reader.mpp * reader.level_downsamples[level]:.3g} µm/px"
    return f"level {level}{own}"

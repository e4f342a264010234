"""Rules of which pixels are tissue, by the names that `dinov2.extensions.TISSUE_RULES` has for them."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image

from dinov2.configs.fields import key
from dinov2.data.slides.coarse import Box, CoarseView
from dinov2.data.slides.errors import SlideOpenError

_HSV_MOST = (180, 255, 255)
_MASK_ENDINGS = (".geojson", ".json", ".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
_MASK_NAMES = ("{}", "{}_mask", "{}-mask", "{}_tissue")
_SUBPIXEL_BITS = 4  # of OpenCV's fixed-point corners
_MOST_OVERSAMPLED = 16
_FAR = 1e7  # level-0 px, beyond which OpenCV's corners do not reach and no slide does


class PixelRule(ABC):
    """One rule.

    Attributes:
        Options: dataclass of its options, fields made by `dinov2.configs.fields.key`: flags `--<rule>-<option>` of
            commands and keys `online.tissue_options.<rule>.<option>`.
        needs_pixels: whether `mask` looks at the image.
        bounds_hue: whether tissue of other colours than H&E's may escape it, of which its user is then warned.
    """

    @dataclass(frozen=True)
    class Options:
        """None."""

    needs_pixels: ClassVar[bool] = True
    bounds_hue: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    def fit(self, view: CoarseView) -> "PixelRule":
        """Make the rule of one slide from a look at it; SlideError if that has none."""
        return self

    def state(self, slide: str) -> list[Any]:
        """Name what a slide's tissue depends on beside its file and the options; JSON."""
        return []

    @abstractmethod
    def mask(self, image: np.ndarray, box: Box | None) -> np.ndarray:
        """Return uint8 (H, W), 255 where a pixel of the uint8 (H, W, 3) RGB image that lies in a box is tissue, else 0.

        It is called on what `fit` returned; rules that do without `fit` and without a box are also called as they are.
        """


class Hsv(PixelRule):
    """Colours within bounds of hue, saturation and value; the defaults are those of Virchow and OpenMidnight.

    Blue to pink, not white, not black. ValueError if a bound is above its counterpart.
    """

    bounds_hue = True

    @dataclass(frozen=True)
    class Options:
        """Bounds, inclusive."""

        lower: tuple[int, int, int] = key((90, 8, 103), "OpenCV HSV", least=0, most=255)
        upper: tuple[int, int, int] = key(_HSV_MOST, "OpenCV HSV", least=0, most=255)

        def __post_init__(self) -> None:
            pairs = list(zip(self.lower, self.upper, strict=True))
            if len(pairs) != 3 or not all(0 <= low <= high <= 255 for low, high in pairs):
                raise ValueError(f"Tissue bounds {self.lower} to {self.upper} must be 3 rising pairs within 0 to 255.")

    def mask(self, image: np.ndarray, box: Box | None) -> np.ndarray:
        """Compare with the bounds."""
        return cv2.inRange(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), self.options.lower, self.options.upper)


class Otsu(PixelRule):
    """Saturation above Otsu's threshold of the slide (IEEE Trans. SMC 9, 1979), of any hue."""

    @dataclass(frozen=True)
    class Options:
        """Thresholds, of 0 to 255 as in OpenCV's HSV."""

        saturation: int = key(0, "to exceed; 0: Otsu's threshold of each slide", least=0, most=254)
        floor: int = key(8, "least of Otsu's thresholds, so that blank glass is none", least=0, most=254)
        darkest: int = key(25, "least value, so that black borders are none", least=0, most=255)

    def __init__(self, options: Options, saturation: int | None = None) -> None:
        super().__init__(options)
        self._saturation = saturation or options.saturation

    def fit(self, view: CoarseView) -> "Otsu":
        """Find the threshold, unless the user has given one."""
        if self.options.saturation:
            return self
        counts = np.zeros(256, np.int64)
        for block in view.blocks(keep=True):
            _, saturation, value = cv2.split(cv2.cvtColor(block.image, cv2.COLOR_RGB2HSV))
            counts += np.bincount(saturation[(block.weight > 0.5) & (value >= self.options.darkest)], minlength=256)
        return Otsu(self.options, max(self.options.floor, _otsu(counts)))

    def mask(self, image: np.ndarray, box: Box | None) -> np.ndarray:
        """Compare with the threshold."""
        lower = (0, self._saturation + 1, self.options.darkest)
        return cv2.inRange(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), lower, _HSV_MOST)


class Everything(PixelRule):
    """All of a slide."""

    needs_pixels = False

    def mask(self, image: np.ndarray, box: Box | None) -> np.ndarray:
        """Mark every pixel."""
        return np.full(image.shape[:2], 255, np.uint8)


class Given(PixelRule):
    """Masks of the user's: an image of the whole slide in any size, or polygons in level-0 px (GeoJSON), for each."""

    needs_pixels = False

    @dataclass(frozen=True)
    class Options:
        """Location of the masks."""

        folder: str = key("", "of masks named as their slides: SLIDE.geojson, SLIDE.png, SLIDE_mask.png, ...")

    def __init__(self, options: Options, drawn: "_Picture | _Polygons | None" = None) -> None:
        super().__init__(options)
        self._drawn = drawn
        if not Path(options.folder).is_dir() or not options.folder:
            found = f"but '{options.folder}' is none" if options.folder else "but its option 'folder' is empty"
            raise ValueError(f"The tissue rule 'mask' needs a folder of masks, {found}.")

    def fit(self, view: CoarseView) -> "Given":
        """Read the slide's mask; SlideOpenError if there is none, or it is malformed or of other proportions."""
        slide, size = view.reader.path, view.reader.level_dimensions[0]
        file = self._file(str(slide))
        if file is None:
            raise SlideOpenError(slide, f"'{self.options.folder}' holds no mask of it, as SLIDE.geojson or SLIDE.png")
        try:
            drawn = _Polygons(file, size) if file.suffix.lower() in (".geojson", ".json") else _Picture(file, size)
        except (OSError, ValueError, KeyError, TypeError, Image.DecompressionBombError) as error:
            raise SlideOpenError(slide, f"its mask '{file}' cannot be used ({error})") from error
        return Given(self.options, drawn)

    def state(self, slide: str) -> list[Any]:
        """Name, size and time of change of the mask."""
        file = self._file(slide)
        return [] if file is None else [file.name, file.stat().st_size, file.stat().st_mtime_ns]

    def mask(self, image: np.ndarray, box: Box | None) -> np.ndarray:
        """Look the pixels up."""
        if self._drawn is None or box is None:
            raise ValueError("The tissue rule 'mask' is asked without a slide.")
        return self._drawn.within(box, *image.shape[:2])

    def _file(self, slide: str) -> Path | None:
        name = Path(slide).name
        stems = dict.fromkeys((Path(name).stem, name, name.partition(".")[0]))
        names = (form.format(stem) + ending for stem in stems for form in _MASK_NAMES for ending in _MASK_ENDINGS)
        found = (path for path in (Path(self.options.folder, name) for name in names) if path.is_file())
        itself = os.path.abspath(slide)  # an image can be a slide
        return next((path for path in found if os.path.abspath(path) != itself), None)


class _Picture:
    """A mask as an image; what is not 0 is tissue."""

    def __init__(self, file: Path, size: tuple[int, int]) -> None:
        with Image.open(file) as image:
            pixels = np.asarray(image)
        if pixels.ndim == 3:
            opaque = pixels[..., -1] > 0 if pixels.shape[2] in (2, 4) else True
            pixels = pixels[..., : 3 if pixels.shape[2] >= 3 else 1].any(-1) & opaque
        self._tissue = pixels != 0
        height, width = self._tissue.shape
        self._per_px = width / size[0], height / size[1]
        if abs(height - width * size[1] / size[0]) > 1 + 0.02 * height:
            raise ValueError(f"it has {width}x{height} px, the slide {size[0]}x{size[1]}")

    def within(self, box: Box, rows: int, columns: int) -> np.ndarray:
        sides = ((box.y, box.height, rows), (box.x, box.width, columns))
        centres = [first + (np.arange(count) + 0.5) * length / count for first, length, count in sides]
        scaled = zip(centres, reversed(self._per_px), self._tissue.shape, strict=True)
        picked = [(centre * scale).astype(int).clip(0, side - 1) for centre, scale, side in scaled]
        return self._tissue[np.ix_(*picked)].astype(np.uint8) * 255


class _Polygons:
    """A mask as GeoJSON polygons with holes; ValueError if it is malformed, or cannot be in px of a slide."""

    def __init__(self, file: Path, size: tuple[int, int]) -> None:
        found = [polygon for polygon in _polygons(json.loads(file.read_text(encoding="utf-8-sig"))) if any(polygon)]
        if not found:
            raise ValueError("it holds no polygon")
        self._polygons = [
            [np.array(ring, float)[:, :2].clip(-_FAR, _FAR) for ring in polygon if ring] for polygon in found
        ]
        ends = [(polygon[0].min(0), polygon[0].max(0)) for polygon in self._polygons]
        self._least, self._most = (np.array(end) for end in zip(*ends, strict=True))
        (left, top), (right, bottom) = self._least.min(0), self._most.max(0)
        if not (left < size[0] and top < size[1] and right > 1 and bottom > 1 and right - left + bottom - top > 2):
            where = f"its polygons reach from ({left:g}, {top:g}) to ({right:g}, {bottom:g})"
            raise ValueError(f"{where}; level-0 px of the slide, {size[0]}x{size[1]}, are expected")

    def within(self, box: Box, rows: int, columns: int) -> np.ndarray:
        # At about a level-0 px, since OpenCV also fills the pixels that an edge only touches.
        finer = int(np.clip(np.ceil(box.width / columns), 1, _MOST_OVERSAMPLED))
        drawn = np.zeros((finer * rows, finer * columns), np.uint8)
        corner, size = np.array((box.x, box.y)), np.array((box.width, box.height))
        scale = np.array(drawn.shape[::-1]) / size
        touched = ((self._most >= corner) & (self._least <= corner + size)).all(1)
        for number in np.flatnonzero(touched):
            rings = ((ring - corner) * scale - 0.5 for ring in self._polygons[number])
            fixed = [np.rint(ring * (1 << _SUBPIXEL_BITS)).astype(np.int32) for ring in rings]
            part = np.zeros_like(drawn)
            cv2.fillPoly(part, fixed, 255, shift=_SUBPIXEL_BITS)  # even-odd, so that holes stay open
            drawn |= part
        averaged = cv2.resize(drawn, (columns, rows), interpolation=cv2.INTER_AREA)
        return np.where(averaged >= 128, np.uint8(255), np.uint8(0))


def _polygons(node: Any) -> Iterator[list[Any]]:
    """Polygons, as lists of rings, of any GeoJSON object or a list of them."""
    if isinstance(node, list):
        for item in node:
            yield from _polygons(item)
    elif not isinstance(node, dict) or "type" not in node:
        raise ValueError("it is no GeoJSON, whose objects have a 'type'")
    elif node["type"] == "Polygon":
        yield node["coordinates"]
    elif node["type"] == "MultiPolygon":
        yield from node["coordinates"]
    else:
        yield from _polygons(node.get("features") or node.get("geometries") or node.get("geometry") or [])


def _otsu(counts: np.ndarray) -> int:
    """Otsu's threshold of a histogram of 0 to 255."""
    if np.count_nonzero(counts) < 2:
        return 0
    from skimage.filters import threshold_otsu

    return int(threshold_otsu(hist=(counts, np.arange(256))))

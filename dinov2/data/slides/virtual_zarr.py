"""Slides as Zarr arrays whose chunks are the tiles in the slide's own file (fsspec references, nothing is copied)."""

import base64
import json
from typing import Any

from dinov2.data.slides.blocks import TileIndex, TileLevel

_COLOURS = {"rgb": 2, "ycbcr": 3}  # libjpeg's numbers of colour spaces


def zarr_references(index: TileIndex) -> dict[str, Any]:
    """References of a Zarr (format 2) group with an array for each level, named "0", "1", ...

    fsspec's `reference://` file system opens them. Chunks decode with the codecs of imagecodecs.numcodecs; those
    that the file does not hold read as 0.

    Args:
        index: of the slide.

    Returns:
        JSON-able: fsspec's reference format, version 1.

    Raises:
        ValueError: YCbCr tiles in JPEG 2000, which no such codec turns into RGB.
    """
    paths = [{"path": str(number)} for number in range(len(index.levels))]
    axes = [{"name": name, "type": kind} for name, kind in (("y", "space"), ("x", "space"), ("c", "channel"))]
    for path, downsample in zip(paths, index.downsamples, strict=True):
        path["coordinateTransformations"] = [{"type": "scale", "scale": [downsample, downsample, 1.0]}]
    multiscales = [{"version": "0.4", "axes": axes, "datasets": paths}]
    refs: dict[str, Any] = {
        ".zgroup": json.dumps({"zarr_format": 2}),
        ".zattrs": json.dumps({"multiscales": multiscales, "mpp": index.mpp, "mpp_source": index.mpp_source}),
    }
    for number, level in enumerate(index.levels):
        refs[f"{number}/.zarray"] = json.dumps(_array(index, level))
        refs[f"{number}/.zattrs"] = json.dumps({"_ARRAY_DIMENSIONS": ["Y", "X", "S"]})
        for row, (offsets, lengths) in enumerate(
            zip(level.offsets.tolist(), level.lengths.tolist(), strict=True)
        ):
            for column, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
                if length:
                    refs[f"{number}/{row}.{column}.0"] = [index.path, offset, length]
    return {"version": 1, "refs": refs}


def _array(index: TileIndex, level: TileLevel) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": [level.height, level.width, 3],
        "chunks": [level.tile_height, level.tile_width, 3],
        "dtype": "|u1",
        "compressor": _codec(index, level),
        "fill_value": 0,
        "order": "C",
        "filters": None,
    }


def _codec(index: TileIndex, level: TileLevel) -> dict[str, Any]:
    if level.compression == "jpeg":
        tables = base64.b64encode(level.jpeg_tables).decode() if level.jpeg_tables else None
        colours = {"colorspace_data": _COLOURS["rgb"], "colorspace_jpeg": _COLOURS[level.photometric]}
        return {"id": "imagecodecs_jpeg", "tables": tables, **colours}
    if level.photometric != "rgb":
        raise ValueError(
            f"Slide '{index.path}' has YCbCr tiles in JPEG 2000, which Zarr codecs leave as they are."
        )
    return {"id": "imagecodecs_jpeg2k"}

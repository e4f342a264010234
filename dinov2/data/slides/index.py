"""Tile indexes of many slides in one file, written once, mapped into memory when used; and Zarr references from them.

Layout: 8 bytes that name the format; a record for each slide; a JSON object of the records' first bytes by slide
path; its length (8 bytes, little-endian); the same 8 bytes again. A record is the CRC-32 of what follows it (8
bytes), the length of its JSON description (8 bytes) and of its arrays (8 bytes), the description, and for each level
offsets (int64) and lengths (int32); every part starts at a multiple of 8 bytes.
"""

import base64
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dinov2.data.slides.blocks import TileIndex, TileLevel
from dinov2.data.slides.errors import SlideError, UnsupportedTiles
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.resolution import Resolution
from dinov2.data.slides.tiff import index_slide
from dinov2.utils.files import commit, replacing, write_text
from dinov2.utils.jobs import run_jobs

_MAGIC = b"PFTILES3"
_HEADER = struct.Struct("<QQQ")
_INDEX_FIELDS = ("path", "size", "downsamples")
_LEVEL_FIELDS = ("width", "height", "tile_width", "tile_height", "compression", "photometric")
_ZARR_CODECS = {
    "jpeg": "imagecodecs_jpeg", "j2k": "imagecodecs_jpeg2k", "webp": "imagecodecs_webp", "png": "imagecodecs_png",
    "jxl": "imagecodecs_jpegxl",
}  # fmt: skip
_ZARR_COLOURS = {"rgb": 2, "ycbcr": 3}  # libjpeg's numbers of colour spaces


class TileIndexes(Mapping[str, TileIndex]):
    """Tile indexes by slide path, made when asked for; their arrays stay in the file. Picklable and fork-safe."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"There is no tile index '{path}'; index_slides.py writes one.")
        self._data = _mapped(self._path)
        tail = len(self._data) - 16
        length = int.from_bytes(self._data[tail : tail + 8].tobytes(), "little") if tail >= 8 else 0
        if not 0 < length <= tail or {self._data[:8].tobytes(), self._data[-8:].tobytes()} != {_MAGIC}:
            raise ValueError(f"'{path}' is not a finished tile index; index_slides.py writes one.")
        self._starts: dict[str, int] = json.loads(self._data[tail - length : tail].tobytes())

    def __getitem__(self, slide: str | Path) -> TileIndex:
        return _index_at(self._data, self._starts[str(slide)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._path,)

    def outline(self, slide: str | Path) -> TileIndex:
        """All that `blocks.assemble` needs of an index, in little memory: one tile, the longest, stands for all."""
        return _index_at(self._data, self._starts[str(slide)], outline=True)


opened_index = lru_cache(1)(TileIndexes)  # of a collection, as the slides of one come one after the other


def is_tile_index(path: Path) -> bool:
    """Whether a file begins as a tile index does."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def write_tile_index(path: Path, index: TileIndex) -> None:
    """Write the tile index of one slide."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(_MAGIC)
        _finish(file, {index.path: _append(file, index)})


def parse_slide(job: tuple[str, float | None]) -> TileIndex | str:
    """Index one slide, with the mpp that its user gives, or say why it cannot be."""
    try:
        return index_slide(*job)
    except UnsupportedTiles as error:
        return f"{error.detail}; tiled TIFF in JPEG, JPEG 2000, JPEG XL, PNG or WebP is indexed, the rest read without"
    except (SlideError, OSError) as error:
        return getattr(error, "detail", str(error))


def complete_tile_index(path: Path, mpps: Mapping[str, float | None], workers: int) -> tuple[set[str], dict[str, str]]:
    """Write the index of a collection; what `<path>.part` or an earlier index knows of it is taken over.

    `mpps` names the slides, with the user's mpp. Returns those parsed now or since the last stop, and why not others.
    """
    partial = path.with_name(f"{path.name}.part")
    starts, end = {}, 0
    for start, end, index in _whole_records(partial):  # noqa: B007
        if _still_holds(index, mpps) and index.resolution.user == mpps[index.path]:
            starts[index.path] = start
    fresh, failures = set(starts), {}
    with partial.open("r+b" if end else "wb") as file:
        file.seek(end)
        file.truncate()
        if not end:
            file.write(_MAGIC)
        for _, _, index in _whole_records(path):
            if index.path not in starts and _still_holds(index, mpps):
                given = index.resolution.given(mpps[index.path])
                if given != index.resolution:
                    fresh.add(index.path)
                starts[index.path] = _append(file, replace(index, resolution=given))
        jobs = [job for job in mpps.items() if job[0] not in starts]
        for number, result in run_jobs(parse_slide, jobs, workers, "slide"):
            if isinstance(result, str):
                failures[jobs[number][0]] = result
            else:
                starts[result.path] = _append(file, result)
                fresh.add(result.path)
        _finish(file, {slide: starts[slide] for slide in mpps if slide in starts})
    commit(partial, path)
    return fresh, failures


def _still_holds(index: TileIndex, mpps: Mapping[str, float | None]) -> bool:
    if index.path not in mpps:
        return False
    try:
        return is_remote(index.path) or os.stat(index.path).st_size == index.size
    except OSError:
        return False


def _append(file: BinaryIO, index: TileIndex) -> int:
    """Append a record to a file opened at its end; returns its first byte."""
    levels = []
    for level in index.levels:
        fields = {name: getattr(level, name) for name in _LEVEL_FIELDS} | {"shape": level.offsets.shape}
        levels.append(fields | {"longest": int(level.lengths.max()), "jpeg_tables": level.jpeg_tables.hex()})
    fields = {name: getattr(index, name) for name in _INDEX_FIELDS}
    words = _json(fields | {"resolution": asdict(index.resolution), "levels": levels})
    stored = (array for level in index.levels for array in (level.offsets.astype("<i8"), level.lengths.astype("<i4")))
    arrays = b"".join(array.tobytes() + bytes(-array.nbytes % 8) for array in stored)
    start = file.tell()
    file.write(_HEADER.pack(zlib.crc32(arrays, zlib.crc32(words)), len(words), len(arrays)) + words + arrays)
    file.flush()
    return start


def _finish(file: BinaryIO, starts: Mapping[str, int]) -> None:
    words = _json(starts)
    file.write(words + struct.pack("<Q", len(words)) + _MAGIC)


def _json(value: Mapping[str, Any]) -> bytes:
    words = json.dumps(value).encode()
    return words + b" " * (-len(words) % 8)


def _mapped(path: Path) -> np.ndarray:
    if not path.is_file() or not path.stat().st_size:
        return np.empty(0, np.uint8)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _whole_records(path: Path) -> Iterator[tuple[int, int, TileIndex]]:
    """First byte, end and index of the sound records at the beginning of a file, finished or not."""
    data, start = _mapped(path), len(_MAGIC)
    while data[: len(_MAGIC)].tobytes() == _MAGIC and start + _HEADER.size <= len(data):
        crc, *lengths = _HEADER.unpack(data[start : start + _HEADER.size])
        end = start + _HEADER.size + sum(lengths)
        if end > len(data) or zlib.crc32(data[start + _HEADER.size : end]) != crc:
            return
        yield start, end, _index_at(data, start)
        start = end


def _index_at(data: np.ndarray, start: int, *, outline: bool = False) -> TileIndex:
    _, length, _ = _HEADER.unpack(data[start : start + _HEADER.size])
    position = start + _HEADER.size
    fields = json.loads(data[position : position + length].tobytes())
    position += length
    levels = []
    for level in fields.pop("levels"):
        shape, longest, tables = (level.pop(name) for name in ("shape", "longest", "jpeg_tables"))
        if outline:
            arrays = [np.zeros((1, 1), np.int64), np.full((1, 1), longest, np.int32)]
        else:
            arrays = []
            for kind in ("<i8", "<i4"):
                size = int(np.prod(shape)) * np.dtype(kind).itemsize
                arrays.append(data[position : position + size].view(kind).reshape(shape))
                position += size + -size % 8
        levels.append(TileLevel(**level, offsets=arrays[0], lengths=arrays[1], jpeg_tables=bytes.fromhex(tables)))
    fields["downsamples"] = tuple(fields["downsamples"])
    said = fields.pop("resolution")
    fields["resolution"] = Resolution(**said | {"own_notes": tuple(said["own_notes"])})
    return TileIndex(**fields, levels=tuple(levels))


def write_zarr(index: Path, job: tuple[str, Path]) -> str:
    """Write Zarr references of a slide of an index to a JSON file; returns why not, "" where they are written."""
    slide, output = job
    try:
        references = zarr_references(opened_index(index)[slide])
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(references))
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def zarr_references(index: TileIndex) -> dict[str, Any]:
    """Describe a slide as a Zarr (format 2) group whose chunks are the tiles in its own file; nothing is copied.

    fsspec's `reference://` file system opens what is returned, which is JSON-able (its format, version 1): an array for
    each level, named "0", "1", ... Chunks decode with the codecs of imagecodecs.numcodecs; those that the file does not
    hold read as 0. ValueError if tiles are YCbCr in JPEG 2000, which no such codec turns into RGB.
    """
    axes = [{"name": name, "type": kind} for name, kind in (("y", "space"), ("x", "space"), ("c", "channel"))]
    scales = [[{"type": "scale", "scale": [scale, scale, 1.0]}] for scale in index.downsamples]
    datasets = [{"path": str(number), "coordinateTransformations": scale} for number, scale in enumerate(scales)]
    multiscales = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    attributes = {"multiscales": multiscales, "mpp": index.mpp, "mpp_source": index.mpp_source}
    refs: dict[str, Any] = {".zgroup": json.dumps({"zarr_format": 2}), ".zattrs": json.dumps(attributes)}
    for number, level in enumerate(index.levels):
        codec: dict[str, Any] = {"id": _ZARR_CODECS[level.compression]}
        if level.compression == "jpeg":
            tables = base64.b64encode(level.jpeg_tables).decode() if level.jpeg_tables else None
            colours = {"colorspace_data": _ZARR_COLOURS["rgb"], "colorspace_jpeg": _ZARR_COLOURS[level.photometric]}
            codec |= {"tables": tables, **colours}
        elif level.photometric != "rgb":
            raise ValueError(f"Slide '{index.path}' has YCbCr tiles in JPEG 2000, which Zarr codecs leave as they are.")
        shape, chunks = [level.height, level.width, 3], [level.tile_height, level.tile_width, 3]
        array = {"zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": "|u1", "compressor": codec}
        array |= {"fill_value": 0, "order": "C", "filters": None}
        refs[f"{number}/.zarray"] = json.dumps(array)
        refs[f"{number}/.zattrs"] = json.dumps({"_ARRAY_DIMENSIONS": ["Y", "X", "S"]})
        for row, column in np.argwhere(level.lengths).tolist():
            block = int(level.offsets[row, column]), int(level.lengths[row, column])
            refs[f"{number}/{row}.{column}.0"] = [index.path, *block]
    return {"version": 1, "refs": refs}

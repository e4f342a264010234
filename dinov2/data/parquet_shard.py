"""Patches of a sample list, cut and written as one Parquet shard of the published schema."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dinov2.data.slide_jobs import commit
from dinov2.data.slide_list import SampleList
from dinov2.data.slide_reader import SlideError, SlideReader
from dinov2.data.tissue import TissueRule

ROWS_PER_GROUP = 64
ROWS_AT_ONCE = 512  # patches held in memory, read in the order of their tiles; a multiple of ROWS_PER_GROUP
IMAGE_COLUMN = "image_bytes"
SCHEMA = pa.schema(
    [
        ("task_id", pa.string()),
        ("slide_path", pa.string()),
        ("x", pa.int32()),
        ("y", pa.int32()),
        ("level", pa.int32()),
        ("tile_size", pa.int32()),
        ("level_downsample", pa.float32()),
        ("image_dtype", pa.string()),
        (IMAGE_COLUMN, pa.binary()),
        ("slide_id", pa.string()),
        ("mpp", pa.float32()),  # of the tile, null when unknown
        ("mpp_source", pa.string()),
        ("read_size", pa.int32()),  # px of the level that became tile_size px
        ("tissue_frac", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Encoding:
    """How a patch becomes bytes: "png", "jpeg" with its quality and chroma subsampling, or "raw".

    PNG uses zlib's run-length strategy: on tissue within 1 % of the smallest file at 4 to 20 times the speed.
    """

    kind: str = "png"
    quality: int = 95
    subsampling: str = "4:2:0"

    def encode(self, image: np.ndarray) -> bytes:
        """Encode a uint8 (H, W, 3) RGB image."""
        if self.kind == "raw":
            return image.tobytes()
        if self.kind == "png":
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            _, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE])
            return data.tobytes()
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "jpeg", quality=self.quality, subsampling=self.subsampling)
        return buffer.getvalue()

    def metadata(self) -> dict[str, str]:
        """Key-values for the shard."""
        jpeg = {"jpeg_quality": str(self.quality), "jpeg_subsampling": self.subsampling}
        return {"image_encoding": self.kind, **(jpeg if self.kind == "jpeg" else {})}


@dataclass(frozen=True)
class ShardOptions:
    """What all shards share; `metadata` are their key-values, `mpp` serves slides that do not say theirs."""

    encoding: Encoding
    rule: TissueRule
    tile_size: int
    mpp: float | None
    metadata: dict[str, str]


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: patches of `samples`, whose slides lie at `paths`."""

    shard: Path
    samples: SampleList
    paths: list[Path]
    options: ShardOptions


def build_shard(job: ShardJob) -> list[dict[str, Any]]:
    """Write one shard, unless no patch can be read, and return the failures, which the shard also keeps.

    Raises:
        OSError: the shard cannot be written.
    """
    failures: list[dict[str, Any]] = []
    partial = job.shard.with_name(f".{job.shard.name}.part")
    plain = [name for name in SCHEMA.names if name != IMAGE_COLUMN]
    schema = SCHEMA.with_metadata(job.options.metadata)
    num_rows, waiting = 0, []
    try:
        with pq.ParquetWriter(
            partial, schema, compression="none", use_dictionary=plain, write_statistics=plain
        ) as writer:
            for rows in _chunks_of_rows(job, failures):
                waiting += rows
                whole = len(waiting) // ROWS_PER_GROUP * ROWS_PER_GROUP
                for start in range(0, whole, ROWS_PER_GROUP):
                    writer.write_table(pa.Table.from_pylist(waiting[start : start + ROWS_PER_GROUP], schema))
                num_rows += len(rows)
                waiting = waiting[whole:]
            if waiting:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
            writer.add_key_value_metadata({"failures": json.dumps(failures)})
        if num_rows:
            commit(partial, job.shard)
    finally:
        partial.unlink(missing_ok=True)
    return failures


def _chunks_of_rows(job: ShardJob, failures: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    samples, task_id = job.samples, job.shard.stem
    open_slide = lru_cache(2)(lambda path: SlideReader(path, job.options.mpp))
    for start in range(0, len(samples), ROWS_AT_ONCE):
        chunk = np.arange(start, min(start + ROWS_AT_ONCE, len(samples)))
        by_tile = np.lexsort(
            (samples.x[chunk], samples.y[chunk] // 256, samples.level[chunk], samples.slide[chunk])
        )
        rows: dict[int, dict[str, Any]] = {}
        bad: dict[int, dict[str, Any]] = {}
        for i in chunk[by_tile].tolist():
            slide, x, y, level = (int(c[i]) for c in (samples.slide, samples.x, samples.y, samples.level))
            place = {"slide_path": samples.slides[slide], "x": x, "y": y, "level": level}
            try:
                tile = _cut(open_slide(job.paths[slide]), x, y, level, job.options)
                rows[i] = {"task_id": task_id, **place, **tile}
            except SlideError as error:
                bad[i] = {**place, "reason": error.detail}
        failures += [bad[i] for i in sorted(bad)]
        yield [rows[i] for i in sorted(rows)]


def _cut(reader: SlideReader, x: int, y: int, level: int, options: ShardOptions) -> dict[str, Any]:
    size = options.tile_size
    image = reader.read_region(level, *reader.snap(level, x, y), size, size)
    downsample = reader.level_downsamples[level]
    return {
        "tile_size": size,
        "level_downsample": downsample,
        "image_dtype": "uint8",
        IMAGE_COLUMN: options.encoding.encode(image),
        "slide_id": reader.path.stem,
        "mpp": None if reader.mpp is None else reader.mpp * downsample,
        "mpp_source": reader.mpp_source,
        "read_size": size,
        "tissue_frac": options.rule.fraction(image),
    }

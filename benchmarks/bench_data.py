"""Cost of the data path: decoding, augmentation, the reader, seeking, mixing and memory.

    python benchmarks/bench_data.py [--seconds 3] [--output results.json]

Every figure comes from one run; the augmentation is compared with the recipe as published, built from Pillow,
torchvision and scikit-image, on the same tiles and with the same parameters. Times are CPU time of one thread, so
that other programs on the machine disturb them little.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import cpu_ms, describe_machine
from dinov2.data import AugmentationOptions, EncodedSample, MultiCropAugmentation, MultiCropCollate, Sample
from dinov2.data.decode import decode_image
from dinov2.data.order import SampleOrder
from dinov2.data.parquet_source import ParquetSource
from dinov2.data.reader import RankReader
from dinov2.data.stream_memory import GIB, Prefetch, memory_bound

SIZE = 224
CROPS = {
    "options": AugmentationOptions(),
    "global_crops_scale": (0.32, 1.0),
    "local_crops_scale": (0.05, 0.32),
    "local_crops_number": 8,
    "global_crops_size": 224,
    "local_crops_size": 98,
}


def tissue_tiles(count: int) -> list[np.ndarray]:
    """Distinct uint8 (224, 224, 3) tiles of scikit-image's stained micrograph."""
    from skimage.data import immunohistochemistry

    tissue, rng = immunohistochemistry(), np.random.default_rng(0)
    corners = rng.integers(0, np.array(tissue.shape[:2]) - SIZE, (count, 2))
    return [np.ascontiguousarray(tissue[y : y + SIZE, x : x + SIZE]) for y, x in corners]


def encode(tile: np.ndarray, kind: str) -> bytes:
    """JPEG of quality 95, or PNG."""
    buffer = io.BytesIO()
    options = {"quality": 95} if kind == "jpeg" else {"optimize": True}
    Image.fromarray(tile).save(buffer, kind, **options)
    return buffer.getvalue()


def write_shards(folder: Path, tiles: list[bytes], shards: int, rows: int) -> Path:
    """JPEG shards in row groups of 64, nanopath's two columns, a slide per shard."""
    folder.mkdir()
    for shard in range(shards):
        images = [tiles[(shard * rows + row) % len(tiles)] for row in range(rows)]
        table = pa.table({"path": [f"slide_{shard}/{row}_0_0.jpg" for row in range(rows)], "jpeg": images})
        path = folder / f"shard-{shard:05d}.parquet"
        pq.write_table(table, path, row_group_size=64, use_dictionary=["path"], compression="none")
    return folder


def measure_transforms(seconds: float) -> dict[str, float]:
    """Milliseconds of CPU per image: decoding, and both augmentations with decoding."""
    tiles = tissue_tiles(16)
    stored = {kind: [encode(tile, kind) for tile in tiles] for kind in ("jpeg", "png")}
    fast = MultiCropAugmentation(**CROPS)
    reference = MultiCropAugmentation(**CROPS, backend="reference")

    def per_image(work: Any) -> float:
        numbers = iter(range(10**9))
        return cpu_ms(lambda: [work(next(numbers)) for _ in tiles], seconds) / len(tiles)

    def decoded(kind: str, g: int) -> np.ndarray:
        return decode_image(stored[kind][g % len(tiles)])

    result = {f"decode_{kind}": per_image(partial(decoded, kind)) for kind in stored}
    result["augment_fast"] = per_image(lambda g: fast(tiles[g % len(tiles)], g))
    result["augment_reference"] = per_image(lambda g: reference(tiles[g % len(tiles)], g))
    for kind in stored:
        result[f"decode_and_augment_{kind}"] = result[f"decode_{kind}"] + result["augment_fast"]
    result["fast_over_reference"] = result["augment_reference"] / result["augment_fast"]
    return result


def measure_reader(folder: Path, seconds: float) -> dict[str, float]:
    """CPU of the reader's process, all its threads, per row; batches of 48 are taken and dropped."""
    source = ParquetSource(str(folder))
    order = SampleOrder(source.unit_rows, seed=0, lanes=384, block_rows=64)
    reader = RankReader(source, order, global_batch=48, rank=0, world_size=1, start_sample=0)
    steps = iter(reader)
    for _ in islice(steps, 20):
        pass
    rows, wall, cpu, main = 0, time.perf_counter(), time.process_time(), time.thread_time()
    while time.perf_counter() - wall < seconds:
        rows += len(next(steps))
    wall, cpu, main = time.perf_counter() - wall, time.process_time() - cpu, time.thread_time() - main
    steps.close()
    return {
        "cpu_ms_per_row": 1000 * cpu / rows,
        "main_thread_ms_per_48": 48 * 1000 * main / rows,
        "rows_per_s": rows / wall,
    }


def slide_sizes(rows: int, slides: int = 12_000) -> np.ndarray:
    """Rows per slide of a collection like TCGA's: lognormal with sigma 0.8, int64 (slides,)."""
    sizes = np.random.default_rng(0).lognormal(sigma=0.8, size=slides)
    return np.maximum(1, np.round(sizes * rows / sizes.sum())).astype(np.int64)


def unit_rows_of(slides: np.ndarray, group: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Row groups of slides stored one per file: rows and slide of each, int64 (U,)."""
    groups = -(-slides // group)
    slide = np.repeat(np.arange(len(slides)), groups)
    rows = np.full(len(slide), group)
    rows[np.cumsum(groups) - 1] = slides - (groups - 1) * group
    return rows, slide


def measure_mixing(rows: int) -> dict[str, Any]:
    """Distinct slides among consecutive samples of the shipped order (batch 384, V = 3072, R = 64)."""
    unit_rows, slide = unit_rows_of(slide_sizes(rows))
    order = SampleOrder(unit_rows, seed=0, lanes=3072, block_rows=64)
    result: dict[str, Any] = {"rows": int(unit_rows.sum()), "row_groups": len(unit_rows)}
    starts = (np.arange(4) * 2 + 1) * order.num_rows // 8  # four places of the epoch
    for steps in (1, 10, 100):
        counts = [
            len(np.unique(slide[order.locate(np.arange(start, start + steps * 384)).unit])) for start in starts
        ]
        result[f"slides_in_{steps}_steps"] = statistics.mean(counts)
    return result


class SizedSource:
    """Row groups of images of one size; knows what they would take and nothing else."""

    is_remote = False

    def __init__(self, unit_rows: np.ndarray, image_bytes: int) -> None:
        self.unit_rows, self.unit_bytes = unit_rows, unit_rows * image_bytes


def compute_memory(rows: int) -> dict[str, float]:
    """GiB of stored tiles that the readers of 8 processes hold together at most, V = 3072."""
    unit_rows, _ = unit_rows_of(slide_sizes(rows))
    order = SampleOrder(unit_rows, seed=0, lanes=3072, block_rows=64)
    split = {"global_batch": 384, "world_size": 8, "prefetch": Prefetch()}
    return {
        kind: 8 * memory_bound(SizedSource(unit_rows, size), order, **split) / GIB
        for kind, size in (("png_105kb", 105_000), ("jpeg_31kb", 31_000))
    }

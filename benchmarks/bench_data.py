"""Cost of the data path: decoding, augmentation, the reader, seeking, mixing and memory.

    python benchmarks/bench_data.py [--seconds 3] [--output results.json] [--tiny]

Every figure comes from one run; the augmentation is compared with the recipe as published, built from Pillow,
torchvision and scikit-image, on the same tiles and with the same parameters. Times are CPU time of one thread, so
that other programs on the machine disturb them little.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
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
from dinov2.build.augmentation import build_augmentation
from dinov2.configs import load_config
from dinov2.data.images.container import Contents, Member
from dinov2.data.images.files import IMAGES
from dinov2.data.images.index import load_index as load_images
from dinov2.data.images.source import ImageSource
from dinov2.data.images.tar import TarShards
from dinov2.data.parquet.index import load_index
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import decode_image
from dinov2.data.storage.base import LocalStorage, StoredFile
from dinov2.data.storage.sidecar import write_sidecar
from dinov2.data.stream.memory import GIB, Prefetch, memory_bound
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.reader import RankReader
from tests.helpers.reference_transforms import reference_crops

SIZE = 224
COLLECTIONS = {
    "29_m_rows": 29_000_000,
    "114_m_rows": 114_000_000,
}  # tiles of 12,000 slides


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
    """Milliseconds of CPU per image: decoding, drawing the views, and both augmentations whole."""
    tiles = tissue_tiles(16)
    stored = {kind: [encode(tile, kind) for tile in tiles] for kind in ("jpeg", "png")}
    augment = build_augmentation(load_config(None))

    def per_image(work: Any) -> float:
        numbers = iter(range(10**9))
        return cpu_ms(lambda: [work(next(numbers)) for _ in tiles], seconds) / len(tiles)

    def decoded(kind: str, g: int) -> np.ndarray:
        return decode_image(stored[kind][g % len(tiles)])

    result = {f"decode_{kind}": per_image(partial(decoded, kind)) for kind in stored}
    result["draw"] = per_image(lambda g: augment.sample((SIZE, SIZE), g))
    result["augment_fast"] = per_image(lambda g: augment(tiles[g % len(tiles)], g))
    result["augment_reference"] = per_image(lambda g: reference_crops(augment, tiles[g % len(tiles)], g))
    return result


def measure_reader(folder: Path, seconds: float) -> dict[str, float]:
    """CPU of the reader's process, all its threads, per row; batches of 48 are taken and dropped."""
    source = ParquetSource(str(folder))
    order = SampleOrder(source.group_rows, seed=0, lanes=384, block_rows=64)
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


def group_rows_of(slides: np.ndarray, group: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Row groups of slides stored one per file: rows and slide of each, int64 (U,)."""
    groups = -(-slides // group)
    slide = np.repeat(np.arange(len(slides)), groups)
    rows = np.full(len(slide), group)
    rows[np.cumsum(groups) - 1] = slides - (groups - 1) * group
    return rows, slide


def measure_mixing(rows: int) -> dict[str, Any]:
    """Distinct slides among consecutive samples of the shipped order (batch 384, V = 3072, R = 64)."""
    group_rows, slide = group_rows_of(slide_sizes(rows))
    order = SampleOrder(group_rows, seed=0, lanes=3072, block_rows=64)
    result: dict[str, Any] = {"rows": int(group_rows.sum()), "row_groups": len(group_rows)}
    starts = (np.arange(4) * 2 + 1) * order.num_rows // 8  # four positions of the epoch
    for steps in (1, 10, 100):
        counts = [len(np.unique(slide[order.locate(np.arange(start, start + steps * 384)).group])) for start in starts]
        result[f"slides_in_{steps}_steps"] = statistics.mean(counts)
    return result


class SizedSource:
    """Row groups of images of one size; knows what they would take and nothing else."""

    is_remote = False

    def __init__(self, group_rows: np.ndarray, image_bytes: int) -> None:
        self.group_rows, self.group_bytes = group_rows, group_rows * image_bytes


def compute_memory(rows: int) -> dict[str, float]:
    """GiB of stored tiles that the readers of 8 processes hold together at most, V = 3072."""
    group_rows, _ = group_rows_of(slide_sizes(rows))
    order = SampleOrder(group_rows, seed=0, lanes=3072, block_rows=64)
    split = {"global_batch": 384, "world_size": 8, "prefetch": Prefetch()}
    return {
        kind: 8 * memory_bound(SizedSource(group_rows, size), order, **split) / GIB
        for kind, size in (("png_105kb", 105_000), ("jpeg_31kb", 31_000))
    }


class ListedStorage:
    """Knows the names and sizes of shards that are not there; enough to open an indexed dataset."""

    location = "nowhere"

    def __init__(self, files: list[StoredFile]) -> None:
        self._files = files

    def list_files(self) -> list[StoredFile]:
        """The names."""
        return self._files

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Nothing can be read."""
        raise FileNotFoundError(name)

    def locate(self, name: str) -> str:
        """The name itself."""
        return name


def measure_seek(folder: Path, shards: int = 12_000, rows: int = 9_500) -> dict[str, float]:
    """CPU seconds from a cached index of shards like the first one of `folder` to the position of sample 10^8."""
    sidecar, indexed = folder / "one", folder / "all"
    write_shards(folder / "shard", [b""], 1, rows)
    index = load_index(LocalStorage(str(folder / "shard")), sidecar)
    files = [StoredFile(f"shard-{number:05d}.parquet", index["size"][0].as_py(), "") for number in range(shards)]
    index = index.take(pa.array(np.zeros(shards, np.int64)))
    for column in ("name", "version"):
        values = pa.array([getattr(file, column) for file in files])
        index = index.set_column(index.schema.get_field_index(column), column, values)
    write_sidecar(indexed, index)
    start = time.process_time()
    source = ParquetSource(ListedStorage(files), indexed)
    opened = time.process_time()
    SampleOrder(source.group_rows, seed=0, lanes=3072, block_rows=64).locate(np.arange(10**8, 10**8 + 48))
    return {
        "rows": source.num_rows,
        "row_groups": len(source.group_rows),
        "open_s": opened - start,
        "seek_s": time.process_time() - opened,
    }


class SyntheticShards:
    """Tar shards that are not there, of 10,000 images each."""

    files = TarShards.files

    def contents(self, storage: ListedStorage, file: StoredFile) -> Contents:
        """Names and places as those of a real shard."""
        stem = Path(file.name).stem
        return Contents([Member(f"{stem}/{n:09d}.jpg", 30_720 * n + 512, 30_000, 30_000) for n in range(10_000)])


def measure_images(folder: Path, count: int = 1_000_000, real: int = 20_000) -> dict[str, Any]:
    """CPU seconds to open a million images, as loose files and in tar shards whose index is kept, and MB they take.

    ``real`` files are made and listed, too, and the seconds of that given per million.
    """
    (folder / "real").mkdir()
    for number in range(real):
        (folder / f"real/tile_{number:09d}.png").touch()
    start = time.process_time()
    found = LocalStorage(str(folder / "real"), files=IMAGES).list_files()
    result: dict[str, Any] = {"images": count, "list_s_per_million": (time.process_time() - start) * 1e6 / len(found)}
    loose = [StoredFile(f"slide_{n // 2500:05d}/tile_{n:09d}.png", 30_000, "1") for n in range(count)]
    shards = [StoredFile(f"shard-{n:05d}.tar", 307_200_000, "1") for n in range(max(1, count // 10_000))]
    for name, files, container in (("loose", loose, None), ("tar", shards, SyntheticShards())):
        storage, sidecar = ListedStorage(files), folder / name
        if container:
            load_images(storage, container, files, sidecar)
        start = time.process_time()
        source = ImageSource(storage, load_images(storage, container, files, sidecar), container)
        result[f"{name}_open_s"] = time.process_time() - start
        result[f"{name}_mb"] = len(pickle.dumps(source)) / 1e6
        start = time.process_time()
        for group in range(0, len(source.group_rows), 10):
            source.origins(group)
        result[f"{name}_origins_s_per_million"] = 10 * (time.process_time() - start) * 1e6 / source.num_rows
    return result


def table(results: dict[str, Any]) -> str:
    """The figures that have a target, as Markdown."""
    transform, reader, seek = (results[key] for key in ("transform_ms", "reader", "seek"))
    images = results["images"]
    mixing, memory = results["mixing"]["29_m_rows"], results["memory_gib"]["29_m_rows"]
    decode_png, augment = transform["decode_png"], transform["augment_fast"]
    ratio = transform["augment_reference"] / augment
    rows = (
        ("decode and augment a JPEG tile, CPU", f"{transform['decode_jpeg'] + augment:.2f} ms", "2.2 ms"),
        ("decode and augment a PNG tile, CPU", f"{decode_png + augment:.2f} ms", "3.2 ms"),
        ("published transform over ours", f"{ratio:.1f} ({transform['augment_reference']:.1f} ms)", "8"),
        ("draw the views of a tile, CPU", f"{transform['draw']:.3f} ms", "0.2 ms"),
        ("reader, CPU per row", f"{reader['cpu_ms_per_row']:.3f} ms", "0.04 ms"),
        ("reader, main thread per 48 rows", f"{reader['main_thread_ms_per_48']:.1f} ms", "6 ms"),
        (
            f"open {seek['rows']:,} rows in {seek['row_groups']:,} row groups and seek",
            f"{seek['open_s'] + seek['seek_s']:.2f} s",
            "0.5 s",
        ),
        (
            f"open {images['images']:,} loose images: list, index; memory",
            f"{images['list_s_per_million'] * images['images'] / 1e6:.1f} + {images['loose_open_s']:.1f} s; "
            f"{images['loose_mb']:.0f} MB",
            "",
        ),
        ("as many in tar shards, from the kept index", f"{images['tar_open_s']:.1f} s; {images['tar_mb']:.0f} MB", ""),
        ("distinct slides in a batch of 384", f"{mixing['slides_in_1_steps']:.0f}", "370"),
        ("in 100 batches", f"{mixing['slides_in_100_steps']:.0f}", "2,800"),
        ("stored tiles held by 8 processes at most, PNG", f"{memory['png_105kb']:.1f} GiB", "19.6 GiB"),
        ("the same, JPEG", f"{memory['jpeg_31kb']:.1f} GiB", "6.5 GiB"),
    )
    lines = ["| what | measured | target |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="little data: shows that it runs, and no more")
    args = parser.parse_args(argv)
    scale = 1000 if args.tiny else 1
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    packages = (
        "torch",
        "torchvision",
        "numpy",
        "pyarrow",
        "opencv-python-headless",
        "pillow",
        "scikit-image",
    )
    results: dict[str, Any] = {"machine": describe_machine(packages)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        jpegs = [encode(tile, "jpeg") for tile in tissue_tiles(128)]
        shards = write_shards(folder / "shards", jpegs, shards=8 if args.tiny else 40, rows=640)
        results["transform_ms"] = measure_transforms(args.seconds)
        results["reader"] = measure_reader(shards, args.seconds)
        results["images"] = measure_images(folder, 1_000_000 // scale, 20_000 // scale)
        results["seek"] = measure_seek(folder, shards=12_000 // scale)
    results["mixing"] = {name: measure_mixing(rows // scale) for name, rows in COLLECTIONS.items()}
    results["memory_gib"] = {name: compute_memory(rows // scale) for name, rows in COLLECTIONS.items()}
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    sys.stdout.write(table(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

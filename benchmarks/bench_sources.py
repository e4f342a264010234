"""What each kind of data costs: the same JPEG tiles in every form, and tiles cut from a slide.

    python benchmarks/bench_sources.py [--seconds 3] [--output results.json] [--tiny]

Reading is measured alone, with decoding, and in the training loader with the default augmentation, in this one
process. The kinds take turns, so that a busy machine disturbs all of them alike; medians of their turns are given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_data import encode, tissue_tiles, write_shards
from benchmarks.bench_slides import write_large_slide
from benchmarks.machine import describe_machine
from dinov2.build.data import build_loader, open_data, order_parameters
from dinov2.configs import load_config
from dinov2.data.source import EncodedSample
from tests.helpers.collections import SLIDES, write_collection

BATCH, TURNS, SLIDE_SIDE = 32, 5, 16_384


@dataclass
class Workload:
    """Part of a plan that the data look at."""

    global_batch: int = BATCH
    local_batch: int = BATCH
    world_size: int = 1
    total_images: int = 10**6


def write_all(folder: Path, count: int, side: int) -> dict[str, str]:
    """``count`` tiles in each kind that holds tiles, and one slide, square with that side; the paths by kind."""
    jpegs = [encode(tile, "jpeg") for tile in tissue_tiles(min(count, 128))]
    each = -(-count // len(SLIDES))
    files = {f"{SLIDES[n // each]}/{n:06d}.jpg": jpegs[n % len(jpegs)] for n in range(count)}
    paths = {"parquet": str(write_shards(folder / "parquet", list(files.values()), 1, count))}
    for kind in ("images", "image_list", "tar", "zip"):
        paths[kind] = write_collection(kind, folder / kind, files)
    paths["hdf5"] = write_collection("hdf5-files", folder / "hdf5", files)
    (folder / "slides").mkdir()
    write_large_slide(folder / "slides/slide.svs", side, side)
    paths["slides"] = str(folder / "slides")
    corners = np.random.default_rng(0).integers(3 * side // 8, 5 * side // 8 - 224, (count, 2))  # within the tissue
    lines = [f"{folder / 'slides/slide.svs'} {x} {y} 0" for x, y in corners]
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    return paths | {"sample_list": str(folder / "list.txt")}


def prepare(kind: str, path: str) -> dict[str, Callable[[], int]]:
    """Pieces of work on data of a kind, each of which returns how many images it was for."""
    config = load_config(
        None, [f"data.path={path}", f"data.kind={kind}", "train.num_workers=0", "online.magnifications=[40]"]
    )
    data = open_data(config)
    source, order = data.source, order_parameters(config, Workload(), data)
    batches = iter(build_loader(config, Workload(), data, 0, order, torch.device("cpu")))
    rows = np.arange(64)
    places = iter(range(0, 10**9, len(rows)))
    ordered = data.order(**order | ({} if kind == "slides" else {"lanes": 1}))  # row group after row group

    def read() -> Iterator[EncodedSample]:
        located = ordered.locate(next(places) + rows)
        for group in np.unique(located.group).tolist():
            wanted = located.row[located.group == group].tolist()
            for row, (slide, stored) in zip(wanted, source.read(group, wanted), strict=True):
                yield EncodedSample(0, group, row, slide, stored)

    return {
        "read": lambda: sum(1 for _ in read()),
        "read_and_decode": lambda: sum(source.decode(sample) is not None for sample in read()),
        "batches": lambda: BATCH * sum(1 for _ in islice(batches, 1)),
    }


def measure(work: Callable[[], int], seconds: float) -> tuple[float, float]:
    """CPU milliseconds of all threads for an image, and images per second."""
    images, wall, cpu = 0, time.perf_counter(), time.process_time()
    while not images or time.perf_counter() - wall < seconds:
        images += work()
    return 1000 * (time.process_time() - cpu) / images, images / (time.perf_counter() - wall)


def table(results: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown."""
    lines = [f"| kind | {' | '.join(results['parquet'])} |", "|---" * (1 + len(results["parquet"])) + "|"]
    for kind, values in results.items():
        lines.append(f"| `{kind}` | {' | '.join(f'{value:.3g}' for value in values.values())} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each turn of each measurement")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="little data: shows that it runs, and no more")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_all(Path(scratch), *((128, 2048) if args.tiny else (2_560, SLIDE_SIDE)))
        works = {kind: prepare(kind, path) for kind, path in paths.items()}
        turns: dict[str, dict[str, list[tuple[float, float]]]] = {
            kind: {name: [] for name in work} for kind, work in works.items()
        }
        for _ in range(2 if args.tiny else 1 + TURNS):
            for kind, work in works.items():
                for name, piece in work.items():
                    turns[kind][name].append(measure(piece, args.seconds))
    for kind, measured in turns.items():
        cpu = {name: statistics.median(cpu for cpu, _ in turn[1:]) for name, turn in measured.items()}
        rate = statistics.median(rate for _, rate in measured["batches"][1:])
        results[kind] = {f"{name}_cpu_ms": value for name, value in cpu.items()} | {"images_per_s": rate}
    packages = ("torch", "numpy", "pyarrow", "opencv-python-headless", "h5py")
    if args.output:
        found: dict[str, Any] = {"machine": describe_machine(packages), "sources": results}
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(table(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One page about a run: ``python -m dinov2.report OUTPUT_DIR [--tiles PARQUET_FOLDER] [--output DIR]``.

Reads the run's metrics, configuration and newest exported teacher. Writes curves, a sheet of augmented crops,
a PCA map of patch features, tiles with their nearest neighbours, the embeddings of tiles, and ``report.html``, which
holds all of it in one file.
"""

import argparse
import base64
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from torch import Tensor

from dinov2.build.augmentation import build_augmentation, build_collate
from dinov2.build.data import open_data
from dinov2.configs import Config, load_config
from dinov2.data.augment.collate import Sample
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import EncodedSample, Source
from dinov2.data.stream.derived import make_source
from dinov2.data.stream.order import SampleOrder
from dinov2.eval.features import embed_images, patch_feature_map, read_tiles
from dinov2.eval.probe.results import aligned
from dinov2.eval.probe.spread import mean_cosine, rankme
from dinov2.hub import load_teacher
from dinov2.logging.metrics import is_of_training
from dinov2.report.figures import as_png, draw_crops, draw_curves, draw_neighbours, draw_pca
from dinov2.utils.cli import run_command
from dinov2.utils.environment import DeviceError, memory_advice, select_device
from dinov2.utils.files import replacing

logger = logging.getLogger("dinov2.report")

MAX_TILES = 512  # embedded, spread evenly over the dataset
PCA_TILES = 8
CROP_TILES = 4  # two pairs, since masks are shared out over the four global crops of a pair
PAGE = "report.html"
Table = list[tuple[str, ...]]
"""A row of headings, then rows of cells."""

_SPEEDS = {"img_per_s": "images per second", "data_wait_pct": "waiting for data, %", "memory_gib": "peak memory, GiB"}


def newest_teacher(output_dir: Path) -> Path:
    """The exported teacher with the most steps; raises FileNotFoundError where there is none."""
    exports = list(output_dir.glob("eval/training_*/teacher_checkpoint.pth"))
    if not exports:
        raise FileNotFoundError(
            f"{str(output_dir)!r} holds no eval/training_*/teacher_checkpoint.pth; export one with train.py "
            "--eval-only."
        )
    return max(exports, key=lambda path: int(path.parent.name.rpartition("_")[2]))


def augmented_batch(config: Config, source: Source) -> tuple[list[np.ndarray], dict[str, Tensor]]:
    """A few tiles of the training data, uint8 (H, W, 3), and the batch that training would make of them."""
    augment = build_augmentation(config)
    order = SampleOrder(source.group_rows, seed=config.train.seed, lanes=CROP_TILES, block_rows=1)
    locations = order.locate(np.arange(CROP_TILES))
    tiles, samples = [], []
    for index, (group, row) in enumerate(zip(locations.group.tolist(), locations.row.tolist(), strict=True)):
        ((slide, data),) = source.read(group, [row])
        tiles.append(source.decode(EncodedSample(index, group, row, slide, data)))
        samples.append(Sample(index, augment(tiles[-1], index), slide, replaced=False))
    return tiles, build_collate(config)(samples)


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of ``metrics.jsonl`` by name, ordered by step; NaN where a record lacks a value.

    A resumed run writes some steps again: the last record of a step counts. Lines cut short by a kill do not, nor
    do records of probes, which are no training steps.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; give the output folder of a training run.")
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if is_of_training(record):
                by_step[record["step"]] = record
    if not by_step:
        raise ValueError(f"{str(path)!r} holds no record yet; wait until the run has logged a step.")
    records = [by_step[step] for step in sorted(by_step)]
    # What was not finite is null.
    return {name: np.array([record.get(name) for record in records], dtype=np.float64) for name in records[-1]}


def tables_of(metrics: Mapping[str, np.ndarray], embeddings: np.ndarray, of: str) -> dict[str, Table]:
    """By heading: first and last value of every loss; throughput, data wait, memory; figures of (N, D) embeddings."""
    names = [name for name in metrics if name.endswith("_loss")]
    losses = [(name, f"{metrics[name][0]:.4f}", f"{metrics[name][-1]:.4f}") for name in names]
    kinds = {"median": np.median, "least": np.min, "largest": np.max}
    speeds = [(words, *(f"{kind(metrics[name]):.1f}" for kind in kinds.values())) for name, words in _SPEEDS.items()]
    figures = (*map(str, embeddings.shape), f"{mean_cosine(embeddings):.4f}", f"{rankme(embeddings):.2f}")
    return {
        "Losses": [("", f"step {metrics['step'][0]:.0f}", f"step {metrics['step'][-1]:.0f}"), *losses],
        "Throughput": [("", *kinds), *speeds],
        f"Embeddings of {of}": [("tiles", "width", "mean off-diagonal cosine", "RankMe"), figures],
    }


def make_report(output_dir: Path, tiles: str | None, report_dir: Path) -> None:
    """Write the report of a run to a new or empty folder, or that of an earlier report, which is replaced.

    ``tiles`` is a Parquet dataset to embed; None takes the validation patients' tiles, or the training data.
    """
    if report_dir.exists() and any(report_dir.iterdir()) and not (report_dir / PAGE).exists():
        raise ValueError(f"Folder {str(report_dir)!r} holds other files; give --output a new folder.")
    metrics = read_metrics(output_dir / "metrics.jsonl")
    config = load_config(output_dir / "config.yaml")
    teacher = newest_teacher(output_dir)
    data = open_data(config, output_dir / "stream_index")
    held_out = [source for source in data.held_out if source]
    if tiles:
        embedded, source = f"tiles of {tiles}", ParquetSource(tiles)
    else:
        embedded = "validation tiles" if held_out else "training tiles"
        source = make_source(held_out) if held_out else data.source
    model = load_teacher(str(teacher)).to(select_device())
    norm = {"mean": config.augmentation.normalize_mean, "std": config.augmentation.normalize_std}
    patch = config.student.patch_size
    with memory_advice("hide the GPU with CUDA_VISIBLE_DEVICES='' to use the CPU"):
        pixels = list(read_tiles(source, MAX_TILES))
        embeddings = embed_images(model, pixels, size=config.crops.global_crops_size, **norm)
        shown = pixels[:: max(1, len(pixels) // PCA_TILES)][:PCA_TILES]
        size = max(patch, min(shown[0].shape[:2]) // patch * patch)  # about their own
        pca = draw_pca(shown, patch_feature_map(model, shown, size=size, **norm))
    tables = tables_of(metrics, embeddings, f"{embedded} by {teacher.parent.name}")
    crops = draw_crops(*augmented_batch(config, data.source), patch)
    images = {
        "loss_curves.png": ("Curves", as_png(draw_curves(metrics))),
        "crops.png": ("Augmented crops, masked patches grey", as_png(crops)),
        "pca.png": (f"Patch features of {embedded}", as_png(pca)),
        "neighbours.png": (
            f"Some of {embedded}, and the nearest to them by cosine of the class token",
            as_png(draw_neighbours(pixels, embeddings)),
        ),
    }
    for title, table in tables.items():
        logger.info("%s", "\n  ".join([title, *aligned(table)]))
    environment = Environment(loader=PackageLoader("dinov2.report", "."), autoescape=True, trim_blocks=True)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    page = environment.get_template("page.html").render(
        title=output_dir.resolve().name, tables=tables, images=images, config=(output_dir / "config.yaml").read_text()
    )
    report_dir.mkdir(parents=True, exist_ok=True)
    with replacing(*(report_dir / name for name in (*images, "embeddings.npy", PAGE))) as partials:
        for partial, (_, png) in zip(partials, images.values(), strict=False):
            partial.write_bytes(png)
        with partials[-2].open("wb") as file:
            np.save(file, embeddings)
        partials[-1].write_text(page)
    logger.info("Report: %s", report_dir / PAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description="One page about a run: curves, crops, PCA maps, embeddings.")
    parser.add_argument("output_dir", type=Path, help="output folder of a training run")
    parser.add_argument("--tiles", help="Parquet folder of tiles to embed (default: the training data)")
    parser.add_argument("--output", type=Path, help="folder of the report (default: OUTPUT_DIR/report)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    report_dir = args.output or args.output_dir / "report"
    return run_command(lambda: make_report(args.output_dir, args.tiles, report_dir), logger, errors=(DeviceError,))


if __name__ == "__main__":
    sys.exit(main())

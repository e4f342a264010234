"""One page about a run: ``python -m dinov2.report OUTPUT_DIR [--tiles PARQUET_FOLDER] [--output DIR]``.

Reads the run's metrics, configuration and newest exported teacher. Writes curves, a sheet of augmented crops,
a PCA map of patch features, the embeddings of tiles, and ``report.html``, which holds all of it in one file.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from dinov2.build.augmentation import build_augmentation, build_collate
from dinov2.build.data import OpenData, open_data
from dinov2.configs import Config, load_config
from dinov2.data.augment.collate import Sample
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import EncodedSample, Source
from dinov2.data.stream.mixture import make_source
from dinov2.data.stream.order import SampleOrder
from dinov2.eval.features import embed_images, patch_feature_map, read_tiles
from dinov2.eval.probe.rankme import mean_cosine, rankme
from dinov2.hub import load_teacher
from dinov2.report.figures import draw_crops, draw_curves, draw_pca
from dinov2.utils.environment import select_device

logger = logging.getLogger("dinov2.report")

MAX_TILES = 512  # embedded, spread evenly over the dataset
PCA_TILES = 8
CROP_TILES = 4  # two pairs, since masks are shared out over the four global crops of a pair
PAGE = "report.html"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2rem 1rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)

Table = list[tuple[str, ...]]


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of ``metrics.jsonl`` by name, ordered by step; NaN where a record lacks a value.

    A resumed run writes some steps again: the last record of a step counts. Lines cut short by a kill do not, nor
    do records of probes, which are no training steps.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds no record.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; give the output folder of a training run.")
    by_step = {record["step"]: record for record in _json_lines(path) if "/" not in "".join(record)}
    if not by_step:
        raise ValueError(f"{str(path)!r} holds no record yet; wait until the run has logged a step.")
    records = [by_step[step] for step in sorted(by_step)]
    return {name: np.array([record.get(name, np.nan) for record in records]) for name in records[-1]}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def newest_teacher(output_dir: Path) -> Path:
    """The exported teacher with the most steps.

    Raises:
        FileNotFoundError: none has been exported.
    """
    exports = list(output_dir.glob("eval/training_*/teacher_checkpoint.pth"))
    if not exports:
        raise FileNotFoundError(
            f"{str(output_dir)!r} holds no eval/training_*/teacher_checkpoint.pth; export one with train.py "
            "--eval-only."
        )
    return max(exports, key=lambda path: int(path.parent.name.rpartition("_")[2]))


def loss_table(metrics: Mapping[str, np.ndarray]) -> Table:
    """First and last logged value of every loss term."""
    names = [name for name in metrics if name.endswith("_loss")]
    rows = [(name, f"{metrics[name][0]:.4f}", f"{metrics[name][-1]:.4f}") for name in names]
    return [("", f"step {metrics['step'][0]:.0f}", f"step {metrics['step'][-1]:.0f}"), *rows]


def speed_table(metrics: Mapping[str, np.ndarray]) -> Table:
    """Median, least and largest logged throughput, data wait and memory."""
    labels = {
        "img_per_s": "images per second",
        "data_wait_pct": "waiting for data, %",
        "memory_gib": "peak memory, GiB",
    }
    rows = [
        (label, *(f"{statistic(metrics[name]):.1f}" for statistic in (np.median, np.min, np.max)))
        for name, label in labels.items()
    ]
    return [("", "median", "least", "largest"), *rows]


def embedding_table(embeddings: np.ndarray) -> Table:
    """Number, width, mean off-diagonal cosine and RankMe of (N, D) embeddings."""
    count, width = embeddings.shape
    cosine, rank = f"{mean_cosine(embeddings):.4f}", f"{rankme(embeddings):.2f}"
    return [("tiles", "width", "mean off-diagonal cosine", "RankMe"), (f"{count}", f"{width}", cosine, rank)]


def augmented_batch(config: Config, source: Source) -> tuple[list[np.ndarray], dict[str, Tensor]]:
    """A few tiles of the training data, uint8 (H, W, 3), and the batch that training would make of them."""
    augment = build_augmentation(config)
    order = SampleOrder(source.unit_rows, seed=config.train.seed, lanes=CROP_TILES, block_rows=1)
    places = order.locate(np.arange(CROP_TILES))
    tiles, samples = [], []
    for index, (unit, row) in enumerate(zip(places.unit.tolist(), places.row.tolist(), strict=True)):
        ((slide, data),) = source.read(unit, [row])
        tiles.append(source.decode(EncodedSample(index, unit, row, slide, data)))
        samples.append(Sample(index, augment(tiles[-1], index), slide, replaced=False))
    return tiles, build_collate(config)(samples)


def choose_tiles(tiles: str | None, data: OpenData) -> tuple[str, Source]:
    """What to embed, in words and as a source: the dataset named, else the validation patients' tiles, else all."""
    if tiles:
        return f"tiles of {tiles}", ParquetSource(tiles)
    held_out = [source for source in data.held_out if source]
    return ("validation tiles", make_source(held_out)) if held_out else ("training tiles", data.source)


def look_through(model: nn.Module, source: Source, config: Config) -> tuple[np.ndarray, Figure]:
    """Embeddings of the source's tiles, (N, D), and the PCA map of a few of them at their own size."""
    norm = {"mean": config.augmentation.normalize_mean, "std": config.augmentation.normalize_std}
    tiles = list(read_tiles(source, MAX_TILES))
    embeddings = embed_images(model, tiles, size=config.crops.global_crops_size, **norm)
    shown = tiles[:: max(1, len(tiles) // PCA_TILES)][:PCA_TILES]
    patch = config.student.patch_size
    size = max(patch, min(shown[0].shape[:2]) // patch * patch)
    return embeddings, draw_pca(shown, patch_feature_map(model, shown, size=size, **norm))


def make_report(output_dir: Path, tiles: str | None, report_dir: Path) -> Path:
    """Write the report of a run.

    Args:
        output_dir: the run's folder.
        tiles: Parquet dataset to embed; None takes the validation patients' tiles, or the training data.
        report_dir: new or empty folder, or that of an earlier report, which is replaced.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError, ValueError: something the report is made of is missing, or the folder is in use.
        RuntimeError: the machine's GPU cannot be used.
    """
    if report_dir.exists() and any(report_dir.iterdir()) and not (report_dir / PAGE).exists():
        raise ValueError(f"Folder {str(report_dir)!r} holds other files; give --output a new folder.")
    metrics = read_metrics(output_dir / "metrics.jsonl")
    config = load_config(output_dir / "config.yaml")
    teacher = newest_teacher(output_dir)
    data = open_data(config, output_dir / "stream_index")
    embedded, source = choose_tiles(tiles, data)
    model = load_teacher(str(teacher)).to(select_device())
    embeddings, pca = look_through(model, source, config)

    tables = {
        "Losses": loss_table(metrics),
        "Throughput": speed_table(metrics),
        f"Embeddings of {embedded} by {teacher.parent.name}": embedding_table(embeddings),
    }
    images = {
        "loss_curves.png": ("Curves", _png(draw_curves(metrics))),
        "crops.png": (
            "Augmented crops, masked patches grey",
            _png(draw_crops(*augmented_batch(config, data.source), config.student.patch_size)),
        ),
        "pca.png": (f"Patch features of {embedded}", _png(pca)),
    }
    for title, table in tables.items():
        logger.info("%s", _as_text(title, table))
    page = _page(output_dir.resolve().name, tables, images, (output_dir / "config.yaml").read_text())
    files = {name: png for name, (_, png) in images.items()}
    _write(report_dir, {**files, "embeddings.npy": _npy(embeddings), PAGE: page.encode()})
    return report_dir / PAGE


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        beside = folder / f"{name}.tmp{os.getpid()}"
        beside.write_bytes(content)
        beside.replace(folder / name)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _as_text(title: str, table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n  ".join([title, *lines])


def _page(
    title: str, tables: Mapping[str, Table], images: Mapping[str, tuple[str, bytes]], config: str
) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    for heading, (head, *rows) in tables.items():
        lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
        lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        parts.append(f"<h2>{escape(heading)}</h2><table>{body}</table>")
    for heading, png in images.values():
        data = base64.b64encode(png).decode()
        parts.append(f"<h2>{escape(heading)}</h2><img alt='' src='data:image/png;base64,{data}'>")
    parts.append(f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>")
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 1 with a one-sentence reason."""
    parser = argparse.ArgumentParser(description="One page about a run: curves, crops, PCA maps, embeddings.")
    parser.add_argument("output_dir", type=Path, help="output folder of a training run")
    parser.add_argument("--tiles", help="Parquet folder of tiles to embed (default: the training data)")
    parser.add_argument("--output", type=Path, help="folder of the report (default: OUTPUT_DIR/report)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        page = make_report(args.output_dir, args.tiles, args.output or args.output_dir / "report")
    except (OSError, ValueError, RuntimeError) as error:
        logger.error("%s", error)
        return 1
    logger.info("Report: %s", page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The page of a report: tables of a run's metrics and embeddings, and one HTML file that holds all of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from dinov2.eval.probe.spread import mean_cosine, rankme

Table = list[tuple[str, ...]]
"""A row of headings, then rows of cells."""

_SPEEDS = {"img_per_s": "images per second", "data_wait_pct": "waiting for data, %", "memory_gib": "peak memory, GiB"}


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of ``metrics.jsonl`` by name, ordered by step; NaN where a record lacks a value.

    A resumed run writes some steps again: the last record of a step counts. Lines cut short by a kill do not, nor
    do records of probes, which are no training steps.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it holds no record.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; give the output folder of a training run.")
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if "/" not in "".join(record):
                by_step[record["step"]] = record
    if not by_step:
        raise ValueError(f"{str(path)!r} holds no record yet; wait until the run has logged a step.")
    records = [by_step[step] for step in sorted(by_step)]
    return {name: np.array([record.get(name, np.nan) for record in records]) for name in records[-1]}


def loss_table(metrics: Mapping[str, np.ndarray]) -> Table:
    """First and last logged value of every loss term."""
    names = [name for name in metrics if name.endswith("_loss")]
    rows = [(name, f"{metrics[name][0]:.4f}", f"{metrics[name][-1]:.4f}") for name in names]
    return [("", f"step {metrics['step'][0]:.0f}", f"step {metrics['step'][-1]:.0f}"), *rows]


def speed_table(metrics: Mapping[str, np.ndarray]) -> Table:
    """Median, least and largest logged throughput, data wait and memory."""
    rows = [
        (words, *(f"{statistic(metrics[name]):.1f}" for statistic in (np.median, np.min, np.max)))
        for name, words in _SPEEDS.items()
    ]
    return [("", "median", "least", "largest"), *rows]


def embedding_table(embeddings: np.ndarray) -> Table:
    """Number, width, mean off-diagonal cosine and RankMe of (N, D) embeddings."""
    figures = (*map(str, embeddings.shape), f"{mean_cosine(embeddings):.4f}", f"{rankme(embeddings):.2f}")
    return [("tiles", "width", "mean off-diagonal cosine", "RankMe"), figures]


def as_text(title: str, table: Table) -> str:
    """A table as lines of a log."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n  ".join([title, *lines])


def render_page(title: str, tables: Mapping[str, Table], images: Mapping[str, tuple[str, bytes]], config: str) -> str:
    """HTML with everything in it: tables by heading, heading and PNG of images by file name, the run's YAML."""
    environment = Environment(loader=PackageLoader("dinov2.report", "."), autoescape=True, trim_blocks=True)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    return environment.get_template("page.html").render(title=title, tables=tables, images=images, config=config)

"""Results of probes, as numbers by name, a table, a CSV and a JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dinov2.utils import files


@dataclass(frozen=True)
class Result:
    """One metric of one probe.

    Attributes:
        task: name of the tiles.
        probe: what was done with their features.
        metric: what it was measured by.
        value: mean over folds and runs.
        low: lower end of the 95 % interval; NaN where there is none.
        high: upper end.
        sd: over folds and runs; NaN where there is one.
        runs: folds times runs.
        count: tiles (or slides) tested.
    """

    task: str
    probe: str
    metric: str
    value: float
    low: float = math.nan
    high: float = math.nan
    sd: float = math.nan
    runs: int = 1
    count: int = 0


COLUMNS = ("step", *(field.name for field in fields(Result)))
HEADLINE = "balanced_accuracy"


def as_metrics(results: Sequence[Result]) -> dict[str, float]:
    """``task/probe/metric`` to value; for balanced accuracy the interval, too, as ``..._low`` and ``..._high``."""
    metrics = {}
    for result in results:
        name = f"{result.task}/{result.probe}/{result.metric}"
        metrics[name] = result.value
        if result.metric == HEADLINE and not math.isnan(result.low):
            metrics |= {f"{name}_low": result.low, f"{name}_high": result.high}
    return metrics


def append_csv(path: str | Path, results: Sequence[Result], step: int | None) -> None:
    """Add one line per metric to a CSV, which is begun where there is none. The last lines of a step count.

    Raises:
        ValueError: if the file is another table.
    """
    path = Path(path)
    before = path.read_text() if path.exists() else ""
    if before and tuple(next(csv.reader([before.partition("\n")[0]]))) != COLUMNS:
        raise ValueError(f"'{path}' is another table; name a new file or one with columns {','.join(COLUMNS)}.")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    if not before:
        writer.writeheader()
    for result in results:
        row = {name: "" if value != value else value for name, value in asdict(result).items()}
        writer.writerow({"step": "" if step is None else step, **row})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, [before, lines.getvalue()])


def write_json(path: str | Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """Write results and what they are of to a new file; NaN becomes null. Raises FileExistsError."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"'{path}' exists already; name a new file.")
    rows = [{name: None if value != value else value for name, value in asdict(result).items()} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {**about, "results": rows})


def as_table(results: Sequence[Result]) -> str:
    """One line per probe, for people."""
    lines = [("task", "probe", "balanced accuracy", "95 % interval", "sd", "accuracy", "F1", "AUROC", "runs", "n")]
    by_probe: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        by_probe.setdefault((result.task, result.probe), {})[result.metric] = result
    for (task, probe), metrics in by_probe.items():
        headline = metrics.get(HEADLINE)
        any_one = next(iter(metrics.values()))
        figures = [_show(metrics.get(name)) for name in ("accuracy", "f1", "auroc")]
        first = [_show(headline), _interval(headline), _number(headline.sd)] if headline else [_show(any_one), "", ""]
        lines.append((task, probe, *first, *figures, str(any_one.runs), str(any_one.count)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _show(result: Result | None) -> str:
    return "" if result is None else _number(result.value)


def _interval(result: Result) -> str:
    return "" if math.isnan(result.low) else f"{result.low:.4f} - {result.high:.4f}"

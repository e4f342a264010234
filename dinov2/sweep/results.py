"""What came out of a sweep: of each variant mean and spread over seeds of probes and final losses."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.report.page import Pictures, Table, read_runs, render, write_page
from dinov2.report.records import Run as Read
from dinov2.sweep.launch import is_finished
from dinov2.sweep.plan import Run, Sweep
from dinov2.utils.files import write_json, write_text

PAGE, TABLE, VALUES = "report.html", "results.md", "results.json"

_FINAL = 0.1  # fraction of a run's records over which a final loss is the mean


def write_results(sweep: Sweep) -> Path:
    """Write table (Markdown and JSON) and page of all runs of a sweep that have begun; returns the page's path.

    Runs that are not finished are on the page and not in the table.
    """
    begun = [run for run in sweep.runs if (sweep.output / run.name).is_dir()]
    read = read_runs([sweep.output / run.name for run in begun], None)
    measured = {run: measures(its) for run, its in zip(begun, read, strict=True) if is_finished(sweep, run)}
    groups = {run.group: [other for other in measured if other.group == run.group] for run in sweep.runs}
    table = comparison(sweep, groups, measured)
    sweep.output.mkdir(parents=True, exist_ok=True)
    write_json(sweep.output / VALUES, _as_json(sweep, groups, measured))
    write_text(sweep.output / TABLE, f"# {sweep.name}\n\n{_markdown(table)}\n\n{_NOTE}\n")
    left = [run.name for run in sweep.runs if run not in measured]
    missing = [f"Runs that are not finished: {', '.join(left)}."] if left else []
    missing.append("Pictures: they are drawn for one run at a time, by pathfm report RUN.")
    pictures = Pictures(tables={"Variants: mean and standard deviation over seeds": table}, missing=missing)
    write_page(sweep.output / PAGE, render(read, pictures), {})
    return sweep.output / PAGE


_NOTE = (
    "Mean and standard deviation over seeds of what runs ended with: of probes the last value, of losses the mean over "
    f"the last {_FINAL:.0%} of the records."
)


def measures(run: Read) -> dict[str, float]:
    """What a finished run ended with, by name: ``TASK/PROBE``, then losses."""
    found = {name: probed.values[-1] for name, probed in run.probes.items() if probed.values}
    for name, values in run.metrics.items():
        if name.endswith("_loss") and "/" not in name:
            found[name] = float(np.mean(values[-max(1, round(_FINAL * len(values))) :]))
    return found


def comparison(sweep: Sweep, groups: dict[str, list[Run]], measured: dict[Run, dict[str, float]]) -> Table:
    """Table with a column for each variant (and phase) and a row for each measure."""
    names = dict.fromkeys(name for values in measured.values() for name in values)
    asked = {name: sum(run.group == name for run in sweep.runs) for name in groups}
    rows: Table = [("", *groups), ("runs", *(f"{len(runs)} of {asked[name]}" for name, runs in groups.items()))]
    for name in names:
        cells = ([measured[run].get(name, math.nan) for run in runs] for runs in groups.values())
        rows.append((name, *map(_cell, cells)))
    return rows


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of values that are finite; NaN of none, and of one the deviation."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    return statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else math.nan


def _cell(values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    if math.isnan(mean):
        return ""
    return f"{mean:.4f}" + ("" if math.isnan(deviation) else f" ± {deviation:.4f}")


def _markdown(table: Table) -> str:
    head, *rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


def _as_json(sweep: Sweep, groups: dict[str, list[Run]], measured: dict[Run, dict[str, float]]) -> dict[str, Any]:
    variants: list[dict[str, Any]] = []
    for group, runs in groups.items():
        names = dict.fromkeys(name for run in runs for name in measured[run])
        results = {}
        for name in names:
            values = {str(run.seed): measured[run].get(name, math.nan) for run in runs}
            mean, deviation = spread(list(values.values()))
            results[name] = {"mean": _finite(mean), "sd": _finite(deviation)}
            results[name]["seeds"] = {seed: _finite(value) for seed, value in values.items()}
        variants.append({"name": group, "runs": [run.name for run in runs], "results": results})
    return {"sweep": sweep.name, "base": sweep.base, "variants": variants}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Results of probes, as numbers by name, a table, a CSV and a JSON."""

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
    """One metric of one probe."""

    task: str  # name of the tiles
    probe: str  # what was done with their features
    metric: str  # what it was measured by
    value: float  # mean over folds and runs
    low: float = math.nan  # ends of the 95 % interval; NaN where there is none
    high: float = math.nan
    sd: float = math.nan  # over folds and runs; NaN where there is one
    runs: int = 1  # folds times runs
    count: int = 0  # tiles (or slides) tested
    division: str = ""  # split, where tiles have one; else what folds keep whole: patient, slide or tile


COLUMNS = ("step", *(field.name for field in fields(Result)))
_OLDER = COLUMNS[:-1]  # of tables begun before there was `division`
HEADLINE = "balanced_accuracy"
COMPARED = "compared_"  # before the metrics of the teacher that another one is compared with
DIFFERENCE = f"{HEADLINE}_difference"


def as_metrics(results: Sequence[Result]) -> dict[str, float]:
    """``task/probe/metric`` to value; of balanced accuracies and their differences also ``..._low``, ``..._high``."""
    metrics = {}
    for result in results:
        name = f"{result.task}/{result.probe}/{result.metric}"
        metrics[name] = result.value
        if result.metric in (HEADLINE, DIFFERENCE) and not math.isnan(result.low):
            metrics |= {f"{name}_low": result.low, f"{name}_high": result.high}
    return metrics


def append_csv(path: Path, results: Sequence[Result], step: int | None) -> None:
    """Add one line per metric to a CSV, which is begun where there is none. The last lines of a step count.

    Raises ValueError if the file is another table.
    """
    before = path.read_text() if path.exists() else ""
    columns = tuple(next(csv.reader([before.partition("\n")[0]]))) if before else COLUMNS
    if columns not in (COLUMNS, _OLDER):
        raise ValueError(f"'{path}' is another table; name a new file or one with columns {','.join(COLUMNS)}.")
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    if not before:
        writer.writerow(COLUMNS)
    writer.writerows([step, *_without_nan(result).values()][: len(columns)] for result in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, [before, lines.getvalue()])


def read_csv(path: Path, step: int | None) -> list[Result]:
    """The last results of a step in a table of `append_csv`, None for those of no step; else ValueError."""
    found: dict[tuple[str, ...], Result] = {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) not in (COLUMNS, _OLDER):
            raise ValueError(f"'{path}' is another table than probes write; columns {','.join(COLUMNS)} are expected.")
        for row in rows:
            if row.pop("step") == ("" if step is None else str(step)):
                numbers = {name: float(row[name] or math.nan) for name in ("value", "low", "high", "sd")}
                counts = {name: int(row[name]) for name in ("runs", "count")}
                result = Result(**{**row, **numbers, **counts})
                found[result.task, result.probe, result.metric] = result
    return list(found.values())


def write_json(path: Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """Write results and what they are of to a new file; NaN becomes null. Raises FileExistsError."""
    if path.exists():
        raise FileExistsError(f"'{path}' exists already; name a new file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {**about, "results": list(map(_without_nan, results))})


def _without_nan(result: Result) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in asdict(result).items()}


def as_table(results: Sequence[Result]) -> str:
    """One line per probe, for people; where two teachers are compared, the other's value and the difference, too."""
    heads = ["task", "probe", "balanced accuracy", "95 % interval", "sd", "accuracy", "F1", "AUROC", "runs", "n"]
    by_probe: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        by_probe.setdefault((result.task, result.probe), {})[result.metric] = result
    compared = any(result.metric.startswith(COMPARED) for result in results)
    lines = [heads + ["compared", "difference", "95 % interval"] * compared]
    for names, metrics in by_probe.items():
        first = metrics.get(HEADLINE) or next(iter(metrics.values()))
        others = [_value(metrics.get(name)) for name in ("accuracy", "f1", "auroc")]
        line = [*names, _value(first), _interval(first), _figure(first.sd), *others, str(first.runs), str(first.count)]
        if compared:
            other, difference = metrics.get(COMPARED + first.metric), metrics.get(DIFFERENCE)
            line += [_value(other), _value(difference, "+.4f"), _interval(difference, "+.4f", " to ")]
        lines.append(line)
    by_tile = dict.fromkeys(result.task for result in results if result.division == "tile")
    told = "folds are by tile; copies or neighbours of one tile in two folds raise the figures."
    return "\n".join([*aligned(lines, left=2), *(f"{task}: {told}" for task in by_tile)])


def aligned(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Lines of a table, whose first columns are ``left`` aligned and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return ["  ".join(side(cell, n) for side, cell, n in zip(sides, row, widths, strict=True)) for row in rows]


def _value(result: Result | None, form: str = ".4f") -> str:
    return "" if result is None else _figure(result.value, form)


def _interval(result: Result | None, form: str = ".4f", between: str = " - ") -> str:
    if result is None or math.isnan(result.low):
        return ""
    return between.join(_figure(end, form) for end in (result.low, result.high))


def _figure(value: float, form: str = ".4f") -> str:
    return "" if math.isnan(value) else format(value, form)

"""One table of what stock eva found, beside published figures: ``python -m dinov2.eval.eva_summary OUTPUT``.

Reads what ``scripts/run_eva.sh`` leaves in OUTPUT, writes ``summary.md`` and ``summary.csv`` there and shows the page.
"""

import csv
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from dinov2.logging import setup_logging
from dinov2.utils.cli import command_parser, run_command
from dinov2.utils.files import replacing, write_text

TASKS = (
    "pcam_10", "bach", "bracs", "breakhis", "crc", "gleason", "mhist", "pcam", "cam16_small", "panda_small",
    "consep", "monusac",
)  # fmt: skip
PUBLISHED = {
    # Kaplan et al. 2025 (sophont.med/blog/openmidnight): class token.
    "OpenMidnight, cls": (.790, .916, .661, .873, .961, .817, .844, .938, .946, .652, .631, .655),
    # The same weights in its authors' high-resolution report, at 224 px: class and mean token.
    "OpenMidnight, cls+mean": (.821, .917, .645, .908, .967, .824, .832, .933, .835, .652, .623, .649),
    # Karasikov et al. 2025 (arXiv 2504.05186) and the model's page: class and mean token.
    "Midnight-92k/392, cls+mean": (.900, .904, .646, .802, .966, .807, .828, .951, .868, .651, .662, .708),
    "Midnight-92k, cls+mean": (.882, .889, .615, .793, .967, .823, .831, .948, .872, .643, .629, .656),
    "Midnight-12k, cls+mean": (.803, .907, .639, .840, .967, .790, .815, .931, .869, .656, .625, .664),
}  # fmt: skip
"""Published figures by model, in the order of `TASKS`."""

METRICS = {
    "MulticlassAccuracy": "balanced accuracy",
    "BinaryBalancedAccuracy": "balanced accuracy",
    "MonaiDiceScore": "Dice",
}
"""Metrics of a task: the first of these that eva recorded (MulticlassAccuracy is a mean over classes)."""

STATUS_FILE = "status.tsv"
"""``task status seconds``, separated by tabs; the last line of a task counts."""

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class Row:
    """Outcome of a task; the last five fields are empty without results."""

    task: str  # one of TASKS
    status: str  # "done", "no data" or "failed"
    seconds: float  # spent on it
    metric: str = ""  # in words
    split: str = ""  # whose tiles or slides were measured: "test" where the task has such, else "val"
    mean: float = math.nan  # over runs
    sd: float = math.nan  # over runs (n - 1); NaN of one run
    runs: int = 0


def read_results(path: Path) -> tuple[str, str, float, float, int]:
    """Metric, split, mean, sd and runs of eva's ``results.json``; ValueError if it is none or without `METRICS`."""
    try:
        metrics = json.loads(path.read_text())["metrics"]
        for split in ("test", "val"):
            for name, words in METRICS.items():
                if found := metrics[split] and metrics[split][0].get(f"{split}/{name}"):
                    values = [float(value) for value in found["values"]]
                    sd = float(found["stdev"]) if len(values) > 1 else math.nan
                    return words, split, fmean(values), sd, len(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is not a results.json of eva ({error!r}).") from error
    raise ValueError(f"'{path}' has none of {', '.join(METRICS)}.")


def collect(output: Path) -> list[Row]:
    """Rows of all tasks that a folder's `STATUS_FILE` names, in the order of `TASKS`.

    A task's figures are those of the newest ``<task>/results/*/results.json``. ValueError: if a file is corrupt.
    """
    status = output / STATUS_FILE
    if not status.is_file():
        raise FileNotFoundError(f"'{output}' has no {STATUS_FILE}; name a folder that scripts/run_eva.sh wrote.")
    rows = {}
    for line in status.read_text().splitlines():
        try:
            task, outcome, seconds = line.split("\t")
            found = ()
            if outcome == "done":  # eva's folders begin with the time
                found = read_results(max((output / task / "results").glob("*/results.json")))
            rows[TASKS.index(task)] = Row(task, outcome, float(seconds), *found)
        except ValueError as error:
            raise ValueError(f"'{status}': {line!r} cannot be read ({error}).") from error
    return [rows[number] for number in sorted(rows)]


def as_markdown(rows: Sequence[Row], title: str) -> str:
    """The table as a page, with averages where all tasks have a result."""
    header = ["task", "metric", "mean", "sd", "runs", "time", *PUBLISHED]
    table: list[list[object]] = [header, ["---"] * len(header)]
    for row in rows:
        metric = f"{row.metric}, {row.split}" if row.runs else row.status
        own = [row.task, metric, _figure(row.mean), _figure(row.sd), row.runs or "", _clock(row.seconds)]
        table.append(own + list(map(_figure, _published(row.task))))
    means = [row.mean for row in rows if row.runs]
    if len(means) == len(TASKS):
        own = ["average", "all twelve", _figure(fmean(means)), "", "", _clock(math.fsum(row.seconds for row in rows))]
        table.append(own + [_figure(fmean(figures)) for figures in PUBLISHED.values()])
    lines = (f"| {' | '.join(map(str, cells))} |" for cells in table)
    return "\n".join([f"# {title}", "", *lines]) + "\n"


def _published(task: str) -> list[float]:
    return [figures[TASKS.index(task)] for figures in PUBLISHED.values()]


def _figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = command_parser(
        "python -m dinov2.eval.eva_summary",
        __doc__.split(":")[0] + ".",
        "output_eva",
    )
    parser.add_argument("output", type=Path, help="folder that scripts/run_eva.sh wrote")
    output = parser.parse_args(argv).output
    setup_logging()

    def summarise() -> None:
        rows = collect(output)
        text = as_markdown(rows, f"eva: {output.name}")
        with replacing(output / "summary.csv") as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Row.__dataclass_fields__, *PUBLISHED])
            for row in rows:  # figures in full, empty where there are none
                own = ["" if value != value else value for value in vars(row).values()]
                writer.writerow([*own, *_published(row.task)])
        write_text(output / "summary.md", text)
        sys.stdout.write(text)

    return run_command(summarise, logger)


if __name__ == "__main__":
    sys.exit(main())

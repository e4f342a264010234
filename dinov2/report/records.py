"""What a run's folder tells of it, whatever of it is there: metrics, probes, restarts, configuration, facts."""

import csv
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dinov2.eval.probe.results import COMPARED, HEADLINE
from dinov2.logging.metrics import PEAK, is_of_training
from dinov2.logging.names import POSITION, ungrouped

logger = logging.getLogger("dinov2.report")

SIGNS = ("metrics.jsonl", "config.yaml", "checkpoints", "logs")
"""What makes a folder a run's, each by itself."""

MOST_POINTS = 1200  # of a curve; of longer runs several records become one point
MOST_WARNINGS = 20
_HEADLINES = (HEADLINE, "value")
_WARNING = re.compile(r"^(\d[\d :-]*) W (.+)$", re.MULTILINE)


@dataclass
class Probed:
    """A probe's headline over the steps: balanced accuracy, or the value of one without labels."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)  # ends of the 95 % interval; NaN where there is none
    high: list[float] = field(default_factory=list)


@dataclass
class Run:
    """A run as its folder shows it.

    Attributes:
        name: to tell it from the others on a page.
        metrics: columns by flat name, float64, ordered by ``step``; NaN where a record lacks a value. Empty without
            records.
        pooled: number of records that a point of these columns stands for.
        probes: by ``task/probe``.
        restarts: steps after which a later launch went on.
        config: values by dotted key, as text.
        facts: heading to text.
        warnings: newest last, each with its time.
        missing: sentences on what could not be shown and why.
    """

    name: str
    folder: Path
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    pooled: int = 1
    probes: dict[str, Probed] = field(default_factory=dict)
    restarts: list[int] = field(default_factory=list)
    config: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_run(folder: Path, name: str, price: float | None = None) -> Run:
    """Read what is there of a run; ``price`` is that of an hour of one GPU. Nothing in the folder raises."""
    run = Run(name, folder)
    if not any((folder / sign).exists() for sign in SIGNS):
        run.missing.append(f"{str(folder)!r} is no run's folder: it holds none of {', '.join(SIGNS)}.")
        return run
    records = _told(run, "metrics.jsonl", "curves", lambda: read_records(folder / "metrics.jsonl", run.missing)) or []
    steps = [record for record in records if is_of_training(record)]
    if steps:
        run.restarts = restarts_of(steps)
        run.metrics, run.pooled = pooled(columns_of(steps), MOST_POINTS)
    elif (folder / "metrics.jsonl").exists():
        run.missing.append("Curves: metrics.jsonl holds no record of a step yet; one is written every few steps.")
    run.config = _told(run, "config.yaml", "configuration", lambda: read_config(folder / "config.yaml")) or {}
    run.probes = probes_of(records)
    if (folder / "eval" / "probes.csv").exists():
        found = _told(run, "eval/probes.csv", "intervals of probes", lambda: read_probes(folder / "eval/probes.csv"))
        run.probes |= found or {}
    if not run.probes:
        run.missing.append("Probes: none was measured; section evaluation of the configuration names what is.")
    run.warnings = _told(run, "logs/rank_0.log", "warnings", lambda: read_warnings(folder / "logs/rank_0.log")) or []
    run.facts = _told(run, "metrics.jsonl", "facts", lambda: facts_of(folder, run, steps, price)) or {}
    return run


def _told(run: Run, file: str, what: str, read: Callable[[], Any]) -> Any:
    """What was read; None where that cannot be, which is then said on the page."""
    try:
        return read()
    except FileNotFoundError:
        run.missing.append(f"{what.capitalize()}: the folder holds no {file}.")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        run.missing.append(f"{what.capitalize()}: {file} cannot be read ({reason}).")
    return None


def read_records(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl`` in the order of the file, names ungrouped, without what is no record.

    Lines that a kill has cut short are counted in a sentence added to ``missing``.
    """
    records, cut = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            number = isinstance(record["step"], int | float) and math.isfinite(record["step"])
        except (ValueError, KeyError, TypeError):
            number = False
        if number:
            records.append({ungrouped(name): value for name, value in record.items()})
        elif line.strip():
            cut += 1
    if cut:
        missing.append(f"Curves: {cut} lines of metrics.jsonl are no records, as a kill leaves them, and are left out.")
    return records


def columns_of(records: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Columns by name, ordered by step. Of a step that was made again after a restart the last record counts."""
    by_step = {record["step"]: record for record in records}
    rows = [by_step[step] for step in sorted(by_step)]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.array([_number(row.get(name)) for row in rows]) for name in names}
    return {name: values for name, values in columns.items() if np.isfinite(values).any() or name.endswith("_loss")}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan  # what was not finite is null


def pooled(columns: Mapping[str, np.ndarray], most: int) -> tuple[dict[str, np.ndarray], int]:
    """Columns of at most so many points, means over equal numbers of records, largest ones of peaks; and that number.

    The step of a point is that of its last record.
    """
    count = len(columns["step"])
    size = -(-count // most)
    if size <= 1:
        return dict(columns), 1
    starts = np.arange(0, count, size)

    def pool(name: str, values: np.ndarray) -> np.ndarray:
        if name in POSITION:
            return values[np.minimum(starts + size, count) - 1]
        parts = np.full(len(starts) * size, np.nan)
        parts[:count] = values
        parts = parts.reshape(len(starts), size)
        if name.endswith((PEAK, "of_median")):
            return np.fmax.reduce(parts, axis=1)
        finite = np.isfinite(parts)
        with np.errstate(invalid="ignore"):
            return np.where(finite, parts, 0).sum(1) / finite.sum(1)

    return {name: pool(name, values) for name, values in columns.items()}, size


def restarts_of(records: Iterable[Mapping[str, Any]]) -> list[int]:
    """Steps after which another launch went on, of records in the order of the file.

    Records of versions that did not number launches show only those that made steps again.
    """
    found, before = [], None
    for record in records:
        if before is not None:
            again = record["step"] <= before["step"]
            if again or record.get("attempt", 0) != before.get("attempt", 0):
                found.append(int(record["step"]) - 1 if again else int(before["step"]))
        before = record
    return sorted(set(found))


def read_config(path: Path) -> dict[str, str]:
    """A configuration's values as text by dotted key."""
    loaded = yaml.safe_load(path.read_text())
    if not isinstance(loaded, dict):
        raise ValueError("it is no mapping")
    flat: dict[str, str] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            flat[prefix] = json.dumps(node, default=str) if isinstance(node, dict | list | bool) else str(node)

    visit("", loaded)
    return flat


def config_difference(runs: Iterable[Run]) -> list[tuple[str, ...]]:
    """Keys in which configurations differ, each with every run's value; those that one lacks count as empty.

    A run whose configuration is not known differs in none.
    """
    configs = [run.config for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, *(config.get(key, "") for config in configs)) for key in keys]
    return [row for row in rows if len({text for text, config in zip(row[1:], configs, strict=True) if config}) > 1]


def probes_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Probed]:
    """Headlines of probes in records that are not of training steps."""
    found: dict[str, dict[int, tuple[float, ...]]] = {}
    for record in records:
        if is_of_training(record):
            continue
        for name, value in record.items():
            probe, _, metric = name.rpartition("/")
            if metric in _HEADLINES and probe:
                ends = (_number(record.get(f"{name}_{end}")) for end in ("low", "high"))
                found.setdefault(probe, {})[int(record["step"])] = (_number(value), *ends)
    return _by_step(found)


def read_probes(path: Path) -> dict[str, Probed]:
    """Headlines of the table that probes leave, which has all intervals."""
    found: dict[str, dict[int, tuple[float, ...]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] in _HEADLINES and row["step"] and not row["metric"].startswith(COMPARED):
                numbers = tuple(float(row[name] or math.nan) for name in ("value", "low", "high"))
                found.setdefault(f"{row['task']}/{row['probe']}", {})[int(row["step"])] = numbers
    return _by_step(found)


def _by_step(found: Mapping[str, Mapping[int, tuple[float, ...]]]) -> dict[str, Probed]:
    return {
        probe: Probed(sorted(steps), *map(list, zip(*(steps[step] for step in sorted(steps)), strict=True)))
        for probe, steps in found.items()
    }


def read_warnings(path: Path) -> list[tuple[str, str]]:
    """Times and texts of the newest warnings of a log."""
    return _WARNING.findall(path.read_text(errors="replace"))[-MOST_WARNINGS:]


def exports_of(folder: Path) -> list[Path]:
    """Exported teachers of a run in order of their steps."""
    exports = folder.glob("eval/training_*/teacher_checkpoint.pth")
    return sorted((path for path in exports if path.parent.name[9:].isdigit()), key=step_of)


def step_of(export: Path) -> int:
    """Step of an export of `exports_of`."""
    return int(export.parent.name.rpartition("_")[2])


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """What each launch of a run noted at its start; empty for versions that noted nothing."""
    attempts = []
    with suppress(OSError):
        for line in (folder / "attempts.jsonl").read_text(errors="replace").splitlines():
            with suppress(ValueError):
                if isinstance(attempt := json.loads(line), dict):
                    attempts.append(attempt)
    return attempts


def seconds_of(records: Iterable[Mapping[str, Any]], attempts: Iterable[Mapping[str, Any]]) -> tuple[float, bool]:
    """Seconds that launches have worked, up to their last record, and whether that is an estimate.

    It is one for records without a time, from the pace by which they foretold their end.
    """
    begun = {attempt.get("attempt"): attempt.get("time") for attempt in attempts}
    total, estimated, before, pace, made = 0.0, False, None, 0.0, 0
    for record in records:
        follows = before is not None and record.get("attempt") == before.get("attempt")
        follows = follows and record["step"] > before["step"]
        since = before.get("time") if follows else begun.get(record.get("attempt"))
        if since is not None and record.get("time") is not None:
            total += max(0.0, record["time"] - since)
        else:
            left = (record.get("total_steps") or 0) - record["step"]
            pace = (record.get("eta_s") or 0) / left if left > 0 else pace
            # Where a resumed launch began is not known: its first record counts for as many steps as the one before.
            made = record["step"] - before["step"] if follows else made or record["step"]
            total, estimated = total + pace * made, True
        before = record
    return total, estimated


def facts_of(folder: Path, run: Run, records: list[dict[str, Any]], price: float | None) -> dict[str, str]:
    """Facts of a run, heading to text, as far as they were noted."""
    attempts, state = read_attempts(folder), _newest_state(folder)
    last, latest = (records or [{}])[-1], (attempts or [{}])[-1]
    facts: dict[str, str] = {}

    def note(heading: str, text: Any) -> None:
        if text not in (None, ""):
            facts[heading] = str(text)

    total = last.get("total_steps")
    if last:
        note("step", f"{last['step']:,} of {total:,} ({last['step'] / total:.0%})" if total else f"{last['step']:,}")
    if isinstance(last.get("time"), int | float):
        note("last record", f"{_when(last['time'])} ({_ago(time.time() - last['time'])} before this page)")
    if attempts and isinstance(attempts[0].get("time"), int | float):
        note("begun", _when(attempts[0]["time"]))
    processes = latest.get("processes")
    note("host", latest.get("host"))
    note("devices", processes and f"{processes} x {latest.get('device', 'unknown')}")
    note("commit", latest.get("commit"))
    note("versions", ", ".join(f"{name} {text}" for name, text in state.get("versions", {}).items()))
    note("restarts", len(attempts) - 1 if attempts else f"{len(run.restarts)} seen")
    if records:
        seconds, estimated = seconds_of(records, attempts)
        hours = seconds / 3600
        note("hours", f"{hours:.2f}{' (estimated)' if estimated else ''}")
        if price is not None:
            known = f" for {hours * processes:,.2f} GPU-hours" if processes else ", one GPU assumed"
            note("cost so far", f"{price * hours * (processes or 1):,.2f}{known}")
        speeds = [record["img_per_s"] for record in records if isinstance(record.get("img_per_s"), int | float)]
        note("images per second", speeds and f"{np.median(speeds):,.1f} (median)")
    samples, batch = last.get("samples"), state.get("global_batch")
    samples = samples or (batch * last["step"] if batch and last else None)
    note("images seen", samples and f"{samples:,}")
    note("images a step", batch and f"{batch:,}")
    note("backbone", f"{run.config['student.arch']}/{run.config.get('student.patch_size', '?')}"
         if "student.arch" in run.config else None)  # fmt: skip
    note("data", run.config.get("data.path"))
    note("exports", len(exports_of(folder)))
    return facts


def _newest_state(folder: Path) -> dict[str, Any]:
    for path in sorted(folder.glob("checkpoints/step_*/state.json"), reverse=True):
        with suppress(OSError, ValueError):
            state = json.loads(path.read_text())
            if isinstance(state, dict) and isinstance(state.get("versions", {}), dict):
                return state
    return {}


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _ago(seconds: float) -> str:
    minutes = max(0, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h" if minutes < 2880 else f"{minutes // 1440} d"

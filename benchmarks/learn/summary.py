"""Figures of a sweep from what its heads said: results, tables and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learn.judge import HEADS, KINDS, Folds, weights_name
from benchmarks.learn.runs import RECIPE, Run
from dinov2.eval.probe.compare import paired_difference

NAMES = {"as_is": "as they are", "grey": "grey", "knn": "20-NN", "logistic": "logistic"}
COMBINATIONS = tuple((kind, head) for kind in KINDS for head in HEADS)


def summarise(runs: Sequence[Run], judged: Path, folds: Folds) -> dict[str, Any]:
    """Baselines, models over time and differences, as JSON.

    Accuracies are means over folds and seeds, with the interval over photographs and the value of each seed.

    Args:
        runs: finished, seeds of one model after each other.
        judged: folder of their judgements.
        folds: of the tiles that were judged.
    """

    def read(name: str) -> dict[str, Any]:
        return json.loads((judged / f"{name}.json").read_text())

    models: dict[str, Any] = {}
    baselines = read("baselines")
    ends = {name: [judgement] for name, judgement in baselines.items()}
    for name in dict.fromkeys(run.model.name for run in runs):
        alike = [run for run in runs if run.model.name == name]
        marks = [images for images, _ in alike[0].exports]
        exports = [[read(weights_name(path)) for _, path in run.exports] for run in alike]
        cpu = [run.finished["cpu_s"] for run in alike]
        per_image = None if None in cpu else float(np.mean(cpu)) / alike[0].images
        points = [
            {"images": images, "cpu_s": per_image and images * per_image} | _figures(judgements, folds)
            for images, judgements in zip(marks, zip(*exports, strict=True), strict=True)
        ]
        ends[f"start of {name}"] = [judgements[0] for judgements in exports]
        ends[name] = [judgements[-1] for judgements in exports]
        models[name] = {
            "peer": alike[0].model.peer,
            "overrides": alike[0].model.overrides,
            "command": alike[0].command,
            "images": alike[0].images,
            "seeds": [run.seed for run in alike],
            "cpu_s": cpu,
            "wall_s": [run.finished["wall_s"] for run in alike],
            "points": points,
            "losses": [run.finished["losses"] for run in alike],
        }
    return {
        "baselines": {name: _figures([judgement], folds) for name, judgement in baselines.items()},
        "models": models,
        "differences": {name: _differences(name, ends, folds) for name in models},
    }


def _figures(judgements: Sequence[dict[str, Any]], folds: Folds) -> dict[str, Any]:
    """What a model is worth at one time; ``judgements`` are those of its seeds."""
    found: dict[str, Any] = {}
    for kind in judgements[0]:
        alike, found[kind] = [judgement[kind] for judgement in judgements], {}
        for head in HEADS:
            value, low, high, _ = folds.accuracy(np.array([one[head] for one in alike]))
            each = [folds.accuracy(np.array(one[head]), resamples=0).value for one in alike]
            found[kind][head] = {"value": value, "low": low, "high": high, "seeds": each}
        found[kind] |= {key: [one[key] for one in alike] for key in ("rankme", "odcorr", "seconds")}
    return found


def _differences(name: str, ends: dict[str, list[dict[str, Any]]], folds: Folds) -> dict[str, Any]:
    """How much better a model is at its end than what it has to beat, tile by tile."""
    others = [other for other in ends if other in ("colour", "LBP", "LBP, interpolated", f"start of {name}", RECIPE)]
    found: dict[str, Any] = {}
    for other in others:
        if other == name:
            continue
        found[other] = {}
        for kind, head in COMBINATIONS:
            if kind not in ends[other][0]:
                continue
            a, b = (np.array([one[kind][head] for one in ends[side]]) for side in (name, other))
            if len(b) != len(a):
                b = np.repeat(b[:1], len(a), 0)  # a baseline has no seeds
            labels, groups = (np.tile(values, len(a)) for values in (folds.labels, folds.groups))
            found[other][f"{kind} {head}"] = paired_difference(a.ravel(), b.ravel(), labels, groups)._asdict()
    return found


def tables(results: dict[str, Any]) -> str:
    """Accuracies and differences as Markdown."""
    shown = [f"{NAMES[kind]}, {NAMES[head]}" for kind, head in COMBINATIONS]
    head = ["features", "images", "CPU min", *shown, "RankMe", "RankMe grey", "ODCorr", "ODCorr grey"]
    rows = [[name, "", "", *_cells(figures)] for name, figures in results["baselines"].items()]
    for name, model in results["models"].items():
        for point in model["points"]:
            minutes = "?" if point["cpu_s"] is None else f"{point['cpu_s'] / 60:.1f}"
            rows.append([name, f"{point['images']:,}", minutes, *_cells(point)])
    lines = [_row(head), "|---" * len(head) + "|", *map(_row, rows), ""]
    lines += [_row(["at the end", "less", *shown]), "|---" * (2 + len(shown)) + "|"]
    for name, others in results["differences"].items():
        for other, values in others.items():
            cells = [values.get(f"{kind} {head}") for kind, head in COMBINATIONS]
            texts = [f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" if d else "-" for d in cells]
            lines.append(_row([name, other, *texts]))
    return "\n".join(lines) + "\n"


def _cells(figures: dict[str, Any]) -> list[str]:
    texts = []
    for kind, head in COMBINATIONS:
        if kind not in figures:
            texts.append("-")
            continue
        one = figures[kind][head]
        spread = f" sd {np.std(one['seeds'], ddof=1):.3f}" if len(one["seeds"]) > 1 else ""
        texts.append(f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]{spread}")
    for key, form in (("rankme", ".1f"), ("odcorr", ".2f")):
        texts += [format(float(np.mean(figures[kind][key])), form) if kind in figures else "-" for kind in KINDS]
    return texts


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(results: dict[str, Any], path: Path, over: str) -> None:
    """Draw accuracy, RankMe and loss over ``images`` or ``cpu_s``: mean and range of the seeds, baselines as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 4)
    scale, unit = {"images": (1e-3, "thousand images"), "cpu_s": (1 / 60, "CPU minutes")}[over]
    for row, kind in zip(axes, KINDS, strict=True):
        for axis, key in zip(row, (*HEADS, "rankme"), strict=False):
            axis.set(title=f"{NAMES.get(key, 'RankMe')}, tiles {NAMES[kind]}", xlabel=unit)
            for number, (name, model) in enumerate(results["models"].items()):
                points = [point for point in model["points"] if point[over] is not None]
                if not points:  # of runs that were interrupted nobody knows the CPU time
                    continue
                x = [scale * point[over] for point in points]
                values = [point[kind][key] for point in points]
                seeds = np.array([one if key == "rankme" else one["seeds"] for one in values]).reshape(len(x), -1)
                axis.plot(x, seeds.mean(1), color=f"C{number}", marker=".", label=name)
                axis.fill_between(x, seeds.min(1), seeds.max(1), color=f"C{number}", alpha=0.2, linewidth=0)
            for style, (name, figures) in zip(("--", ":", "-."), results["baselines"].items(), strict=True):
                if key in HEADS and kind in figures:
                    axis.axhline(figures[kind][key]["value"], color="grey", linestyle=style, label=name)
    axes[0, 0].legend(fontsize="small")
    axes[1, 3].axis("off")
    axes[0, 3].set(title="total loss (ours)", xlabel=unit)
    for number, model in enumerate(results["models"].values()):
        for seed, records in zip(model["cpu_s"], model["losses"], strict=True):
            per_image = 1 if over == "images" else (seed or np.nan) / model["images"]
            x = [scale * per_image * record["images"] for record in records]
            axes[0, 3].plot(x, [record["total_loss"] for record in records], color=f"C{number}", alpha=0.6)
    figure.savefig(path, dpi=120)

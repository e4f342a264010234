"""Curves of runs, as Bokeh figures that zoom together, and what is good and bad in each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.embed.util import OutputDocumentFor, standalone_docs_json_and_render_items
from bokeh.models import ColumnDataSource, HoverTool, Range1d, Span, Whisker
from bokeh.plotting import figure

from dinov2.logging.health import Thresholds
from dinov2.logging.metrics import HEALTH, OF_CHANCE, PEAK
from dinov2.logging.names import POSITION, SCHEDULE, TIME
from dinov2.report.records import Probed, Run

COLOURS = ("#3b82d6", "#e0782f", "#2fa36b", "#d0494f", "#9a6dd7", "#9c6b4e", "#d45fa6", "#8a8f98")
"""Of runs, or of the curves of one; told apart on white and on black."""

_DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot")
_SETTLED = 0.05  # fraction of a run after which its curves set the scale
_OUTER = (0.5, 99.5)  # percentiles of the rest between which it is set
_SMOOTHED_FROM = 100  # points, from which on they are drawn faint under their running mean
_LIMITS = Thresholds()

_LOSSES = {
    "total_loss": "Falls fast, then slowly; it may rise a little while the teacher's targets sharpen. Bad: jumps that "
    "stay, or a rise without end.",
    "kde_loss": "Falls as class tokens spread out. Bad: a rise, which is tokens drawing together.",
    "koleo_loss": "Falls as class tokens move apart. Bad: a steady rise.",
}
_OF_CHANCE = (
    "1 is a student that knows nothing of the teacher's targets. Good: below it and falling. Bad: at 1 or above after "
    "the warm-up, or no change at all."
)
_SCHEDULES = {
    "lr": "As planned, not measured: a linear warm-up, then a cosine. The last layer's is 0 while it is frozen.",
    "wd": "As planned: a cosine between two values.",
    "mom": "As planned: the teacher follows ever more slowly, up to 1.",
    "teacher_temp": "As planned: lower means sharper targets.",
}
_SPEEDS = {
    "img_per_s": "Level, but for dips at exports and checkpoints. Bad: a slow decline, or dips at regular steps.",
    "data_wait_pct": "Below a few percent. Above, the GPU waits for tiles: more train.num_workers, or repacked shards.",
    "memory_gib": "Level after the first steps. Bad: growth without end, which is a leak.",
    "tflops": "Arithmetic of the model on one process; follows the images per second.",
    "slides_per_batch": "More slides mean more variety. Bad: few, where the data have many.",
}
_HEALTH = {
    "entropy": f"Mean entropy of the teacher's targets over the largest: good well between 0 (one prototype a row) and "
    f"1 (uniform); bad outside {_LIMITS.entropy:g} to {1 - _LIMITS.entropy:g}.",
    "prototype_use": f"Prototypes in use, as a fraction. Small in sound runs of few rows; bad below "
    f"{_LIMITS.prototypes:g} prototypes in all. Other batch sizes do not compare.",
    "class_token_std": f"Spread of the teacher's class tokens: 1 is all directions, 0 all equal. Sound runs had 0.5 to "
    f"0.83; bad below {_LIMITS.std:g}.",
    "rankme": f"Effective rank of the class tokens of a batch, of 1 to the smaller of images and width. Good: level or "
    f"rising; bad below {_LIMITS.rankme:g}.",
    f"total_loss{PEAK}": f"Largest loss of a period. Bad: {_LIMITS.loss_factor:g} times its median of 50 records and "
    "more, if it happens often or does not come back.",
    f"grad_norm{PEAK}": "Largest gradient norm of a period, before clipping. Bad: rising jumps; one alone is clipped.",
    "grad_norm_of_median": f"Largest gradient norm over its running median. Sound runs had up to 1.6; bad above "
    f"{_LIMITS.grad_norm_of_median:g}.",
}
_THRESHOLDS = {
    f"{HEALTH}class_token_std": _LIMITS.std,
    f"{HEALTH}rankme": _LIMITS.rankme,
    f"{HEALTH}grad_norm_of_median": _LIMITS.grad_norm_of_median,
}
_NORMS = "Of the gradient, by module, before clipping; log scale. Good: level or falling slowly. Bad: growth."
_PROBES = {
    "rankme": "Effective rank of embeddings: 1 is a collapse. Good: rising or level. Other numbers of tiles or widths "
    "do not compare.",
    "odcorr": "Correlation between different tiles: 0 is good, 1 a collapse.",
}
_TITLES = {
    "lr": "learning rate", "last_layer_lr": "learning rate of the last layer", "wd": "weight decay",
    "mom": "momentum of the teacher", "teacher_temp": "temperature of the teacher", "img_per_s": "images per second",
    "data_wait_pct": "waiting for data, %", "memory_gib": "peak memory, GiB", "tflops": "TFLOP/s per process",
    "slides_per_batch": "slides in a batch",
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One figure: which curves, and what to look for."""

    title: str
    names: tuple[str, ...]
    advice: str = ""
    log: bool = False
    reference: float | None = None  # drawn as a horizontal line

    def label(self, name: str) -> str:
        """A curve's name beside the others of the panel."""
        short = name.removeprefix(HEALTH).removeprefix("grad_norm_").removesuffix(OF_CHANCE).removesuffix(PEAK)
        return _TITLES.get(name, short.replace("_", " "))


def sections_of(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Panels by heading, for all metrics that any of the runs has."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics if name not in POSITION))
    taken: set[str] = set()

    def take(suffix: str = "", prefix: str = "") -> tuple[str, ...]:
        found = tuple(n for n in names if n.endswith(suffix) and n.startswith(prefix) and n not in taken)
        taken.update(found)
        return found

    def each(known: Mapping[str, str], prefix: str = "") -> list[Panel]:
        panels = []
        for name, advice in known.items():
            if found := take(prefix + name, prefix + name):
                panels.append(Panel(_title(name), found, advice, reference=_THRESHOLDS.get(prefix + name)))
        return panels

    losses = sorted((n for n in take("_loss") if not n.startswith(HEALTH)), key=lambda name: name != "total_loss")
    sections = {"Losses": [Panel(_title(name), (name,), _LOSSES.get(name, "")) for name in losses]}
    if of_chance := take(OF_CHANCE):
        sections["Losses"].insert(1, Panel("losses, as fractions of chance", of_chance, _OF_CHANCE, reference=1.0))
    health = []
    for word in ("entropy", "prototype_use"):
        if found := take(word, HEALTH):
            health.append(Panel(f"{_title(word)} of the targets", found, _HEALTH[word], log=word != "entropy"))
    health += each({name: _HEALTH[name] for name in ("class_token_std", "rankme", f"total_loss{PEAK}")}, HEALTH)
    if found := take(PEAK, f"{HEALTH}grad_norm_"):
        health.append(Panel("largest gradient norms", found, _HEALTH[f"grad_norm{PEAK}"], log=True))
    health += each({"grad_norm_of_median": _HEALTH["grad_norm_of_median"]}, HEALTH)
    health += [Panel(_title(name), (name,)) for name in take(prefix=HEALTH)]
    sections["Health"] = health
    if norms := take(prefix="grad_norm_"):
        sections["Gradient norms"] = [Panel("gradient norm before clipping", norms, _NORMS, log=True)]
    rates = take("lr", "lr") + take("last_layer_lr")
    schedules = [Panel("learning rate", rates, _SCHEDULES["lr"])] if rates else []
    sections["Schedules"] = schedules + each({name: _SCHEDULES[name] for name in SCHEDULE if name in _SCHEDULES})
    sections["Throughput"] = each({name: _SPEEDS[name] for name in TIME if name in _SPEEDS})
    taken.add("eta_s")
    sections["Other metrics"] = [Panel(_title(name), (name,)) for name in take()]
    return {heading: panels for heading, panels in sections.items() if panels}


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


class Curves:
    """Figures of runs with one common range of steps; `page_parts` is what a page needs to draw them.

    What is drawn of a run is named ``run-<number>``.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        steps = [run.metrics["step"] for run in runs if run.metrics]
        steps += [np.array(probed.steps) for run in runs for probed in run.probes.values()]
        last = max((float(values.max()) for values in steps if len(values)), default=1.0)
        self._x_range = Range1d(0, last * 1.01 or 1, bounds=(0, last * 1.01 or 1))
        self._figures: list[Any] = []

    def sections(self) -> dict[str, list[dict[str, Any]]]:
        """Figures of `sections_of` and of probes by heading: ``number``, ``title``, ``advice``, ``alt`` and ``legend``.

        The latter is label, colour and dash of the curves of one run; runs have a common one, by `COLOURS`.
        """
        drawn = {
            heading: [
                self._entry(panel.title, panel.advice, *self._draw(panel), self._legend(panel)) for panel in panels
            ]
            for heading, panels in sections_of(self._runs).items()
        }
        if probes := dict.fromkeys(name for run in self._runs for name in run.probes):
            drawn["Probes"] = [
                self._entry(name, _PROBES.get(name.rpartition("/")[2], "Bars are 95 % intervals."), *self._probe(name))
                for name in probes
            ]
        return drawn

    def page_parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What BokehJS' ``embed_items`` takes: documents, and one render item whose roots are in order of the numbers;
        empty where there is no figure.
        """
        if not self._figures:
            return {}, {}
        with OutputDocumentFor(self._figures):
            documents, (item,) = standalone_docs_json_and_render_items(self._figures)
        return documents, item.to_json()

    def _entry(
        self, title: str, advice: str, plot: Any, last: dict[str, str], legend: Sequence[Any] = ()
    ) -> dict[str, Any]:
        self._figures.append(plot)
        alt = f"Chart of {title} against the step. " + "; ".join(f"{name}: {text}" for name, text in last.items())
        return {"number": len(self._figures) - 1, "title": title, "advice": advice, "alt": alt, "legend": legend}

    def _legend(self, panel: Panel) -> list[tuple[str, str, str]]:
        if len(panel.names) == 1:
            return []
        styles = [self._style(0, place, name) for place, name in enumerate(panel.names)]
        grey = len(self._runs) > 1
        return [
            (panel.label(name), "currentcolor" if grey else colour, dash)
            for name, (colour, dash) in zip(panel.names, styles, strict=True)
        ]

    def _style(self, number: int, place: int, name: str) -> tuple[str, str]:
        """Colour and dash of a run's curve: colours are of curves where there is one run, else of runs."""
        alone = len(self._runs) == 1
        dash = place if not alone or name == "last_layer_lr" else 0  # which lies on the rate of the others
        return COLOURS[(place if alone else number) % len(COLOURS)], _DASHES[dash % len(_DASHES)]

    def _draw(self, panel: Panel) -> tuple[Any, dict[str, str]]:
        alone, several = len(self._runs) == 1, len(panel.names) > 1
        shown = [
            (run, number, name, place)
            for number, run in enumerate(self._runs)
            for place, name in enumerate(panel.names)
            if name in run.metrics
        ]
        log = panel.log and any((run.metrics[name] > 0).any() for run, _, name, _ in shown)
        limits = robust_range(((run.metrics["step"], run.metrics[name]) for run, _, name, _ in shown), log)
        plot, last = self._plot(limits, log), {}
        for run, number, name, place in shown:
            colour, dash = self._style(number, place, name)
            label = panel.label(name) if alone else run.name + (f": {panel.label(name)}" if several else "")
            options = {"color": colour, "line_dash": dash, "name": f"run-{number}"}
            last[label] = self._line(plot, run.metrics["step"], run.metrics[name], options)
        self._marks(plot)
        if panel.reference is not None:
            plot.add_layout(Span(location=panel.reference, dimension="width", line_color="#8a8f98", line_dash="dashed"))
        return plot, last

    def _line(self, plot: Any, steps: np.ndarray, values: np.ndarray, options: dict[str, Any]) -> str:
        """Draw one curve, many points faint under their running mean; return its first and last value in words."""
        finite = np.flatnonzero(np.isfinite(values))
        if not len(finite):
            return "no finite value"
        first, last = (f"{values[i]:.4g} at step {steps[i]:,.0f}" for i in (finite[0], finite[-1]))
        if len(values) >= _SMOOTHED_FROM:
            plot.line(steps, values, line_width=1, alpha=0.3, color=options["color"], name=options["name"])
            values = running_mean(values, len(values) // 50)
        data = ColumnDataSource({"step": steps, "value": values})
        plot.line("step", "value", source=data, line_width=2, **options)
        if len(finite) < 3:  # a line of one point is none
            plot.scatter("step", "value", source=data, size=6, color=options["color"], name=options["name"])
        return first if first == last else f"{first}, {last}"

    def _probe(self, name: str) -> tuple[Any, dict[str, str]]:
        shown = [(run, number, run.probes[name]) for number, run in enumerate(self._runs) if name in run.probes]
        series = [
            (np.array(probed.steps), np.array(values))
            for _, _, probed in shown
            for values in (probed.values, probed.low, probed.high)
        ]
        plot, last = self._plot(robust_range(series, log=False, settled=0.0), log=False), {}
        for run, number, probed in shown:
            colour = COLOURS[number % len(COLOURS)]
            columns = {"step": probed.steps, "value": probed.values, "low": probed.low, "high": probed.high}
            data = ColumnDataSource({key: np.asarray(column, np.float64) for key, column in columns.items()})
            plot.line("step", "value", source=data, line_width=2, color=colour, name=f"run-{number}")
            plot.scatter("step", "value", source=data, size=6, color=colour, name=f"run-{number}")
            if np.isfinite(probed.low).any():
                ends = ColumnDataSource({key: c[np.isfinite(data.data["low"])] for key, c in data.data.items()})
                plot.add_layout(Whisker(base="step", lower="low", upper="high", source=ends, line_color=colour))
            last[run.name] = _in_words(probed)
        self._marks(plot)
        return plot, last

    def _plot(self, limits: tuple[float, float], log: bool) -> Any:
        plot = figure(
            height=230,
            sizing_mode="stretch_width",
            x_range=self._x_range,
            y_range=Range1d(*limits),
            y_axis_type="log" if log else "linear",
            tools="xbox_zoom,ywheel_zoom,reset,save",
            active_scroll=None,
            toolbar_location="above",
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=None,
        )
        plot.toolbar.logo = None
        plot.grid.grid_line_color = "#8a8f98"
        plot.grid.grid_line_alpha = 0.25
        plot.axis.axis_line_color = plot.axis.major_tick_line_color = "#8a8f98"
        plot.axis.minor_tick_line_color = None
        plot.axis.major_label_text_color = "#7d828b"
        plot.xaxis.formatter.use_scientific = False
        plot.add_tools(HoverTool(tooltips=[("step", "@step{0,0}"), ("value", "@value{0.0000a}")], mode="vline"))
        return plot

    def _marks(self, plot: Any) -> None:
        for number, run in enumerate(self._runs):
            colour = "#8a8f98" if len(self._runs) == 1 else COLOURS[number % len(COLOURS)]
            for step in run.restarts:
                plot.add_layout(Span(location=step, dimension="height", line_color=colour, line_dash="dotted"))


def robust_range(
    curves: Iterable[tuple[np.ndarray, np.ndarray]], log: bool, settled: float = _SETTLED
) -> tuple[float, float]:
    """Ends of an axis on which the curves, each of steps and values, are to be seen.

    The first 5 % of a curve's steps and the outer half percents of the rest do not count, so that a beginning or a
    spike does not flatten all else; curves of fewer than 20 points count whole.
    """
    kept = []
    for steps, values in curves:
        usable = np.isfinite(values) & (values > 0 if log else True)
        if len(steps) >= 20:
            late = usable & (steps >= steps[0] + settled * (steps[-1] - steps[0]))
            usable = late if late.any() else usable
        kept.append(np.log10(values[usable]) if log else values[usable])
    values = np.concatenate([*kept, np.empty(0)])
    if not len(values):
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = np.percentile(values, _OUTER) if len(values) >= 20 else (values.min(), values.max())
    pad = 0.08 * (high - low) or max(0.05 * abs(high), 1e-12)
    low, high = low - pad, high + pad
    return (float(10**low), float(10**high)) if log else (float(low), float(high))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over each value and those up to ``window - 1`` before it, of those that are finite; NaN where none is."""
    padded = np.concatenate([np.full(window - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    finite = np.isfinite(windows)
    with np.errstate(invalid="ignore"):
        return np.where(finite, windows, 0.0).sum(1) / finite.sum(1)


def _in_words(probed: Probed) -> str:
    value, low, high = probed.values[-1], probed.low[-1], probed.high[-1]
    interval = "" if math.isnan(low) else f" ({low:.4g} to {high:.4g})"
    return f"{value:.4g}{interval} at step {probed.steps[-1]:,}"

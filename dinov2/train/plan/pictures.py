"""The schedules of a run as a picture."""

import numpy as np
from matplotlib.figure import Figure

from dinov2.train.update.optim import Schedules

_POINTS = 2000
_TITLES = {
    "lr": "learning rate",
    "wd": "weight decay",
    "mom": "teacher momentum",
    "teacher_temp": "teacher temperature",
}


def draw_schedules(schedules: Schedules, total_steps: int) -> Figure:
    """Draw what the schedules are in each step of a run; that of the heads' last layers dashed, where it differs."""
    steps = np.unique(np.linspace(0, total_steps - 1, min(total_steps, _POINTS)).round().astype(int))
    values = [schedules[step] for step in steps.tolist()]
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for axis, (name, title) in zip(axes, _TITLES.items(), strict=True):
        axis.plot(steps + 1, [getattr(value, name) for value in values], lw=1.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if schedules.frozen_steps:
        axes[0].plot(steps + 1, [value.last_layer_lr for value in values], lw=1.2, ls="--", label="heads' last layers")
        axes[0].legend(fontsize=8, edgecolor="none", framealpha=0.8)
    return figure

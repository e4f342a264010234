"""Scales and smoothing of curves, and which panels metrics get."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinov2.report.curves import Curves, robust_range, running_mean, sections_of
from dinov2.report.records import Probed, Run


def run_of(name: str = "a", **columns: list[float]) -> Run:
    metrics = {key.replace("__", "/"): np.array(values, np.float64) for key, values in columns.items()}
    return Run(name, Path("."), metrics=metrics)


def test_the_beginning_and_outliers_do_not_set_the_scale():
    steps = np.arange(1, 1001.0)
    values = 2 + 0.1 * np.sin(steps)
    values[:20], values[500] = 1e6, -1e6
    low, high = robust_range([(steps, values)], log=False)
    assert 1.8 < low <= values[600:].min() and values[600:].max() <= high < 2.2


@pytest.mark.parametrize("log", [False, True])
def test_any_values_have_a_scale(log: bool):
    for values in ([], [np.nan], [0.0], [3.0, 3.0], [-1.0, 5.0], [np.inf, 1.0]):
        low, high = robust_range([(np.arange(len(values)), np.array(values, np.float64))], log)
        assert np.isfinite([low, high]).all() and low < high and (low > 0 or not log)


def test_running_mean_is_that_of_the_finite_values_so_far():
    values = np.random.default_rng(0).normal(size=50)
    values[[3, 4, 5, 20]] = np.nan
    expected = [np.nanmean(values[max(0, i - 2) : i + 1]) if i != 5 else np.nan for i in range(50)]
    np.testing.assert_allclose(running_mean(values, 3), expected, rtol=1e-9, atol=1e-12)


def test_every_metric_is_shown_once_whatever_its_name():
    names = ["total_loss", "own_loss", "own_of_chance", "lr", "last_layer_lr", "wd", "grad_norm_backbone", "img_per_s",
             "health/dino_entropy", "health/rankme", "health/total_loss_peak", "health/grad_norm_backbone_peak",
             "health/mine", "something"]  # fmt: skip
    runs = [run_of(step=[1, 2], **{name.replace("/", "__"): [1.0, 2.0] for name in part}) for part in
            (names[:8], names[4:])]  # fmt: skip
    shown = [name for panels in sections_of(runs).values() for panel in panels for name in panel.names]
    assert sorted(shown) == sorted(names)


def test_runs_with_different_keys_share_the_range_of_steps():
    runs = [run_of("a", step=[1, 2], total_loss=[3, 2]), run_of("b", step=[1, 90], kde_loss=[1, np.nan])]
    runs[1].probes = {"t/knn": Probed([0, 100], [0.5, 0.6], [0.4, np.nan], [0.6, np.nan])}
    runs[0].restarts = [1]
    curves = Curves(runs)
    entries = [entry for charts in curves.sections().values() for entry in charts]
    documents, item = curves.page_parts()
    assert [entry["number"] for entry in entries] == list(range(3)) and len(item["root_ids"]) == 3
    assert len(documents) == 1 and all(entry["alt"] for entry in entries)
    ranges = {id(plot.x_range) for plot in curves._figures}
    assert len(ranges) == 1 and curves._figures[0].x_range.end >= 100


def test_without_any_curve_there_is_no_document():
    curves = Curves([run_of()])
    assert curves.sections() == {} and curves.page_parts() == ({}, {})

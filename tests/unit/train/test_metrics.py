"""Metric accumulation and sinks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from dinov2.logging.metrics import ConsoleSink, JsonlSink, MetricAccumulator, WandbSink, relative_to_chance
from tests.helpers.spawn import run_ranks

RECORD = {
    "step": 10, "total_steps": 250_000, "total_loss": 12.5, "dino_local_crops_loss": 9.25, "lr": 1.2247e-4,
    "grad_norm_backbone": 2.5, "grad_norm_dino_head": 3.5, "img_per_s": 320.04, "data_wait_pct": 1.6,
    "slides_per_batch": 373,
    "memory_gib": 71.2, "eta_s": 86_461.2,
}  # fmt: skip


def test_mean_over_a_period_then_anew():
    metrics = MetricAccumulator()
    for value in (1.0, 2.0, 6.0):
        metrics.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    assert metrics.reduce() == {"a": 3.0, "b": -3.0}
    metrics.add({"a": torch.tensor(5.0), "b": torch.tensor(0.0)})
    assert metrics.reduce() == {"a": 5.0, "b": 0.0}
    assert metrics.reduce() == {}


def reduce_on(rank: int) -> dict[str, float]:
    metrics = MetricAccumulator()
    metrics.add({"a": torch.tensor(float(rank))})
    metrics.add({"a": torch.tensor(float(rank + 4))})
    return metrics.reduce()


def test_mean_over_ranks():
    assert run_ranks(reduce_on) == [{"a": 2.5}, {"a": 2.5}]


def test_losses_relative_to_chance_take_the_place_of_its_levels():
    means = {"total_loss": 9.0, "ibot_loss": 3.0, "ibot_loss_chance": 4.0, "own": 1.0, "own_chance": 0.5,
             "empty_loss": 0.0, "empty_loss_chance": 0.0, "last_chance": 7.0}  # fmt: skip
    assert relative_to_chance(means) == {
        "total_loss": 9.0, "ibot_loss": 3.0, "own": 1.0, "empty_loss": 0.0, "last_chance": 7.0,
        "ibot_of_chance": 0.75, "own_of_chance": 2.0,
    }  # fmt: skip


def test_console_line(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="dinov2"):
        ConsoleSink().write(RECORD)
    line = caplog.messages[0]
    for part in ("step 10/250000", "total 12.5000", "dino_local 9.2500", "lr 1.22e-04", "grad norm 3.50",
                 "320.0 img/s", "data wait 2%  373 slides", "71.2 GiB", "ETA 1 day, 0:01:01"):  # fmt: skip
        assert part in line


def test_console_says_how_far_from_chance_a_loss_is(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="dinov2"):
        ConsoleSink().write(RECORD | {"dino_local_crops_of_chance": 0.9921})
    assert "99.2%" in caplog.messages[0] and "of_chance" not in caplog.messages[0]


def test_jsonl_appends(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        sink = JsonlSink(file)
        sink.write(RECORD | {"step": step})
        sink.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_wandb_stays_offline_without_login_and_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        sink = WandbSink(tmp_path, "path-fm", {"a": 1})
        sink.write(RECORD)
        sink.close()
    run_id = (tmp_path / "wandb_run_id.txt").read_text()
    runs = [path.name for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert runs and all(name.endswith(run_id) for name in runs)

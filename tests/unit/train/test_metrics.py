"""Metric accumulation and sinks."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import median_abs_deviation

from dinov2.extensions import SINKS
from dinov2.logging import setup_logging
from dinov2.logging.metrics import GradNormLevel, MetricAccumulator, RunningMedian, relative_to_chance
from dinov2.logging.names import grouped, ungrouped
from dinov2.logging.sinks import ConsoleSink, Exported, JsonlSink, Sink, Sinks, WandbSink
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


def test_the_largest_value_of_a_period_beside_its_mean():
    metrics = MetricAccumulator(peaks=("total", "grad_norm_"))
    for value in (1.0, 6.0, 2.0):
        metrics.add({"total_loss": torch.tensor(value), "kde_loss": torch.tensor(value)})
    expected = {"total_loss": 3.0, "kde_loss": 3.0, "health/total_loss_peak": 6.0, "health/rankme": 7.5}
    assert metrics.reduce({"health/rankme": torch.tensor(7.5, dtype=torch.float64)}) == expected
    metrics.add({"total_loss": torch.tensor(5.0), "kde_loss": torch.tensor(0.0)})
    assert metrics.reduce()["health/total_loss_peak"] == 5.0


def test_running_median_of_the_newest_finite_values():
    values = np.random.default_rng(0).lognormal(size=120)
    running = RunningMedian(length=50, least=10)
    for number, value in enumerate(values):
        running.before(math.inf)
        median, deviation = running.before(value)
        before = values[max(0, number - 50) : number]
        if number < 10:
            assert math.isnan(median) and math.isnan(deviation)
        else:
            assert median == pytest.approx(np.median(before))
            assert deviation == pytest.approx(median_abs_deviation(before))


def test_gradient_norms_against_their_medians():
    level, found = GradNormLevel(), []
    for number in range(14):
        peaks = {"backbone": 2.0, "dino_head": 4.0, "frozen": 0.0}
        peaks |= {12: {"dino_head": 40.0}, 13: {"backbone": math.inf}}.get(number, {})
        found.append(level.of_median({f"health/grad_norm_{name}_peak": value for name, value in peaks.items()}))
    assert all(math.isnan(value) for value in found[:10])
    assert found[10:] == [1.0, 1.0, 10.0, 1.0]


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
    for part in ("10/250000", "12.500", "1.22e-04", "320 img/s", "2%", "1d 00h"):
        assert part in line


@pytest.mark.parametrize("seconds", [0.0, 59.4, 3599.0, 86_400.0 * 21])
def test_console_lines_fit_into_100_columns(capsys: pytest.CaptureFixture, seconds: float):
    long = {"step": 250_000, "total_loss": 123.456, "img_per_s": 123_456.0, "data_wait_pct": 100.0, "eta_s": seconds}
    logger = setup_logging()
    try:
        ConsoleSink().write(RECORD | long)
    finally:
        logger.handlers.clear()
        logger.propagate = True
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= 100
    assert re.match(r"\d\d-\d\d \d\d:\d\d:\d\d I step 250000/250000 ", line)


def test_a_log_that_cannot_be_opened_is_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "logs/rank_0.log").mkdir(parents=True)
    logger = setup_logging()
    try:
        with pytest.raises(OSError) as error:
            setup_logging(tmp_path)
        logger.error("%s", error.value)
    finally:
        logger.handlers.clear()
        logger.propagate = True
    assert re.search(r" E .*rank_0\.log", capsys.readouterr().err)


def test_records_are_stamped_with_time_and_launch(tmp_path: Path):
    sinks = Sinks(attempt=3)
    sinks.add(JsonlSink, tmp_path / "metrics.jsonl")
    began = time.time()
    for record in (RECORD, {"step": 10, "tiles/knn20/balanced_accuracy": 0.5}):
        sinks.write(record)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["attempt"] == 3 and began - 1 < record["time"] < time.time() + 1


def test_names_in_groups_and_back():
    groups = {
        "total_loss": "loss", "ibot_of_chance": "loss", "lr": "schedule", "teacher_temp": "schedule",
        "grad_norm_backbone": "norm", "img_per_s": "time", "data_wait_pct": "time",
    }  # fmt: skip
    for name, group in groups.items():
        assert grouped(name) == f"{group}/{name}"
        assert ungrouped(grouped(name)) == ungrouped(name) == name
    for name in ("health/rankme", "tiles/knn20/balanced_accuracy", "step", "own"):
        assert grouped(name) == ungrouped(name) == name


def test_tensorboard_gets_groups_at_their_steps(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = SINKS["tensorboard"](tmp_path, "path-fm", {})
    for step, loss in ((10, 12.5), (20, 11.25)):
        sink.write(RECORD | {"step": step, "total_loss": loss, "time": 1000.0 + step})
    sink.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.wall_time, event.step, event.value) for event in events.Scalars("loss/total_loss")]
    assert scalars == [(1010.0, 10, 12.5), (1020.0, 20, 11.25)]
    assert {"schedule/lr", "norm/grad_norm_backbone", "time/img_per_s"} <= set(events.Tags()["scalars"])
    assert "step" not in events.Tags()["scalars"]


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    """A red picture, and files that stand for a teacher's."""
    teacher = tmp_path / "teacher_checkpoint.pth"
    teacher.write_bytes(b"weights")
    teacher.with_suffix(".json").write_text("{}")
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(buffer, "PNG")
    return Exported(20, {"crops": buffer.getvalue()}, teacher)


def test_tensorboard_gets_pictures(tmp_path: Path, exported: Exported):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = SINKS["tensorboard"](tmp_path, "path-fm", {})
    sink.export(exported)
    sink.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    ((step, width, height),) = [(event.step, event.width, event.height) for event in events.Images("pictures/crops")]
    assert (step, width, height) == (20, 6, 4)


def test_mlflow_gets_records_pictures_and_teacher_and_goes_on(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # which mlflow-skinny lacks
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = {"optim": {"base_lr": 1e-3, "epochs": 2}, "data": {"path": ""}}
    for step in (10, 20):
        sink = SINKS["mlflow"](tmp_path, "path-fm", config)
        sink.write(RECORD | {"step": step, "time": 1000.0 + step, "total_loss": 12.5, "kde_loss": math.nan})
        sink.export(exported)
        sink.close()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("path-fm").experiment_id])
    assert run.info.run_name == tmp_path.name and run.info.status == "FINISHED"
    assert run.data.params == {"optim.base_lr": "0.001", "optim.epochs": "2"}
    history = client.get_metric_history(run.info.run_id, "loss/total_loss")
    assert sorted((metric.timestamp, metric.step, metric.value) for metric in history) == [
        (1_010_000, 10, 12.5), (1_020_000, 20, 12.5),
    ]  # fmt: skip
    assert "loss/kde_loss" not in run.data.metrics and "step" not in run.data.metrics
    kept = [path for path in (tmp_path / "mlflow").rglob("*") if path.is_file()]
    assert {"config.yaml", "teacher_checkpoint.pth", "teacher_checkpoint.json"} <= {path.name for path in kept}
    assert any(path.suffix == ".png" and Image.open(path).size == (6, 4) for path in kept)


def test_a_sink_whose_package_is_missing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for name, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")):
        monkeypatch.setitem(sys.modules, module, None)
        sinks = Sinks()
        caplog.clear()
        sinks.add(SINKS[name], tmp_path, "path-fm", {})
        assert not sinks.takes_exports
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "install.sh" in caplog.text


def test_jsonl_appends(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        sink = JsonlSink(file)
        sink.write(RECORD | {"step": step})
        sink.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_jsonl_is_strict_json(tmp_path: Path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1, "total_loss": float("nan"), "lr": float("inf")})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "total_loss": None, "lr": None}


@pytest.mark.parametrize("torn", ['{"step": 3, "to', "x" * 10_000])
def test_jsonl_takes_a_line_off_that_was_cut_short(tmp_path: Path, torn: str):
    file = tmp_path / "metrics.jsonl"
    for whole in ('{"step": 1}\n{"step": 2}\n', ""):
        file.write_text(whole + torn)
        JsonlSink(file).write({"step": 3})
        assert file.read_text() == whole + '{"step": 3}\n'


def test_jsonl_that_cannot_be_written_is_told_once_and_goes_on_when_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "away" / "metrics.jsonl"
    sink = JsonlSink(file)
    for step in (1, 2):
        sink.write({"step": step})
    file.parent.mkdir()
    sink.write({"step": 3})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [3]
    assert len(caplog.records) == 1 and str(file) in caplog.text


def test_a_sink_that_fails_is_left_out_and_the_others_go_on(caplog: pytest.LogCaptureFixture):
    class Failing(Sink):
        def write(self, record: object) -> None:
            raise RuntimeError("the server is gone")

        def close(self) -> None:
            raise RuntimeError("and so is its end")

    class Kept(Sink):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def write(self, record: dict) -> None:
            self.steps.append(record["step"])

    def cannot() -> Sink:
        raise OSError("no such server")

    kept, sinks = Kept(), Sinks()
    for make in (cannot, Failing, lambda: kept):
        sinks.add(make)
    for step in (1, 2):
        sinks.write({"step": step})
    sinks.close()
    assert kept.steps == [1, 2]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "the server is gone" in caplog.text


def test_a_sink_that_hangs_is_left_out_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for limit in ("_WRITE_S", "_OPEN_OR_CLOSE_S"):
        monkeypatch.setattr(f"dinov2.logging.sinks.{limit}", 0.2)
    returned = threading.Event()

    class Kept(Sink):
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.closed_by: threading.Thread | None = None

        def write(self, record: dict) -> None:
            self.steps.append(record["step"])

        def close(self) -> None:
            self.closed_by = threading.current_thread()

    class HangingFrom(Kept):
        def __init__(self, hangs_at: int) -> None:
            super().__init__()
            self.hangs_at = hangs_at
            hanging.append(self)
            assert hangs_at or returned.wait(60)

        def write(self, record: dict) -> None:
            super().write(record)
            assert record["step"] < self.hangs_at or returned.wait(60)

        def close(self) -> None:
            returned.wait(60)

    hanging: list[HangingFrom] = []
    kept, apart, sinks = Kept(), Kept(), Sinks()
    for make in (lambda: HangingFrom(0), lambda: HangingFrom(2), lambda: HangingFrom(9), lambda: apart):
        sinks.add(make, apart=True)
    sinks.add(lambda: kept)
    for step in (1, 2, 3):
        sinks.write({"step": step})
    sinks.close()
    returned.set()
    assert kept.steps == apart.steps == [1, 2, 3]
    assert [sink.steps for sink in hanging] == [[], [1, 2], [1, 2, 3]]
    assert kept.closed_by is threading.current_thread() and apart.closed_by not in (None, kept.closed_by)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3


def test_a_sink_apart_fails_as_any(caplog: pytest.LogCaptureFixture):
    def missing() -> Sink:
        raise ImportError("no such library")

    class Failing(Sink):
        def write(self, record: object) -> None:
            raise TimeoutError("of its own")

    class Leaving(Failing):
        def write(self, record: object) -> None:
            sys.exit("of its own")

    sinks = Sinks()
    for make in (missing, Failing, Leaving):
        sinks.add(make, apart=True)
    sinks.write({"step": 1})
    sinks.write({"step": 2})
    said = zip(caplog.records, ("no such library", "of its own", "of its own"), strict=True)
    assert all(text in record.message for record, text in said)


def test_wandb_without_a_way_to_the_internet_goes_offline(tmp_path: Path):
    """In a process of its own: wandb remembers a login."""
    code = f"""
from pathlib import Path
from dinov2.logging import sinks
sinks._WANDB_TIMEOUT_S = 2
sink = sinks.WandbSink(Path({str(tmp_path)!r}), "path-fm", {{}})
sink.write({{"step": 1}})
sink.close()
"""
    nowhere = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true"}
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"} | nowhere
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
    run_id = (tmp_path / "wandb_run_id.txt").read_text()
    assert [path.name for path in (tmp_path / "wandb").glob(f"offline-run-*-{run_id}")]


def test_wandb_stays_offline_without_login_and_keeps_its_id(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        sink = WandbSink(tmp_path, "path-fm", {"a": 1})
        sink.write(RECORD)
        sink.export(exported)
        sink.close()
    run_id = (tmp_path / "wandb_run_id.txt").read_text()
    runs = [path.name for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert runs and all(run_id in name for name in runs)
    pictures = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/pictures/crops_*.png"))
    assert pictures and Image.open(pictures[0]).size == (6, 4)

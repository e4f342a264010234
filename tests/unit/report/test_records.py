"""What is read of runs' folders, damaged ones among them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov2.report.records import (
    columns_of,
    config_difference,
    pooled,
    read_records,
    read_run,
    restarts_of,
    seconds_of,
)


def write_metrics(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"step": number, "total_steps": 10, "total_loss": 9.0 / number, "lr": 0.1, "eta_s": 10.0 - number} | values


def test_the_last_record_of_a_step_counts_and_cut_lines_do_not(tmp_path: Path):
    order = (1, 1.0), (2, 2.0), (1, 3.0), (3, 4.0)
    records = [{"step": step, "total_loss": 9.0, "health/rankme": 5.0, "lr": lr} for step, lr in order]
    records.append({"step": 3, "held_out/rankme/value": 7.0})
    cut = '{"step": 2, "l' + json.dumps(records[2])
    lines = [*map(json.dumps, records[:2]), cut, "[1, 2]", '"text"', '{"total_loss": 1}', '{"step": null}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, *map(json.dumps, records[2:]), '{"step": 4, "to']))
    missing: list[str] = []
    found = read_records(tmp_path / "metrics.jsonl", missing)
    columns = columns_of([record for record in found if "total_loss" in record])
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["lr"].tolist() == [3.0, 2.0, 4.0]
    assert len(missing) == 1 and " 6 " in missing[0]


def test_values_that_are_null_or_absent_are_nan(tmp_path: Path):
    columns = columns_of([step(1), step(2, total_loss=None), step(3, own=5.0), step(4, lr="x")])
    assert np.isnan(columns["total_loss"]).tolist() == [False, True, False, False]
    assert np.isnan(columns["own"]).tolist() == [True, True, False, True]
    assert math.isnan(columns["lr"][3])


def test_names_in_groups_read_as_flat_ones(tmp_path: Path):
    flat = {"step": 1, "total_loss": 3.0, "lr": 0.1, "grad_norm_backbone": 2.0, "img_per_s": 5.0, "health/rankme": 4.0}
    groups = {"total_loss": "loss/", "lr": "schedule/", "grad_norm_backbone": "norm/", "img_per_s": "time/"}
    named = {groups.get(name, "") + name: value for name, value in flat.items()}
    one, other = (read_run(write_metrics(tmp_path / name, [r]), "") for name, r in (("a", flat), ("b", named)))
    assert one.metrics == other.metrics and one.metrics.keys() == flat.keys()


def test_restarts_by_launch_and_by_steps_made_again():
    assert restarts_of([step(1), step(2), step(3)]) == []
    assert restarts_of([step(n) for n in (1, 2, 3, 3, 4, 2, 3)]) == [1, 2]
    assert restarts_of([step(1, attempt=1), step(2, attempt=1), step(3, attempt=2)]) == [2]
    assert restarts_of([step(1), step(2), step(3, attempt=1)]) == [2]  # of a version that noted none, gone on with


def test_hours_are_those_of_the_launches_without_what_lies_between():
    attempts = [{"attempt": 1, "time": 1000.0}, {"attempt": 2, "time": 9000.0}]
    records = [step(1, attempt=1, time=1100.0), step(2, attempt=1, time=1150.0), step(2, attempt=2, time=9020.0)]
    assert seconds_of(records, attempts) == (170.0, False)
    # A second a step is left at each of ten steps of an older version.
    assert seconds_of([step(n) for n in range(1, 11)], []) == (10.0, True)
    assert seconds_of([], []) == (0.0, False)


def test_long_runs_are_pooled_into_means_and_largest_peaks():
    count = 2501
    values = np.random.default_rng(0).normal(size=count)
    values[7] = np.nan
    columns = {"step": np.arange(1.0, count + 1), "total_loss": values, "health/total_loss_peak": values}
    found, size = pooled(columns, 1200)
    assert size == 3 and {len(column) for column in found.values()} == {834}
    assert found["step"][[0, 1, -1]].tolist() == [3, 6, 2501]
    assert found["total_loss"][0] == pytest.approx(values[:3].mean())
    assert found["total_loss"][2] == pytest.approx((values[6] + values[8]) / 2)
    assert found["total_loss"][-1] == pytest.approx(values[-2:].mean())
    assert found["health/total_loss_peak"][1] == values[3:6].max()
    assert pooled(columns, 2501)[1] == 1


def test_configurations_are_compared_key_by_key(tmp_path: Path):
    for name, text in (("a", "optim: {base_lr: 0.1, epochs: 3}\nonly: 1"), ("b", "optim: {base_lr: 0.2, epochs: 3}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    runs = [read_run(tmp_path / name, name) for name in "ab"]
    assert config_difference(runs) == [("optim.base_lr", "0.1", "0.2"), ("only", "1", "")]
    (tmp_path / "c").mkdir()  # of which nothing is known
    assert config_difference([*runs, read_run(tmp_path / "c", "c")])[0] == ("optim.base_lr", "0.1", "0.2", "")
    assert config_difference([runs[0], read_run(tmp_path / "c", "c")]) == []


def test_probes_of_records_and_intervals_of_their_table(tmp_path: Path):
    probed = {"t/knn/balanced_accuracy": 0.5, "t/knn/balanced_accuracy_low": 0.4, "t/knn/balanced_accuracy_high": 0.6,
              "t/knn/f1": 0.1, "t/rankme/value": 7.0}  # fmt: skip
    folder = write_metrics(tmp_path, [{"step": 0} | probed, step(1), {"step": 5, "t/rankme/value": 8.0}])
    probes = read_run(folder, "").probes
    assert (probes["t/knn"].steps, probes["t/knn"].low, probes["t/knn"].high) == ([0], [0.4], [0.6])
    assert (probes["t/rankme"].steps, probes["t/rankme"].values) == ([0, 5], [7.0, 8.0])
    (tmp_path / "eval").mkdir()
    with (tmp_path / "eval/probes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "task", "probe", "metric", "value", "low", "high", "sd", "runs", "count"])
        writer.writerow([0, "t", "knn", "balanced_accuracy", 0.9, 0.8, "", "", 1, 10])
        writer.writerow([0, "t", "knn", "balanced_accuracy", 0.5, 0.3, 0.7, "", 1, 10])
    probes = read_run(folder, "").probes
    assert (probes["t/knn"].values, probes["t/knn"].low, probes["t/knn"].high) == ([0.5], [0.3], [0.7])
    assert probes["t/rankme"].steps == [0, 5]


def test_facts_of_launches_state_and_price(tmp_path: Path):
    folder = write_metrics(tmp_path, [step(4, attempt=1, time=4600.0, samples=32)])
    noted = {"attempt": 1, "time": 1000.0, "host": "node7", "processes": 4, "device": "H200", "commit": "abc"}
    (folder / "attempts.jsonl").write_text(json.dumps(noted) + '\n{"attem')
    facts = read_run(folder, "", price=2.5).facts
    assert (facts["host"], facts["commit"], facts["devices"]) == ("node7", "abc", "4 x H200")
    assert facts["hours"] == "1.00" and facts["cost so far"].startswith("10.00")
    assert facts["images seen"] == "32"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", b"\x00\xff\xfe junk\n{}\n"),
        ("metrics.jsonl", b'{"step": 1, "total_loss": 1.0, "total_steps": "many", "time": [], "attempt": {}}\n'),
        ("config.yaml", b"- a\n- list"),
        ("config.yaml", b"a: [unclosed"),
        ("eval/probes.csv", b"another,table\n1,2\n"),
        ("checkpoints/step_0000001/state.json", b'{"step": '),
        ("attempts.jsonl", b"[]\n7\n"),
    ],
)
def test_a_damaged_file_takes_nothing_else_away(tmp_path: Path, file: str, content: bytes):
    folder = write_metrics(tmp_path, [step(1), step(2)])
    (folder / "config.yaml").write_text("optim: {base_lr: 0.1}")
    whole = read_run(folder, "")
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    run = read_run(folder, "")
    assert len(run.missing) >= len(whole.missing)
    if file != "metrics.jsonl":
        assert run.metrics.keys() == whole.metrics.keys()
    if file != "config.yaml":
        assert run.config == whole.config

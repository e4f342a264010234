"""Probes while training: before the first step, periodically and at the end, and without a trace in the training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.data import immunohistochemistry

from dinov2.eval.probe.__main__ import main as probe
from dinov2.train.train import main
from tests.helpers.runs import TINY


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """24 crops of tissue in each of two classes, one of them inverted."""
    rng, tissue = np.random.default_rng(0), immunohistochemistry()
    for number in range(48):
        folder = tmp_path / "tiles" / ("brown" if number % 2 else "inverted")
        folder.mkdir(parents=True, exist_ok=True)
        top, left = rng.integers(0, 512 - 64, 2)
        crop = tissue[top : top + 64, left : left + 64]
        Image.fromarray(crop if number % 2 else 255 - crop).save(folder / f"{number}.png")
    return tmp_path / "tiles"


def train(shards: Path, output_dir: Path, *overrides: str) -> tuple[list[dict], list[dict]]:
    """Records of training steps and of probes."""
    data = (f"train.streaming_dataset_path={shards}", "train.validation_share=0.5", "logging.wandb=false")
    assert main(["--output-dir", str(output_dir), *TINY, *data, *overrides]) == 0
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "total_loss" in record]
    return steps, [record for record in records if "total_loss" not in record]


def test_probes_leave_the_training_as_it_is(shards: Path, labelled: Path, tmp_path: Path):
    without, none = train(shards, tmp_path / "plain", "evaluation.probes=[]")
    settings = (
        f"evaluation.labelled=[{{path: {labelled}}}]",
        "evaluation.probes=[knn, rankme, odcorr]",
        "evaluation.probe_options={knn: {neighbours: [3, 20]}}",
    )
    period = "evaluation.eval_period_iterations=3"
    train(shards, tmp_path / "probed", *settings, period, "optim.early_stop=1")
    steps_after, probes_after = train(shards, tmp_path / "probed", *settings, period)
    assert none == []
    assert [r["total_loss"] for r in steps_after if r["step"] <= 8] == [r["total_loss"] for r in without]
    assert [r["step"] for r in probes_after] == [0, 3, 4, 6, 8]
    for record in probes_after:
        assert record["tiles/knn20/balanced_accuracy"] > 0.9  # colours turned round are easy to tell
        assert "tiles/knn3/balanced_accuracy" in record and "tiles/knn5/balanced_accuracy" not in record
        assert 1 <= record["held_out/rankme/value"] <= 128
        assert 0 <= record["held_out/odcorr/value"] <= 1
    with (tmp_path / "probed/eval/probes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted({int(row["step"]) for row in rows}) == [0, 3, 4, 6, 8]
    found = {(row["step"], row["task"], row["probe"], row["metric"]): float(row["value"]) for row in rows}
    assert found["8", "held_out", "rankme", "value"] == probes_after[-1]["held_out/rankme/value"]
    # The command, given the configuration or an export of the run, probes the weights of step 0.
    options = ["--data", f"tiles={labelled}", "--probes", "knn", "--neighbours", "3,20", "--device", "cpu"]
    for source in ("config.yaml", "eval/training_8/teacher_checkpoint.pth"):
        table = tmp_path / f"{Path(source).name}.csv"
        start = f"random:{tmp_path / 'probed' / source}"
        assert probe(["--checkpoint", start, "--output", str(table), *options]) == 0
        with table.open() as file:
            of_start = list(csv.DictReader(file))
        assert len(of_start) == 6 * 4
        for row in of_start:
            assert row["step"] == "0"
            assert float(row["value"]) == found["0", "tiles", row["probe"], row["metric"]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.labelled=[{path: /nowhere}]", "Folder '/nowhere' of labelled tiles does not exist"),
        ("evaluation.labelled=[{name: a}]", "evaluation.labelled[0].path is empty"),
        ("evaluation.probes=[knn, kmeans]", "evaluation.probes = ['knn', 'kmeans'] is"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, override: str, message: str
):
    data = f"train.streaming_dataset_path={shards}"
    assert main(["--output-dir", str(tmp_path / "out"), *TINY, data, override]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line[14:17] == " E "]
    assert len(errors) == 1 and message in errors[0]


def test_a_benchmark_that_is_not_there_is_left_out(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Published YAML files name folders of their authors' machines."""
    missing = "evaluation.bach_root=/nowhere", "evaluation.probes=[knn]", "optim.early_stop=0.25"
    steps, probes = train(shards, tmp_path / "out", *missing)
    assert steps and not probes
    assert "evaluation.bach_root = '/nowhere' is no folder" in capsys.readouterr().err

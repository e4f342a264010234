"""The report of a small run, and what it says where something is missing."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.report.__main__ import main, read_metrics
from dinov2.train.train import main as train
from tests.helpers.runs import TINY, write_tissue_shards

PAGES = ("loss_curves.png", "crops.png", "pca.png", "neighbours.png")


@pytest.fixture(scope="module")
def run_folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that exported its teacher twice."""
    folder = tmp_path_factory.mktemp("report") / "run"
    overrides = (
        f"train.streaming_dataset_path={shards}",
        "optim.epochs=1",
        "evaluation.eval_period_iterations=3",
    )
    assert train(["--output-dir", str(folder), *TINY, *overrides]) == 0
    return folder


@pytest.fixture(scope="module")
def holdout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_shards(tmp_path_factory.mktemp("holdout") / "shards", shards=1, rows=11)


@pytest.fixture(scope="module")
def report(run_folder: Path, holdout: Path) -> Path:
    assert main([str(run_folder), "--tiles", str(holdout)]) == 0
    return run_folder / "report"


def test_drawings_and_embeddings(report: Path):
    for name in PAGES:
        with Image.open(report / name) as image:
            colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
            assert image.width > 600 and image.height > 250 and len(colours) > 50
    embeddings = np.load(report / "embeddings.npy")
    assert embeddings.shape == (11, 128)
    assert embeddings.dtype == np.float32 and np.isfinite(embeddings).all()


def test_page_holds_everything_itself(report: Path, run_folder: Path):
    page = (report / "report.html").read_text()
    embedded = re.findall(r"data:image/png;base64,([^']+)", page)
    assert [base64.b64decode(png) for png in embedded] == [(report / name).read_bytes() for name in PAGES]
    assert not re.search(r"(src|href)='(?!data:)", page)
    for text in ("dino_local_crops_loss", "images per second", "RankMe", "training_4", "base_lr"):
        assert text in page
    last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"<td>{last['total_loss']:.4f}</td>" in page


def test_an_earlier_report_is_replaced_and_nothing_left_beside(report: Path, run_folder: Path, holdout: Path):
    (report / "pca.png").write_bytes(b"old")
    assert main([str(run_folder), "--tiles", str(holdout)]) == 0
    assert (report / "pca.png").read_bytes() != b"old"
    assert sorted(path.name for path in report.iterdir()) == sorted([*PAGES, "embeddings.npy", "report.html"])


def test_training_tiles_serve_where_none_are_given(run_folder: Path, tmp_path: Path):
    assert main([str(run_folder), "--output", str(tmp_path / "new")]) == 0
    assert len(np.load(tmp_path / "new/embeddings.npy")) == 90
    assert "Embeddings of training tiles" in (tmp_path / "new/report.html").read_text()


def test_a_folder_in_other_use_is_left_alone(run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "crops.png").write_bytes(b"mine")
    assert main([str(run_folder), "--output", str(tmp_path)]) == 2
    assert "holds other files" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["crops.png"]
    assert (tmp_path / "crops.png").read_bytes() == b"mine"


def test_the_last_record_of_a_step_counts(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    order = (1, 1.0), (2, 2.0), (1, 3.0), (3, 4.0)
    records = [{"step": step, "total_loss": 9.0, "health/rankme": 5.0, "lr": lr} for step, lr in order]
    records.append({"step": 3, "held_out/rankme/value": 7.0})
    cut = '{"step": 2, "l' + json.dumps(records[2])
    path.write_text("\n".join([*map(json.dumps, records[:2]), cut, *map(json.dumps, records[2:])]))
    metrics = read_metrics(path)
    assert metrics["step"].tolist() == [1, 2, 3]
    assert metrics["lr"].tolist() == [3.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("metrics.jsonl", "metrics.jsonl' does not exist; give the output folder of a training run"),
        ("config.yaml", "config.yaml' does not exist"),
        ("eval", "export one with train.py --eval-only"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, missing: str, message: str
):
    for name in {"metrics.jsonl", "config.yaml", "eval"} - {missing}:
        (tmp_path / name).symlink_to(run_folder / name)
    assert main([str(tmp_path)]) == 2
    assert message in caplog.text
    (error,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert "\n" not in error.message
    assert not (tmp_path / "report").exists()


def test_missing_tiles_are_named(run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert main([str(run_folder), "--tiles", str(tmp_path / "nowhere"), "--output", str(tmp_path / "new")]) == 2
    assert "nowhere" in caplog.text
    assert not (tmp_path / "new").exists()

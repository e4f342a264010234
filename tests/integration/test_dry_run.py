"""``--dry-run``: the plan comes first, whatever is wrong with weights and data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dinov2.configs import load_config
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import main
from tests.helpers.runs import TINY, write_tissue_shards

EAGER = "performance.compile=false"  # quicker to measure


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_shards(tmp_path_factory.mktemp("data") / "tiles")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    arch = SSLMetaArch(load_config(None, [*TINY, "data.path=unused"]))
    return {"teacher": arch.student.state_dict()}


def dry_run(data: object, *words: str) -> int:
    return main(["--dry-run", *TINY, EAGER, f"data.path={data}", *words])


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if " E " in line]


@pytest.mark.parametrize("epochs", ["2", "auto"])
def test_the_plan_is_there_without_the_data(tmp_path: Path, capsys: pytest.CaptureFixture, epochs: str):
    assert dry_run(tmp_path / "absent", f"optim.epochs={epochs}", "--gpu", "L4", "--price", "1") == 2
    shown = capsys.readouterr()
    assert "GPU-hours" in shown.out and "L4" in shown.out
    (error,) = errors(shown.err)
    assert str(tmp_path / "absent") in error


def test_faults_of_weights_and_of_data_are_told_together(
    weights: dict[str, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture
):
    broken = {name: value.clone() for name, value in weights["teacher"].items()}
    broken["backbone.norm.weight"][3] = float("nan")
    torch.save({"teacher": broken}, tmp_path / "teacher.pth")
    assert dry_run(tmp_path / "absent", f"MODEL.WEIGHTS={tmp_path / 'teacher.pth'}") == 2
    shown = capsys.readouterr()
    assert "Run plan" in shown.out
    (error,) = errors(shown.err)
    assert "norm.weight" in error and str(tmp_path / "absent") in error


def test_weights_pictures_and_nothing_else(
    shards: Path,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**20))
    torch.save(weights, tmp_path / "teacher.pth")
    line = (f"MODEL.WEIGHTS={tmp_path / 'teacher.pth'}", "--output-dir", str(tmp_path / "out"),
            "--pictures", str(tmp_path / "plan"))  # fmt: skip
    assert dry_run(shards, *line) == 0
    shown = capsys.readouterr()
    assert str(tmp_path / "teacher.pth") in shown.out and "Run plan" in shown.out and "90 tiles" in shown.out
    assert f"warning   '{tmp_path}'" in shown.out  # a MiB is too little
    assert {path.name for path in tmp_path.iterdir()} == {"teacher.pth", "plan"}
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "plan").iterdir()}
    assert pictures.keys() == {"schedules.png", "crops.png"}
    for name in pictures:
        with Image.open(tmp_path / "plan" / name) as picture:
            assert min(picture.size) > 300 and len(set(picture.convert("L").tobytes())) > 50
    # Other schedules give another picture, which does not take the first one's place.
    assert dry_run(shards, *line, "optim.base_lr=0.02") == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "plan").iterdir()} == pictures


def test_a_batch_that_the_named_gpu_cannot_hold(shards: Path, capsys: pytest.CaptureFixture):
    line = ("train.batch_size_per_gpu=20000", "train.OFFICIAL_EPOCH_LENGTH=1", "optim.early_stop=1")
    assert dry_run(shards, *line, "--gpu", "L4", "--memory", "1") == 2
    shown = capsys.readouterr()
    assert "Run plan" in shown.out and "90 tiles" in shown.out
    (error,) = errors(shown.err)
    assert "train.batch_size_per_gpu" in error


def test_a_batch_by_the_memory_of_a_gpu(shards: Path, capsys: pytest.CaptureFixture):
    """Twice the memory holds about twice the images."""
    batches = []
    for gib in "1", "2":
        assert dry_run(shards, "train.batch_size_per_gpu=auto", "--memory", gib) == 0
        words = capsys.readouterr().out.split()
        batches.append(int(words[words.index("batch") + 1]))
    assert batches[1] / batches[0] == pytest.approx(2, rel=0.1)

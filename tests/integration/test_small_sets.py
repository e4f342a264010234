"""Small sets of tiles: batches of any size, and as many epochs as the tiles are worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.train.train import main
from tests.helpers.runs import TINY, checkpoint_tensors, read_metrics, write_tissue_shards

FEW = ("logging.period_iterations=1", "evaluation.eval_period_iterations=1000000")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_shards(tmp_path_factory.mktemp("few") / "shards", shards=1, rows=6)


def train(shards: Path, output_dir: Path, *overrides: str, flags: tuple[str, ...] = ()) -> int:
    return main(["--output-dir", str(output_dir), *flags, *TINY, *FEW, f"data.path={shards}", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.batch_size_per_gpu=3",),
        ("train.batch_size_per_gpu=1", "train.centering=centering", "dino.koleo_loss_weight=0",
         "dino.kde_loss_weight=0"),
    ],
    ids=["three", "one"],
)  # fmt: skip
def test_odd_batches_train(shards: Path, tmp_path: Path, overrides: tuple[str, ...]):
    assert train(shards, tmp_path / "out", *overrides, "optim.epochs=3", "train.skip_checkpointer=true") == 0
    records = read_metrics(tmp_path / "out")
    assert len(records) == 12
    assert all(np.isfinite(record["total_loss"]) and record["grad_norm_backbone"] > 0 for record in records)


def test_epochs_of_the_data_train_and_resume(shards: Path, tmp_path: Path):
    """Six tiles in batches of five: 100 passes are 600 images, of which 100 epochs are one step each."""
    overrides = ("optim.epochs=auto", "train.batch_size_per_gpu=5", "optim.warmup_epochs=1")
    assert train(shards, tmp_path / "whole", *overrides, "optim.early_stop=6") == 0
    assert train(shards, tmp_path / "parts", *overrides, "optim.early_stop=3") == 0
    assert train(shards, tmp_path / "parts", *overrides, "optim.early_stop=6") == 0
    assert len(read_metrics(tmp_path / "whole")) == 6
    expected, found = checkpoint_tensors(tmp_path / "whole", 6), checkpoint_tensors(tmp_path / "parts", 6)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_a_dry_run_says_what_the_data_are_worth(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train(shards, tmp_path / "out", "optim.epochs=auto", flags=("--dry-run",)) == 0
    said = capsys.readouterr().out
    assert "100 of 1 steps" in said and "over 6 tiles" in said
    overrides = ("optim.epochs=200", "optim.early_stop=900", "optim.warmup_epochs=300")
    assert train(shards, tmp_path / "out", *overrides, flags=("--dry-run",)) == 0
    said = capsys.readouterr().out
    assert said.count("warning") == 3  # passes, early stop, warm-up

"""Gram anchoring in whole runs of the command: its frozen teacher in checkpoints, and weights that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinov2.train.train import main
from tests.helpers.runs import TINY, checkpoint_tensors, read_metrics

GRAM = (
    "gram.use_loss=true", "gram.loss_weight=2", "gram.img_level=true", "gram.it_load_ema_teacher=1",
    "gram.update_frequency=2", "crops.gram_teacher_crops_size=112", "crops.gram_teacher_no_distortions=true",
    "train.checkpoint_period_iterations=1", "train.keep_checkpoints=10",
)  # fmt: skip


def train(shards: Path, output_dir: Path, *overrides: str) -> int:
    return main(["--output-dir", str(output_dir), *TINY, f"data.path={shards}", *overrides])


def test_a_run_resumes_bit_for_bit_across_a_replacement(shards: Path, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(shards, whole, *GRAM, "optim.early_stop=1.25") == 0
    for stop in ("0.25", "0.5", "0.75", "1.25"):  # before, at and after replacements
        assert train(shards, parts, *GRAM, f"optim.early_stop={stop}") == 0
    checkpoints = {step: checkpoint_tensors(whole, step) for step in range(1, 6)}
    found = checkpoint_tensors(parts, 5)
    assert checkpoints[5].keys() == found.keys()
    assert [key for key in found if not torch.equal(checkpoints[5][key], found[key])] == []
    # A checkpoint is taken before the replacement that is due after its step.
    name = "blocks.0.attn.qkv.weight"
    of_teacher = {step: tensors[f"/teacher/backbone.{name}"] for step, tensors in checkpoints.items()}
    of_gram = {step: tensors[f"/losses/gram/{name}"] for step, tensors in checkpoints.items()}
    assert all(torch.equal(of_gram[step], of_teacher[taken]) for step, taken in {2: 1, 3: 2, 4: 2, 5: 4}.items())
    losses = [record["gram_loss"] for record in read_metrics(whole)]
    assert losses[0] == 0 and min(losses[1:]) > 0


def test_weights_of_a_gram_teacher(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """It starts from an export, and one of another width or none is refused before data are opened."""
    short = "optim.early_stop=0.25"
    assert train(shards, tmp_path / "first", short) == 0
    export = tmp_path / "first/eval/training_1/teacher_checkpoint.pth"
    options = (f"gram.ckpt={export}", "gram.use_loss=true", "gram.img_level=true", short)
    assert train(shards, tmp_path / "out", *options) == 0
    exported = torch.load(export, weights_only=True)["teacher"]
    for name, tensor in checkpoint_tensors(tmp_path / "out", 1).items():
        if name.startswith("/losses/gram/"):
            assert torch.equal(tensor, exported[name.replace("/losses/gram/", "backbone.")])
    assert read_metrics(tmp_path / "out")[0]["gram_loss"] > 0
    export.unlink()
    assert train(shards, tmp_path / "out", *options, "optim.early_stop=0.5") == 0  # a checkpoint needs no weights
    capsys.readouterr()
    nowhere = tmp_path / "nowhere"
    assert train(nowhere, tmp_path / "a", *options) == 2
    missing = capsys.readouterr().err
    assert "losses.gram.ckpt" in missing and str(export) in missing
    torch.save({"teacher": {**exported, "backbone.cls_token": torch.zeros(1, 1, 64)}}, export)
    assert train(nowhere, tmp_path / "b", *options) == 2
    narrow = capsys.readouterr().err
    assert "losses.gram.ckpt" in narrow and str(export) in narrow
    for said in (missing, narrow):
        assert "Traceback" not in said and str(nowhere) not in said
    assert train(shards, tmp_path / "out", "optim.early_stop=1") == 2
    assert "gram" in capsys.readouterr().err

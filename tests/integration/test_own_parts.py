"""Parts of one's own, registered by nothing but their name in the configuration, in whole runs of the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from dinov2.hub import load_teacher
from dinov2.train.train import main
from tests.helpers.runs import TINY, checkpoint_tensors, read_metrics
from tests.helpers.toys import Discriminator, Patches

TERM = f"{Discriminator.__module__}:{Discriminator.__name__}"
BACKBONE = f"{Patches.__module__}:{Patches.__name__}"
Train = Callable[..., int]


@pytest.fixture
def train(shards: Path, tmp_path: Path) -> Train:
    """Train as the command does, with a YAML file of sections over the tiny configuration."""

    def run(output_dir: Path, sections: dict, *overrides: str) -> int:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(sections))
        data = f"train.streaming_dataset_path={shards}"
        return main(["--config-file", str(file), "--output-dir", str(output_dir), *TINY, data, *overrides])

    return run


def test_a_term_with_weights_trains_and_resumes_bit_for_bit(train: Train, tmp_path: Path):
    sections = {"losses": {TERM: {"weight": 0.5, "width": 6}}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, sections, "optim.early_stop=1") == 0
    assert train(parts, sections, "optim.early_stop=0.5") == 0
    assert train(parts, sections, "optim.early_stop=1") == 0
    expected, found = checkpoint_tensors(whole, 4), checkpoint_tensors(parts, 4)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert expected["/losses/Discriminator/steps"] == 4
    assert expected["/optimizer/Discriminator.net.0.weight/exp_avg"].any()
    first = checkpoint_tensors(whole, 3)["/losses/Discriminator/net.0.weight"]
    assert not torch.equal(first, expected["/losses/Discriminator/net.0.weight"])
    for record in read_metrics(whole):
        assert record["Discriminator_loss"] > 0 and record["grad_norm_Discriminator"] > 0


def test_a_run_does_not_go_on_with_other_weights_in_its_loss(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture
):
    sections = {"losses": {TERM: {"weight": 0.5}}}
    assert train(tmp_path / "out", sections, "optim.early_stop=0.25") == 0
    assert train(tmp_path / "out", {}, "train.allow_changes=true") == 2  # of settings, which weights are not
    assert "the checkpoint holds Discriminator, section losses now has none" in capsys.readouterr().err


def test_a_backbone_trains_exports_and_opens_again(train: Train, tmp_path: Path):
    student = {"arch": BACKBONE, "options": {"width": 24}}
    overrides = [f"student.arch={BACKBONE}", "optim.early_stop=0.5", "optim.layerwise_decay=0.5"]
    assert train(tmp_path / "out", {"student": student}, *overrides) == 0
    records = read_metrics(tmp_path / "out")
    assert len(records) == 2 and records[0]["grad_norm_backbone"] > 0
    path = tmp_path / "out/eval/training_2/teacher_checkpoint.pth"
    described = json.loads(path.with_suffix(".json").read_text())["architecture"]
    assert described == {"arch": BACKBONE, "patch_size": 14, "width": 24}
    teacher = load_teacher(path)
    assert isinstance(teacher, Patches) and isinstance(teacher, nn.Module)
    exported = torch.load(path, weights_only=True)["teacher"]
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, exported[f"backbone.{name}"])
    assert teacher(torch.randn(2, 3, 56, 56)).shape == (2, 24)


def test_a_backbone_that_cannot_be_built_is_one_sentence(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture):
    sections = {"student": {"options": {"depth": 3}}}
    assert train(tmp_path / "out", sections, f"student.arch={BACKBONE}") == 2
    error = capsys.readouterr().err
    assert f"student.arch = '{BACKBONE}'" in error and "depth" in error and "Traceback" not in error

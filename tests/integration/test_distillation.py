"""Distillation in whole runs of the command: resuming, what is saved and exported, and teachers that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov2.build.networks import with_teachers
from dinov2.configs import load_config
from dinov2.hub import load_teacher
from dinov2.train.plan.measure import StepCosts
from dinov2.train.plan.memory import MemoryModel
from dinov2.train.train import main
from tests.helpers.backbones import random_backbone, transformers_weights
from tests.helpers.checkpoints import save_vit
from tests.helpers.runs import TINY, checkpoint_tensors, read_metrics
from tests.helpers.training import tiny_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and shallower than the student, with smaller patches."""
    return save_vit(tmp_path_factory.mktemp("weights") / "teacher.pth")


def train(shards: Path, output_dir: Path, *overrides: str) -> int:
    return main(["--output-dir", str(output_dir), *TINY, f"data.path={shards}", *overrides])


def test_a_run_resumes_bit_for_bit_and_exports_the_student(shards: Path, teacher: Path, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distil = (f"losses.distillation.teacher={teacher}", "losses.distillation.weight=2")
    assert train(shards, whole, *distil, "optim.early_stop=1") == 0
    for stop in ("0.5", "1"):
        assert train(shards, parts, *distil, f"optim.early_stop={stop}") == 0
    expected, found = checkpoint_tensors(whole, 4), checkpoint_tensors(parts, 4)
    assert expected.keys() == found.keys()
    assert [key for key in found if not torch.equal(expected[key], found[key])] == []
    of_term = {key.removeprefix("/losses/distillation/") for key in found if "/losses/" in key}
    # The projections alone: the teacher does not change, and stays where it is.
    assert of_term == {f"projections.{part}.{kind}" for part in ("class", "patch") for kind in ("weight", "bias")}
    records = read_metrics(whole)
    for name in ("distillation_class_loss", "distillation_patch_loss", "grad_norm_distillation"):
        assert all(math.isfinite(record[name]) and record[name] > 0 for record in records)
    assert records[-1]["distillation_class_loss"] < records[0]["distillation_class_loss"]
    export = whole / "eval/training_4/teacher_checkpoint.pth"
    exported = load_teacher(export)
    assert (exported.embed_dim, exported.patch_size) == (128, 14)
    assert torch.equal(exported.cls_token, expected["/teacher/backbone.cls_token"])


def test_it_may_be_all_that_is_learned(shards: Path, teacher: Path, tmp_path: Path):
    alone = ("dino.loss_weight=0", "ibot.loss_weight=0", "dino.koleo_loss_weight=0", "dino.kde_loss_weight=0")
    distil = (f"losses.distillation.teacher={teacher}", "losses.distillation.distance=mse")
    assert train(shards, tmp_path, *alone, *distil, "optim.early_stop=0.5") == 0
    for record in read_metrics(tmp_path):
        parts = record["distillation_class_loss"] + record["distillation_patch_loss"]
        assert record["total_loss"] == pytest.approx(parts, rel=1e-6)


def test_teachers_that_cannot_be_are_refused_before_data_are_opened(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    nowhere = tmp_path / "nowhere"
    broken = torch.load(teacher, weights_only=True)
    broken["blocks.1.attn.qkv.weight"][0, 0] = torch.nan
    torch.save(broken, tmp_path / "broken.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    coarse = save_vit(tmp_path / "coarse.pth", patch_size=16)
    cases = {
        tmp_path / "missing.pth": ("missing.pth",),
        tmp_path / "broken.pth": ("broken.pth", "blocks.1.attn.qkv.weight"),
        tmp_path / "other.pth": ("other.pth",),
        coarse: ("56", "16 px", "losses.distillation.crops_size", "48 or 64"),
    }
    for command in ((), ("--dry-run",)):
        for file, words in cases.items():
            out = tmp_path / "out"
            overrides = (*TINY, f"data.path={nowhere}", f"losses.distillation.teacher={file}")
            assert main(["--output-dir", str(out), *command, *overrides]) == 2
            told = capsys.readouterr().err
            assert all(word in told for word in ("losses.distillation", *words)), told
            assert "Traceback" not in told and str(nowhere) not in told


def test_what_a_teachers_folder_tells_is_in_the_runs_configuration(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """As transformers saves one: eps of its norms, and the normalisation of its images, beside the weights."""
    folder, run = tmp_path / "published", tmp_path / "run"
    folder.mkdir()
    vit = random_backbone(patch_size=16, img_size=64, embed_dim=192, num_heads=3)
    save_file(transformers_weights(vit.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 3, "layer_norm_eps": 1e-12}))
    colours = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    distil = (f"losses.distillation.teacher={folder}", "losses.distillation.crops_size=64")
    assert train(shards, run, *distil, "optim.early_stop=0.25") == 0
    found = load_config(run / "config.yaml").losses["distillation"]
    assert (found.normalize_mean, found.normalize_std) == ((0.5,) * 3, (0.25,) * 3)
    assert (found.architecture["patch_size"], found.architecture["layer_norm_eps"]) == (16, 1e-12)
    teacher = found.build()
    teacher.load_state_dict(load_teacher(folder).state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(teacher.eval()(images), load_teacher(folder)(images))
    (folder / "model.safetensors").unlink()
    capsys.readouterr()
    assert train(shards, run, *distil, "optim.early_stop=0.5") == 2  # a resumed run reads it again
    told = capsys.readouterr().err
    assert "Traceback" not in told and str(folder) in told
    assert main(["--output-dir", str(run), "--eval-only"]) == 0  # an export has no use for it


def test_the_plan_counts_the_teacher(shards: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    plain = StepCosts(tiny_config("losses.gram={ema_teacher: true, img_level: true}"))  # all patches are computed
    distil = StepCosts(
        with_teachers(
            tiny_config(
                "losses.gram={ema_teacher: true, img_level: true}", f"losses.distillation.teacher={teacher}",
                "losses.distillation.patch_weight=0",
            )
        )
    )  # fmt: skip
    tokens, width, images = (56 // 8) ** 2 + 1, 192, 4
    block = 2 * 12 * width**2 * tokens + 4 * tokens**2 * width
    forward = 2 * images * (3 * block + 2 * 3 * 8**2 * width * (tokens - 1))
    projection = 3 * 2 * 2 * images * 128 * width  # forward, and gradients of input and weight
    for kind in ("model", "hardware", "dense"):
        assert getattr(distil.flops(images), kind) - getattr(plain.flops(images), kind) == forward + projection
    parameters = sum(tensor.numel() for tensor in torch.load(teacher, weights_only=True).values())
    assert MemoryModel(distil)(images).weights - MemoryModel(plain)(images).weights == 4 * parameters
    overrides = (*TINY, f"data.path={shards}", f"losses.distillation.teacher={teacher}")
    assert main(["--output-dir", str(tmp_path), "--dry-run", *overrides]) == 0
    assert f"losses.distillation.teacher: {teacher} is of the right shapes" in capsys.readouterr().out

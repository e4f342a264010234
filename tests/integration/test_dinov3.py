"""A narrow DINOv3 trained by the command, exported for every library, opened again and started from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dinov2.export import main as export
from dinov2.hub import load_teacher
from dinov2.models.dinov3 import Dinov3VisionTransformer
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.train import main
from tests.helpers.runs import NARROW_DINOV3, TINY, checkpoint_tensors, read_metrics

TWO_STEPS = (*TINY, *NARROW_DINOV3, "student.drop_path_rate=0.1", "optim.early_stop=0.5")
PUBLISHED_SIZE = (
    "student.arch=dinov3_vits16", "student.patch_size=16", "crops.global_crops_size=64", "crops.local_crops_size=32",
)  # fmt: skip
STARTED = ("optim.early_stop=0.25", "performance.recompute=full")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dinov3") / "out"
    assert main(["--output-dir", str(out), *TWO_STEPS, f"data.path={shards}"]) == 0
    return out


@pytest.fixture
def teacher(run: Path) -> Path:
    return run / "eval/training_2/teacher_checkpoint.pth"


def test_two_steps(run: Path):
    records = read_metrics(run)
    assert len(records) == 2 and all(0 < record["total_loss"] < 100 for record in records)
    first, last = (
        checkpoint_tensors(run, 2)[f"/{role}/backbone.local_cls_norm.weight"] for role in ("teacher", "student")
    )
    assert not torch.equal(first, last)


def test_a_resumed_run_is_the_same(run: Path, shards: Path, tmp_path: Path):
    """Draws of positions and of stochastic depth follow from seed and step; periods and masks are in checkpoints."""
    for stop in ("optim.early_stop=0.25", "optim.early_stop=0.5"):
        assert main(["--output-dir", str(tmp_path / "out"), *TWO_STEPS, f"data.path={shards}", stop]) == 0
    expected, found = checkpoint_tensors(run, 2), checkpoint_tensors(tmp_path / "out", 2)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert "/student/backbone.rope_embed.periods" in found


def test_the_teacher_opens_again(teacher: Path):
    model = load_teacher(teacher)
    assert type(model) is Dinov3VisionTransformer and model.norm.eps == 1e-5
    exported = torch.load(teacher, weights_only=True)["teacher"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, exported[f"backbone.{name}"]), name
    image = torch.randn(1, 3, 56, 28)
    assert load_teacher(teacher, pooling="cls_mean")(image).shape == (1, 128)
    assert load_teacher(teacher, feature_map=True)(image)[0].shape == (1, 64, 4, 2)


@pytest.mark.parametrize("target", ["meta", "timm", "hf"])
def test_exports_compute_the_same_and_can_be_started_from(
    target: str, teacher: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = tmp_path / target
    command = ["--checkpoint", str(teacher), "--format", target, "--output", str(folder), "--image-size", "70"]
    assert export([*command, "--verify"]) == 0
    assert "70 px" in capsys.readouterr().out
    again = load_teacher(folder)
    assert again.describe()["img_size"] == 70
    image = torch.randn(1, 3, 56, 28)
    torch.testing.assert_close(again(image), load_teacher(teacher)(image), rtol=1e-4, atol=1e-4)
    if target == "hf":  # it holds neither the norm of local class tokens nor periods
        data = (f"data.path={shards}", f"student.pretrained_weights={folder}")
        assert main(["--output-dir", str(tmp_path / "out"), *TWO_STEPS, *STARTED, *data]) == 0
        assert read_metrics(tmp_path / "out")[0]["total_loss"] > 0


def refused(
    capsys: pytest.CaptureFixture, tmp_path: Path, *overrides: str, base: tuple[str, ...] = (*TINY, *NARROW_DINOV3)
) -> str:
    """The sentence with which a run is refused that has no data, which are opened later."""
    status = main(["--output-dir", str(tmp_path / "out"), *base, f"data.path={tmp_path / 'none'}", *overrides])
    error = capsys.readouterr().err
    *warnings, sentence = error.splitlines()
    assert status == 2 and "Traceback" not in error and all(" W " in line for line in warnings)
    return sentence


def test_weights_of_another_kind_are_refused(teacher: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    sizes = {"img_size": 56, "patch_size": 14, "embed_dim": 64, "depth": 2, "num_heads": 2}
    torch.save(DinoVisionTransformer(**sizes).state_dict(), tmp_path / "dinov2.pth")
    message = refused(capsys, tmp_path, f"student.pretrained_weights={tmp_path / 'dinov2.pth'}")
    assert "learned positions" in message and "rotary positions" in message
    message = refused(capsys, tmp_path, f"student.pretrained_weights={teacher}", base=TINY)
    assert "learned positions" in message and "rotary positions" in message
    message = refused(capsys, tmp_path, f"student.pretrained_weights={teacher}", "student.options.embed_dim=96")
    assert "width 64" in message and "width 96" in message
    state = torch.load(teacher, weights_only=True)["teacher"]
    state["backbone.blocks.0.attn.qkv.bias_mask"].fill_(torch.nan)
    torch.save(state, tmp_path / "unset.pth")
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.bias_mask"):
        load_teacher(tmp_path / "unset.pth")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("debug.packed_crops=false",), "debug.packed_crops"),
        (("student.arch=dinov3_vits16",), "student.patch_size"),
        (("student.options.depth=none",), "student.options"),
        (("student.options.ffn_layer=swiglufused",), "ffn_layer"),
        (("train.use_pretrained=true", "student.arch=dinov3_vits16", "student.patch_size=8"), "student.patch_size"),
        (("train.use_pretrained=true", *PUBLISHED_SIZE), "student.pretrained_weights"),
    ],
)
def test_impossible_backbones_are_refused(
    overrides: tuple[str, ...], named: str, capsys: pytest.CaptureFixture, tmp_path: Path
):
    assert named in refused(capsys, tmp_path, *overrides)


@pytest.mark.parametrize(
    ("changed", "target"),
    [
        ({"untie_cls_and_patch_norms": True}, "hf"),
        ({"mask_k_bias": False}, "timm"),
        ({"pos_embed_rope_normalize_coords": "max"}, "hf"),
    ],
    ids=str,
)
def test_what_other_libraries_have_not(changed: dict, target: str, capsys: pytest.CaptureFixture, tmp_path: Path):
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 2, "norm_layer": "layernormbf16", "n_storage_tokens": 4}
    model = Dinov3VisionTransformer(**sizes, **{"mask_k_bias": True} | changed)
    model.blocks[0].attn.qkv.bias.data.fill_(1)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    (tmp_path / "teacher.json").write_text(json.dumps({"architecture": model.describe()}))
    command = ["--checkpoint", str(tmp_path / "teacher.pth"), "--output", str(tmp_path / "out"), "--format"]
    assert export([*command, target]) == 2
    assert "meta" in capsys.readouterr().err
    assert export([*command, "meta"]) == 0

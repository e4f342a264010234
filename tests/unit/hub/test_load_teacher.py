"""Teachers open from every layout, with the architecture stated or inferred."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2.configs import load_config
from dinov2.export import save_teacher
from dinov2.hub import load_teacher
from dinov2.hub.teacher import HEADS
from dinov2.layers import DINOHead
from dinov2.models import build_model_from_cfg
from dinov2.models.vision_transformer import ARCHITECTURES, vit_demo, vit_small
from dinov2.train.run import _architecture
from tests.helpers.backbones import chunked, randomise
from tests.helpers.runs import TINY

ROOT = Path(__file__).parents[3]


def export(folder: Path, *overrides: str) -> tuple[Path, nn.Module]:
    """A file as training writes it, and the backbone in it."""
    config = load_config(None, [*TINY, "train.streaming_dataset_path=unused", *overrides])
    teacher, width = build_model_from_cfg(config, only_teacher=True)
    randomise(teacher).eval()
    modules = {"backbone": teacher, "dino_head": DINOHead(width, 16, hidden_dim=8, bottleneck_dim=4)}
    path = folder / "eval" / "training_7" / "teacher_checkpoint.pth"
    metadata = {"architecture": _architecture(config), "step": 7, "samples": 56, "config": {}}
    save_teacher(path, {name: module.state_dict() for name, module in modules.items()}, metadata)
    return path, teacher


@pytest.mark.parametrize("json_beside", [True, False], ids=["stated", "inferred"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("student.num_register_tokens=4", "student.interpolate_antialias=true", "student.interpolate_offset=0"),
        ("student.num_register_tokens=0", "student.interpolate_antialias=false", "student.interpolate_offset=0.1"),
        ("student.ffn_layer=swiglufused", "student.qkv_bias=false", "student.ffn_bias=false",
         "student.interpolate_antialias=true", "student.interpolate_offset=0"),
        ("student.ffn_layer=identity", "student.proj_bias=false", "student.layerscale=0",
         "student.interpolate_antialias=true", "student.interpolate_offset=0"),
    ],
    ids=["registers", "none", "swiglu", "identity"],
)  # fmt: skip
def test_exported_teachers(overrides, json_beside, tmp_path):
    path, teacher = export(tmp_path, *overrides)
    if not json_beside:
        path.with_suffix(".json").unlink()
    model = load_teacher(path)
    assert not model.training
    for size in (56, 84):  # the training grid and a resampled one
        images = torch.randn(2, 3, size, size)
        torch.testing.assert_close(model(images), teacher(images), rtol=0, atol=0)


def test_what_only_the_json_knows(tmp_path):
    path, teacher = export(tmp_path, "student.interpolate_antialias=false", "student.interpolate_offset=0.25")
    images = torch.randn(2, 3, 84, 84)
    torch.testing.assert_close(load_teacher(path)(images), teacher(images), rtol=0, atol=0)
    path.with_suffix(".json").unlink()
    assert not torch.allclose(load_teacher(path)(images), teacher(images))


def test_feature_map(tmp_path):
    path, teacher = export(tmp_path)
    images = torch.randn(2, 3, 56, 84)
    maps = load_teacher(path, feature_map=True)(images)
    assert isinstance(maps, list) and len(maps) == 1
    assert maps[0].shape == (2, 128, 4, 6)
    patches = teacher.forward_features(images)["x_prenorm"][:, 3:]
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), patches, rtol=0, atol=0)


@pytest.mark.parametrize(("registers", "antialias", "offset"), [(4, True, 0.0), (0, False, 0.1)])
def test_released_teachers(registers, antialias, offset, tmp_path):
    """OpenMidnight's: chunks, wrappers, no JSON; here in half precision."""
    teacher = vit_small(
        patch_size=14, img_size=224, num_register_tokens=registers, ffn_layer="swiglufused", init_values=1e-5,
        interpolate_antialias=antialias, interpolate_offset=offset,
    )  # fmt: skip
    randomise(teacher).eval()
    state = {key: value.half() for key, value in chunked(teacher.state_dict(), 3).items()}
    wrapped = {"teacher": {f"backbone.{key}": value for key, value in state.items()}}
    torch.save(wrapped, tmp_path / "teacher.pth")
    model = load_teacher(str(tmp_path / "teacher.pth"))
    teacher.load_state_dict(state)
    images = torch.randn(1, 3, 98, 98)
    torch.testing.assert_close(model(images), teacher(images), rtol=0, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_position_grid_of_the_file_is_kept(tmp_path):
    """Meta's grid of 37 x 37 under a JSON for training at 224 px."""
    published = randomise(vit_demo(patch_size=14, img_size=518, num_register_tokens=4)).eval()
    torch.save(published.state_dict(), tmp_path / "teacher.pth")
    described = {"arch": "vit_demo", "patch_size": 14, "num_register_tokens": 4, "img_size": 224}
    (tmp_path / "teacher.json").write_text(json.dumps({"architecture": described}))
    model = load_teacher(tmp_path / "teacher.pth")
    assert torch.equal(model.pos_embed, published.pos_embed)


def test_heads_are_those_of_the_architectures():
    with torch.device("meta"):
        models = [make() for make in ARCHITECTURES.values()]
    assert {model.embed_dim: model.num_heads for model in models} == HEADS


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("{", r"teacher.json' does not describe a teacher's architecture"),
        ("[]", r"teacher.json' does not describe a teacher's architecture"),
        (
            '{"step": 7}',
            r"teacher.json' does not describe a teacher's architecture .*architecture.*; mend or remove it",
        ),
        ('{"architecture": {"arch": "vit_huge"}}', "names no arch out of vit_demo, vit_tiny, vit_small"),
        ('{"architecture": {"arch": "vit_demo", "patches": 14}}', "does not describe a ViT .*'patches'"),
        (
            '{"architecture": {"arch": "vit_tiny", "patch_size": 14}}',
            "do not fit the model: missing: blocks.10.attn",
        ),
    ],
)
def test_wrong_json(described, message, tmp_path):
    torch.save(vit_demo(patch_size=14, img_size=28).state_dict(), tmp_path / "teacher.pth")
    (tmp_path / "teacher.json").write_text(described)
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(tmp_path / "teacher.pth")
    assert "\n" not in str(error.value)


def test_architecture_that_cannot_be_inferred(tmp_path):
    state = vit_demo(patch_size=14, img_size=28).state_dict()
    torch.save({**state, "cls_token": torch.zeros(1, 1, 130)}, tmp_path / "teacher.pth")
    with pytest.raises(
        ValueError, match=r"cannot be inferred from its width 130 .*put a JSON with its architecture"
    ):
        load_teacher(tmp_path / "teacher.pth")


def test_files_that_hold_no_teacher(tmp_path):
    torch.save({"teacher": {"token.weight": torch.zeros(1, 1, 128)}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"other.pth' hold no backbone: cls_token, pos_embed, .* a DINOv2 ViT is"
    ):
        load_teacher(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_teacher(tmp_path / "none.pth")


def test_torch_hub(tmp_path):
    path, teacher = export(tmp_path)
    images = torch.randn(1, 3, 56, 56)
    model = torch.hub.load(str(ROOT), "pathfm_teacher", source="local", checkpoint_path=str(path))
    torch.testing.assert_close(model(images), teacher(images), rtol=0, atol=0)
    maps = torch.hub.load(
        str(ROOT), "pathfm_teacher", source="local", checkpoint_path=str(path), feature_map=True
    )
    assert maps(images)[0].shape == (1, 128, 4, 4)

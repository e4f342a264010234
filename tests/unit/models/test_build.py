"""Backbones follow the configuration."""

from typing import get_args, get_type_hints

import pytest
import torch

from dinov2.configs import load_config
from dinov2.configs.schema import StudentConfig
from dinov2.extensions import BACKBONES
from dinov2.models import build_model_from_cfg
from dinov2.models.backbone import ignored_settings
from dinov2.models.vision_transformer import FFN_LAYERS
from tests.helpers.runs import TINY


def config(*overrides: str):
    return load_config(None, [*TINY, "train.streaming_dataset_path=unused", *overrides])


def test_configurations_name_exactly_the_feed_forward_layers_there_are():
    assert set(get_args(get_type_hints(StudentConfig)["ffn_layer"])) == set(FFN_LAYERS)


@pytest.mark.parametrize(
    ("arch", "width", "depth", "heads"),
    [
        ("vit_demo", 128, 4, 4),
        ("vit_tiny", 192, 12, 3),
        ("vit_small", 384, 12, 6),
        ("vit_base", 768, 12, 12),
        ("vit_large", 1024, 24, 16),
        ("vit_giant2", 1536, 40, 24),
    ],
)
def test_geometry(arch, width, depth, heads):
    with torch.device("meta"):
        model = BACKBONES[arch](patch_size=14)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, depth, heads)


def test_every_setting_arrives():
    settings = config(
        "student.arch=vit_demo", "student.patch_size=28", "student.ffn_layer=swiglufused",
        "student.num_register_tokens=3", "student.layerscale=0.25", "student.qkv_bias=false",
        "student.proj_bias=false", "student.ffn_bias=false", "student.drop_path_rate=0.3",
        "student.drop_path_uniform=false", "student.interpolate_antialias=true", "student.interpolate_offset=0.05",
    )  # fmt: skip
    student, teacher, width = build_model_from_cfg(settings)
    assert width == 128
    assert student.state_dict().keys() == teacher.state_dict().keys()
    assert [block.drop_path_rate for block in student.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [block.drop_path_rate for block in teacher.blocks] == [0] * 4
    for model in (student, teacher):
        assert model.pos_embed.shape == (1, 1 + 4, 128)  # 56 px in patches of 28
        assert model.register_tokens.shape == (1, 3, 128)
        assert (model.interpolate_antialias, model.interpolate_offset) == (True, 0.05)
        assert (model.blocks[0].ls1.gamma == 0.25).all()
        biases = [key for key in model.state_dict() if key.startswith("blocks") and key.endswith("bias")]
        assert all("norm" in key for key in biases)
        assert "blocks.0.mlp.w12.weight" in model.state_dict()


def test_teacher_alone():
    teacher, width = build_model_from_cfg(config(), only_teacher=True)
    assert (teacher.embed_dim, width) == (128, 128)
    assert not any(block.drop_path_rate for block in teacher.blocks)


def test_named_dinov3_keeps_its_kinds_and_takes_rates_gains_and_options():
    settings = config(
        "student.arch=dinov3_vits16plus", "student.patch_size=16", "crops.global_crops_size=64",
        "crops.local_crops_size=32", "student.layerscale=0.25", "student.ffn_layer=mlp", "student.qkv_bias=false",
        "student.drop_path_rate=0.3", "student.drop_path_uniform=false", "student.options.depth=2",
        "student.options.n_storage_tokens=1",
    )  # fmt: skip
    with torch.device("meta"):
        student, teacher, width = build_model_from_cfg(settings)
    assert (width, len(student.blocks), student.num_prefix_tokens, student.num_heads) == (384, 2, 2, 6)
    assert [block.drop_path_rate for block in student.blocks] == [0, 0.3]
    assert student.blocks[0].ls1.init_values == 0.25
    assert {"blocks.0.mlp.w1.weight", "blocks.0.attn.qkv.bias"} <= teacher.state_dict().keys()
    assert set(ignored_settings(settings)) >= {"ffn_layer", "qkv_bias", "num_register_tokens"}
    assert ignored_settings(config()) == []


def test_sizes_by_options():
    with torch.device("meta"):
        student, _, width = build_model_from_cfg(config("student.arch=vit_giant2", "student.options.depth=24"))
    assert (width, len(student.blocks)) == (1536, 24)
    described = student.describe()
    with torch.device("meta"):
        again = BACKBONES[described.pop("arch")](**described)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in student.state_dict().items()}

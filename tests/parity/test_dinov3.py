"""DINOv3's ViTs compute what timm's and transformers' do with the same weights, and files of either open here."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models import save_for_hf
from torch import Tensor, nn

from dinov2.extensions import BACKBONES
from dinov2.hub import load_teacher
from dinov2.hub.layouts_dinov3 import to_meta
from dinov2.models.dinov3 import Dinov3VisionTransformer
from tests.helpers.backbones import random_dinov3, randomise

# Both compute angles from float32 coordinates; everything else is float64.
CLOSE = {"rtol": 0, "atol": 1e-5}
SIZES = [(64, 64), (48, 112)]
TIMM = {"mlp": "vit_small_patch16_dinov3_qkvb", "swiglu": "vit_small_plus_patch16_dinov3_qkvb"}
HIDDEN = {"mlp": 384, "swiglu": 256}  # of D = 96: 4 x 96, and 2/3 of it


def timm_model(ffn_layer: str, **options: Any) -> nn.Module:
    options = {"embed_dim": 96, "depth": 3, "num_heads": 4, "mlp_ratio": HIDDEN[ffn_layer] / 96, **options}
    return randomise(timm.create_model(TIMM[ffn_layer], global_pool="token", **options)).eval()


def transformers_model(ffn_layer: str, **options: Any) -> nn.Module:
    config = transformers.DINOv3ViTConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_register_tokens=4,
        intermediate_size=HIDDEN[ffn_layer], use_gated_mlp=ffn_layer == "swiglu",
        hidden_act="silu" if ffn_layer == "swiglu" else "gelu", **options,
    )  # fmt: skip
    return randomise(transformers.DINOv3ViTModel(config)).eval()


def ours_of(theirs: nn.Module, ffn_layer: str) -> Dinov3VisionTransformer:
    """Our model with the weights of theirs, by name."""
    ours = random_dinov3(ffn_layer=ffn_layer)
    state = to_meta({key.removeprefix("model."): value.double() for key, value in theirs.state_dict().items()})
    report = ours.load_state_dict(state, strict=False)
    assert report.missing_keys == ["rope_embed.periods"] and not report.unexpected_keys
    return ours


def tokens_of(model: nn.Module, images: Tensor, masks: Tensor | None = None) -> Tensor:
    out = model.forward_features(images, masks)
    return torch.cat([out["x_norm_clstoken"][:, None], out["x_norm_regtokens"], out["x_norm_patchtokens"]], dim=1)


@pytest.mark.parametrize("ffn_layer", HIDDEN)
@torch.no_grad()
def test_tokens_and_layers_are_timms(ffn_layer):
    theirs = timm_model(ffn_layer).double()
    ours = ours_of(theirs, ffn_layer)
    for size in SIZES:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        expected = theirs.forward_features(images)
        assert expected.abs().max() > 1
        torch.testing.assert_close(tokens_of(ours, images), expected, **CLOSE)
        torch.testing.assert_close(ours(images), theirs(images), **CLOSE)
    for norm in (True, False):
        found = ours.get_intermediate_layers(
            images, [0, 2], reshape=True, return_class_token=True, return_extra_tokens=True, norm=norm
        )
        layers = theirs.forward_intermediates(
            images, [0, 2], return_prefix_tokens=True, norm=norm, intermediates_only=True
        )
        for (patches, class_token, registers), (expected, prefix) in zip(found, layers, strict=True):
            torch.testing.assert_close(patches, expected, **CLOSE)
            torch.testing.assert_close(torch.cat([class_token[:, None], registers], dim=1), prefix, **CLOSE)


@pytest.mark.parametrize("ffn_layer", HIDDEN)
def test_tokens_masks_and_gradients_are_transformers(ffn_layer):
    theirs = transformers_model(ffn_layer).double()
    ours = ours_of(theirs, ffn_layer)
    for size in SIZES:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        masks = torch.rand(2, size[0] * size[1] // 256) < 0.4
        for mask in (None, masks):
            expected = theirs(images, bool_masked_pos=mask).last_hidden_state
            torch.testing.assert_close(tokens_of(ours, images, mask), expected, **CLOSE)
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (tokens_of(ours, images, masks) * direction).sum().backward()
    gradients = {key.removeprefix("model."): p.grad for key, p in theirs.named_parameters()}
    expected = to_meta(gradients)
    for name, parameter in ours.named_parameters():
        found = parameter.grad
        if name.endswith("qkv.bias"):
            assert not found.chunk(3)[1].any()  # of the keys
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("dinov3_vits16", "vit_small_patch16_dinov3_qkvb"),
        ("dinov3_vits16plus", "vit_small_plus_patch16_dinov3_qkvb"),
        ("dinov3_vitb16", "vit_base_patch16_dinov3_qkvb"),
        ("dinov3_vitl16", "vit_large_patch16_dinov3_qkvb"),
        ("dinov3_vith16plus", "vit_huge_plus_patch16_dinov3_qkvb"),
        ("dinov3_vit7b16", "vit_7b_patch16_dinov3"),
    ],
)
def test_published_architectures_have_timms_tensors(arch, name):
    with torch.device("meta"):
        ours, theirs = BACKBONES[arch](), timm.create_model(name, num_classes=0)
    renamed = {key: value.shape for key, value in to_meta(theirs.state_dict()).items()}
    extra = {"rope_embed.periods", "local_cls_norm.weight", "local_cls_norm.bias"}
    expected = {key: value.shape for key, value in ours.state_dict().items() if key not in extra}
    assert renamed == expected
    assert (ours.num_heads, ours.norm.eps) == (theirs.blocks[0].attn.num_heads, theirs.norm.eps)


@pytest.mark.parametrize("ffn_layer", HIDDEN)
@torch.no_grad()
def test_folders_of_both_open(ffn_layer, tmp_path: Path):
    images = torch.randn(2, 3, 64, 48)
    theirs = transformers_model(ffn_layer, layer_norm_eps=1e-3, rope_theta=50.0)
    theirs.save_pretrained(tmp_path / "hf")
    found = tokens_of(load_teacher(tmp_path / "hf"), images)
    torch.testing.assert_close(found, theirs(images).last_hidden_state, rtol=1e-4, atol=1e-4)
    for bias in (True, False):
        theirs = timm_model(ffn_layer, qkv_bias=bias)
        save_for_hf(theirs, tmp_path / f"timm{bias}", safe_serialization=True)
        config = json.loads((tmp_path / f"timm{bias}/config.json").read_text())
        config["model_args"] = {"num_heads": 4}
        (tmp_path / f"timm{bias}/config.json").write_text(json.dumps(config))
        found = tokens_of(load_teacher(tmp_path / f"timm{bias}"), images)
        torch.testing.assert_close(found, theirs.forward_features(images), rtol=1e-4, atol=1e-4)

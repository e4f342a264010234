"""The backbone computes what transformers' DINOv2 models do with the same weights."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from tests.helpers.backbones import random_backbone, transformers_weights

CLOSE = {"rtol": 0, "atol": 1e-6}


def load(ours: nn.Module, registers: int, ffn_layer: str, folder) -> nn.Module:
    """Transformers' model of our weights, opened from a folder as a user would."""
    arguments = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": 56,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": ffn_layer == "swiglufused",
    }
    if registers:
        config, model = (
            Dinov2WithRegistersConfig(**arguments, num_register_tokens=registers),
            Dinov2WithRegistersModel,
        )
    else:
        config, model = Dinov2Config(**arguments), Dinov2Model
    config.save_pretrained(folder)
    weights = {key: value.float() for key, value in transformers_weights(ours.state_dict()).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    theirs, report = model.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return theirs.double().eval()


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
def test_all_tokens(ffn_layer, registers, tmp_path):
    # Transformers resamples positions to exact sides, with antialiasing in its register models only.
    ours = random_backbone(
        ffn_layer=ffn_layer,
        num_register_tokens=registers,
        interpolate_antialias=registers > 0,
        interpolate_offset=0.0,
    )
    theirs = load(ours, registers, ffn_layer, tmp_path)
    for size in [(56, 56), (28, 28), (98, 98), (42, 70)]:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        out = ours.forward_features(images)
        tokens = [out[f"x_norm_{name}"] for name in ("clstoken", "regtokens", "patchtokens")]
        tokens[0] = tokens[0][:, None]
        with torch.no_grad():
            expected = theirs(images).last_hidden_state
        torch.testing.assert_close(torch.cat(tokens, dim=1), expected, **CLOSE)


def test_masked_patches(tmp_path):
    ours = random_backbone(num_register_tokens=4)
    theirs = load(ours, 4, "mlp", tmp_path)
    images, masks = torch.randn(2, 3, 56, 56, dtype=torch.float64), torch.rand(2, 16) < 0.4
    with torch.no_grad():
        expected = theirs(images, bool_masked_pos=masks).last_hidden_state
    out = ours.forward_features(images, masks)
    torch.testing.assert_close(out["x_norm_patchtokens"], expected[:, 5:], **CLOSE)

"""Files that transformers writes open as teachers with transformers' outputs, at any resolution."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from dinov2.hub import load_teacher
from tests.helpers.backbones import randomise


def transformers_model(registers: int, swiglu: bool) -> torch.nn.Module:
    options = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": 70,
        "use_swiglu_ffn": swiglu,
    }
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**options, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**options))
    return randomise(model).eval()


@pytest.mark.parametrize(("registers", "swiglu"), [(0, True), (0, False), (4, True)])
@torch.no_grad()
def test_saved_models_open_with_the_same_outputs(registers, swiglu, tmp_path):
    theirs = transformers_model(registers, swiglu)
    theirs.save_pretrained(tmp_path)
    ours = load_teacher(tmp_path / "model.safetensors").double()
    theirs.double()
    for size in ((70, 70), (42, 42), (56, 98)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected.pooler_output, rtol=0, atol=1e-9)
        patches = ours.forward_features(images)["x_norm_patchtokens"]
        torch.testing.assert_close(patches, expected.last_hidden_state[:, 1 + registers :], rtol=0, atol=1e-9)

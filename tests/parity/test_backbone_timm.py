"""The backbone computes what timm's does with the same weights."""

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dinov2.models.vision_transformer import vit_giant2, vit_small
from tests.helpers.backbones import SMALL, SWIGLU_WIDTH, random_backbone, timm_weights

# timm resamples positions in float32, as we do; everything else is float64.
CLOSE = {"rtol": 0, "atol": 1e-6}
GEOMETRY = {key: SMALL[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "init_values")}
FFN = {
    "mlp": {},
    "swiglufused": {
        "mlp_layer": SwiGLUPacked,
        "act_layer": nn.SiLU,
        "mlp_ratio": 2 * SWIGLU_WIDTH / SMALL["embed_dim"],
    },
}


def both(ffn_layer: str = "mlp", registers: int = 4) -> tuple[nn.Module, nn.Module]:
    ours = random_backbone(
        ffn_layer=ffn_layer,
        num_register_tokens=registers,
        interpolate_antialias=True,
        interpolate_offset=0.0,
    )
    theirs = VisionTransformer(
        **GEOMETRY,
        **FFN[ffn_layer],
        reg_tokens=registers,
        no_embed_class=True,
        dynamic_img_size=True,
        num_classes=0,
    )
    theirs.double().eval().load_state_dict(timm_weights(ours.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn_layer", FFN)
@pytest.mark.parametrize("size", [(56, 56), (28, 28), (98, 98), (42, 70)], ids=str)
def test_all_tokens(ffn_layer, registers, size):
    ours, theirs = both(ffn_layer, registers)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    out = ours.forward_features(images)
    tokens = [out[f"x_norm_{name}"] for name in ("clstoken", "regtokens", "patchtokens")]
    tokens[0] = tokens[0][:, None]
    expected = theirs.forward_features(images)
    assert expected.abs().max() > 1
    torch.testing.assert_close(torch.cat(tokens, dim=1), expected, **CLOSE)


def test_gradients():
    ours, theirs = both("swiglufused")
    images = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    direction = torch.randn(2, 16, 96, dtype=torch.float64)
    (ours.forward_features(images)["x_norm_patchtokens"] * direction).sum().backward()
    (theirs.forward_features(images)[:, 5:] * direction).sum().backward()
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    grads["pos_embed"][:, 0] = 0  # timm has no such position; its gradient is the class token's
    grads = timm_weights(grads)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(grads.pop(name), parameter.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert not grads


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n", [1, 2, [0, 2]], ids=str)
def test_intermediate_layers(n, norm):
    ours, theirs = both()
    images = torch.randn(2, 3, 56, 42, dtype=torch.float64)
    out = ours.get_intermediate_layers(images, n, reshape=True, return_class_token=True, norm=norm)
    expected = theirs.get_intermediate_layers(images, n, reshape=True, return_prefix_tokens=True, norm=norm)
    assert len(out) == len(expected)
    for (patches, cls), (wanted, prefix) in zip(out, expected, strict=True):
        assert patches.shape == (2, 96, 4, 3)
        torch.testing.assert_close(patches, wanted, **CLOSE)
        torch.testing.assert_close(cls, prefix[:, 0], **CLOSE)
    flat = ours.get_intermediate_layers(images, n, norm=norm)
    for patches, (wanted, _) in zip(flat, expected, strict=True):
        torch.testing.assert_close(patches, wanted.flatten(2).transpose(1, 2), **CLOSE)


@pytest.mark.parametrize(
    ("name", "make", "ffn_layer"),
    [
        ("vit_small_patch14_reg4_dinov2", vit_small, "mlp"),
        ("vit_giant_patch14_reg4_dinov2", vit_giant2, "swiglufused"),
    ],
)
def test_published_architectures_have_timms_tensors(name, make, ffn_layer):
    with torch.device("meta"):
        ours = make(patch_size=14, img_size=518, num_register_tokens=4, init_values=1.0, ffn_layer=ffn_layer)
        theirs = timm.create_model(name, num_classes=0)
    renamed = {key: value.shape for key, value in timm_weights(ours.state_dict()).items()}
    assert renamed == {key: value.shape for key, value in theirs.state_dict().items()}

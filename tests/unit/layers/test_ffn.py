"""Feed-forward layers, LayerScale, layer norm and patch embedding against their formulas."""

import math

import pytest
import torch

from dinov2.layers import LayerNorm, LayerScale, Mlp, PatchEmbed, SwiGLUFFN, SwiGLUFFNFused
from tests.helpers.backbones import randomise


def affine(x, linear):
    return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_mlp(bias):
    mlp = randomise(Mlp(6, 24, bias=bias)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    hidden = affine(x, mlp.fc1)
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), affine(gelu, mlp.fc2))
    assert ("fc1.bias" in mlp.state_dict()) == bias


@pytest.mark.parametrize("bias", [True, False])
def test_swiglu_gates_with_the_first_half(bias):
    swiglu = randomise(SwiGLUFFN(6, 10, bias=bias)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    gate, value = affine(x, swiglu.w12).tensor_split(2, dim=1)
    torch.testing.assert_close(swiglu(x), affine(gate * torch.sigmoid(gate) * value, swiglu.w3))
    assert ("w3.bias" in swiglu.state_dict()) == bias


@pytest.mark.parametrize(("dim", "hidden"), [(1536, 4096), (384, 1024), (96, 256), (100, 272)])
def test_fused_swiglu_width(dim, hidden):
    with torch.device("meta"):
        swiglu = SwiGLUFFNFused(dim, 4 * dim)
    assert swiglu.w12.weight.shape == (2 * hidden, dim)
    assert swiglu.w3.weight.shape == (dim, hidden)


def test_layer_scale():
    scale = LayerScale(4, init_values=0.1)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    out = scale(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x.float() * 0.1)
    torch.testing.assert_close(scale(x.double()), x.double() * scale.gamma.double())


def test_layer_norm_keeps_the_streams_precision_under_16_bit_parameters():
    norm = randomise(LayerNorm(8)).bfloat16()
    x = torch.randn(5, 8)
    wide = x.double()
    deviation = ((wide - wide.mean(1, True)) ** 2).mean(1, True).add(1e-6).sqrt()
    expected = (wide - wide.mean(1, True)) / deviation * norm.weight.double() + norm.bias.double()
    torch.testing.assert_close(norm(x), expected.float())


def test_patch_embedding_is_one_linear_map_per_patch():
    embed = randomise(PatchEmbed(img_size=8, patch_size=2, in_chans=3, embed_dim=5)).double()
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    out = embed(images)
    assert out.shape == (2, 6, 5)
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
            expected = patch @ embed.proj.weight.flatten(1).T + embed.proj.bias
            torch.testing.assert_close(out[:, 3 * row + column], expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 30, 28), "30 x 28 px do not divide into patches of 14 px"),
        ((2, 3, 28, 13), "28 x 13 px do not divide into patches of 14 px"),
        ((2, 1, 28, 28), r"\(2, 1, 28, 28\); \(B, 3, H, W\) is expected"),
        ((3, 28, 28), r"\(3, 28, 28\); \(B, 3, H, W\) is expected"),
    ],
)
def test_patch_embedding_refuses_other_images(shape, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbed(img_size=28, patch_size=14, embed_dim=4)(torch.zeros(shape))


def test_patch_embedding_refuses_a_grid_of_broken_patches():
    with pytest.raises(ValueError, match="img_size = 225 is not a multiple of patch_size = 14"):
        PatchEmbed(img_size=225, patch_size=14)

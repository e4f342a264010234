"""What is rounded to 16 bit and what is not: products are, sums and gains are not."""

import pytest
import torch

from dinov2.layers import Block, DINOHead, LayerScale, SwiGLUFFNFused
from dinov2.layers.stochastic_depth import draw_orders

SEGMENTS = ((3, 4), (2, 5))


def block() -> Block:
    return Block(32, num_heads=2, qkv_bias=True, drop_path=0.4, init_values=1.0, ffn_layer=SwiGLUFFNFused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_where_sharding_gathers_16_bit_parameters(dtype):
    layer = block().to(dtype)
    x = torch.randn(22, 32, requires_grad=True)
    layer(x, SEGMENTS, draw_orders(SEGMENTS, 2, x.device)).sum().backward()
    assert x.grad.dtype == torch.float32
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}


def test_products_under_autocast():
    layer, seen = block(), []
    for linear in (layer.attn.qkv, layer.attn.proj, layer.mlp.w12, layer.mlp.w3):
        linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(22, 32), SEGMENTS)
    assert seen == [torch.bfloat16] * 4


def test_a_small_update_survives_16_bit_gains():
    """1 + 2^-12 exists in float32, not in 16 bit."""
    scale = LayerScale(4, 2.0**-12).bfloat16()
    updated = torch.ones(4) + scale(torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(updated, torch.full((4,), 1 + 2.0**-12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_head_takes_tokens_of_another_dtype(dtype):
    head = DINOHead(16, 32, hidden_dim=24, bottleneck_dim=8)
    x = torch.randn(5, 16)
    expected = head(x)
    logits = head.to(dtype)(x)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.02)

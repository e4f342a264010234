"""Attention against the softmax formula, and its backends."""

import sys
from types import ModuleType

import pytest
import torch

from dinov2.layers import Attention
from tests.helpers.backbones import randomise

SEGMENTS = ((3, 5), (2, 4))


@pytest.fixture
def xformers(monkeypatch) -> ModuleType:
    """A stand-in for the package: attention (B, N, H, D / H) written out, on a machine that claims CUDA."""

    def memory_efficient_attention(q, k, v):
        weights = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhij,bjhd->bihd", weights.softmax(dim=-1), v)

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return ops


def test_backends_agree(xformers):
    sdpa = randomise(Attention(24, num_heads=3, qkv_bias=True)).double()
    other = Attention(24, num_heads=3, qkv_bias=True, backend="xformers").double()
    other.load_state_dict(sdpa.state_dict())
    rows = torch.randn(23, 24, dtype=torch.float64)
    torch.testing.assert_close(other(rows, SEGMENTS), sdpa(rows, SEGMENTS), rtol=0, atol=1e-12)


def image_by_image(attention, x):
    """softmax(Q K^T / sqrt(d)) V for each image and head by itself."""
    outputs, start = [], 0
    for batch, tokens in SEGMENTS:
        for _ in range(batch):
            rows = x[start : start + tokens]
            q, k, v = (rows @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=1)
            heads = [
                torch.softmax(a @ b.T / 8**0.5, dim=1) @ c
                for a, b, c in zip(*(t.split(8, dim=1) for t in (q, k, v)), strict=True)
            ]
            outputs.append(torch.cat(heads, dim=1) @ attention.proj.weight.T + attention.proj.bias)
            start += tokens
    return torch.cat(outputs)


def test_attends_within_each_image_only():
    attention = randomise(Attention(24, num_heads=3, qkv_bias=True)).double()
    x = torch.randn(23, 24, dtype=torch.float64, requires_grad=True)
    out, expected = attention(x, SEGMENTS), image_by_image(attention, x)
    torch.testing.assert_close(out, expected)
    inputs, direction = [x, *attention.parameters()], torch.randn_like(out)
    grads = torch.autograd.grad((out * direction).sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * direction).sum(), inputs))


def test_unknown_backend():
    with pytest.raises(
        ValueError, match=r"attention_backend = 'flash' is unknown; choose 'sdpa' or 'xformers'\.$"
    ):
        Attention(8, num_heads=2, backend="flash")


def test_xformers_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^[^.]*'xformers' needs a CUDA device.*choose 'sdpa'\.$"):
        Attention(8, num_heads=2, backend="xformers")


def test_xformers_not_importable(xformers, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ValueError, match=r"cannot be imported beside torch .*or choose 'sdpa'\.$"):
        Attention(8, num_heads=2, backend="xformers")


def test_xformers_built_for_another_torch(xformers):
    def no_kernel(q, k, v):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`:\n  reasons\n")

    xformers.memory_efficient_attention = no_kernel
    attention = Attention(8, num_heads=2, backend="xformers")
    with pytest.raises(
        ValueError, match=r"no kernel here for torch.float32 on cpu \(No operator.*choose 'sdpa'\.$"
    ):
        attention(torch.randn(23, 8), SEGMENTS)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads = 5 does not divide the width 24"):
        Attention(24, num_heads=5)

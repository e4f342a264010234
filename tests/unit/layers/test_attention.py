"""Attention against the softmax formula, and its backends."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from dinov2.layers import Attention
from dinov2.layers.attention_backends import attention_backend, require_kernel
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


@pytest.mark.parametrize("backend", ["sdpa", "flash", "math"])
def test_attends_within_each_image_only(backend):
    attention = randomise(Attention(24, num_heads=3, qkv_bias=True, backend=backend)).double()
    x = torch.randn(23, 24, dtype=torch.float64, requires_grad=True)
    out, expected = attention(x, SEGMENTS), image_by_image(attention, x)
    torch.testing.assert_close(out, expected)
    inputs, direction = [x, *attention.parameters()], torch.randn_like(out)
    grads = torch.autograd.grad((out * direction).sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * direction).sum(), inputs))


def softmax_attention(q, k, v):
    """softmax(Q K^T / sqrt(d)) V in float64 for (B, N, H, d)."""
    q, k, v = (t.double() for t in (q, k, v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bjhd->bihd", weights.softmax(dim=-1), v)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)


@pytest.mark.parametrize("how", [lambda f: f, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize(("name", "flash"), [("flash", True), ("math", False)])
def test_the_kernel_asked_for_runs(name, flash, how):
    q, k, v = torch.randn(3, 2, 5, 3, 8)
    attend = how(attention_backend(name))
    with torch.autograd.profiler.profile() as profile:
        out = attend(q, k, v)
    torch.testing.assert_close(out.double(), softmax_attention(q, k, v), rtol=0, atol=1e-6)
    kernels = {event.name for event in profile.function_events}
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in kernels) == flash
    assert ("aten::bmm" in kernels) != flash


@pytest.mark.gpu
@pytest.mark.parametrize("how", [lambda f: f, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["sdpa", "flash", "cudnn", "efficient", "math"])
def test_kernels_of_the_gpu(name, how):
    q, k, v = torch.randn(3, 2, 54, 3, 64, device="cuda", dtype=torch.bfloat16)
    require_kernel(name, head_width=64, dtype=q.dtype, device=q.device)
    out = how(attention_backend(name))(q, k, v)
    torch.testing.assert_close(out.double(), softmax_attention(q, k, v), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_no_float32_kernel_on_the_gpu(name):
    with pytest.raises(ValueError, match=r"no kernel here for torch\.float32 on cuda"):
        require_kernel(name, head_width=64, dtype=torch.float32, device=torch.device("cuda"))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"attention_backend = 'fast' is unknown; choose 'sdpa', .* or 'xformers'\.$"):
        Attention(8, num_heads=2, backend="fast")


@pytest.mark.parametrize("name", ["cudnn", "efficient", "xformers"])
def test_without_cuda(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"^[^.]*'{name}' needs a CUDA device.*choose 'sdpa'\.$"):
        Attention(8, num_heads=2, backend=name)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_no_kernel_for_the_device(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError,
        match=rf"^attention_backend = '{name}' has no kernel here for torch\.float32 on cpu with heads 4 wide; "
        r"choose 'sdpa'\.$",
    ):
        require_kernel(name, head_width=4, dtype=torch.float32, device=torch.device("cpu"))


def test_other_errors_stay_themselves(monkeypatch):
    def exhausted(q, k, v):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", exhausted)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\.$"):
        Attention(8, num_heads=2, backend="flash")(torch.randn(23, 8), SEGMENTS)


def test_xformers_not_importable(xformers, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ValueError, match=r"cannot be imported beside torch .*or choose 'sdpa'\.$"):
        Attention(8, num_heads=2, backend="xformers")


def test_xformers_built_for_another_torch(xformers):
    def no_kernel(q, k, v):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`:\n  reasons\n")

    xformers.memory_efficient_attention = no_kernel
    attention = Attention(8, num_heads=2, backend="xformers")
    with pytest.raises(ValueError, match=r"no kernel here for torch.float32 on cpu \(No operator.*choose 'sdpa'\.$"):
        attention(torch.randn(23, 8), SEGMENTS)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads = 5 does not divide the width 24"):
        Attention(24, num_heads=5)

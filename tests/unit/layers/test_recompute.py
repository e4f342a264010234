"""Recomputed blocks: equal results, what is kept until the backward, and compilation in one graph."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2.layers import Block, SwiGLUFFN
from dinov2.layers.recompute import compiled_and_recomputed, recomputed
from dinov2.layers.stochastic_depth import draw_orders
from tests.helpers.backbones import randomise

D, HEADS, F, DEPTH = 32, 4, 128, 3
SEGMENTS, KEPT_ROWS = ((16, 65), (32, 20)), 9 * 65 + 19 * 20  # 0.6 of the images, rounded down
ROWS = 16 * 65 + 32 * 20


class KeptBytes(TorchDispatchMode):
    """Bytes of the storages made under it that are still alive."""

    def __init__(self):
        super().__init__()
        self.made, self.given = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            {t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)}
            for tree in ((args, kwargs), out)
        )
        self.given |= given.keys() - self.made.keys()
        for key, storage in made.items():
            if key not in self.given:
                self.made[key] = StorageWeakRef(storage), storage.nbytes()
        return out

    def total(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


@pytest.fixture
def blocks() -> list[Block]:
    return [
        randomise(Block(D, HEADS, qkv_bias=True, drop_path=0.4, init_values=1.0, ffn_layer=SwiGLUFFN))
        for _ in range(DEPTH)
    ]


@pytest.fixture
def data() -> tuple[Tensor, list[list[Tensor]]]:
    """Rows and the orders of every block."""
    return torch.randn(ROWS, D), [draw_orders(SEGMENTS, 2, torch.device("cpu")) for _ in range(DEPTH)]


def run(blocks, forwards, data, dtype, during_forward=None) -> list[Tensor]:
    """Output, gradient of the rows and gradients of the weights of one pass."""
    rows = data[0].clone().requires_grad_()
    for block in blocks:
        block.zero_grad()
    x = rows
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with during_forward or contextlib.nullcontext(), autocast:
        for forward, orders in zip(forwards, data[1], strict=True):
            x = forward(x, SEGMENTS, orders)
    if isinstance(during_forward, KeptBytes):
        during_forward.bytes = during_forward.total()
    x.square().mean().backward()
    return [x.detach(), rows.grad, *(p.grad.clone() for block in blocks for p in block.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_bit_equal_to_keeping_everything(blocks, data, mode, dtype):
    expected = run(blocks, blocks, data, dtype)
    actual = run(blocks, [recomputed(block.forward, mode) for block in blocks], data, dtype)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_what_is_kept(blocks, data):
    kept = {}
    for mode in ("none", "selective", "full"):
        counted = KeptBytes()
        run(blocks, [recomputed(block.forward, mode) for block in blocks], data, torch.bfloat16, counted)
        kept[mode] = counted.bytes / DEPTH
    stream = 4 * ROWS * D
    # Outputs of the joint projection, attention (with its log-sum-exp), projection, and the two feed-forward maps.
    products = KEPT_ROWS * (2 * (3 * D + D + D + 2 * F + D) + 4 * HEADS)
    assert kept["full"] == stream
    assert kept["selective"] == stream + products
    assert kept["none"] > 1.8 * kept["selective"]


def test_compiled_in_one_graph(blocks, data):
    weights = {p.data_ptr() for block in blocks for p in block.parameters()}
    expected, kept = run(blocks, blocks, data, torch.bfloat16), {}
    for mode in ("none", "selective", "full"):
        graphs, saved = [], []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return aot_eager(graph, inputs)

        def compile(function, backend=backend):
            return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

        def note(t, saved=saved):
            saved.append(t.nbytes if t.data_ptr() not in weights else 0)
            return t

        torch._dynamo.reset()
        forwards = [compiled_and_recomputed(block.forward, mode, compile) for block in blocks]
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
        actual = run(blocks, forwards, data, torch.bfloat16, hooks)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert len(graphs) == 1
        kept[mode] = sum(saved)
    assert 2 * kept["full"] < kept["selective"] < 0.8 * kept["none"]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_two_passes_through_the_same_weights(blocks, mode):
    """Autocast casts weights once per step; a pass that finds them cast is repeated all the same."""
    block, forward = blocks[0], recomputed(blocks[0].forward, mode)
    crops = [(torch.randn(2 * 17, D), ((2, 17),)), (torch.randn(4 * 5, D), ((4, 5),))]

    def gradients(forward, dtype):
        block.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = sum(forward(rows, segments).square().mean() for rows, segments in crops)
        loss.backward()
        return [p.grad.clone() for p in block.parameters()]

    expected = gradients(block.forward, torch.float32)
    for actual, exact in zip(gradients(forward, torch.bfloat16), expected, strict=True):
        assert (actual - exact).norm() < 0.03 * exact.norm()


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"^recompute = 'some' is unknown; choose 'none', 'selective' or 'full'\.$"):
        recomputed(lambda x: x, "some")

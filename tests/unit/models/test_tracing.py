"""The backbone compiles into one graph and never asks the device for a value."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2.layers import Block, DINOHead
from dinov2.layers.stochastic_depth import draw_orders
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.helpers.backbones import SMALL, randomise

SEGMENTS = ((4, 5), (6, 3))
SIZES = (56, 28)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def backbone(depth: int = 2, **kwargs) -> DinoVisionTransformer:
    arguments = {
        **SMALL,
        "depth": depth,
        "num_register_tokens": 4,
        "drop_path_rate": 0.4,
        "drop_path_uniform": True,
    }
    return DinoVisionTransformer(**{**arguments, **kwargs}).train()


def inputs():
    crops = [torch.randn(4, 3, SIZES[0], SIZES[0]), torch.randn(6, 3, SIZES[1], SIZES[1])]
    return crops, [torch.rand(4, 16) < 0.5, None]


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
def test_training_step_never_reads_a_value_from_the_device(ffn_layer):
    model, head = backbone(ffn_layer=ffn_layer), DINOHead(96, 32, hidden_dim=16, bottleneck_dim=8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        crops, masks = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(crops, masks=masks, is_training=True)
            loss = sum(head(out["x_norm_clstoken"]).sum() for out in outputs)
            loss = loss + head(outputs[0]["x_norm_patchtokens"]).sum()
        loss.backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert without == []


def test_block_compiles_without_a_graph_break():
    block = randomise(Block(8, num_heads=2, init_values=1.0, drop_path=0.4))
    x = torch.randn(38, 8, requires_grad=True)
    orders = draw_orders(SEGMENTS, 2, x.device)
    expected = block(x, SEGMENTS, orders)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(x, SEGMENTS, orders)
    torch.testing.assert_close(compiled, expected)
    grads = [torch.autograd.grad(out.square().sum(), [x, *block.parameters()]) for out in (compiled, expected)]
    torch.testing.assert_close(*grads)


def test_backbone_compiles_without_a_graph_break():
    model = randomise(backbone())
    crops, masks = inputs()
    torch.manual_seed(1)
    expected = model(crops, masks=masks, is_training=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    out = compiled(crops, masks=masks, is_training=True)
    torch.testing.assert_close(out, expected)


def graphs_of(block, x, orders, wanted):
    """Operations of a block's compiled forward and backward graphs."""
    seen = []

    def record(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(block, backend=aot_autograd(fw_compiler=record), fullgraph=True, dynamic=False)
    compiled(x, SEGMENTS, orders, wanted).square().sum().backward()
    return seen


@pytest.mark.parametrize("inverse_gather", [True, False])
def test_no_row_is_scattered(inverse_gather):
    block = randomise(Block(8, num_heads=2, init_values=1.0, drop_path=0.4, inverse_gather=inverse_gather))
    x = torch.randn(38, 8, requires_grad=True)
    operations = graphs_of(block, x, draw_orders(SEGMENTS, 2, x.device), None)
    assert any("index_select" in name or "aten.index.Tensor" in name for name in operations)
    scattered = any(part in name for name in operations for part in ("index_put", "index_add", "scatter"))
    assert scattered != inverse_gather


def test_equal_blocks_share_one_compiled_graph():
    model, counter = backbone(depth=3), CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    crops, masks = inputs()
    for _ in range(2):
        model(crops, masks=masks, is_training=True)
    assert counter.frame_count == 1

"""The projection head against PyTorch's own weight norm."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dinov2.layers import DINOHead


def torch_head(head: DINOHead, bottleneck: int, prototypes: int) -> nn.Module:
    """The same last layer out of PyTorch's parametrisation, with its own gradients."""
    last = weight_norm(nn.Linear(bottleneck, prototypes, bias=False, dtype=torch.float64))
    last.parametrizations.weight.original0.data.copy_(head.last_layer.weight_g)
    last.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v)
    return last


@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_logits_and_gradients(nlayers):
    head = DINOHead(16, 40, nlayers=nlayers, hidden_dim=24, bottleneck_dim=8).double()
    nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    last = torch_head(head, 8, 40)
    x, upstream = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 5, 40, dtype=torch.float64)
    z = head.mlp(x)
    expected = last(z / z.pow(2).sum(dim=-1, keepdim=True).sqrt())
    logits = head(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    (expected * upstream).sum().backward()
    theirs = [parameter.grad for parameter in last.parameters()]
    mlp = [parameter.grad.clone() for parameter in head.mlp.parameters()]
    head.zero_grad()
    (logits * upstream).sum().backward()
    ours = [head.last_layer.weight_g.grad, head.last_layer.weight_v.grad]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close([p.grad for p in head.mlp.parameters()], mlp, rtol=1e-12, atol=1e-12)


def test_keys_and_initial_values():
    head = DINOHead(16, 4000, hidden_dim=24, bottleneck_dim=64)
    assert list(head.state_dict()) == [
        *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
    assert head.last_layer.weight_g.shape == (4000, 1)
    assert torch.equal(head.last_layer.weight_g, torch.ones(4000, 1))
    assert all(not head.mlp[layer].bias.any() for layer in (0, 2, 4))
    assert head.last_layer.weight_v.abs().max() <= 1 / 8
    assert head.last_layer.weight_v.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    assert head.mlp[4].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_published_sizes():
    """58.6 M parameters with the DINO head's 384-wide bottleneck, 41.6 M with iBOT's 256."""
    for bottleneck, millions in ((384, 58.6), (256, 41.6)):
        with torch.device("meta"):
            head = DINOHead(1536, 131072, bottleneck_dim=bottleneck)
        assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_batch_norm_and_no_bias():
    head = DINOHead(16, 8, use_bn=True, hidden_dim=24, bottleneck_dim=4, mlp_bias=False)
    assert [type(module).__name__ for module in head.mlp] == [
        *("Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear")
    ]
    assert "mlp.0.bias" not in head.state_dict()
    assert head(torch.randn(3, 7, 16)).shape == (3, 7, 8)


def test_a_zero_bottleneck_and_a_zero_direction_stay_finite():
    head = DINOHead(4, 6, hidden_dim=8, bottleneck_dim=3)
    nn.init.zeros_(head.last_layer.weight_v)
    x = torch.zeros(2, 4, requires_grad=True)
    logits = head(x)
    logits.sum().backward()
    assert logits.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_weights_on_the_meta_device_are_drawn_after_materialising():
    with torch.device("meta"):
        head = DINOHead(8, 12, hidden_dim=16, bottleneck_dim=4)
    head.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(float("nan"))
    head.init_weights()
    assert all(p.isfinite().all() for p in head.parameters())


def test_initial_weights_reach_every_parameter():
    with torch.device("meta"):
        head = DINOHead(16, 32, use_bn=True, hidden_dim=24, bottleneck_dim=8)
    head.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(torch.nan)
    head.init_weights()
    assert [name for name, value in head.state_dict().items() if not value.isfinite().all()] == []


def test_logits_without_gradients_keep_more_bits():
    """bfloat16 logits of a teacher would shift its targets at T = 0.04; float16 ones hardly do."""
    head = DINOHead(64, 4096, hidden_dim=64, bottleneck_dim=32)
    x = torch.randn(16, 64)
    z = torch.nn.functional.normalize(head.mlp(x), dim=-1)
    last = head.last_layer
    exact = z.double() @ torch.nn.functional.normalize(last.weight_v.double(), dim=1).T
    with torch.autocast("cpu", torch.bfloat16):
        student = last(z)
        with torch.no_grad():
            teacher = last(z)
    assert (student.dtype, teacher.dtype) == (torch.bfloat16, torch.float16)
    wrong = {
        logits.dtype: ((logits.double() / 0.04).softmax(1) - (exact / 0.04).softmax(1)).abs().sum(1).mean()
        for logits in (student.detach(), teacher)
    }
    assert wrong[torch.float16] < 0.25 * wrong[torch.bfloat16] < 0.05

"""A backbone sharded with 16-bit parameters computes what one process does under autocast, on the same stream."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2.fsdp import shard
from tests.helpers.backbones import random_backbone
from tests.helpers.spawn import run_ranks


def forward_backward(rank: int | None) -> dict[str, Tensor]:
    """Outputs and some gradients of the same images on every rank; ``rank`` None is one process."""
    torch.manual_seed(0)
    model = random_backbone(num_register_tokens=4, ffn_layer="swiglufused").float()
    images = torch.randn(2, 3, 56, 56)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: streams.append(out.dtype))
    if rank is not None:
        dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        shard(model, model.blocks, device=torch.device("cpu"), strategy="SHARD_GRAD_OP", **dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, is_training=True)
    out["x_norm_clstoken"].sum().backward()
    assert streams == [torch.float32] * 3
    grads = {
        name: model.get_parameter(name).grad for name in ("cls_token", "blocks.0.ls1.gamma", "blocks.2.norm1.bias")
    }
    whole = {name: grad if rank is None else grad.full_tensor() for name, grad in grads.items()}
    assert {grad.dtype for grad in whole.values()} == {torch.float32}
    return {"stream": out["x_prenorm"].detach(), "cls": out["x_norm_clstoken"].detach(), **whole}


def test_sharded_16_bit_parameters():
    expected = forward_backward(None)
    for sharded in run_ranks(forward_backward):
        assert sharded["stream"].dtype == torch.float32
        for name, value in sharded.items():
            error = (value - expected[name]).norm() / expected[name].norm()
            assert error < 0.02, (name, error)

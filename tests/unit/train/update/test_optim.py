"""Parameter groups, clipping and the fused update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov2.layers import DINOHead
from dinov2.models.vision_transformer import vit_demo
from dinov2.train.update.optim import ScheduleValues, adam_state, apply_schedule, build_optimizer, parameter_groups

DEPTH = 4


@pytest.fixture
def student() -> nn.ModuleDict:
    backbone = vit_demo(img_size=28, patch_size=14, num_register_tokens=2, init_values=1.0)
    head = DINOHead(backbone.embed_dim, 16, hidden_dim=8, bottleneck_dim=4)
    return nn.ModuleDict({"backbone": backbone, "dino_head": head})


def group_of(student: nn.ModuleDict, name: str, rate: float = 0.5) -> dict:
    parameter = dict(student.named_parameters())[name]
    groups = parameter_groups(student, layerwise_decay=rate, patch_embed_lr_mult=0.2)
    return next(group for group in groups if any(p is parameter for p in group["params"]))


@pytest.mark.parametrize(
    ("name", "lr", "wd", "last"),
    [  # layer 0 is the embeddings, layer i + 1 is block i, layer depth + 1 everything above
        ("backbone.cls_token", 0.5 ** (DEPTH + 1), 1.0, False),
        ("backbone.register_tokens", 0.5 ** (DEPTH + 1), 1.0, False),
        ("backbone.mask_token", 0.5 ** (DEPTH + 1), 1.0, False),
        ("backbone.pos_embed", 0.5 ** (DEPTH + 1), 1.0, False),
        ("backbone.patch_embed.proj.weight", 0.2 * 0.5 ** (DEPTH + 1), 1.0, False),
        ("backbone.patch_embed.proj.bias", 0.2 * 0.5 ** (DEPTH + 1), 0.0, False),
        ("backbone.blocks.0.attn.qkv.weight", 0.5**DEPTH, 1.0, False),
        ("backbone.blocks.3.mlp.fc1.bias", 0.5, 0.0, False),
        ("backbone.blocks.3.norm1.weight", 0.5, 0.0, False),
        ("backbone.blocks.3.ls1.gamma", 0.5, 0.0, False),
        ("backbone.norm.weight", 1.0, 0.0, False),
        ("dino_head.mlp.0.weight", 1.0, 1.0, False),
        ("dino_head.last_layer.weight_v", 1.0, 1.0, True),
        ("dino_head.last_layer.weight_g", 1.0, 1.0, True),
    ],
)
def test_factors(student: nn.ModuleDict, name: str, lr: float, wd: float, last: bool):
    group = group_of(student, name)
    assert group["lr_multiplier"] == pytest.approx(lr)
    assert (group["wd_multiplier"], group["is_last_layer"]) == (wd, last)


def test_every_trainable_parameter_is_in_one_group(student: nn.ModuleDict):
    student.backbone.blocks[0].requires_grad_(False)
    grouped = [p for group in parameter_groups(student, 0.9, 0.2) for p in group["params"]]
    trainable = [p for p in student.parameters() if p.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable))


def test_schedule_reaches_every_group(student: nn.ModuleDict):
    optimizer = build_optimizer(parameter_groups(student, 0.5, 0.2), (0.9, 0.95))
    apply_schedule(optimizer, ScheduleValues(lr=0.1, last_layer_lr=0.0, wd=0.04, mom=0.9, teacher_temp=0.07))
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0 if group["is_last_layer"] else 0.1 * group["lr_multiplier"])
        assert group["weight_decay"] == 0.04 * group["wd_multiplier"]
        assert group["betas"] == (0.9, 0.95)


def test_found_inf_leaves_weights_and_moments_alone():
    """What the trainer relies on to suppress an update without asking the device."""
    parameter = nn.Parameter(torch.ones(3))
    groups = [{"params": [parameter], "lr_multiplier": 1.0, "wd_multiplier": 1.0, "is_last_layer": False}]
    optimizer = build_optimizer(groups, (0.9, 0.999))
    optimizer.param_groups[0]["lr"] = 0.1
    parameter.grad = torch.full((3,), float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(parameter.data, torch.ones(3))
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.zeros(3))


def test_adam_state_is_the_optimisers_own(student: nn.ModuleDict):
    optimizer = build_optimizer(parameter_groups(student, 1.0, 1.0), (0.9, 0.999))
    state = adam_state(student, optimizer)
    assert state.keys() == dict(student.named_parameters()).keys()
    state["backbone.cls_token"]["exp_avg"].fill_(2.0)
    assert (optimizer.state[student.backbone.cls_token]["exp_avg"] == 2.0).all()

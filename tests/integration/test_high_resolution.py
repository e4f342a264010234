"""The recipe of high-resolution post-training: its schedules, and where it starts from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2.build.networks import load_starting_weights
from dinov2.configs import Config, load_config
from dinov2.export import save_teacher
from dinov2.train.plan.plan import make_plan
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update.optim import Schedules

RECIPE = "vitg14_reg4_highres392"
NARROW = (
    *("student.arch=vit_demo", "dino.head_n_prototypes=64", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16"),
    *("ibot.head_n_prototypes=48", "ibot.head_hidden_dim=32", "ibot.head_bottleneck_dim=16"),
)


def test_schedules_go_on_where_the_first_phase_ended():
    config = load_config(RECIPE)
    plan = make_plan(config, 48)
    assert (plan.global_batch, plan.local_batch, plan.total_steps) == (1152, 6, 120_000)
    schedules = Schedules(config, plan)
    first, middle, last = (schedules[step] for step in (0, 60_000, 119_999))
    assert first.mom == pytest.approx(0.9995) and middle.mom > first.mom and last.mom == pytest.approx(1)
    for values in (first, middle, last):
        assert (values.teacher_temp, values.wd) == pytest.approx((0.07, 0.2))
    assert (first.lr, first.last_layer_lr) == (0, 0) and schedules[1].last_layer_lr == schedules[1].lr > 0
    assert schedules[6250].lr == pytest.approx(1e-4 * math.sqrt(1152 / 1024), rel=1e-6)
    assert config.optim.layerwise_decay == 0.9


def test_half_a_node_takes_the_same_batch():
    config = load_config(RECIPE, ["train.batch_size_per_gpu=12", "optim.accumulation_steps=12"])
    assert make_plan(config, 8).global_batch == 1152


def noisy(config: Config) -> SSLMetaArch:
    arch = SSLMetaArch(config)
    with torch.no_grad():
        for parameter in arch.teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return arch


def features(network: nn.ModuleDict, image: torch.Tensor) -> list[torch.Tensor]:
    """Class token, patch tokens and both heads' logits."""
    with torch.no_grad():
        out = network.backbone.eval()(image, is_training=True)
        tokens = out["x_norm_clstoken"], out["x_norm_patchtokens"]
        return [*tokens, network.dino_head(tokens[0]), network.ibot_head(tokens[1].flatten(0, 1))]


def test_it_starts_as_the_teacher_up_to_the_interpolation_of_its_grid(tmp_path: Path):
    """A teacher of 224 px; at 392 the student's stored grid is what the teacher resamples its own to by itself."""
    torch.manual_seed(0)
    first = noisy(load_config("vitg14_reg4", NARROW))
    path = tmp_path / "teacher_checkpoint.pth"
    save_teacher(path, {name: module.state_dict() for name, module in first.teacher.items()}, {})
    config = load_config(RECIPE, [*NARROW, f"MODEL.WEIGHTS={path}"])
    second = SSLMetaArch(config)
    load_starting_weights(second.student, config)
    second.copy_student_to_teacher()
    grid = first.teacher.backbone.pos_embed
    assert (grid.shape[1], second.student.backbone.pos_embed.shape[1]) == (1 + 16**2, 1 + 28**2)
    patches = grid[:, 1:].unflatten(1, (16, 16)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (28, 28), mode="bicubic", antialias=True).flatten(2).mT
    expected = torch.cat([grid[:, :1], patches], dim=1)
    torch.testing.assert_close(second.student.backbone.pos_embed, expected, rtol=1e-5, atol=1e-6)
    image = torch.randn(2, 3, 392, 392)
    for network in (second.student, second.teacher):
        for found, wanted in zip(features(network, image), features(first.teacher, image), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

"""A few steps of training in FP8 follow those in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dinov2.build.augmentation import build_collate
from dinov2.data import MultiCrops, Sample, normalize
from dinov2.layers.linear import use_fp8
from dinov2.train.run import build_arch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.helpers.fp8 import scaled_mm
from tests.helpers.training import in_precision, tiny_config

IMAGES, TEACHER_TEMP = 8, 0.04


@pytest.fixture(autouse=True)
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)


def teacher_in_fp8(scaling: str) -> Callable[[SSLMetaArch], None]:
    return lambda arch: use_fp8(arch.teacher.backbone.blocks, scaling, backward=False)


def all_in_fp8(scaling: str) -> Callable[[SSLMetaArch], None]:
    def change(arch: SSLMetaArch) -> None:
        teacher_in_fp8(scaling)(arch)
        use_fp8(arch.student.backbone.blocks, scaling, backward=True)

    return change


def train(steps: int, change: Callable[[SSLMetaArch], None] | None = None) -> torch.Tensor:
    """Total losses (steps,) on images of one colour each: the same weights and batches at every call."""
    config = tiny_config(*in_precision("bf16"), "student.drop_path_rate=0")
    arch = build_arch(config, torch.device("cpu"), from_checkpoint=False)
    if change is not None:
        change(arch)
    # An epsilon of this size keeps Adam from blowing noise up where a gradient is nearly zero.
    optimizer = torch.optim.AdamW(arch.student.parameters(), betas=(0.9, 0.999), eps=1e-6)
    collate = build_collate(config)
    torch.manual_seed(0)
    colours = torch.randint(0, 256, (IMAGES, 1, 3, 1, 1))

    def views(image: int, count: int, size: int) -> torch.Tensor:
        return (colours[image] + torch.randint(-20, 20, (count, 3, size, size))).clamp(0, 255).to(torch.uint8)

    losses = torch.zeros(steps)
    for step in range(steps):
        samples = [Sample(i, MultiCrops(views(i, 2, 56), views(i, 2, 28)), "", False) for i in range(IMAGES)]
        batch = collate(samples)
        batch |= {name: normalize(batch[name]) for name in ("global_crops", "local_crops")}
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 10)
        optimizer.zero_grad()
        loss = arch.compute_losses(batch, TEACHER_TEMP)["total_loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(arch.student.parameters(), 3.0)
        optimizer.step()
        follow(arch, momentum=0.99)
        losses[step] = loss.detach()
    return losses


@torch.no_grad()
def follow(arch: SSLMetaArch, momentum: float) -> None:
    for teacher, student in zip(arch.teacher.parameters(), arch.student.parameters(), strict=True):
        teacher.lerp_(student, 1 - momentum)


def assert_alike(losses: torch.Tensor, reference: torch.Tensor) -> None:
    """Every step within 6 % of the bfloat16 run, all together within 2 %, and both falling."""
    difference = losses / reference - 1
    assert difference.abs().max() < 0.06
    assert difference.mean().abs() < 0.02
    for curve in (losses, reference):
        assert curve[-3:].mean() < 0.8 * curve[:3].mean()


def test_training_in_fp8_begins_like_training_in_bf16():
    assert_alike(train(12, all_in_fp8("tensor")), train(12))


@pytest.fixture(scope="module")
def bf16_losses() -> torch.Tensor:
    return train(40)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("networks", [teacher_in_fp8, all_in_fp8], ids=["teacher", "all"])
def test_training_in_fp8_follows_training_in_bf16(networks, scaling, bf16_losses):
    assert_alike(train(40, networks(scaling)), bf16_losses)

"""Frozen teachers: when that of Gram anchoring is replaced, what they cost, and what they hold."""

from __future__ import annotations

import pytest
import torch

from dinov2.loss import LossContext
from dinov2.loss.gram import Gram
from dinov2.train.performance.apply import accelerate
from dinov2.train.plan.measure import StepCosts
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.helpers.batches import random_batch
from tests.helpers.training import in_precision, tiny_config

FROZEN = ("losses.gram.it_load_ema_teacher=0", "losses.gram.img_level=true")


def replaced(**options: int | str | bool | None) -> list[int]:
    term = Gram(Gram.Options(**options), LossContext(2, 2, 2))
    return [step for step in range(60) if term.is_replaced(step)]


def test_steps_before_which_it_is_replaced():
    assert replaced(ckpt="a", update_frequency=20) == [20, 40]
    assert replaced(ckpt="a", update_frequency=10, it_first_update=25) == [30, 40, 50]
    assert replaced(ckpt="a", update_frequency=10, it_first_update=30, max_updates=2) == [30, 40]
    assert replaced(ckpt="a", update_frequency=10, max_updates=0) == []
    assert replaced(ckpt="a", update_frequency=10, rep_update=False) == []
    assert replaced(ckpt="a", it_load_ema_teacher=7, update_frequency=25) == [7, 25, 50]
    assert replaced(it_load_ema_teacher=30, update_frequency=10, max_updates=1) == [30, 40]


def test_it_follows_in_jumps_and_is_off_before_it_exists():
    config = tiny_config("losses.gram.it_load_ema_teacher=2", "losses.gram.update_frequency=3", FROZEN[1])
    arch, batch = SSLMetaArch(config).train(), random_batch(config, 4)
    frozen = arch.frozen_teachers["gram"]
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    taken, losses = {}, []
    for step in range(7):
        arch.begin_step(step, epoch=1.0)
        losses.append(arch.compute_losses(batch, 0.05)["gram_loss"].item())
        taken[step] = arch.frozen_teachers["gram"].backbone.cls_token.clone()
        with torch.no_grad():
            for parameter in arch.teacher.backbone.parameters():
                parameter.add_(0.01)
    assert losses[:2] == [0, 0] and min(losses[2:]) > 0
    jumps = [step for step in range(1, 7) if not torch.equal(taken[step], taken[step - 1])]
    assert jumps == [2, 3, 6]
    arch.begin_step(9, epoch=1.0)
    for ours, theirs in zip(arch.frozen_teachers["gram"].parameters(), arch.teacher.backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_it_does_not_run_where_its_loss_has_no_weight():
    course = "{start: 0, peak: 0, end: 1, warmup_epochs: 1, cosine_epochs: 1}"
    config = tiny_config(*FROZEN, f"losses.gram.loss_weight_schedule={course}")
    arch, batch = SSLMetaArch(config).train(), random_batch(config, 4)
    arch.begin_step(0, epoch=0.5)
    assert arch.compute_losses(batch, 0.05, 0.5)["gram_loss"] == 0
    arch.begin_step(0, epoch=1.5)
    assert arch.compute_losses(batch, 0.05, 1.5)["gram_loss"] > 0


def test_its_16_bit_weights_follow():
    arch = SSLMetaArch(tiny_config(*in_precision("bf16"), *FROZEN)).train()
    of_step = accelerate(arch, compile=False)
    pairs = arch.frozen_teachers["gram"].low_precision
    assert len(of_step) == 2 * len(pairs) > 0
    with torch.no_grad():
        for parameter in arch.teacher.backbone.parameters():
            parameter.add_(0.5)
    before = [low.clone() for _, low in pairs]
    arch.begin_step(0, epoch=1.0)
    for (weight, low), old in zip(pairs, before, strict=True):
        assert torch.equal(low, weight.bfloat16()) and not torch.equal(low, old)


@pytest.mark.parametrize("size", [56, 112])
def test_its_forward_pass_is_counted(size: int):
    """Beside the EMA teacher as gram teacher: one more pass of a backbone, which is a third of training it."""
    sized = (f"crops.gram_teacher_crops_size={size}", "crops.gram_teacher_no_distortions=true")
    frozen = StepCosts(tiny_config(*FROZEN, *sized)).flops(4)
    ema = StepCosts(tiny_config("losses.gram.ema_teacher=true", FROZEN[1])).flops(4)
    width, depth, patches = 128, 4, (size // 14) ** 2
    tokens = patches + 1 + 2
    block = 2 * 12 * width**2 * tokens + 4 * tokens**2 * width
    one_pass = 8 * (depth * block + 2 * 3 * 14**2 * width * patches)
    assert frozen.model - ema.model == frozen.dense - ema.dense == frozen.hardware - ema.hardware == one_pass

"""The whole step learns: images that differ are told apart, which a mispaired or mis-signed loss could not do."""

from __future__ import annotations

import math

import torch

from dinov2.build.augmentation import build_collate
from dinov2.configs import load_config
from dinov2.data import MultiCrops, Sample, normalize
from dinov2.train.run import build_arch
from dinov2.train.update.optim import ScheduleValues, apply_schedule, build_optimizer
from dinov2.train.update.weight_update import WeightUpdate
from tests.helpers.runs import TINY

IMAGES, STEPS, TEACHER_TEMP = 8, 40, 0.04


def test_losses_fall_below_those_of_a_student_that_tells_nothing_apart():
    overrides = ("student.drop_path_rate=0", "train.streaming_dataset_path=unused")
    config = load_config(None, [*TINY, *overrides])
    arch = build_arch(config, torch.device("cpu"), from_checkpoint=False)
    optimizer = build_optimizer(arch.get_params_groups(), (0.9, 0.999))
    update = WeightUpdate(optimizer, arch.student, arch.teacher, 3.0)
    collate = build_collate(config)
    colours = torch.randint(0, 256, (IMAGES, 1, 3, 1, 1))

    def views(image: int, count: int, size: int) -> torch.Tensor:
        return (colours[image] + torch.randint(-20, 20, (count, 3, size, size))).clamp(0, 255).to(torch.uint8)

    for step in range(STEPS):
        samples = [Sample(i, MultiCrops(views(i, 2, 56), views(i, 2, 28)), "", False) for i in range(IMAGES)]
        batch = collate(samples)
        batch |= {name: normalize(batch[name]) for name in ("global_crops", "local_crops")}
        lr = 1e-3 * min(1, step / 10)
        apply_schedule(optimizer, ScheduleValues(lr, lr, wd=0.04, mom=0.99, teacher_temp=TEACHER_TEMP))
        optimizer.zero_grad()
        losses = arch.compute_losses(batch, TEACHER_TEMP)
        losses["total_loss"].backward()
        update.apply(0.99, torch.ones(()))

    # A student that says the same of every image cannot do better than ln K, K being the prototypes that
    # Sinkhorn-Knopp makes the teacher use evenly.
    pairs_local, pairs_global = 2 * 2, 2
    uniform = math.log(config.dino.head_n_prototypes) / (pairs_local + pairs_global)
    assert losses["dino_local_crops_loss"] < 0.8 * uniform * pairs_local
    assert losses["dino_global_crops_loss"] < 0.8 * uniform * pairs_global
    masked_fraction = 0.5
    assert losses["ibot_loss"] < 0.8 * masked_fraction * math.log(config.ibot.head_n_prototypes)

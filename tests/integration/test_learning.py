"""The whole step learns: images that differ are told apart, which a mispaired or mis-signed loss could not do."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from scipy import ndimage

from benchmarks.learn.__main__ import main as learn
from benchmarks.machine import ROOT
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


# What takes the class token off chance within few steps (docs/experiments.md): a teacher that follows soon and whose
# targets are sharp, and a weight of the patches that leaves the tile its share.
TWO_TEXTURES = (
    "precision=fp32",
    "student.arch=vit_demo",
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.global_crops_scale=[0.1,0.2]",
    "crops.local_crops_scale=[0.025,0.05]",
    "dino.head_bottleneck_dim=16",
    "ibot.loss_weight=0.1",
    "teacher.momentum_teacher=0.8",
    "teacher.warmup_teacher_temp_epochs=0",
    "teacher.warmup_teacher_temp=0.015",
    "teacher.teacher_temp=0.015",
    "optim.base_lr=0.008",
    "optim.epochs=4",
    "augmentation.grayscale_prob=1",
    "augmentation.jitter_prob=1",
    "augmentation.brightness=0.3",
    "augmentation.contrast=0.3",
    "data.block_rows=16",
    "train.num_workers=0",
)


def test_two_textures_are_told_apart_as_the_random_start_does_not(tmp_path: Path):
    """Fine or coarse noise in a colour and with a contrast that say nothing."""
    rng = np.random.default_rng(0)

    def tile(grain: float) -> bytes:
        noise = ndimage.gaussian_filter(rng.standard_normal((96, 96)), grain, mode="wrap")
        contrast = rng.uniform(15, 35) * rng.uniform(0.7, 1.3, 3)
        pixels = rng.uniform(88, 168, 3) + contrast * (noise / noise.std())[..., None]
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    labels = ["fine", "coarse"] * 256
    names = [f"{number}.png" for number in range(len(labels))]
    images = pa.array([tile(1.0 if label == "fine" else 5.0) for label in labels], pa.binary())
    table = pa.table({"image_bytes": images, "slide_path": names, "label": labels, "patient": names})
    pq.write_table(table, tmp_path / "tiles.parquet", row_group_size=16)
    recipe = str(ROOT / "dinov2" / "configs" / "train" / "tissue_small.yaml")
    options = ["--tiles", str(tmp_path / "tiles.parquet"), "--config-file", recipe, "--output", str(tmp_path / "out")]
    options += ["--images", "9600", "--seeds", "1", "--exports", "1", "--image-size", "96"]
    assert learn([*options, "--set", *TWO_TEXTURES]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    start, end = (record["as_is"]["knn"]["value"] for record in results["models"]["recipe"]["points"])
    assert start < 0.7 and end > start + 0.2

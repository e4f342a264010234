"""Values and combinations that are refused before anything is built."""

from __future__ import annotations

import dataclasses

import pytest

from dinov2.configs import ConfigError, load_config, validate

DATA = "data.path=shards"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["crops.local_crops_size=97"], r"crops.local_crops_size = 97 is not a multiple .* 84 or 98"),
        (["crops.global_crops_size=7"], r"crops.global_crops_size = 7 .*; 14 would be"),
        (["ibot.mask_ratio_min_max=[0.1,1.5]"], r"ibot.mask_ratio_min_max = \[0.1, 1.5\]"),
        (["ibot.mask_ratio_min_max=[0.6,0.5]"], r"min <= max"),
        (["ibot.mask_ratio_min_max=[-0.1,0.5]"], r"ibot.mask_ratio_min_max = \[-0.1, 0.5\]"),
        (["ibot.mask_sample_probability=0.3"], r"not a multiple of 0.25"),
        (["ibot.mask_sample_probability=1.5"], r"in \[0, 1\]"),
        (["ibot.mask_sample_probability=0"], r"mask none"),
        (["train.keep_checkpoints_every=1000"], r"train.keep_checkpoints_every = 1000 is not a multiple"),
        (["train.batch_size_per_gpu=0"], r"train.batch_size_per_gpu = 0 is out of range"),
        (["data.path="], r"data.path is empty"),
        (["data.datasets=[{path: a}]"], r"name different data"),
        (["data.path=", "data.datasets=[{weight: 2}]"], r"data.datasets\[0\].path is empty"),
        (["dino.head_n_prototypes=4194304", "dino.head_bottleneck_dim=16384"], r"at most 2,147,483,648"),
        (["student.patch_size=1", "crops.global_crops_size=512"], r"262,144 patches per view"),
        (["train.OFFICIAL_EPOCH_LENGTH=1000000000"], r"1,000,000,000 at most"),
        (["dino.kde_ramp_epochs=[3,2]"], r"dino.kde_ramp_epochs = \[3.0, 2.0\] is not a range"),
        (["optim.base_lr=-1"], r"optim.base_lr = -1 is out of range"),
        (["train.batch_size_per_gpu=1"], r"dino.koleo_loss_weight = 0.1 needs another image"),
        (["train.batch_size_per_gpu=1", "dino.kde_loss_weight=0.1"], r"dino.kde_loss_weight = 0.1 needs another image"),
        (["train.batch_size_per_gpu=1", "train.centering=sinkhorn_knopp"], r"train.centering = sinkhorn_knopp shares"),
        (["dino.koleo_group=7"], r"dino.koleo_group = 7 does not divide the 64 images"),
        (["dino.koleo_group=4", "dino.koleo_topk=4"], r"hold no dino.koleo_topk = 4"),
        (["student.drop_path_rate=1.0"], r"student.drop_path_rate = 1.0"),
        (["crops.local_crops_scale=[0,0.3]"], r"crops.local_crops_scale"),
        (["augmentation.blur_kernel_size=4"], r"blur_kernel_size = 4 is not an odd"),
        (["augmentation.hed_prob=2"], r"augmentation.hed_prob = 2 "),
        (["train.use_pretrained=true", "student.pretrained_weights=w.pth"], r"use_pretrained.* different weights"),
        (["compute_precision.student.backbone.sharding_strategy=NO_SHARD"], r"set NO_SHARD for both"),
        (["compute_precision.student.dino_head.sharding_strategy=HYBRID_SHARD"], r"set HYBRID_SHARD for both"),
        (["dino.loss_weight=0", "ibot.loss_weight=0"], r"nothing to learn"),
        (
            ["compute_precision.grad_scaler=false",
             "compute_precision.student.backbone.mixed_precision.param_dtype=fp16"],
            r"underflow without a scaler",
        ),
    ],
)  # fmt: skip
def test_refused(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        validate(load_config(None, [DATA, *overrides]), world_size=1)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["train.batch_size_per_gpu=7"], 3),
        (["train.batch_size_per_gpu=1", "dino.koleo_loss_weight=0"], 1),
        (["train.batch_size_per_gpu=1", "dino.koleo_gather=true", "train.centering=sinkhorn_knopp"], 2),
        (["optim.epochs=auto", "optim.early_stop=200", "optim.warmup_epochs=500"], 1),
        (["optim.early_stop=101"], 1),
        (["optim.warmup_epochs=101"], 1),
    ],
)
def test_accepted(overrides: list[str], world_size: int):
    validate(load_config(None, [DATA, *overrides]), world_size)


def test_all_faults_at_once():
    wrong = ["crops.local_crops_size=97", "augmentation.blur_kernel_size=4", "train.batch_size_per_gpu=1"]
    config = load_config(None, [DATA, *wrong])
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=1)
    assert len(caught.value.faults) == 3


def test_values_that_were_put_in_later_are_checked_too():
    config = load_config(None, [DATA])
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, base_lr=-1.0))
    with pytest.raises(ConfigError, match=r"optim.base_lr = -1.0 is out of range; expected a number in \(0, 1000\]"):
        validate(config, world_size=1)


def test_defaults_are_valid():
    validate(load_config(None, [DATA]), world_size=4)

"""Files of DINOv3 in our keys, and what of them has none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinov2.configs import ConfigError, load_config
from dinov2.models.backbone import build_model_from_cfg
from dinov2.train.plan.plan import make_plan
from dinov2.train.update.optim import Schedules

DATA = "data.path=shards"
FILE: dict[str, Any] = {
    "MODEL": {"META_ARCHITECTURE": "SSLMetaArch", "DEVICE": "cuda", "DTYPE": "float32"},
    "compute_precision": {"param_dtype": "fp16", "reduce_dtype": "fp16", "sharding_strategy": "FULL_SHARD"},
    "dino": {
        "global_ignore_diagonal": True, "head_norm_last_layer": False, "koleo_loss_distributed": True, "koleo_topk": 2,
        "koleo_distributed_replicas": 0, "force_weight_norm": False, "reweight_dino_local_loss": True,
        "local_loss_weight_schedule": {"start": 1, "peak": 1, "end": 0.5, "warmup_epochs": 3, "cosine_epochs": 1},
    },
    "ibot": {"mask_random_circular_shift": False, "head_n_prototypes": 4096},
    "gram": {"use_loss": False, "loss_weight_schedule": None},
    "train": {"dataset_path": "ImageNet:split=TRAIN", "checkpointing": True, "checkpointing_full": True,
              "batch_size_per_gpu": 64, "OFFICIAL_EPOCH_LENGTH": 10, "compile": True},
    "student": {
        "ffn_ratio": 6, "arch": "vit_huge2", "n_storage_tokens": 4, "ffn_layer": "swiglu", "pos_embed_type": "rope",
        "pos_embed_rope_dtype": "fp32", "mask_k_bias": True, "fp8_enabled": False, "fp8_filter": "blocks",
    },
    "teacher": {"momentum_teacher": None, "teacher_temp": None, "in_chans": 3},
    "optim": {"optimizer": "adamw", "lr": None, "epochs": 10, "scaling_rule": "sqrt_wrt_1024"},
    "crops": {"share_color_jitter": True, "horizontal_flips": False, "rgb_mean": [0.5, 0.5, 0.5],
              "localcrops_subset_of_globalcrops": True},
    "checkpointing": {"period": 7, "max_to_keep": 2, "keep_every": 99999999999999999},
    "schedules": {
        "lr": {"start": 0, "peak": 1e-4, "end": 1e-5, "warmup_epochs": 2, "freeze_last_layer_epochs": 3},
        "weight_decay": {"start": 0.04, "peak": 0.04, "end": 0.04, "warmup_epochs": 0},
        "momentum": {"start": 0.99, "peak": 0.994, "end": 1.0, "warmup_epochs": 1, "cosine_epochs": 4},
    },
}  # fmt: skip


def write(folder: Path, values: Any, name: str = "theirs.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_a_file_of_theirs_means_what_it_says(tmp_path: Path):
    config = load_config(write(tmp_path, FILE), [DATA])
    precision = config.compute_precision.student.ibot_head
    assert (config.precision, precision.sharding_strategy) == ("fp16", "FULL_SHARD")
    assert precision.mixed_precision.reduce_dtype == "fp16"
    assert (config.dino.koleo_gather, config.dino.koleo_topk, config.ibot.separate_head) == (True, 2, True)
    assert config.dino.local_loss_weight_schedule.values() == (1, 1, 0.5)
    assert (config.performance.recompute, config.performance.compile) == ("full", True)
    assert (config.crops.local_crops_size, config.crops.localcrops_subset_of_globalcrops) == (96, True)
    colours = config.augmentation
    assert (colours.jitter_per_tile, colours.horizontal_flip_prob, colours.hed_prob) == (True, 0, 0)
    assert (colours.brightness, colours.normalize_mean) == (0.4, (0.5, 0.5, 0.5))
    kept = config.train.checkpoint_period_iterations, config.train.keep_checkpoints, config.train.keep_checkpoints_every
    assert kept == (7, 2, 0)
    backbone, width = build_model_from_cfg(config, only_teacher=True)
    # ViT-H+: 1280 wide, 20 heads, hidden width 5120 of a gated FFN (arXiv:2508.10104, table 2)
    assert (width, len(backbone.blocks), backbone.num_heads, backbone.num_prefix_tokens) == (1280, 32, 20, 5)
    assert backbone.blocks[0].mlp.w3.in_features == 5120


def test_its_schedules_are_scaled_and_shaped_as_theirs(tmp_path: Path):
    """Peak and end by 4 sqrt(batch / 1024), the start by nothing; a cosine may be shorter than the rest."""
    config = load_config(write(tmp_path, FILE), [DATA])
    plan = make_plan(config, 2)
    schedules = Schedules(config, plan)
    factor = 4 * math.sqrt(128 / 1024)
    assert plan.peak_lr == pytest.approx(1e-4 * factor)
    found = [schedules[step] for step in range(101)]
    assert [found[step].lr for step in (0, 10, 20, 60, 100)] == pytest.approx(
        [0, 0.5e-4 * factor, 1e-4 * factor, (1e-4 + 1e-5) / 2 * factor, 1e-5 * factor]
    )
    assert [found[step].last_layer_lr > 0 for step in (29, 30)] == [False, True]
    assert {values.wd for values in found} == {0.04}
    assert [found[step].mom for step in (0, 5, 10, 30, 50, 90)] == pytest.approx([0.99, 0.992, 0.994, 0.997, 1.0, 1.0])
    assert found[0].teacher_temp == 0.04 and found[100].teacher_temp < 0.07  # by sections teacher and optim, as before


def test_files_over_theirs_are_read_alike(tmp_path: Path):
    write(tmp_path, FILE)
    over = {"extends": "theirs", "student": {"arch": "vit_small", "n_storage_tokens": 0}, "optim": {"lr": 2e-4}}
    config = load_config(write(tmp_path, over, "over.yaml"), [DATA])
    assert (config.student.options["embed_dim"], config.student.options["n_storage_tokens"]) == (384, 0)
    assert config.optim.base_lr == 2e-4


def test_switches_that_are_off_leave_their_sections_out(tmp_path: Path):
    values = {"student": {"n_storage_tokens": 4}}
    values["dino"] = {"reweight_dino_local_loss": False, "local_loss_weight_schedule": {"peak": 0.5, "start": 0.5}}
    config = load_config(write(tmp_path, values), [DATA])
    assert not config.dino.local_loss_weight_schedule.is_given
    values["dino"] = {"koleo_loss_distributed": False, "koleo_distributed_loss_group_size": 16}
    assert load_config(write(tmp_path, values), [DATA]).dino.koleo_group == 0
    values["dino"]["koleo_loss_distributed"] = True
    dino = load_config(write(tmp_path, values), [DATA]).dino
    assert (dino.koleo_gather, dino.koleo_group) == (True, 16)
    assert config.optim.scaling_rule == "four_sqrt_wrt_1024"


def test_path_fm_on_dinov3(tmp_path: Path):
    """Its own keys beside theirs."""
    values = {
        "train": {"streaming_from_hf": True, "streaming_dataset": {"path": "org/tiles", "base_seed": 42}},
        "student": {"n_storage_tokens": 4}, "crops": {"use_pathology_hed": True},
        "checkpointing": {"allow_resume": False}, "logging": {"use_wandb": False, "project": "mine", "tags": []},
        "dino": {"kde_loss_weight": 0.05},
    }  # fmt: skip
    config = load_config(write(tmp_path, values))
    assert (config.data.kind, config.data.path, config.dino.kde_loss_weight) == ("parquet", "org/tiles", 0.05)
    assert (config.augmentation.hed_prob, config.augmentation.hue) == (0.5, 0.05)
    assert config.augmentation.steps["solarize"].prob_global2 == 0
    assert (config.train.skip_checkpointer, config.logging.wandb, config.logging.wandb_project) == (True, False, "mine")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("distillation", "enabled", True), ("multidistillation", "enabled", True),
        ("dino", "koleo_distributed_replicas", 2),
        ("student", "pos_embed_type", "fourier"), ("optim", "schedule_trunc_extra", 0.25),
        ("student", "patch_drop", 0.5),
        ("crops", "global_local_crop_pairs_ratios", [0.3, 0.7]), ("optim", "optimizer", "sgd"),
        ("ibot", "mask_random_circular_shift", True), ("optim", "no_such_key", 1), ("student", "arch", "convnext_tiny"),
        ("schedules", "lr", {"start": 0.0}), ("schedules", "momentum", {"peak": 1.5}),
        ("schedules", "teacher_temp", {"peak": 0.0}),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_named(tmp_path: Path, section: str, key: str, value: Any):
    values = {"student": {"n_storage_tokens": 4}}
    values.setdefault(section, {})[key] = value
    with pytest.raises(ConfigError, match=key):
        load_config(write(tmp_path, values), [DATA])

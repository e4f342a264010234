"""Files that extend others: which one is found, what wins, and what is said of those that cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dinov2.configs import ConfigError, load_config
from dinov2.train.plan.plan import make_plan

DATA = "data.path=shards"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_goes_over_those_that_it_extends(tmp_path: Path):
    write(tmp_path / "first.yaml", "optim: {base_lr: 1e-4, epochs: 7, clip_grad: 1}\ntrain: {seed: 3}\n")
    write(tmp_path / "second.yaml", "extends: first\noptim: {epochs: 8, clip_grad: 2}\n")
    third = write(tmp_path / "third.yaml", "extends: ./second.yaml\noptim: {clip_grad: 30}\n")
    config = load_config(third, [DATA, "train.seed=4"])
    optim = config.optim
    assert (optim.base_lr, optim.epochs, optim.clip_grad, config.train.seed) == (1e-4, 8, 30, 4)


def test_a_file_beside_is_found_before_a_recipe_of_that_name(tmp_path: Path):
    file = write(tmp_path / "mine.yaml", "extends: vits14_reg4\n")
    assert load_config(file) == load_config("vits14_reg4")
    write(tmp_path / "vits14_reg4.yaml", "student: {arch: vit_base}\ndata: {path: x}\n")
    assert load_config(file).student.arch == "vit_base"


def test_older_keys_are_translated_at_each_height(tmp_path: Path):
    write(tmp_path / "old.yaml", "train: {streaming_from_hf: true, streaming_dataset_path: a, stream_lanes: 2}\n")
    file = write(tmp_path / "new.yaml", "extends: old\ndata: {path: b}\n")
    data = load_config(file).data
    assert (data.path, data.lanes) == ("b", 2)


def test_files_of_meta_get_metas_defaults(tmp_path: Path):
    """As its shortest published ones, which name little but the data."""
    short = "train: {dataset_path: 'ImageNet:split=TRAIN', batch_size_per_gpu: 64}\nstudent: {block_chunks: 4}\n"
    config = load_config(write(tmp_path / "short.yaml", short), [DATA])
    assert (config.student.patch_size, config.crops.local_crops_size, config.precision) == (16, 96, "fp16")
    assert (config.student.interpolate_offset, config.augmentation.hed_prob) == (0.1, 0)
    asked = load_config(write(tmp_path / "asked.yaml", "extends: meta\n" + short.replace("ImageNet", "Other")), [DATA])
    assert asked == config
    given = load_config(write(tmp_path / "given.yaml", short + "crops: {local_crops_size: 112}\n"), [DATA])
    assert (given.student.patch_size, given.crops.local_crops_size) == (16, 112)
    ours = load_config(write(tmp_path / "ours.yaml", short.replace("ImageNet", "Other")), [DATA])
    assert (ours.student.patch_size, ours.crops.local_crops_size) == (14, 98)


@pytest.mark.parametrize("extends", ["no_such", "''", "[meta]", "3", "{}", "../x.yaml", "loop", "self.yaml"])
def test_what_cannot_be_extended_is_named(tmp_path: Path, extends: str):
    write(tmp_path / "loop.yaml", "extends: self\n")
    file = write(tmp_path / "self.yaml", f"extends: {extends}\noptim: {{epochs: x}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, [DATA])
    first, second = caught.value.faults
    assert "extends" in first and ".yaml" in first and "optim.epochs" in second


def test_rates_after_the_scaling_rules():
    """Those that the published runs logged: OpenMidnight's at 384, Path-FM's on DINOv3 at 448."""
    rates = {"vitg14_reg4": (8, 1.2247e-4), "vitg14_reg4_2026": (8, 1.8371e-4), "vith16plus": (8, 5.29e-4)}
    for recipe, (world, rate) in rates.items():
        assert math.isclose(make_plan(load_config(recipe, [DATA]), world).peak_lr, rate, rel_tol=1e-3)

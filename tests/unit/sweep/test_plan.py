"""A sweep's file: what runs it stands for, and what is refused before the first of them starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov2.configs import ConfigError, load_config
from dinov2.configs.files import sweeps
from dinov2.sweep.plan import OPEN, read
from tests.helpers.commands import ROOT

COLOURS = "[0.7, 0.5, 0.6]"
KAIKO = ("student.pretrained_weights=weights.pth", "data.path=slides")
GIVEN = {
    "normalisation": (
        f"tcga:augmentation.normalize_mean={COLOURS}",
        f"tcga:augmentation.normalize_std={COLOURS}",
    ),
    "kaiko_ffpe_ff": (KAIKO[0], "ffpe:data.path=ffpe", "both:data.path=all"),
    **dict.fromkeys(("kaiko_magnifications", "kaiko_slides", "kaiko_tiles"), KAIKO),
}
"""What files leave to their user."""
SWEEP = """
base: vits14_reg4
overrides: {data.path: tiles, optim: {warmup_epochs: 3, clip_grad: 1.0}}
variants:
  one: [optim.clip_grad=3, "crops.global_crops_scale=[0.2, 1.0]"]
  two: {optim.clip_grad: 30.0}
seeds: [5, 7]
"""


def write(folder: Path, text: str) -> str:
    (folder / "sweep.yaml").write_text(text)
    return str(folder / "sweep.yaml")


def faults_of(folder: Path, text: str, *further: str, **options: int) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        read(write(folder, text), None, further, **options)
    return refused.value.faults


@pytest.mark.parametrize("name", sweeps())
def test_shipped_sweeps_are_sound_sourced_and_listed(name: str):
    file = ROOT / "dinov2/configs/sweeps" / f"{name}.yaml"
    text = file.read_text()
    assert text.startswith("# ") and "# Source: " in text
    assert f"| `{name}` |" in (ROOT / "docs/recipes.md").read_text()
    if OPEN in text:
        with pytest.raises(ConfigError):
            read(name, None, GIVEN[name][1:])
    sweep = read(name, None, GIVEN.get(name, ()), processes=4)
    assert len(sweep.runs) >= 2 and len({run.name for run in sweep.runs}) == len(sweep.runs)


def test_runs_are_variants_by_seeds_with_values_in_their_order(tmp_path: Path):
    sweep = read(write(tmp_path, SWEEP), tmp_path / "out", ["optim.weight_decay=0.1", "two:optim.clip_grad=20"])
    assert [run.name for run in sweep.runs] == ["one-seed5", "one-seed7", "two-seed5", "two-seed7"]
    assert [config.optim.clip_grad for config in sweep.configs] == [3, 3, 20, 20]
    assert [config.train.seed for config in sweep.configs] == [5, 7, 5, 7]
    assert all(config.optim.weight_decay == 0.1 and config.optim.warmup_epochs == 3 for config in sweep.configs)
    # The overrides alone make each configuration, as the training command reads them.
    assert [load_config(sweep.base, run.overrides) for run in sweep.runs] == list(sweep.configs)
    assert read(write(tmp_path, SWEEP), seeds=[9]).configs[0].train.seed == 9
    assert sweep.tasks == [[0], [1], [2], [3]]
    assert len(read(write(tmp_path, SWEEP + "phases:\n")).runs) == 4


def test_a_phase_starts_from_the_teacher_of_the_one_before(tmp_path: Path):
    phases = "phases:\n  first: {optim.base_lr: 2e-4}\n  second: {optim.base_lr: 1e-4, data.path: both}\n"
    sweep = read(write(tmp_path, SWEEP + phases), tmp_path / "out")
    assert [run.name for run in sweep.runs[:2]] == ["one-seed5-first", "one-seed5-second"]
    assert [run.follows for run in sweep.runs[:3]] == ["", "one-seed5-first", ""]
    first, second = sweep.configs[:2]
    assert (first.train.use_pretrained, first.MODEL.WEIGHTS) == (True, "")
    assert (second.train.use_pretrained, second.MODEL.WEIGHTS) == (False, str(tmp_path / "out/one-seed5-first"))
    assert (second.optim.base_lr, second.data.path, second.optim.clip_grad) == (1e-4, "both", 3)
    assert sweep.tasks[1] == [2, 3]


def test_runs_that_cut_slides_share_their_masks(tmp_path: Path):
    slides = SWEEP.replace("vits14_reg4", "kaiko_vits16")
    sweep = read(write(tmp_path, slides), tmp_path / "out")
    assert {config.online.cache_dir for config in sweep.configs} == {str(tmp_path / "out/slide_cache")}
    assert [load_config(sweep.base, run.overrides) for run in sweep.runs] == list(sweep.configs)
    own = read(write(tmp_path, slides), tmp_path / "out", ["online.cache_dir=mine"])
    assert {config.online.cache_dir for config in own.configs} == {"mine"}
    assert not read(write(tmp_path, SWEEP)).configs[0].online.cache_dir


def test_the_base_may_be_a_file_beside_the_sweep(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("extends: vits14_reg4\noptim: {clip_grad: 2.5}\n")
    sweep = read(write(tmp_path, "base: mine.yaml\nvariants: {same: {}, other: {optim.clip_grad: 3}}\n"))
    assert sweep.base == str(tmp_path / "mine.yaml")
    assert [config.optim.clip_grad for config in sweep.configs] == [2.5, 3]
    assert [config.train.seed for config in sweep.configs] == [0, 0]


def test_all_faults_of_all_variants_come_at_once(tmp_path: Path):
    text = SWEEP.replace("seeds:", "  three: {optim.clip_gradd: 3, crops.local_crops_size: 97}\nseeds:")
    faults = faults_of(tmp_path, text)
    assert len(faults) == 2 and all(fault.startswith("three: ") for fault in faults)
    assert any("optim.clip_gradd" in fault for fault in faults) and any("97" in fault for fault in faults)
    shared = faults_of(tmp_path, text.replace("data.path: tiles", "data.pathh: tiles"))
    assert sum("data.pathh" in fault for fault in shared) == 1 and len(shared) == 3


def test_what_is_left_open_is_to_be_given(tmp_path: Path):
    text = SWEEP.replace("tiles", '"???"').replace("30.0", '"???"')
    open_keys = faults_of(tmp_path, text)
    assert [("data.path=VALUE" in fault, "two:optim.clip_grad=VALUE" in fault) for fault in open_keys] == [
        (True, False),
        (False, True),
    ]
    sweep = read(write(tmp_path, text), None, ["data.path=x", "two:optim.clip_grad=1"])
    assert [config.data.path for config in sweep.configs] == ["x"] * 4


@pytest.mark.parametrize(
    ("before", "after", "further"),
    [
        ("base: vits14_reg4", "base: 3", []),
        ("variants:", "variant:", []),
        ("seeds: [5, 7]", "seeds: [5, 5]", []),
        ("seeds: [5, 7]", "seeds: 5", []),
        ("seeds: [5, 7]", "seeds: [-1]", []),
        ("two:", "a/b:", []),
        ("two:", "2:", []),
        ("optim.clip_grad: 30.0", "optim.clip_grad: 3, crops.global_crops_scale: [0.2, 1.0]", []),
        ("optim.clip_grad: 30.0", "train.seed: 30", []),
        ("two: {optim.clip_grad: 30.0}", "two: 3", []),
        ("seeds:", "phases: {one: {}}\nseeds:", []),
        ("seeds:", "seeds:", ["optim.clip_grad=2"]),
        ("seeds:", "seeds:", ["three:optim.clip_grad=2"]),
        ("seeds:", "seeds:", ["nonsense"]),
        ("base:", "base", []),
    ],
)
def test_what_makes_no_sweep_is_refused(tmp_path: Path, before: str, after: str, further: list[str]):
    assert before in SWEEP
    assert faults_of(tmp_path, SWEEP.replace(before, after), *further)


def test_processes_are_part_of_the_check(tmp_path: Path):
    one_image = SWEEP.replace("data.path: tiles", "data.path: tiles, train.batch_size_per_gpu: 1")
    assert faults_of(tmp_path, one_image)
    gathered = one_image.replace("data.path", "dino.kde_gather: true, data.path")
    assert read(write(tmp_path, gathered), processes=2).runs


def test_absent_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read(str(tmp_path / "absent.yaml"))
    with pytest.raises(FileNotFoundError, match="no_recipe"):
        read(write(tmp_path, SWEEP.replace("vits14_reg4", "no_recipe")))

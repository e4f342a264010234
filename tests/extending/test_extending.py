"""``docs/extending.md`` as its reader follows it: each diff is applied to a copy of the code and its commands run."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

from tests.helpers.runs import TINY, read_metrics, write_tissue_shards

ROOT = Path(__file__).parents[2]
SECTIONS = re.split(r"^## ", (ROOT / "docs/extending.md").read_text(), flags=re.M)[1:]
PARTS = dict(zip(("loss", "step", "kind", "rule", "backbone", "probe"), SECTIONS, strict=True))
MOST_FILES = {"loss": 2, "step": 2, "kind": 2, "rule": 2, "backbone": 2, "probe": 2}


def blocks(part: str, language: str) -> list[str]:
    """Fenced blocks of a section."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PARTS[part], flags=re.M | re.S)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with all parts added."""
    copy = tmp_path_factory.mktemp("code")
    for folder in ("dinov2", "eval_configs", "prepatching_scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for part in PARTS:
        for diff in blocks(part, "diff"):
            apply = ["git", "apply", "--unidiff-zero", "-"]
            done = subprocess.run(apply, input=diff, text=True, cwd=copy, capture_output=True)
            assert done.returncode == 0, f"{part}: {done.stderr}"
    return copy


@pytest.fixture(scope="module")
def out(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of all sections leave, one after the other."""
    out = tmp_path_factory.mktemp("out")
    tiles = write_tissue_shards(tmp_path_factory.mktemp("data") / "tiles")
    recipe = out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_nested([*TINY, "optim.early_stop=0.5", "train.checkpoint_period_iterations=1"])))
    rng = np.random.default_rng(0)
    grey = np.full((1024, 1024, 3), 235, np.uint8)
    grey[:, :640] = 120
    tifffile.imwrite(out / "grey.tif", grey, photometric="rgb", tile=(256, 256), compression="deflate")
    np.save(out / "tiles.npy", rng.integers(0, 256, (100, 64, 64, 3), np.uint8))
    for label, brightness in {"dark": 40, "light": 200}.items():
        (out / "labelled" / label).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(brightness, brightness + 40, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(out / "labelled" / label / f"patient{number}.png")
    environment = os.environ | {
        "TILES": str(tiles),
        "SLIDE": str(out / "grey.tif"),
        "OUT": str(out),
        "RECIPE": str(recipe),
        "PYTHONPATH": str(code),
    }
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for part in PARTS:
        for commands in blocks(part, "bash"):
            script = ["bash", "-euo", "pipefail", "-c", commands]
            done = subprocess.run(script, cwd=code, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{part}: {done.stdout}{done.stderr}"
    return out


def _nested(overrides: list[str]) -> dict:
    nested: dict = {}
    for override in overrides:
        path, value = override.split("=", 1)
        *sections, key = path.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = yaml.safe_load(value)
    return nested


@pytest.mark.parametrize("part", PARTS)
def test_an_addition_touches_few_files(part: str):
    touched = [name for diff in blocks(part, "diff") for name in re.findall(r"^\+\+\+ b/(.+)$", diff, flags=re.M)]
    assert len(touched) <= MOST_FILES[part]
    registry = [line for diff in blocks(part, "diff") for line in re.findall(r"^\+[^+].*:[A-Z]\w+\".*$", diff, re.M)]
    assert len(registry) == 1


def test_the_loss_trains_and_is_saved(out: Path):
    records = read_metrics(out / "loss")
    assert [record["variance_loss"] > 0 for record in records] == [True, True]
    assert all(record["grad_norm_variance"] > 0 for record in records)
    saved = out / "loss/checkpoints/step_0000002"
    reader = torch.distributed.checkpoint.FileSystemReader(next(p.parent for p in saved.rglob(".metadata")))
    names = reader.read_metadata().state_dict_metadata
    assert any("variance" in name and "projection.weight" in name for name in names)


def test_the_step_shows_in_the_sheet_of_crops(out: Path, code: Path):
    from dinov2.build.augmentation import build_augmentation
    from dinov2.configs import load_config

    assert (out / "aug/report/crops.png").stat().st_size > 0
    # The sheet's crops are those of `build_augmentation`; with the step they differ in the second global view alone.
    program = (
        "import sys, numpy as np; from dinov2.configs import load_config\n"
        "from dinov2.build.augmentation import build_augmentation\n"
        "crops = build_augmentation(load_config(sys.argv[1]))(np.load(sys.argv[2])[0], 5)\n"
        "np.save(sys.argv[3], crops.global_crops.numpy())"
    )
    arguments = [out / "aug/config.yaml", out / "tiles.npy", out / "with.npy"]
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=code, check=True)
    with_step = np.load(out / "with.npy")
    plain = build_augmentation(load_config(out / "recipe.yaml"))(np.load(out / "tiles.npy")[0], 5).global_crops.numpy()
    assert np.array_equal(with_step[0], plain[0]) and not np.array_equal(with_step[1], plain[1])


def test_the_kind_of_data_feeds_a_run(out: Path):
    assert len(read_metrics(out / "source")) == 2


def test_the_tissue_rule_finds_grey_tissue(out: Path):
    corners = [int(line.split()[1]) for line in (out / "dark.txt").read_text().splitlines()]
    assert len(corners) == 4  # the rule "hsv" finds none without colour
    assert max(corners) + 0.6 * 224 < 640
    assert json.loads((out / "dark.txt.meta.json").read_text())["rule"]["options"] == {"above": 25, "below": 180}


def test_the_backbone_trains_exports_and_opens_again(out: Path):
    assert len(read_metrics(out / "backbone")) == 2
    exported = json.loads(next((out / "backbone/eval").rglob("*.json")).read_text())
    assert exported["architecture"] == {"arch": "mixer", "patch_size": 14, "width": 32, "depth": 2}
    assert any((out / "exported").iterdir())


def test_the_probe_stands_in_the_table(out: Path):
    with (out / "probes.csv").open() as file:
        rows = {(row["probe"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    # Dark and light noise are told apart by any network.
    assert rows["centroid", "balanced_accuracy"] == 1.0

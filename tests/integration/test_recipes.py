"""Every shipped recipe as a user starts it, but narrow: its plan, and two steps."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from dinov2.configs import load_config, recipes
from dinov2.train.train import main
from tests.helpers.checkpoints import save_vit
from tests.helpers.runs import NARROW_DINOV3, read_metrics

NARROW = (
    *("dino.head_n_prototypes=64", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16"),
    *("ibot.head_n_prototypes=48", "ibot.head_hidden_dim=32", "ibot.head_bottleneck_dim=16"),
    *("train.batch_size_per_gpu=4", "train.num_workers=0", "train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=1"),
    *("optim.early_stop=null", "optim.warmup_epochs=0", "train.use_pretrained=false", "train.skip_checkpointer=true"),
    "MODEL.WEIGHTS=",
    *("precision=fp32", "performance.fp8=none", "crops.local_crops_number=2", "logging.period_iterations=1"),
    *("data.kind=parquet", "logging.wandb=false"),
)


def test_each_has_its_row():
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    named = {name for line in page.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line)}
    assert named >= set(recipes())


@pytest.mark.parametrize("recipe", recipes())
def test_two_steps(shards: Path, tmp_path: Path, recipe: str):
    out = tmp_path / "out"
    config = load_config(recipe, ["data.path=x"])
    student, losses = config.student, config.losses
    options = [item for item in NARROW_DINOV3 if "ffn_layer" not in item]
    narrow = options if student.arch.startswith("dinov3") else ["student.arch=vit_demo"]
    patch = student.patch_size
    sizes = f"crops.global_crops_size={4 * patch}", f"crops.local_crops_size={2 * patch}"
    if "distillation" in losses:
        sizes += (f"losses.distillation.teacher={save_vit(tmp_path / 'teacher.pth')}",)
    run = "--config-file", recipe, "--output-dir", str(out)
    assert main([*run, *NARROW, *narrow, *sizes, f"data.path={shards}"]) == 0
    records = read_metrics(out)
    assert len(records) == 2 and all(math.isfinite(record["total_loss"]) for record in records)

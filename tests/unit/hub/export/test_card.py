"""Model cards, read with the hub's own library."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from dinov2.configs import config_from_mapping
from dinov2.eval.probe.results import Result, append_csv
from dinov2.export import main, save_teacher
from dinov2.models.vision_transformer import vit_demo
from tests.helpers.backbones import randomise

OPTIONS = {"patch_size": 14, "img_size": 42, "num_register_tokens": 2, "init_values": 1.0}
TRAINED = {
    "data": {"datasets": [{"path": "/home/somebody/tiles", "weight": 3}, {"path": "hf://org/tiles", "weight": 1}]},
    "optim": {"base_lr": 0.0125},
    "augmentation": {"normalize_mean": [0.5, 0.25, 0.75]},
    "student": {"pretrained_weights": "/home/somebody/start.pth"},
    "logging": {"wandb_project": "ours"},
}


def teacher(run: Path, config: dict[str, Any] | None = None, **told: Any) -> Path:
    path = run / "eval/training_40/teacher_checkpoint.pth"
    metadata = {"architecture": {"arch": "vit_demo", **OPTIONS}, **told}
    if config is not None:
        metadata["config"] = json.loads(json.dumps(asdict(config_from_mapping(config))))
    save_teacher(path, {"backbone": randomise(vit_demo(**OPTIONS)).state_dict()}, metadata)
    return path


def card_of(path: Path, output: Path, *options: str, target: str = "meta") -> ModelCard:
    assert main(["--checkpoint", str(path), "--format", target, "--output", str(output), *options]) == 0
    return ModelCard.load(output / "README.md")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of a run whose probes measured it at steps 20 and 40."""
    run = tmp_path_factory.mktemp("run")
    for step, value in ((20, 0.1234), (40, 0.5678)):
        append_csv(run / "eval/probes.csv", [Result("bach", "knn", "balanced_accuracy", value, 0.5, 0.625)], step)
    return teacher(run, TRAINED, step=40, samples=320)


@pytest.mark.parametrize(("target", "library"), [("meta", "path-fm"), ("timm", "timm"), ("hf", "transformers")])
def test_front_matter(trained: Path, tmp_path: Path, target: str, library: str):
    data = card_of(trained, tmp_path, target=target).data
    assert (data.library_name, data.license) == (library, None)
    assert {"pathology", "dinov2"} <= set(data.tags)
    assert "license" not in data.to_dict()


def test_licence(trained: Path, tmp_path: Path):
    card = card_of(trained, tmp_path, "--license", "cc-by-nc-4.0")
    assert card.data.license == "cc-by-nc-4.0" and "cc-by-nc-4.0" in card.text


def test_data_recipe_and_results(trained: Path, tmp_path: Path):
    card = card_of(trained, tmp_path)
    told = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert told["optim"] == {"base_lr": 0.0125} and told["student"]["pretrained_weights"] == "start.pth"
    assert told["augmentation"] == {"normalize_mean": [0.5, 0.25, 0.75]} and "logging" not in told
    assert "`tiles`, 75% of the samples" in card.text and "`hf://org/tiles`, 25%" in card.text
    assert "320 tiles seen in 40 steps, 8 in each" in card.text
    assert "0.5678" in card.text and "0.1234" not in card.text
    assert "0.5, 0.25, 0.75" in card.text and "/home/somebody" not in str(card)


@pytest.mark.parametrize("target", ["meta", "hf"])
def test_weights_of_which_nothing_is_known(tmp_path: Path, target: str):
    card = card_of(teacher(tmp_path / "run"), tmp_path / "out", target=target)
    assert "```yaml" not in card.text and card.data.library_name
    again = card_of(tmp_path / "out/backbone.pth", tmp_path / "again") if target == "meta" else card
    assert "```yaml" not in again.text


def test_colours_that_are_told_of_such_weights_go_with_the_export(tmp_path: Path):
    colours = ["--mean", "0.5", "0.5", "0.25", "--std", "0.5", "0.5", "0.5"]
    card = card_of(teacher(tmp_path / "run"), tmp_path / "out", *colours)
    assert "0.5, 0.5, 0.25" in card.text and "```yaml" not in card.text
    config = json.loads((tmp_path / "out/backbone.json").read_text())["config"]
    assert config["augmentation"] == {"normalize_mean": [0.5, 0.5, 0.25], "normalize_std": [0.5, 0.5, 0.5]}


def test_colours_of_training_cannot_be_told_otherwise(trained: Path, tmp_path: Path):
    line = ["--checkpoint", str(trained), "--format", "hf", "--output", str(tmp_path / "out")]
    assert main([*line, "--mean", "0.5", "0.5", "0.5"]) == 2
    assert not (tmp_path / "out").exists()
    assert main([*line, "--mean", "0.5", "0.25", "0.75"]) == 0


def test_a_card_that_was_edited_stays(trained: Path, tmp_path: Path):
    card_of(trained, tmp_path)
    (tmp_path / "README.md").write_text("Edited.")
    card_of(trained, tmp_path)
    assert (tmp_path / "README.md").read_text() == "Edited."

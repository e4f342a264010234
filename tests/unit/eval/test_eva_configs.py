"""Configurations of stock eva: complete, apart from each other, and with the protocol of the published figures."""

import re
from math import ceil
from pathlib import Path

import pytest
import yaml

from dinov2.eval.eva_summary import METRICS, TASKS

FOLDER = Path(__file__).parents[3] / "eval_configs"
PAGE = Path(__file__).parents[3] / "docs/evaluation.md"
CONFIGS = {path.stem: path.read_text() for path in FOLDER.glob("*.yaml")}
# Training images (slides), classes and splits, as the data sets' papers and eva's pages have them.
LINEAR = {"bach": (268, 4), "bracs": (3657, 7), "breakhis": (1132, 4), "crc": (100_000, 9), "gleason": (15_303, 4),
          "mhist": (2175, 1), "pcam": (262_144, 1), "pcam_10": (20, 1)}  # fmt: skip
SLIDES = {"cam16_small": (1000, 0.25, 1), "panda_small": (200, 0.5, 6)}  # tiles, um/px, outputs
SEGMENTATION = {"consep": 432, "monusac": 209}
WITH_TEST = {"bracs", "pcam", "pcam_10", "cam16_small", "panda_small"}


def default(value):
    """The default in ``${oc.env:NAME, default}``; the value itself where it is none."""
    match = re.fullmatch(r"\$\{oc\.env:\w+, (.*)\}", str(value))
    return yaml.safe_load(match[1]) if match else value


def load(task):
    """Configuration of a task, and its callbacks' arguments by class."""
    config = yaml.safe_load(CONFIGS[task])
    callbacks = config["trainer"]["init_args"]["callbacks"]
    return config, {item["class_path"].split(".")[-1]: item.get("init_args") for item in callbacks}


def test_all_twelve_are_there():
    assert set(CONFIGS) == set(TASKS) == {*LINEAR, *SLIDES, *SEGMENTATION} and len(TASKS) == 12


@pytest.mark.parametrize("task", sorted(TASKS))
def test_places_come_from_the_environment_and_are_the_task_s_own(task):
    config, callbacks = load(task)
    trainer = config["trainer"]["init_args"]
    assert default(trainer["default_root_dir"]) == f"logs/pathfm/{task}"
    assert trainer["logger"][0]["init_args"]["save_dir"] == trainer["default_root_dir"]
    datasets = config["data"]["init_args"]["datasets"]
    if task in SEGMENTATION:
        assert datasets["train"]["init_args"]["root"] == "${oc.env:DATA_ROOT}"
        return
    embeddings = callbacks["ClassificationEmbeddingsWriter"]["output_dir"]
    assert embeddings == f"${{oc.env:EMBEDDINGS_ROOT, data/embeddings}}/{task}"
    for role in ("train", "val", *(["test"] if task in WITH_TEST else [])):
        assert datasets[role]["init_args"]["root"] == embeddings
    assert {item["init_args"]["root"] for item in datasets["predict"]} == {"${oc.env:DATA_ROOT}"}
    written = callbacks["ClassificationEmbeddingsWriter"]["dataloader_idx_map"]
    assert [item["init_args"]["split"] for item in datasets["predict"]] == list(written.values())
    assert {item["init_args"]["split"] for role, item in datasets.items() if role != "predict"} == set(written.values())
    assert ("test" in datasets) == (task in WITH_TEST)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_metric_is_the_summary_s(task):
    _, callbacks = load(task)
    monitor = callbacks["ModelCheckpoint"]["monitor"]
    assert monitor == callbacks["EarlyStopping"]["monitor"]
    assert default(monitor).removeprefix("val/") in METRICS


@pytest.mark.parametrize("task", sorted(LINEAR))
def test_protocol_of_linear_heads(task):
    images, outputs = LINEAR[task]
    config, callbacks = load(task)
    trainer, model = config["trainer"]["init_args"], config["model"]["init_args"]
    assert model["head"] == {
        "class_path": "torch.nn.Linear",
        "init_args": {"in_features": "${oc.env:IN_FEATURES, 384}", "out_features": outputs},
    }
    assert model["criterion"] == f"torch.nn.{'BCEWithLogitsLoss' if outputs == 1 else 'CrossEntropyLoss'}"
    assert model["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert default(model["optimizer"]["init_args"]["lr"]) == 0.0003
    assert default(trainer["max_steps"]) == 12_500
    assert default(config["data"]["init_args"]["dataloaders"]["train"]["batch_size"]) == 256
    assert default(trainer["n_runs"]) == (50 if task == "pcam_10" else 5)
    # Early stopping after a fifth of the epochs, rounded up; after 125 of 1250 validations for ten shots.
    expected = 125 if task == "pcam_10" else ceil(0.2 * 12_500 / ceil(images / 256))
    assert default(callbacks["EarlyStopping"]["patience"]) == expected


@pytest.mark.parametrize("task", sorted(SLIDES))
def test_protocol_of_slides(task):
    tiles, resolution, outputs = SLIDES[task]
    config, callbacks = load(task)
    trainer, model = config["trainer"]["init_args"], config["model"]["init_args"]
    head = model["head"]["init_args"]
    assert model["head"]["class_path"].endswith(".ABMIL") and head["output_size"] == outputs
    assert head["projected_input_size"] == 128
    assert (default(trainer["max_epochs"]), default(trainer["n_runs"])) == (100, 20)
    assert default(callbacks["EarlyStopping"]["patience"]) == 20
    assert default(model["optimizer"]["init_args"]["lr"]) == 0.001
    data = config["data"]["init_args"]
    assert default(data["dataloaders"]["train"]["batch_size"]) == 32
    images = data["datasets"]["predict"][0]["init_args"]
    assert images["target_mpp"] == resolution and images["width"] == images["height"] == 224
    assert default(images["sampler"]["init_args"]["max_samples"]) == tiles
    padding = data["datasets"]["train"]["init_args"]["embeddings_transforms"]["init_args"]["pad_size"]
    assert default(padding) == tiles


@pytest.mark.parametrize("task", sorted(SEGMENTATION))
def test_protocol_of_segmentation(task):
    config, callbacks = load(task)
    trainer, model = config["trainer"]["init_args"], config["model"]["init_args"]
    assert model["decoder"]["class_path"].endswith(".ConvDecoderWithImage")
    assert model["decoder"]["init_args"]["num_classes"] == 5
    assert model["encoder"]["init_args"]["model_kwargs"] == {"out_indices": "${oc.env:OUT_INDICES, 1}"}
    assert model["lr_multiplier_encoder"] == 0
    assert default(model["optimizer"]["init_args"]["lr"]) == 0.002
    assert (default(trainer["max_steps"]), default(trainer["n_runs"])) == (2000, 5)
    assert default(config["data"]["init_args"]["dataloaders"]["train"]["batch_size"]) == 64
    assert default(callbacks["EarlyStopping"]["patience"]) == (200 if task == "consep" else 100)
    ignored = {"ignore_index": 5} if task == "monusac" else {}
    assert model["criterion"]["init_args"] == {"softmax": True, "batch": True, **ignored}
    metrics = model["metrics"]["evaluation"][0]["init_args"]
    assert metrics == {"num_classes": 6 if task == "monusac" else 5, **ignored}
    assert "predict" not in config["data"]["init_args"]["datasets"]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_variables_are_documented(task):
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", PAGE.read_text()))
    assert set(re.findall(r"oc\.env:(\w+)", CONFIGS[task])) <= documented

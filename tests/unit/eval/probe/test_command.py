"""The command, from an exported teacher and a folder of tissue crops to a table and files."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2hed
from skimage.data import immunohistochemistry

from dinov2.configs import load_config
from dinov2.eval.probe.__main__ import main
from dinov2.eval.probe.command import open_tasks
from dinov2.export import save_teacher
from dinov2.hub import trained_with
from dinov2.models import build_model_from_cfg
from tests.helpers.checkpoints import forget
from tests.helpers.runs import TINY

QUICK = [
    "--steps",
    "60",
    "--runs",
    "2",
    "--draws",
    "5",
    "--folds",
    "3",
    "--shots",
    "1,4",
    "--batch-size",
    "16",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As training writes it; untrained."""
    overrides = [*TINY, "train.streaming_dataset_path=unused", "augmentation.normalize_mean=[0.7,0.6,0.7]"]
    config = load_config(None, overrides)
    torch.manual_seed(0)
    teacher, _ = build_model_from_cfg(config, only_teacher=True)
    path = tmp_path_factory.mktemp("run") / "teacher_checkpoint.pth"
    metadata = {"architecture": teacher.describe(), "step": 7, "samples": 56}
    metadata["config"] = {
        "crops": {"global_crops_size": 56},
        "augmentation": {"normalize_mean": [0.7, 0.6, 0.7]},
    }
    save_teacher(path, {"backbone": teacher.state_dict()}, metadata)
    return str(path)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Crops of a stained section of 512 px, by how much of the brown stain they hold."""
    image, root = immunohistochemistry(), tmp_path_factory.mktemp("crops")
    boxes = [(y, x) for y in range(0, 449, 32) for x in range(0, 449, 32)]
    stain = [rgb2hed(image[y : y + 64, x : x + 64])[..., 2].mean() for y, x in boxes]
    ranks = np.argsort(np.argsort(stain))
    for (y, x), rank in zip(boxes, ranks, strict=True):
        name = "pale" if rank < 75 else "brown" if rank >= len(boxes) - 75 else None
        if name:
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(image[y : y + 64, x : x + 64]).save(root / name / f"x{x:03}_y{y:03}.png")
    return root


def rows_of(path):
    with path.open() as file:
        return {(row["probe"], row["metric"]): row for row in csv.DictReader(file)}


def test_from_teacher_to_table(checkpoint, crops, tmp_path, capsys):
    output = tmp_path / "new" / "probes.csv"
    arguments = ["--checkpoint", checkpoint, "--data", f"stain={crops}", "--output", str(output), *QUICK]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    rows = rows_of(output)
    assert {row["step"] for row in rows.values()} == {"7"} and {row["task"] for row in rows.values()} == {"stain"}
    assert float(rows["knn5", "balanced_accuracy"]["value"]) > 0.8  # colour is there without training
    assert float(rows["knn5", "balanced_accuracy"]["low"]) > 0.6
    assert rows["linear_eva", "accuracy"]["runs"] == "6" and rows["knn5", "f1"]["count"] == "150"
    assert 1 <= float(rows["rankme", "value"]["value"]) <= 128
    for (probe, _), row in rows.items():
        assert probe in table and row["value"]
    assert {row["division"] for row in rows.values()} == {"tile", ""}  # of a measure without folds, nothing
    assert len(table.splitlines()) == 1 + len({probe for probe, _ in rows}) + 1  # and the note on these folds

    before = output.read_text()
    assert main(arguments) == 0
    assert output.read_text().startswith(before) and len(output.read_text()) > 1.9 * len(before)
    assert rows_of(output) == rows  # same seed


def test_json_and_labels_by_slide(checkpoint, crops, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    slides = sorted({path.name[:4] for path in crops.glob("*/*.png")})  # columns of the section
    rows = [f"{slide},{number % 2}" for number, slide in enumerate(slides)]
    labels.write_text("\n".join(["slide_id,label", *rows]))
    output = tmp_path / "probes.json"
    options = [
        "--labels",
        str(labels),
        "--slide-regex",
        r"/(x\d+)_",
        "--probes",
        "knn,odcorr",
        "--neighbours",
        "3",
    ]
    options += [
        "--output",
        str(output),
        "--pooling",
        "cls_mean",
        "--aggregate",
        "probabilities",
        "--autocast",
        "bf16",
    ]
    assert main(["--checkpoint", checkpoint, "--data", str(crops), *options, *QUICK]) == 0
    content = json.loads(output.read_text())
    found = {(row["task"], row["probe"], row["metric"]): row for row in content["results"]}
    assert content["step"] == 7 and content["command"]["pooling"] == "cls_mean"
    assert found[crops.name, "knn3", "accuracy"]["count"] == len(slides)
    assert {probe for _, probe, _ in found} == {"knn3", "knn3_majority", "knn3_standardized", "odcorr"}
    assert found[crops.name, "knn3", "accuracy"]["division"] == "patient"  # what paths tell
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4  # no note


def test_comparison_with_another_teacher(checkpoint, crops, tmp_path, capsys):
    """Against itself nothing differs; at another normalisation its own record counts."""
    other = tmp_path / "other.pth"
    shutil.copy(checkpoint, other)
    record = json.loads(Path(checkpoint).with_suffix(".json").read_text()) | {"step": 9}
    record["config"]["augmentation"]["normalize_mean"] = [0.1, 0.9, 0.1]
    other.with_suffix(".json").write_text(json.dumps(record))
    forget(other)
    options = ["--data", str(crops), "--probes", "knn,rankme", "--neighbours", "3", *QUICK]
    found = []
    for number, teacher in enumerate((checkpoint, other)):
        output = tmp_path / f"{number}.json"
        assert main(["--checkpoint", checkpoint, "--compare", str(teacher), "--output", str(output), *options]) == 0
        content = json.loads(output.read_text())
        assert (content["step"], content["compare_step"], content["compare"]) == (7, 7 + 2 * number, str(teacher))
        found.append({(row["probe"], row["metric"]): row for row in content["results"]})
    capsys.readouterr()
    assert main(["--checkpoint", str(other), *options, "--output", str(tmp_path / "alone.csv")]) == 0
    alone, (same, differs) = rows_of(tmp_path / "alone.csv"), found
    for (probe, metric), row in alone.items():
        assert same[probe, f"compared_{metric}"]["value"] == same[probe, metric]["value"]
        assert differs[probe, f"compared_{metric}"]["value"] == float(row["value"])
    for probe in ("knn3", "knn3_majority", "knn3_standardized"):
        difference = same[probe, "balanced_accuracy_difference"]
        assert [difference[name] for name in ("value", "low", "high")] == [0, 0, 0]
        figures = [differs[probe, name]["value"] for name in ("balanced_accuracy", "compared_balanced_accuracy")]
        assert differs[probe, "balanced_accuracy_difference"]["value"] == pytest.approx(figures[0] - figures[1])
    assert ("rankme", "balanced_accuracy_difference") not in same


def test_normalisation_and_size_are_those_of_training(checkpoint):
    assert trained_with(checkpoint) == {"step": 7, "size": 56, "mean": [0.7, 0.6, 0.7]}
    assert trained_with("https://host/other.pth") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "Folder 'nowhere' of labelled tiles does not exist."),
        (["--data", "bach={crops}"], "BACH is not in '{crops}'; ICIAR2018_BACH_Challenge/Photos/"),
        (["--data", "{crops}", "{crops}/."], "Two tasks are called '{name}'"),
        (["--data", "{crops}", "a={crops}", "--labels", "x.csv"], "Labels 'x.csv' are given for 2 roots"),
        (["--data", "{crops}", "--probes", "svm"], "There is no probe 'svm'"),
        (["--data", "{crops}", "--output", "probes.txt"], "ends neither in .csv nor in .json"),
        (["--data", "{crops}", "--output", "{checkpoint}.json"], "exists; name a new file"),
        (["--data", "{crops}", "--folds", "500"], "150 groups cannot be divided into 500 folds"),
        (["--data", "{crops}", "--group", "patient"], "Nothing tells the patient of a tile"),
        (["--data", "{crops}", "--device", "tpu9"], "Device 'tpu9' is unknown; cpu, cuda or cuda:N is expected"),
        (["--data", "{crops}", "--device", "cuda:64"], "Device 'cuda:64' is unavailable: PyTorch sees"),
        (["--data", "{crops}", "--size", "50"], "50"),
        (["--data", "{crops}", "--compare", "random:{checkpoint}.json"], "is neither a .yaml nor a teacher"),
        (["--data", "{crops}", "--compare", "random:absent.yaml"], "absent.yaml"),
        (["--data", "{crops}", "--C", "0"], "C is 0.0; values in (0, inf) are accepted"),
    ],
)  # fmt: skip
def test_bad_input(checkpoint, crops, tmp_path, arguments, message, capsys):
    known = {"crops": crops, "name": crops.name, "checkpoint": tmp_path / "taken"}
    (tmp_path / "taken.json").write_text("{}")
    arguments = [argument.format(**known) for argument in arguments]
    assert main(["--checkpoint", checkpoint, *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " E " in line]
    assert message.format(**known) in line
    assert (tmp_path / "taken.json").read_text() == "{}"


def test_checkpoint_that_is_not_there(crops, capsys):
    assert main(["--checkpoint", "none.pth", "--data", str(crops)]) == 2
    assert "'none.pth' does not exist" in capsys.readouterr().err


def test_roots_that_hold_equals_signs(crops, tmp_path):
    root = tmp_path / "mpp=0.5"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / name / "tile.png")
    assert list(open_tasks([str(root)])) == ["mpp=0.5"]
    assert list(open_tasks([f"mine={root}"])) == ["mine"]

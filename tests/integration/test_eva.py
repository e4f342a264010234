"""Stock kaiko-eva on an exported teacher: what our command and script do, and real runs on made-up data.

The latter need kaiko-eva: in this Python, or in one that PATHFM_EVA_PYTHON names.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from skimage.data import immunohistochemistry
from torchvision.transforms.v2 import functional

from dinov2.eval import eva_cli
from dinov2.export import save_teacher
from dinov2.hub import load_teacher
from dinov2.models.vision_transformer import vit_demo

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/run_eva.sh"
BACH = str(ROOT / "eval_configs/bach.yaml")
OPTIONS = {
    "patch_size": 14, "img_size": 56, "num_register_tokens": 4, "init_values": 1.0,
    "interpolate_antialias": True, "interpolate_offset": 0.0,
}  # fmt: skip
MEAN, STD = (0.5, 0.6, 0.7), (0.2, 0.25, 0.3)
EVA = os.environ.get("PATHFM_EVA_PYTHON") or (sys.executable if importlib.util.find_spec("eva") else None)
with_eva = pytest.mark.skipif(
    not EVA, reason="kaiko-eva is not installed and PATHFM_EVA_PYTHON names no Python with it"
)
# In place of Python: does as the tasks' names in FAIL and eva's results.json say.
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$2 $3" in
    "dinov2.eval.eva_cli check") exit 0 ;;
    dinov2.eval.eva_summary*) exec {sys.executable} "$@" ;;
esac
task=$(basename "$5" .yaml)
echo "$3 $task $DATA_ROOT $EMBEDDINGS_ROOT" >>"$CALLS"
touch "$EMBEDDINGS_ROOT/manifest.csv"
if [[ " $FAIL " == *" $task "* ]]; then
    echo "ValueError: made to fail"
    exit 1
fi
mkdir -p "$OUTPUT_ROOT/20260101_a"
figures='{{"mean": 0.5, "stdev": 0.1, "values": [0.4, 0.6]}}'
echo "{{\\"metrics\\": {{\\"test\\": [], \\"val\\": [{{\\"val/MulticlassAccuracy\\": $figures}}]}}}}" \\
    >"$OUTPUT_ROOT/20260101_a/results.json"
"""


@pytest.fixture
def teacher(tmp_path):
    """A demo teacher as training exports it."""
    torch.manual_seed(0)
    metadata = {
        "architecture": {"arch": "vit_demo", **OPTIONS},
        "config": {"augmentation": {"normalize_mean": MEAN, "normalize_std": STD}},
    }
    save_teacher(tmp_path / "teacher.pth", {"backbone": vit_demo(**OPTIONS).state_dict()}, metadata)
    return tmp_path / "teacher.pth"


@pytest.fixture
def errors(monkeypatch, capsys, tmp_path):
    """What the command says, given variables, that the user can mend."""

    def run(*arguments, **variables):
        for name in (
            "CHECKPOINT_PATH",
            "DATA_ROOT",
            "ACCELERATOR",
            "EMBEDDING",
            "POOLING",
            "MODEL_NAME",
            "DOWNLOAD_DATA",
        ):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        assert eva_cli.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize("name", ["POOLING", "EMBEDDING"])
@pytest.mark.parametrize(("pooling", "width"), [("cls", 128), ("cls_mean", 256)])
def test_what_follows_from_the_checkpoint(teacher, name, pooling, width):
    environment = {"CHECKPOINT_PATH": str(teacher), name: pooling}
    eva_cli.fill_in(environment)
    assert environment["MODEL_NAME"] == "pathfm/teacher"
    assert (environment["IN_FEATURES"], environment["MAP_FEATURES"]) == (str(width), "128")
    assert json.loads(environment["NORMALIZE_MEAN"]) == list(MEAN)
    assert json.loads(environment["NORMALIZE_STD"]) == list(STD)
    model = eva_cli.teacher(**json.loads(environment["MODEL_EXTRA_KWARGS"]))
    assert model(torch.zeros(2, 3, 56, 56)).shape == (2, width)
    (features,) = eva_cli.teacher(**json.loads(environment["MODEL_EXTRA_KWARGS"]), out_indices="1")(
        torch.zeros(2, 3, 56, 70)
    )
    assert features.shape == (2, 128, 4, 5)


def test_what_the_user_says_stays(teacher):
    own = {"CHECKPOINT_PATH": str(teacher), "IN_FEATURES": "7", "NORMALIZE_MEAN": "[0, 0, 0]"}
    environment = dict(own)
    eva_cli.fill_in(environment)
    assert {name: environment[name] for name in own} == own
    for other in (
        {"MODEL_NAME": "timm/resnet18"},
        {"MODEL_NAME": "pathfm/teacher", "MODEL_EXTRA_KWARGS": "{}"},
    ):
        environment = dict(other)
        eva_cli.fill_in(environment)
        assert environment == other
    teacher.with_suffix(".json").unlink()
    environment = {"CHECKPOINT_PATH": str(teacher)}
    eva_cli.fill_in(environment)
    assert "NORMALIZE_MEAN" not in environment


def test_what_the_user_can_mend(teacher, errors, monkeypatch, tmp_path):
    fit = ("predict_fit", "--config", BACH)
    good = {"CHECKPOINT_PATH": teacher, "DATA_ROOT": tmp_path}
    assert "DATA_ROOT is not set" in errors(*fit, CHECKPOINT_PATH=teacher)
    assert "DATA_ROOT=nix is not a folder" in errors(*fit, CHECKPOINT_PATH=teacher, DATA_ROOT="nix")
    assert "CHECKPOINT_PATH is not set" in errors(*fit, DATA_ROOT="nix", DOWNLOAD_DATA="true")
    assert "'nix' does not exist" in errors(*fit, DATA_ROOT=tmp_path, CHECKPOINT_PATH="nix")
    assert "EMBEDDING=mean is not cls or cls_mean" in errors(*fit, **good, EMBEDDING="mean")
    assert "EMBEDDING=cls is" in errors(*fit, **good, POOLING="cls_mean", EMBEDDING="cls")
    assert "bach, bracs, breakhis, cam16_small" in errors("fit", "--config=eval_configs/nix.yaml", **good)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "ACCELERATOR=gpu asks for a GPU" in errors("check", **good, ACCELERATOR="gpu")
    monkeypatch.setitem(sys.modules, "eva", None)
    assert "PATHFM_EXTRAS=dev,slides,eval ./install.sh" in errors("check", CHECKPOINT_PATH=teacher)
    with pytest.raises(ValueError, match="OUT_INDICES is 4"):
        eva_cli.teacher(str(teacher), out_indices=4)


def run_script(folder, *arguments, python=None, **variables):
    if python is None:
        python = folder / "python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = {
        **kept,
        "PATHFM_EVA_PYTHON": str(python),
        "CALLS": str(folder / "calls"),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"DATA_ROOT": str(folder / "data"), **variables}
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.parametrize("place", ["run", "run/eval", "run/eval/training_20"])
def test_script_takes_the_newest_teacher_of_a_run(tmp_path, place):
    for step in (3, 20):
        (tmp_path / f"run/eval/training_{step}").mkdir(parents=True)
        (tmp_path / f"run/eval/training_{step}/teacher_checkpoint.pth").write_text("weights")
    (tmp_path / "data/bach").mkdir(parents=True)
    assert run_script(tmp_path, place, "out", "bach").returncode == 0
    assert "/training_20/teacher_checkpoint.pth," in (tmp_path / "out/settings.txt").read_text()
    assert run_script(tmp_path, "data", "elsewhere", "bach").returncode == 2


def test_script_goes_on_after_a_failure_and_from_where_it_was(tmp_path):
    (tmp_path / "teacher.pth").write_text("weights")
    for name in ("bach", "crc", "patch_camelyon", "consep"):
        (tmp_path / "data" / name).mkdir(parents=True)
    start = ("teacher.pth", "out", "crc", "bach", "pcam", "consep")
    result = run_script(tmp_path, *start, FAIL="crc", N_RUNS="2")
    assert result.returncode == 1 and "crc: failed: ValueError: made to fail" in result.stderr
    calls = [line.split(" ") for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[:2] for call in calls] == [
        ["predict_fit", "crc"], ["predict_fit", "bach"], ["predict_fit", "pcam"], ["fit", "consep"]
    ]  # fmt: skip
    data, embeddings = ([call[i] for call in calls] for i in (2, 3))
    assert data == [str(tmp_path / "data" / name) for name in ("crc", "bach", "patch_camelyon", "consep")]
    assert len(set(embeddings)) == 4
    assert [Path(folder).exists() for folder in embeddings] == [True, False, False, False]
    assert (
        "| crc | failed |" in result.stdout and "| bach | balanced accuracy, val | 0.500 | 0.100 | 2 |" in result.stdout
    )
    assert (tmp_path / "out/summary.md").read_text() == result.stdout

    result = run_script(tmp_path, *start, N_RUNS="2")
    assert result.returncode == 0 and "bach: done before, kept." in result.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 5
    assert not list((tmp_path / "out").glob("*/embeddings.*"))
    result = run_script(tmp_path, *start, N_RUNS="3")
    assert result.returncode == 2 and "has results of other settings" in result.stderr


def test_script_without_data(tmp_path):
    (tmp_path / "teacher.pth").write_text("weights")
    (tmp_path / "data/mhist").mkdir(parents=True)
    result = run_script(tmp_path, "teacher.pth", "out", KEEP_EMBEDDINGS="1")
    assert result.returncode == 0
    assert f"bach: no data, {tmp_path}/data/bach is not a folder." in result.stderr.splitlines()
    assert result.stderr.count("no data") == 11 and result.stdout.count("no data") == 11
    assert len(list((tmp_path / "out/mhist").glob("embeddings.*/manifest.csv"))) == 1
    assert run_script(tmp_path, "teacher.pth", "named", "mhist", "bach").returncode == 1
    assert run_script(tmp_path, "teacher.pth", "fetched", "mhist", "bach", DOWNLOAD_DATA="true").returncode == 0
    (tmp_path / "data/mhist").rmdir()
    assert run_script(tmp_path, "teacher.pth", "none").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        ((), {}, "CHECKPOINT and OUTPUT are expected"),
        (("nix.pth", "out"), {}, "CHECKPOINT=nix.pth is not there"),
        (("teacher.pth", "out", "bach", "cam17"), {}, "There is no task cam17: name some of bach bracs"),
        (("teacher.pth", "out"), {"DATA_ROOT": ""}, "DATA_ROOT is not set"),
        (("teacher.pth", "out"), {"DATA_ROOT": "nix"}, "DATA_ROOT=nix is not a folder"),
        (("teacher.pth", "data"), {}, "is neither empty nor of an earlier run_eva.sh"),
        (("teacher.pth", "teacher.pth"), {}, "is a file: name a folder"),
        (("teacher.pth", "out"), {"PATHFM_EVA_PYTHON": "/nix"}, "/nix is not a Python"),
    ],
)  # fmt: skip
def test_script_refuses(tmp_path, arguments, variables, reason):
    (tmp_path / "teacher.pth").write_text("weights")
    (tmp_path / "data/bach").mkdir(parents=True)
    result = run_script(tmp_path, *arguments, **variables)
    assert result.returncode == 2 and reason in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


PARSE = """
import contextlib, io, json, sys
from dinov2.eval import eva_cli
found = {}
for config in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            eva_cli.main(["predict_fit", "--config", config, "--print_config"])
        except SystemExit as end:
            found[config] = [end.code, text.getvalue()[-4000:], errors.getvalue()[-2000:]]
print(json.dumps(found))
"""


@pytest.mark.slow
@with_eva
def test_every_configuration_is_one_of_stock_eva(teacher):
    configs = sorted(map(str, (ROOT / "eval_configs").glob("*.yaml")))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "CHECKPOINT_PATH": str(teacher), "DATA_ROOT": str(teacher.parent),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    result = subprocess.run([EVA, "-c", PARSE, *configs], env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert {config: code for config, (code, *_) in found.items() if code} == {}, found
    assert len(found) == 12 and all("dataloaders" in text for _, text, _ in found.values())


def write_bach(folder):
    """400 crops of tissue in BACH's layout."""
    tissue, rng = immunohistochemistry(), np.random.default_rng(0)
    for name in ("Benign", "InSitu", "Invasive", "Normal"):
        (folder / "ICIAR2018_BACH_Challenge/Photos" / name).mkdir(parents=True)
        for i in range(100):
            y, x = rng.integers(0, tissue.shape[0] - 64, 2)
            crop = Image.fromarray(tissue[y : y + 64, x : x + 64])
            crop.save(folder / "ICIAR2018_BACH_Challenge/Photos" / name / f"{i:03d}.tif")


def write_consep(folder):
    """27 + 14 images of one tile each in CoNSeP's layout, their labels the colour of the stain."""
    tissue, rng = immunohistochemistry(), np.random.default_rng(0)
    for part, count in (("Train", 27), ("Test", 14)):
        (folder / part / "Images").mkdir(parents=True)
        (folder / part / "Labels").mkdir()
        for i in range(1, count + 1):
            y, x = rng.integers(0, tissue.shape[0] - 250, 2)
            crop = tissue[y : y + 250, x : x + 250]
            Image.fromarray(crop).save(folder / part / "Images" / f"{part.lower()}_{i}.png")
            savemat(
                folder / part / "Labels" / f"{part.lower()}_{i}.mat",
                {"type_map": (crop[..., 2] // 32).astype(float)},
            )


@pytest.mark.slow
@with_eva
def test_made_up_bach_and_consep_run_to_results(teacher):
    folder = teacher.parent
    write_bach(folder / "data/bach")
    write_consep(folder / "data/consep")
    # Few steps: start-ups and 400 embeddings take the time.
    options = {"N_RUNS": "2", "MAX_STEPS": "16", "N_DATA_WORKERS": "1", "BATCH_SIZE": "32", "KEEP_EMBEDDINGS": "1",
               "LR_VALUE": "0.05", "EMBEDDING": "cls_mean", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    result = run_script(folder, teacher, "out", "bach", "consep", "crc", python=EVA, **options)
    logs = {task: (folder / "out" / task / "log.txt").read_text()[-3000:] for task in ("bach", "consep")}
    assert result.returncode == 1 and "failed" not in result.stderr, (result.stderr, logs)  # there is no crc

    for task, metric in (("bach", "MulticlassAccuracy"), ("consep", "MonaiDiceScore")):
        (path,) = (folder / "out" / task / "results").glob("*/results.json")
        values = json.loads(path.read_text())["metrics"]["val"][0][f"val/{metric}"]["values"]
        assert len(values) == 2 and all(0 < value <= 1 for value in values)
        assert (
            f"| {task} | " in result.stdout
            and f"{np.mean(values):.3f} | {np.std(values, ddof=1):.3f} | 2 |" in result.stdout
        )
    assert "| crc | no data |" in result.stdout

    # The embeddings that eva wrote are the teacher's, of images at 224 px normalised as in training.
    (embeddings,) = (folder / "out/bach").glob("embeddings.*/bach")
    name = "Invasive/007"
    (found,) = torch.load(embeddings / f"{name}.pt")
    image = Image.open(folder / "data/bach/ICIAR2018_BACH_Challenge/Photos" / f"{name}.tif")
    image = functional.resize(functional.pil_to_tensor(image), [224], antialias=True) / 255
    with torch.inference_mode():
        tokens = load_teacher(teacher).forward_features(functional.normalize(image, MEAN, STD)[None])
    expected = torch.cat([tokens["x_norm_clstoken"][0], tokens["x_norm_patchtokens"][0].mean(0)])
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@with_eva
@pytest.mark.parametrize("task", ["mhist", "pcam_10", "cam16_small"])
def test_heads_with_one_output_learn_from_made_up_embeddings(task, teacher):
    folder, is_slides = teacher.parent, task == "cam16_small"
    for name in ("training/normal", "training/tumor", "testing/images"):
        (folder / "data" / name).mkdir(parents=True)
    (folder / "data/testing/reference.csv").touch()
    (folder / "embeddings" / task).mkdir(parents=True)
    lines = ["embeddings,target,split,wsi_id"]
    for split in ("train", "test") if task == "mhist" else ("train", "val", "test"):
        for i in range(40):
            features = torch.randn(7 if is_slides else 1, 128) + (i % 2) * 2 - 1
            torch.save(list(features), folder / "embeddings" / task / f"{split}_{i}.pt")
            lines.append(f"{split}_{i}.pt,{i % 2},{split},{split}_{i}")
    (folder / "embeddings" / task / "manifest.csv").write_text("\n".join(lines))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "CHECKPOINT_PATH": str(teacher), "DATA_ROOT": str(folder / "data"),
        "EMBEDDINGS_ROOT": str(folder / "embeddings"), "OUTPUT_ROOT": str(folder / "out"), "OMP_NUM_THREADS": "1",
        "N_RUNS": "1", "MAX_STEPS": "40", "MAX_EPOCHS": "10", "LR_VALUE": "0.05", "N_DATA_WORKERS": "1",
        "ACCELERATOR": "cpu",
    }  # fmt: skip
    command = [EVA, "-m", "dinov2.eval.eva_cli", "fit", "--config", str(ROOT / f"eval_configs/{task}.yaml")]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = (folder / "out").glob("*/results.json")
    metrics = json.loads(path.read_text())["metrics"]
    split = "val" if task == "mhist" else "test"
    assert metrics[split][0][f"{split}/BinaryBalancedAccuracy"]["mean"] > 0.9

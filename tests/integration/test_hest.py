"""HEST_evaluation.py against a stand-in with the signature of HEST's `benchmark` (mahmoodlab/HEST, commit afd42c3).

The stand-in copies what the driver relies on: keyword arguments of which None is ignored, two downloads, a registry of
weights that only an editable installation has, the encoder called on transformed 224-px images, files of results.
"""

import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import HEST_evaluation
from dinov2.export import save_teacher
from dinov2.hub import load_teacher
from dinov2.models.vision_transformer import vit_demo

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "patch_size": 14, "img_size": 56, "num_register_tokens": 4, "init_values": 1.0,
    "interpolate_antialias": True, "interpolate_offset": 0.0,
}  # fmt: skip
STAND_IN = """
import json, os, pathlib, time
import numpy as np, torch
from PIL import Image

def snapshot_download(repo_id, repo_type, local_dir, allow_patterns=None, ignore_patterns=None):
    assert repo_id == "MahmoodLab/hest-bench" and repo_type == "dataset"
    if os.environ.get("HF_HUB_OFFLINE") == "1" and not os.listdir(local_dir):
        raise RuntimeError(f"LocalEntryNotFoundError: {local_dir}")
    with open(os.environ["DOWNLOADS"], "a") as log:
        log.write(json.dumps([local_dir, allow_patterns, ignore_patterns]) + "\\n")

def get_bench_weights(weights_root, name):
    raise FileNotFoundError("local_ckpts.json")

def benchmark(encoder, enc_transf, precision, cli_args=None, **kwargs):
    args = {"encoders": ["resnet50"], "datasets": ["IDC"], "dimreduce": "PCA", "latent_dim": 256, "batch_size": 128}
    args |= {key: value for key, value in kwargs.items() if value is not None}
    assert args["encoders"] == [] and precision == torch.float32
    assert all(os.path.isabs(args[f"{name}_root"]) for name in ("bench_data", "weights"))
    assert all(os.path.isabs(args[name]) for name in ("embed_dataroot", "results_dir"))
    snapshot_download("MahmoodLab/hest-bench", "dataset", args["weights_root"], allow_patterns=["fm_v1/*"])
    snapshot_download("MahmoodLab/hest-bench", "dataset", args["bench_data_root"], ignore_patterns=["fm_v1/*"])
    get_bench_weights(args["weights_root"], "custom_encoder")
    image = Image.fromarray(np.load(os.environ["IMAGE"]))
    with torch.inference_mode():
        features = encoder.eval()(enc_transf(image)[None])
    where = pathlib.Path(args["results_dir"], f"{args['exp_code']}::{time.time()}")
    where.mkdir(parents=True)
    np.save(where / "features.npy", features.numpy())
    (where / "arguments.json").write_text(json.dumps(args))
    results = []
    for i, name in enumerate(args["datasets"], 1):
        own = {"encoder_name": "custom_encoder", "pearson_mean": 0.1 * i, "pearson_std": 0.02}
        results.append({"dataset_name": name, "results": [own]})
    (where / "dataset_results.json").write_text(json.dumps({"results": results, "average": {"custom_encoder": 0.5}}))
"""


@pytest.fixture
def place(tmp_path):
    """A teacher, one image, data of a made-up task, and the stand-in as the package `hest`."""
    torch.manual_seed(0)
    metadata = {
        "architecture": {"arch": "vit_demo", **OPTIONS},
        "config": {"augmentation": {"normalize_mean": [0.5, 0.6, 0.7], "normalize_std": [0.1, 0.2, 0.3]}},
    }
    save_teacher(tmp_path / "teacher.pth", {"backbone": vit_demo(**OPTIONS).state_dict()}, metadata)
    np.save(tmp_path / "image.npy", np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    bench = tmp_path / "site/hest/bench"
    bench.mkdir(parents=True)
    (bench.parent / "__init__.py").touch()
    (bench / "__init__.py").write_text("from .benchmark import benchmark\n")
    (bench / "benchmark.py").write_text(STAND_IN)
    (tmp_path / "data/FAKE/splits").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def evaluate(place, monkeypatch, capsys):
    """The command in this process: status, standard output, standard error."""
    for name, value in environment(place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the command may set it
    monkeypatch.chdir(place)

    def run(*arguments, site="site"):
        for name in [name for name in sys.modules if name.split(".")[0] == "hest"]:
            monkeypatch.delitem(sys.modules, name)
        with monkeypatch.context() as context:
            context.syspath_prepend(str(place / site))
            status = HEST_evaluation.main(["--checkpoint", "teacher.pth", *arguments])
        return status, *capsys.readouterr()

    return run


def environment(place):
    return {"DOWNLOADS": str(place / "downloads"), "IMAGE": str(place / "image.npy"), "OMP_NUM_THREADS": "1"}


def recorded(place):
    (folder,) = (place / "out/results").iterdir()
    return json.loads((folder / "arguments.json").read_text()), np.load(folder / "features.npy")


def one_sentence(result):
    status, _, errors = result
    assert status == 2 and "Traceback" not in errors, errors
    (line,) = [line for line in errors.splitlines() if line.strip()]
    return line


def test_made_up_task_offline(place):
    command = [sys.executable, str(ROOT / "HEST_evaluation.py"), "--checkpoint", "teacher.pth", "--datasets", "FAKE",
               "--bench-data", "data", "--output", "out", "--offline", "--latent-dim", "32", "--batch-size", "16",
               "--embedding", "cls_mean"]  # fmt: skip
    variables = {**os.environ, **environment(place), "PYTHONPATH": str(place / "site")}
    result = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "| FAKE | 0.1000 | 0.0200 |" in result.stdout and "Midnight" not in result.stdout
    assert (place / "out/hest.md").read_text() == result.stdout
    rows = list(csv.DictReader((place / "out/hest.csv").open()))
    assert [(row["dataset"], float(row["mean"]), float(row["sd"])) for row in rows] == [("FAKE", 0.1, 0.02)]

    arguments, features = recorded(place)
    assert arguments["dimreduce"] == "PCA" and arguments["latent_dim"] == 32 and arguments["batch_size"] == 16
    assert arguments["datasets"] == ["FAKE"]
    image = np.load(place / "image.npy").transpose(2, 0, 1) / 255.0
    image = (image - np.reshape([0.5, 0.6, 0.7], (3, 1, 1))) / np.reshape([0.1, 0.2, 0.3], (3, 1, 1))
    tokens = load_teacher(place / "teacher.pth").forward_features(torch.tensor(image[None], dtype=torch.float32))
    expected = torch.cat([tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(1)], 1)
    np.testing.assert_allclose(features, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_all_tasks_are_fetched_without_the_weights_of_other_encoders(place, evaluate):
    status, table, errors = evaluate("--output", "out", "--latent-dim", "0")
    assert status == 0, errors
    fetched = [json.loads(line) for line in (place / "downloads").read_text().splitlines()]
    assert fetched == [[str(place / "data/hest_bench"), None, ["fm_v1/*"]]]
    arguments, _ = recorded(place)
    assert len(arguments["datasets"]) == 9 and "HCC" not in arguments["datasets"]
    assert arguments["dimreduce"] == "none"
    assert "| average | 0.5000 | |" in table  # (0.1 + ... + 0.9) / 9
    assert "| average, Midnight-92k, cls+mean | 0.425 | |" in table


def test_what_the_user_can_mend(place, evaluate):
    assert "--latent-dim 256 exceeds the 128 features of cls" in one_sentence(evaluate("--output", "out"))
    assert "has no IDC" in one_sentence(evaluate("--datasets", "IDC", "--offline"))
    assert "what can be fetched is IDC, PRAD" in one_sentence(evaluate("--datasets", "idc"))
    assert "name a new one" in one_sentence(evaluate("--output", "data"))
    assert "'nix' does not exist" in one_sentence(evaluate("--checkpoint", "nix"))
    assert not (place / "output_hest").exists() and not (place / "downloads").exists()


def test_the_other_package_of_that_name_is_recognised(place, evaluate):
    about = place / "other/HeST-0.1.3.dist-info"
    (place / "other/HeST").mkdir(parents=True)
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: HeST\nVersion: 0.1.3\n")
    line = one_sentence(evaluate("--latent-dim", "32", site="other"))
    assert "hest 0.1.3 is PyPI's HeST" in line and "scripts/install_hest.sh" in line
    assert "HEST is not installed; scripts/install_hest.sh" in one_sentence(evaluate("--latent-dim", "32", site="none"))


def install(place, *arguments, **variables):
    command = [str(ROOT / "scripts/install_hest.sh"), *map(str, arguments)]
    environment = {**os.environ, "HEST_VENV": str(place / "venv"), "PYTHON": sys.executable, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("kind", ["checkout", "archive"])
def test_installing_a_local_source(place, kind):
    source = place / "HEST"
    (source / "src").mkdir(parents=True)
    (source / "src/hest").symlink_to(place / "site/hest")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "hest"\nversion = "1.1.1"\n[tool.setuptools.packages.find]\nwhere = ["src"]\n'
    )
    (place / "site/hest/bench/benchmark.py").write_text("def benchmark(): ...\n")
    if kind == "archive":
        with zipfile.ZipFile(place / "HEST.zip", "w") as archive:
            for path in source.rglob("*"):
                archive.write(path, Path("HEST-afd42c3") / path.relative_to(source))
            for path in (place / "site/hest").rglob("*.py"):
                archive.write(path, Path("HEST-afd42c3/src") / path.relative_to(place / "site"))
        source = place / "HEST.zip"
    for _ in range(2):
        result = install(place, source)
        assert result.returncode == 0, result.stderr
    imported = subprocess.run(
        [place / "venv/bin/python", "-c", "import hest.bench, openslide_bin"], capture_output=True
    )
    assert imported.returncode == 0, imported.stderr


def test_installation_refuses_what_is_no_source(tmp_path):
    for source, reason in (("nix", "does not exist"), (tmp_path, "has no pyproject.toml")):
        result = install(tmp_path, source)
        assert result.returncode == 1 and reason in result.stderr and len(result.stderr.splitlines()) == 1
    (tmp_path / "venv").mkdir()
    (tmp_path / "pyproject.toml").touch()
    result = install(tmp_path, tmp_path)
    assert result.returncode == 1 and "is no virtual environment" in result.stderr

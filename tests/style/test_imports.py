"""Imports go downwards, and heavy packages are loaded only where they are used."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"datasets", "huggingface_hub", "matplotlib", "openslide", "skimage", "sklearn", "tifffile", "timm"}
HEAVY |= {"transformers", "wandb", "xformers"}
NOT_FOR_THE_STEP = HEAVY | {"cv2", "imagecodecs", "pandas", "PIL", "pyarrow", "torchvision"}
BEFORE_TORCH = NOT_FOR_THE_STEP | {"sympy", "torch"}  # what answers at once does without
CONFIGURATION = ROOT / "pyproject.toml"


def test_import_contracts():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    result = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_package_stands_on_a_layer():
    contracts = tomllib.loads(CONFIGURATION.read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    listed = {name for layer in layers for name in layer.replace("|", " ").replace(":", " ").split()}
    parts = [
        *(ROOT / "dinov2").glob("*.py"),
        *(path.parent for path in (ROOT / "dinov2").glob("*/__init__.py")),
    ]
    names = {f"dinov2.{path.stem}" for path in parts if path.name != "__init__.py"}
    assert names == listed


def test_layers_import_torch_only():
    unwanted = set()
    for path in (ROOT / "dinov2/layers").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                chosen_only = name.startswith("xformers") and node not in tree.body
                known = name.startswith("dinov2.layers") or name.split(".")[0] in {
                    "torch",
                    *sys.stdlib_module_names,
                }
                unwanted |= set() if chosen_only or known else {f"{path.name}: {name}"}
    assert unwanted == set()


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("dinov2.models, dinov2.layers, dinov2.loss, dinov2.train.ssl_meta_arch", NOT_FOR_THE_STEP),
        ("dinov2.train.start", HEAVY),
        ("dinov2.train.train", BEFORE_TORCH),
        ("dinov2.command", BEFORE_TORCH | {"numpy", "omegaconf"}),
        ("dinov2.data", HEAVY),
    ],
)
def test_importing_loads_nothing_heavy(modules, unwanted):
    program = f"import sys, {modules}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) & unwanted == set()

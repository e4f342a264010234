"""README, tutorial and notebook as their readers type them, with a network and budgets that a test can afford."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from skimage.data import immunohistochemistry

from dinov2.command import main as pathfm
from tests.helpers.commands import ROOT, run
from tests.helpers.pages import command_of, parser_of, python_blocks, shell_lines, words_of
from tests.helpers.runs import TINY

NARROW = (
    *TINY, "student.patch_size=14", "optim.early_stop=1", "train.use_pretrained=false",
    "train.checkpoint_period_iterations=100",
)  # fmt: skip
ELSEWHERE = ("./install.sh", "source", "./run_tests.sh", "./run_demo.sh")  # in tests/unit/setup, or what these are


def type_line(line: str) -> int:
    """Run a line in this process; its exit status."""
    words = words_of(line)
    if words[0] == "pathfm":
        words += NARROW if words[1] == "train" else ()
        return pathfm(["--no-pictures" if word == "--watch" else word for word in words[1:]])
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
        return 0
    if words[0] == "python":
        return run(words[1], shlex.join(words[2:]))
    if words[0] == "echo":
        Path(words[-1]).write_text(" ".join(words[1:-2]) + "\n")
        return 0
    raise AssertionError(f"nobody here types {line}")


def assert_typed(lines: list[str]) -> None:
    for line in lines:
        if not line.startswith(ELSEWHERE):
            assert type_line(line) == 0, line


def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every line, from a slide to embeddings."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/tutorial.md"
    assert_typed(shell_lines(page))
    assert "demo_train" in (tmp_path / "previews/index.html").read_text()
    config = yaml.safe_load((tmp_path / "output/config.yaml").read_text())
    assert config["data"]["exclusion_file"] == "held_out.txt"
    assert {path.stem for path in (tmp_path / "embeddings").glob("*.parquet")} == {"demo_train", "demo_holdout"}
    (block,) = python_blocks(page)
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["model"], timm.models.VisionTransformer)
    with torch.no_grad():
        assert names["model"](torch.zeros(1, 3, 56, 56)).shape == (1, 128)


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a folder of tiles to a backbone in timm, and what follows: the page, the Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiles").mkdir()
    for number, (y, x) in enumerate(np.random.default_rng(0).integers(0, 448, (400, 2))):
        Image.fromarray(immunohistochemistry()[y : y + 64, x : x + 64]).save(f"tiles/{number}.jpg")
    lines = shell_lines(ROOT / "README.md")
    first = lines.index("pathfm inspect tiles")
    assert_typed(lines[first : first + 4])
    assert lines[first - 1] == "./run_1node.sh data.path=tiles"
    assert_typed([lines[first - 2]])
    (block,) = python_blocks(ROOT / "README.md")
    shutil.copytree(tmp_path / "output", tmp_path / "output_demo/run")
    (teacher,) = (tmp_path / "output_demo/run/eval").iterdir()
    teacher.rename(teacher.with_name("training_200"))
    (tmp_path / "output_demo/parquet/holdout").mkdir(parents=True)
    assert pathfm(["pack", "tiles", "output_demo/parquet/holdout"]) == 0
    names: dict[str, object] = {}
    exec(block, names)
    assert np.shape(names["embeddings"])[1] == 128


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every cell is Python, and every command in them is one that there is, with options that it has."""
    notebook = nbformat.read(ROOT / "docs/demo.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    lines: list[str] = []
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        code = compile(cell.source, f"cell {number}", "exec")
        if number == 0 or "pathfm(" in cell.source or "python(" in cell.source:
            exec(code, names)
            names |= {"python": lambda line: lines.append(f"python {line}")}
            names |= {"pathfm": lambda line: lines.append(f"pathfm {line}")}
    assert len(lines) == 9
    for line in lines:
        words = words_of(line)
        module, arguments = command_of(words) or (words[1].removesuffix(".py").replace("/", "."), words[2:])
        _, unknown = parser_of(module).parse_known_args(arguments)
        assert not [word for word in unknown if word.startswith("-")], line

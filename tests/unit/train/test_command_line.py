"""The command line of train.py: what it accepts, and what it answers before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dinov2.configs import load_config, recipes
from dinov2.train.train import parse_args

RECIPE = ("--config-file", "vits14_reg4")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.seed", "=", "1", "data.path=a"], ["train.seed=1", "data.path=a"]),
        (["train.seed", "=1", "data.path=", "a"], ["train.seed=1", "data.path=a"]),
        (["losses.bare=", "train.seed=1"], ["losses.bare=", "train.seed=1"]),
        (["data.path=a", "b"], ["data.path=a", "b"]),
        (["optim.base_lr", "=", "-1"], ["optim.base_lr=-1"]),
    ],
)
def test_blanks_around_the_equals_sign(words: list[str], expected: list[str]):
    assert parse_args(words).overrides == expected


def test_blanks_within_an_override():
    assert load_config(None, ["train.seed = 3"]).train.seed == 3


@pytest.mark.parametrize("words", [["--pictures", "{}"], ["--nosuch={}"], ["--memory", "{}", "--dry-run"]])
def test_usage_errors_show_no_secret(words: list[str], capsys: pytest.CaptureFixture[str]):
    url = "s3://KEY:PASSWORD@host/x?token=TOKENTOKEN"
    with pytest.raises(SystemExit, match="2"):
        parse_args([word.format(url) for word in words])
    said = capsys.readouterr().err
    assert "host" in said and "PASSWORD" not in said and "TOKEN" not in said


@pytest.mark.parametrize(
    "line",
    [
        [*RECIPE, "data.pth=a"],
        [*RECIPE, "data.path=a", "crops.local_crops_size=97"],
        ["--config-file", "no_such_recipe"],
        ["--output-dir", "out", "data.path=a"],
        [*RECIPE, "data.path=a", "--dry-run", "--gpu", "H300"],
        [*RECIPE, "data.path=a", "--dry-run", "--gpu", "L4", "--memory", "139"],
    ],
)
def test_mistakes_are_answered_before_torch_is_imported(line: list[str]):
    program = f"import sys; from dinov2.train.train import main; print(main({line}), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == ["2", "False"], result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_recipes_open_by_name(tmp_path, monkeypatch: pytest.MonkeyPatch):
    assert {"demo", "vits14_reg4", "vitg14_reg4"} <= set(recipes())
    assert load_config("vits14_reg4").student.arch == load_config("vits14_reg4.yaml").student.arch == "vit_small"
    with pytest.raises(FileNotFoundError, match="vitg14_reg4_short1"):
        load_config("vits14_reg5")
    with pytest.raises(FileNotFoundError):
        load_config("elsewhere/vits14_reg4.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vits14_reg4").write_text("student: {arch: vit_large}")
    assert load_config("vits14_reg4").student.arch == "vit_large"  # a file goes before a recipe


@pytest.mark.parametrize("option", [("--gpu", "H200"), ("--memory", "24"), ("--price", "2"), ("--pictures", "plan")])
def test_options_of_the_plan_belong_to_a_dry_run(option: tuple[str, str]):
    assert parse_args([*RECIPE, "--dry-run", *option])
    with pytest.raises(SystemExit) as ended:
        parse_args([*RECIPE, *option])
    assert ended.value.code == 2


@pytest.mark.parametrize("option", [("--memory", "0"), ("--memory", "nan"), ("--price", "-1"), ("--price", "much")])
def test_figures_of_the_plan_that_are_none(option: tuple[str, str]):
    with pytest.raises(SystemExit) as ended:
        parse_args([*RECIPE, "--dry-run", *option])
    assert ended.value.code == 2
